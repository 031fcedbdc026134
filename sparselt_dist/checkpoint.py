"""Checkpoints: `checkpoints/step_00000100/`, whole tensors by name, complete only if `COMPLETE` is there.

A checkpoint is written into a temporary folder, every file flushed to disk, its sizes and SHA-256 sums noted in
`meta.json`, `COMPLETE` written last, and the folder renamed into place; then `latest` is replaced and old ones
rotate. A kill at any moment leaves the earlier checkpoints as they were. Only complete checkpoints load or rotate;
what cannot be read is never deleted.

Layout: `config.json` (the Hugging Face configuration of the backbone), `weights-00000.safetensors` and
`moments-00000.safetensors` (one of each a writing rank), `rank_00000.pt` (random state of a rank), `meta.json` (step, tokens,
cursor, clock, configuration, hashes).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselt_dist import distributed
from sparselt_dist.errors import CheckpointError

if TYPE_CHECKING:
    import torch

FORMAT = 1
PROBED_BYTES = 64 * 2**20
_NAME = re.compile(r"step_(\d{8,})$")


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
    _sync(path)


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folder = run_dir / "checkpoints"
    found = [path for path in folder.glob("step_*") if _NAME.search(path.name) and (path / "COMPLETE").is_file()]
    return sorted(found, key=lambda path: int(_NAME.search(path.name).group(1)))  # type: ignore[union-attr]


def find(path: Path) -> Path:
    """The checkpoint that a run folder or a checkpoint folder stands for: the newest complete one.

    Raises:
        CheckpointError: nothing complete is there.
    """
    if (path / "COMPLETE").is_file():
        return path
    if _NAME.search(path.name) and path.is_dir():
        raise CheckpointError(
            f"checkpoint {path}: not complete (no COMPLETE in it); choose an earlier one of {path.parent}"
        )
    found = complete_checkpoints(path)
    if not found:
        raise CheckpointError(
            f"{path}: found no complete checkpoint, expected a run folder or a folder checkpoints/step_*"
        )
    return found[-1]


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """`meta.json` of a checkpoint.

    Raises:
        CheckpointError: missing, torn or of another format.
    """
    try:
        meta: dict[str, Any] = json.loads((checkpoint / "meta.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint}: meta.json cannot be read ({error}); use an earlier checkpoint"
        ) from None
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {checkpoint}: format {meta.get('format')!r}, expected {FORMAT}; use a matching version"
        )
    return meta


def verify(checkpoint: Path) -> None:
    """Compare every file with the size and SHA-256 noted at saving.

    Raises:
        CheckpointError: a file is missing or differs; names it.
    """
    for name, noted in read_meta(checkpoint)["files"].items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint {checkpoint}: {name} is missing; use an earlier checkpoint")
        size = path.stat().st_size
        if size != noted["bytes"] or _sha256(path) != noted["sha256"]:
            raise CheckpointError(
                f"checkpoint {checkpoint}: {name} was changed after it was saved ({size} bytes, {noted['bytes']} saved, "
                "or other content); use an earlier checkpoint"
            )


def _is_intact(checkpoint: Path) -> bool:
    if not (checkpoint / "COMPLETE").is_file():
        return False
    try:
        verify(checkpoint)
    except CheckpointError:
        return False
    return True


def newest_intact(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint whose files are as saved; damaged ones are passed over with a warning, never deleted.

    Raises:
        CheckpointError: there are complete checkpoints and all are damaged.
    """
    candidates = complete_checkpoints(run_dir)
    for path in reversed(candidates):
        try:
            verify(path)
        except CheckpointError as error:
            warn(f"{error}; trying the previous one")
        else:
            return path
    if candidates:
        raise CheckpointError(
            f"{run_dir}: none of {len(candidates)} checkpoints is intact; start anew with --resume never"
        )
    return None


@dataclass(frozen=True)
class TensorFiles:
    """Tensors of one kind in a checkpoint, read by name from memory-mapped files."""

    checkpoint: Path
    owner: dict[str, str]  # tensor name -> file name

    @classmethod
    def open(cls, checkpoint: Path, kind: str) -> TensorFiles:
        from safetensors import safe_open

        owner: dict[str, str] = {}
        for path in sorted(checkpoint.glob(f"{kind}-*.safetensors")):
            with safe_open(path, framework="pt") as file:
                owner.update(dict.fromkeys(file.keys(), path.name))
        return cls(checkpoint, owner)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, whole, on the CPU.

        Raises:
            CheckpointError: the checkpoint holds no such tensor.
        """
        from safetensors import safe_open

        if name not in self.owner:
            raise CheckpointError(
                f"checkpoint {self.checkpoint}: holds no {name!r}; it belongs to another model, objective or optimizer"
            )
        with safe_open(self.checkpoint / self.owner[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    def read_all(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""
        from safetensors.torch import load_file

        merged: dict[str, torch.Tensor] = {}
        for file_name in sorted(set(self.owner.values())):
            merged.update(load_file(self.checkpoint / file_name))
        return merged


def load_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Full fp32 weights and persistent buffers by name of the PretrainingModel; tied weights once."""
    return TensorFiles.open(checkpoint, "weights").read_all()


def load_into(model: torch.nn.Module, checkpoint: Path) -> None:
    """Load weights strictly.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape: the checkpoint of another model.
    """
    weights = load_weights(checkpoint)
    own: dict[str, torch.Tensor] = dict(model.named_parameters())
    own.update({name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()})
    missing = sorted(own.keys() - weights.keys())
    unexpected = sorted(weights.keys() - own.keys())
    shapes = [
        f"{name} {tuple(weights[name].shape)} (expected {tuple(own[name].shape)})"
        for name in sorted(own.keys() & weights.keys())
        if weights[name].shape != own[name].shape
    ]
    faults = [
        f"{label}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''} ({len(names)})"
        for label, names in (("missing", missing), ("not in this model", unexpected), ("other shape", shapes))
        if names
    ]
    if faults:
        raise CheckpointError(
            f"checkpoint {checkpoint}: it belongs to another model; {'; '.join(faults)}. "
            "Use the run's own configuration, another run.output_dir, or --resume never"
        )
    model.load_state_dict(weights, strict=False)


def save(
    run_dir: Path,
    step: int,
    *,
    ranks: distributed.Ranks,
    weights: Iterator[tuple[str, torch.Tensor]],
    moments: Iterator[tuple[str, torch.Tensor]],
    rank_state: dict[str, Any],
    architecture: dict[str, Any],
    meta: dict[str, Any],
    keep: int,
) -> Path:
    """Write and commit a checkpoint; all ranks call it together. A step that is saved already is left as it is.

    Raises:
        CheckpointError: the run folder cannot be written; earlier checkpoints are untouched.
    """
    final = run_dir / "checkpoints" / folder_name(step)
    if distributed.on_main(ranks, lambda: _is_intact(final)):
        return final
    staging = final.with_name(final.name + ".partial")
    distributed.on_main(ranks, lambda: _start_staging(staging, final))
    # Gathering is collective, so a rank that cannot write still takes part; its error is raised on all ranks below.
    own_weights, own_moments = _owned(weights, ranks), _owned(moments, ranks)
    parts = {"weights": own_weights, "moments": own_moments}
    noted = distributed.gather_objects(_write_rank_files(staging, parts, rank_state, ranks), ranks)
    failures = [text for text in noted if isinstance(text, str)]
    if failures:
        raise CheckpointError(f"checkpoint {final}: cannot be written ({failures[0]}); free space or mend permissions")
    meta = {"format": FORMAT, "step": step, "world_size": ranks.world_size, **meta}
    meta["files"] = {name: entry for part in noted for name, entry in part.items()}  # type: ignore[union-attr]
    distributed.on_main(ranks, lambda: _commit(staging, final, architecture, meta, keep))
    return final


def _owned(tensors: Iterator[tuple[str, torch.Tensor]], ranks: distributed.Ranks) -> dict[str, torch.Tensor]:
    """The tensors that fall to this rank to write: every world_size-th."""
    return {name: tensor.contiguous() for i, (name, tensor) in enumerate(tensors) if i % ranks.world_size == ranks.rank}


def _write_rank_files(
    staging: Path, parts: dict[str, dict[str, torch.Tensor]], rank_state: dict[str, Any], ranks: distributed.Ranks
) -> dict[str, dict[str, Any]] | str:
    """Write this rank's files; their sizes and sums, or the text of the error."""
    import torch
    from safetensors.torch import save_file

    files: dict[str, dict[str, Any]] = {}
    try:
        names = [f"{kind}-{ranks.rank:05d}.safetensors" for kind, tensors in parts.items() if tensors]
        for name in names:
            save_file(parts[name.partition("-")[0]], staging / name)
        names.append(f"rank_{ranks.rank:05d}.pt")
        torch.save(rank_state, staging / names[-1])
        for name in names:
            _sync(staging / name)
            files[name] = {"bytes": (staging / name).stat().st_size, "sha256": _sha256(staging / name)}
    except (OSError, RuntimeError, ValueError) as error:  # torch and safetensors wrap a full disk in their own types
        return f"rank {ranks.rank}: {error}"
    return files


def probe_seconds(run_dir: Path, num_bytes: int) -> float:
    """What writing so many bytes of a checkpoint takes, judged by writing, flushing and hashing some of them.

    Raises:
        CheckpointError: the run folder cannot be written.
    """
    probe, size = run_dir / f".probe-{os.getpid()}", min(num_bytes, PROBED_BYTES)
    started = time.perf_counter()
    try:
        probe.write_bytes(os.urandom(1 << 20) * (size >> 20) + bytes(size & 0xFFFFF))
        _sync(probe)
        _sha256(probe)
    except OSError as error:
        raise CheckpointError(f"{run_dir}: cannot be written ({error}); free space or mend permissions") from None
    finally:
        probe.unlink(missing_ok=True)
    return (time.perf_counter() - started) * num_bytes / max(size, 1)


def _move_aside(folder: Path) -> None:
    folder.rename(folder.with_name(f"{folder.name}.aside-{os.getpid()}"))


def set_aside_after(run_dir: Path, step: int) -> None:
    """Move checkpoints later than the step a start continues from out of the way, for they are no part of its run.

    They are of an abandoned branch or damaged; left in place they would be rotated as the newest, and resumed from.
    """
    for path in complete_checkpoints(run_dir):
        if int(_NAME.search(path.name).group(1)) > step:  # type: ignore[union-attr]
            _move_aside(path)


def _start_staging(staging: Path, final: Path) -> None:
    try:
        if staging.exists():
            shutil.rmtree(staging)  # our own unfinished attempt
        if final.exists():
            _move_aside(final)  # unfinished or damaged; never deleted
        staging.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {final}: cannot be written ({error}); free space or mend permissions"
        ) from None


def _commit(staging: Path, final: Path, architecture: dict[str, Any], meta: dict[str, Any], keep: int) -> None:
    try:
        _write_text(staging / "config.json", json.dumps(architecture, indent=1))
        _write_text(staging / "meta.json", json.dumps(meta, indent=1))
        _write_text(staging / "COMPLETE", f"{meta['step']}\n")
        _sync(staging)
        staging.rename(final)
        _sync(final.parent)
        pointer = final.parent / "latest.new"
        _write_text(pointer, final.name + "\n")
        pointer.replace(final.parent / "latest")
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {final}: cannot be written ({error}); free space or mend permissions"
        ) from None
    for old in complete_checkpoints(final.parent.parent)[:-keep]:
        (old / "COMPLETE").unlink()  # a half-deleted folder must not look whole
        shutil.rmtree(old, ignore_errors=True)

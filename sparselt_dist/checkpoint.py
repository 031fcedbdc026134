"""Checkpoints: `checkpoints/step_00000100/`, tensors by name, complete only if `COMPLETE` is there.

Here they are found, verified and read; `committing.py` makes them. Only complete checkpoints load.

Layout: `config.json` (the Hugging Face configuration of the backbone), `weights-00000.safetensors` and
`moments-00000.safetensors` (one of each a writing rank: `tensor_files.py`), `rank_00000.pt` (random state of a rank),
`meta.json` (step, tokens, cursor, clock, configuration; size and SHA-256 of all files before it), `COMPLETE` (the step, and
the SHA-256 of `meta.json`): a chain in which a flipped bit shows wherever it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselt_dist.errors import CheckpointError
from sparselt_dist.tensor_files import TensorFiles

if TYPE_CHECKING:
    import torch

FORMAT = 2
READABLE = (1, FORMAT)  # 1: each tensor whole in one file, which is read as any other
HASHED_AT_ONCE = 4  # files
_NAME = re.compile(r"step_(\d{8,})$")


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named after; -1 for a folder of another name."""
    match = _NAME.search(checkpoint.name)
    return int(match[1]) if match else -1


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first.

    Raises:
        CheckpointError: the disk or its permissions do not let us see them, which must not look as if there were none.
    """
    folder = run_dir / "checkpoints"
    try:
        found = [folder / name for name in os.listdir(folder) if _NAME.fullmatch(name)]
        return sorted((path for path in found if (path / "COMPLETE").is_file()), key=step_of)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error}); mend its permissions or the disk") from None


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


def find_intact(path: Path) -> Path:
    """What `find` finds, verified.

    Raises:
        CheckpointError: nothing complete is there, or it was changed after it was saved.
    """
    found = find(path)
    verify(found)
    return found


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
    if meta.get("format") not in READABLE:
        raise CheckpointError(
            f"checkpoint {checkpoint}: format {meta.get('format')!r}, expected one of {READABLE}; use a matching version"
        )
    return meta


def complete_mark(step: int | None, meta: Path) -> str:
    """What `COMPLETE` holds."""
    return f"{step}\n{sha256(meta)}\n"


def verify(checkpoint: Path) -> None:
    """Compare every file with the size and SHA-256 noted at saving.

    Raises:
        CheckpointError: a file is missing or differs; names it.
    """
    meta = read_meta(checkpoint)
    try:
        mark = (checkpoint / "COMPLETE").read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint {checkpoint}: COMPLETE cannot be read ({error})") from None
    noted = meta.get("files", {})
    if (outside := next((name for name in noted if Path(name).name != name), None)) is not None:
        raise CheckpointError(f"checkpoint {checkpoint}: meta.json names {outside!r}, expected files of its own folder")
    # Earlier versions noted no sum of config.json, nor one of meta.json.
    is_earlier = "config.json" not in noted and mark == f"{meta.get('step')}\n".encode()
    if not is_earlier and mark != complete_mark(meta.get("step"), checkpoint / "meta.json").encode():
        raise CheckpointError(
            f"checkpoint {checkpoint}: meta.json or COMPLETE was changed after it was saved; use an earlier checkpoint"
        )
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        for _ in pool.map(lambda name: _verify_file(checkpoint, name, noted[name]), noted):
            pass


def _verify_file(checkpoint: Path, name: str, noted: dict[str, Any]) -> None:
    path = checkpoint / name
    if not path.is_file():
        raise CheckpointError(f"checkpoint {checkpoint}: {name} is missing; use an earlier checkpoint")
    try:
        size = path.stat().st_size
        same = size == noted["bytes"] and sha256(path) == noted["sha256"]
    except OSError as error:
        raise CheckpointError(f"checkpoint {checkpoint}: {name} cannot be read ({error})") from None
    if not same:
        raise CheckpointError(
            f"checkpoint {checkpoint}: {name} was changed after it was saved ({size} bytes, {noted['bytes']} saved, "
            "or other content); use an earlier checkpoint"
        )


def is_intact(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete and all of it as it was saved."""
    try:
        if not (checkpoint / "COMPLETE").is_file():
            return False
        verify(checkpoint)
    except (CheckpointError, OSError):
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


def open_tensors(checkpoint: Path, kind: str, share: float = 0.0) -> TensorFiles:
    """The `weights` or `moments` of a verified checkpoint: of the files that were verified, whatever else lies there."""
    noted = read_meta(checkpoint).get("files", {})
    names = sorted(name for name in noted if re.fullmatch(rf"{kind}-\d+\.safetensors", name))
    return TensorFiles(checkpoint, names, share)


def load_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Full fp32 weights and persistent buffers by name of the PretrainingModel; tied weights once."""
    return open_tensors(checkpoint, "weights").read_all()


def load_into(model: torch.nn.Module, checkpoint: Path) -> None:
    """Load weights strictly.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape: the checkpoint of another model.
    """
    import torch

    files = open_tensors(checkpoint, "weights")
    saved = {name: files.shape(name) for name in files.names()}
    own: dict[str, torch.Tensor] = dict(model.named_parameters())
    own.update({name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()})
    missing = sorted(own.keys() - saved.keys())
    unexpected = sorted(saved.keys() - own.keys())
    shapes = [
        f"{name} {saved[name]} (expected {tuple(own[name].shape)})"
        for name in sorted(own.keys() & saved.keys())
        if saved[name] != tuple(own[name].shape)
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
    with torch.no_grad():
        for name, tensor in own.items():  # one after another: no second copy of all
            tensor.copy_(files.read(name))

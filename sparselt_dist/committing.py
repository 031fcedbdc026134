"""How a checkpoint folder comes to be and goes: staged, written, committed, rotated; what killed runs left is cleaned.

A checkpoint is written into `step_*.partial`, every file flushed to disk, its sizes and SHA-256 sums noted in
`meta.json`, `COMPLETE` written last, and the folder renamed into place; then `latest` is replaced. An old one is renamed to
`step_*.removed` before it is deleted. So a kill at any moment leaves whole checkpoints and leftovers that can be told by
their names. What cannot be read is never deleted, only moved aside.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparselt_dist.checkpoint import complete_checkpoints, complete_mark, read_meta, sha256, step_of
from sparselt_dist.errors import CheckpointError
from sparselt_dist.tensor_files import Slice, write_slices

PROBED_BYTES = 64 * 2**20
_LEFTOVER = re.compile(r"step_\d{8,}\.(partial|removed)")
_OUR_FILE = re.compile(r"(weights|moments)-\d+\.safetensors|rank_\d+\.pt|config\.json|meta\.json|COMPLETE")


class Written(NamedTuple):
    """What one rank wrote."""

    files: dict[str, dict[str, Any]]
    """Size and SHA-256 by name."""
    seconds: float


class Retention(NamedTuple):
    """Which complete checkpoints stay."""

    keep: int
    """The newest ones."""
    every_steps: int | None = None
    """Those of its multiples stay for good."""


def unwritable(final: Path, error: object) -> CheckpointError:
    """The error of a checkpoint that could not be saved."""
    return CheckpointError(f"checkpoint {final}: cannot be written ({error}); free space or mend permissions")


def staging_of(final: Path) -> Path:
    """Where a checkpoint is written before it is committed."""
    return final.with_name(final.name + ".partial")


def start_staging(final: Path, num_bytes: int) -> None:
    """Make the staging folder, where the disk has room for so many bytes.

    Raises:
        CheckpointError: it cannot be written.
    """
    staging = staging_of(final)
    try:
        if staging.exists():
            shutil.rmtree(staging)  # our own unfinished attempt
        if final.exists():
            _move_aside(final)  # unfinished or damaged; never deleted
        staging.mkdir(parents=True)
        if not _has_room(staging, num_bytes):  # else the disk is full for everyone until the write fails
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {num_bytes / 1e9:.2f} GB are needed")
    except OSError as error:
        raise unwritable(final, error) from None


def write_rank_files(
    staging: Path, parts: Mapping[str, Sequence[Slice]], rank_state: dict[str, Any], rank: int
) -> Written | str:
    """Write this rank's files and force them to disk; or the text of the error, and nothing is left of them."""
    import torch
    from safetensors import SafetensorError

    started = time.perf_counter()
    names = [f"{kind}-{rank:05d}.safetensors" for kind, slices in parts.items() if slices]
    state_name = f"rank_{rank:05d}.pt"
    try:
        for name in names:
            write_slices(parts[name.partition("-")[0]], staging / name)
        torch.save(rank_state, staging / state_name)
        files = {name: _noted(staging / name) for name in (*names, state_name)}
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:  # which wrap a full disk in their own types
        for name in (*names, state_name):  # at once: the disk may be full for the journal too
            with contextlib.suppress(OSError):
                (staging / name).unlink(missing_ok=True)
        return f"rank {rank}: {error}"
    return Written(files, time.perf_counter() - started)


def commit(final: Path, architecture: dict[str, Any], meta: dict[str, Any]) -> None:
    """Complete the staged folder, put it in place and let `latest` name it.

    Raises:
        CheckpointError: it cannot be written; unless only `latest` could not be, nothing of it is left.
    """
    staging = staging_of(final)
    try:
        _write_text(staging / "config.json", json.dumps(architecture, indent=1))
        meta["files"]["config.json"] = _noted(staging / "config.json")
        _write_text(staging / "meta.json", json.dumps(meta, indent=1))
        _write_text(staging / "COMPLETE", complete_mark(meta["step"], staging / "meta.json"))
        sync(staging)
        staging.rename(final)
        sync(final.parent)
        pointer = final.parent / "latest.new"
        _write_text(pointer, final.name + "\n")
        pointer.replace(final.parent / "latest")
    except OSError as error:
        discard(final)
        raise unwritable(final, error) from None


def discard(final: Path) -> None:
    """Remove what was staged of a checkpoint."""
    shutil.rmtree(staging_of(final), ignore_errors=True)


def rotate(run_dir: Path, retention: Retention, spared: Collection[Path] = ()) -> None:
    """Delete complete checkpoints that need not stay; one that cannot be deleted stays, and so does one that cannot be read:
    it may be a later version's, or what somebody wants to look at."""
    for old in [path for path in complete_checkpoints(run_dir) if _is_readable(path)][: -retention.keep]:
        for_good = retention.every_steps is not None and step_of(old) % retention.every_steps == 0
        if for_good or old in spared:
            continue
        removed = old.with_name(old.name + ".removed")  # a half-deleted folder must not look whole
        with contextlib.suppress(OSError):
            old.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)


def _is_readable(checkpoint: Path) -> bool:
    try:
        read_meta(checkpoint)
    except CheckpointError:
        return False
    return True


def clean_leftovers(run_dir: Path) -> list[str]:
    """Remove what killed runs left half-written or half-deleted, and nothing that is not ours; the names of it.

    The caller holds the run folder's lock, so that nobody is at work on them.
    """
    removed = []
    for folder in sorted((run_dir / "checkpoints").glob("step_*")):
        ours = _LEFTOVER.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink()
        if ours and all(_OUR_FILE.fullmatch(entry.name) and entry.is_file() for entry in folder.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder.name)
    for file in [*run_dir.glob(".probe-*"), run_dir / "checkpoints" / "latest.new"]:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
    return removed


def set_aside_after(run_dir: Path, step: int) -> None:
    """Move checkpoints later than the step a start continues from out of the way, for they are no part of its run.

    They are of an abandoned branch or damaged; left in place they would be rotated as the newest, and resumed from.
    """
    for path in complete_checkpoints(run_dir):
        if step_of(path) > step:
            _move_aside(path)


def probe_seconds(run_dir: Path, num_bytes: int) -> float:
    """What writing so many bytes of a checkpoint takes, judged by writing, flushing and hashing some of them.

    Raises:
        CheckpointError: the run folder cannot be written.
    """
    probe, size = run_dir / f".probe-{os.getpid()}", min(num_bytes, PROBED_BYTES)
    started = time.perf_counter()
    try:
        probe.write_bytes(os.urandom(1 << 20) * (size >> 20) + bytes(size & 0xFFFFF))
        sync(probe)
        sha256(probe)
    except OSError as error:
        raise CheckpointError(f"{run_dir}: cannot be written ({error}); free space or mend permissions") from None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    return (time.perf_counter() - started) * num_bytes / max(size, 1)


def sync(path: Path) -> None:
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _noted(path: Path) -> dict[str, Any]:
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
    sync(path)


def _has_room(folder: Path, num_bytes: int) -> bool:
    return shutil.disk_usage(folder).free >= num_bytes


def _move_aside(folder: Path) -> None:
    places = (folder.with_name(f"{folder.name}.aside-{number}") for number in itertools.count(1))
    folder.rename(next(place for place in places if not place.exists()))

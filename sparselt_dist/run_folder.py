"""A run's folder: what it holds besides checkpoints, and how a start finds its place in it.

`config.resolved.yaml`, `ds_config.resolved.json`, `environment.json`, `run_id`, `tokenizer/`,
`data_manifest.json`, `metrics.jsonl`, `checkpoints/`,
`model/`, `summary.json`. Written by rank 0 only.
"""

from __future__ import annotations

import fcntl
import filecmp
import json
import platform
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from sparselt_dist import checkpoint
from sparselt_dist.errors import CheckpointError, DataError
from sparselt_dist.metrics import replace_file

RESUME_CHOICES = ("auto", "never", "must")
_RECORDED = (
    "sparselt_dist",
    "torch",
    "deepspeed",
    "transformers",
    "tokenizers",
    "webdataset",
    "datasets",
    "mlflow",
    "numpy",
)


def find_start(run_dir: Path, resume: Sequence[str], warn: Callable[[str], None]) -> Path | None:
    """The checkpoint that a start continues, or None for a new run; makes the folder.

    Args:
        resume: of which the last counts: `auto` the newest intact checkpoint if there is one; `must` that or an error;
            `never` a new run, an earlier one in the same folder being moved aside; else a path to a checkpoint or run
            folder. Behind a path, as in a job that is requeued, `auto` means that one if the folder has none of its own.

    Raises:
        CheckpointError: nothing to resume, nothing intact, or the folder cannot be written.
    """
    *earlier, last = resume
    if last == "never":
        _move_aside(run_dir, warn)
    _make_writable(run_dir)
    if last not in RESUME_CHOICES:
        return _named(last)
    found = checkpoint.newest_intact(run_dir, warn)
    if found is None and last == "must":
        raise CheckpointError(
            f"{run_dir}: found no complete checkpoint, and --resume must asks for one; use --resume auto"
        )
    if found is None and last == "auto" and earlier and earlier[-1] not in RESUME_CHOICES:
        return _named(earlier[-1])
    return found


def _named(place: str) -> Path:
    """The checkpoint at a path that the user gave."""
    path = Path(place)
    if not path.exists():
        raise CheckpointError(
            f"--resume {place}: no such folder; expected {'|'.join(RESUME_CHOICES)} or a checkpoint's path"
        )
    return checkpoint.find_intact(path)


def _move_aside(run_dir: Path, warn: Callable[[str], None]) -> None:
    """Keep an earlier run that stands where a new one was asked for."""
    if not (run_dir / "metrics.jsonl").exists() and not checkpoint.complete_checkpoints(run_dir):
        return
    lock(run_dir, warn).close()  # nobody trains in it
    aside = run_dir.with_name(f"{run_dir.name}.{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        run_dir.rename(aside)
    except OSError as error:
        raise CheckpointError(
            f"{run_dir}: the earlier run cannot be moved aside ({error}); choose another run.output_dir"
        ) from None
    warn(f"the earlier run in {run_dir} is kept as {aside}")


def _make_writable(run_dir: Path) -> None:
    probe = run_dir / ".writable"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"run.output_dir: {run_dir} cannot be written ({error.strerror or error}); choose another folder"
        ) from None


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    replace_file(path, (json.dumps(content, indent=1, sort_keys=False) + "\n").encode())


def run_id(run_dir: Path) -> str:
    """The folder's lasting identity, made at its first start."""
    path = run_dir / "run_id"
    if not path.exists():
        replace_file(path, uuid.uuid4().hex.encode())
    return path.read_text().strip()


def copy_tokenizer(source: Path, run_dir: Path) -> None:
    """Keep the shards' tokenizer with the run, so that checkpoints can be used without the shards.

    Links that lead out of its folder are left: who made the shards may not be who reads what they point to.
    """
    inside = source.resolve()

    def foreign(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if not Path(folder, name).resolve().is_relative_to(inside)]

    target, staging = run_dir / "tokenizer", run_dir / "tokenizer.partial"
    kept = target / "tokenizer.json"
    if kept.exists() and filecmp.cmp(source / "tokenizer.json", kept, shallow=False):
        return
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(source, staging, ignore=foreign)
    if not (staging / "tokenizer.json").is_file():
        raise DataError(
            f"{source}: tokenizer.json is a link that leads out of the folder, expected a file; copy the folder with `cp -rL`"
        )
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)


def lock(run_dir: Path, warn: Callable[[str], None], patience: float = 0.0) -> IO[str]:
    """Claim the folder for this process as long as the returned file is open; on a file system without locks, only warn.

    Args:
        patience: seconds to wait for one that has it: the lock of a lost host may outlive it on a file server.

    Raises:
        CheckpointError: another process trains in it.
    """
    file, deadline = (run_dir / ".lock").open("a"), time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if time.monotonic() < deadline:
                time.sleep(1.0)
                continue
            file.close()
            raise CheckpointError(
                f"run.output_dir: another process trains in {run_dir}; wait for it, stop it, or choose another folder"
            ) from None
        except OSError as error:
            warn(f"warning: {run_dir} cannot be claimed ({error.strerror}): see that no other run uses it")
        return file


def environment(profile: str, data_sha256: str, world_size: int, device: str) -> dict[str, Any]:
    """What ran where: versions, code, machine, data."""
    versions = {}
    for name in _RECORDED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "profile": profile,
        "git_commit": _git_commit(),
        "data_manifest_sha256": data_sha256,
        "world_size": world_size,
        "device": device,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
    }


def _git_commit() -> str | None:
    """The commit of the working copy the package is imported from, with `+` if it was changed; None outside one."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10, check=True
        )
        changed = subprocess.run(
            ["git", "diff", "--quiet", "HEAD"], cwd=here, capture_output=True, timeout=10, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if changed.returncode == 1 else "")

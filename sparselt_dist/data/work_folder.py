"""The folder in which a preparation is under way: who may work there, and whether what lies there can be continued.

Each part holds a lock of its own while it is at work. What is being prepared, and in how many parts, is noted; both are
looked at under one more lock that is held for a moment only.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparselt_dist.data.manifest import MANIFEST, write_atomically
from sparselt_dist.data.parts import Part
from sparselt_dist.data.tokenization import SPLITS
from sparselt_dist.data.workspace import locked
from sparselt_dist.errors import DataError

WORK = ".work"
GATE = "gate.lock"


@contextlib.contextmanager
def opened(work: Path, wanted: dict[str, Any], part: Part) -> Iterator[None]:
    """Continue work of the same configuration and source, or begin it; the part's lock is held in the block.

    Raises:
        DataError: another process holds it, or the folder holds other work that may not be discarded.
    """
    work.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with locked(work / GATE, wait=True):
            if not stack.enter_context(locked(_lock(work, part.number))):
                raise DataError(
                    f"{work.parent}: another `sparselt prepare` is at work there"
                    f"{f' as {part}' if part.count > 1 else ''}; wait for it, or choose another prepare.output_dir"
                )
            _agree(work, wanted, part)
        yield


def _lock(work: Path, number: int) -> Path:
    return work / f"part-{number}.lock"


def _agree(work: Path, wanted: dict[str, Any], part: Part) -> None:
    """Refuse other work, unless it ended with an error, for the change is then the remedy; it may have taken hours."""
    path = work / "config.json"
    found = json.loads(path.read_bytes()) if path.exists() else {**wanted, "parts": part.count}
    if found["parts"] != part.count:
        _refuse_while_at_work(work, part, f"in {found['parts']} parts, not in {part.count}")
    if {**found, "parts": None} != {**wanted, "parts": None}:
        if not list(work.glob("part-*.failed")):
            raise DataError(_other_work(work, found, wanted))
        _refuse_while_at_work(work, part, "on something else")
        _discard(work)
    part.failed(work, part.number).unlink(missing_ok=True)
    part.alive(work, part.number).unlink(missing_ok=True)
    if not path.exists() or found["parts"] != part.count:
        write_atomically(path, json.dumps({**wanted, "parts": part.count}).encode())


def _refuse_while_at_work(work: Path, part: Part, how: str) -> None:
    for path in work.glob("part-*.lock"):
        if path != _lock(work, part.number):
            with locked(path) as free:
                if not free:
                    raise DataError(
                        f"{work.parent}: another `sparselt prepare` is at work there {how}; give it the same "
                        "configuration and parts, or end it first"
                    )


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What a configuration has and another has not, as text; empty if they are equal."""
    keys = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    return ", ".join(f"{key} is {found.get(key)!r} there and {wanted.get(key)!r} here" for key in keys)


def _other_work(work: Path, found: dict[str, Any], wanted: dict[str, Any]) -> str:
    what = differences(found["prepare"], wanted["prepare"]) or "the source files have changed"
    return (
        f"prepare.output_dir: {work.parent}: holds an unfinished preparation of something else: {what}; finish "
        f"that one, choose another prepare.output_dir, or remove {work} to begin anew"
    )


def _discard(work: Path) -> None:
    """Remove unfinished work and the shards it may have written; a folder with a manifest is not touched."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix != ".lock":
            path.unlink()
    for folder in (work.parent, *(work.parent / split for split in SPLITS)):
        if not (folder / MANIFEST).exists():
            for path in folder.glob("shard-[0-9]*"):
                path.unlink()

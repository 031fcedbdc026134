"""Saves checkpoints while training goes on: all ranks write their shares in the background, rank 0 commits.

A save has three parts. The training thread of every rank copies what falls to it (`begin`); a thread of every rank writes
the copy; once all have, which the trainer's own sum over ranks tells (`advance`), the sizes and sums are gathered and a
thread of rank 0 commits. Threads never talk to other ranks: collectives stay on the training thread and in order. One save is
under way at most; the next waits for it.

A save that fails leaves the earlier checkpoints as they are and is said; only who waits for one (`finish`) gets an error.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparselt_dist import committing, distributed
from sparselt_dist.checkpoint import FORMAT, folder_name, is_intact
from sparselt_dist.committing import Retention, Written
from sparselt_dist.errors import CheckpointError
from sparselt_dist.snapshot import Snapshot
from sparselt_dist.tensor_files import Slice


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds: of the tensors this rank's slices, of which all ranks' make up whole ones; each to be copied
    before the next is asked for."""

    step: int
    weights: Iterable[Slice]
    moments: Iterable[Slice]
    num_bytes: int
    """Of all tensors of all ranks, about."""
    rank_state: dict[str, Any]
    architecture: dict[str, Any]
    meta: dict[str, Any]


@dataclass
class _Save:
    """The save under way."""

    final: Path
    architecture: dict[str, Any]
    meta: dict[str, Any]
    copy_seconds: float
    writing: Future[Written | str]
    write_seconds: float = 0.0  # of the slowest rank
    is_committing: bool = False
    committing: Future[float] | None = field(default=None)  # on rank 0


class CheckpointWriter:
    """The checkpoints of one start of a run; all ranks hold one and call it alike, `is_written` apart.

    Args:
        before: called on rank 0 before a save; may raise CheckpointError, as a save that fails.
        say: tells the user; called on rank 0.
        on_commit: called on rank 0, from a thread, with a new checkpoint; the ones it returns are not rotated yet.
    """

    def __init__(
        self,
        run_dir: Path,
        ranks: distributed.Ranks,
        snapshot: Snapshot,
        retention: Retention,
        *,
        before: Callable[[], None],
        say: Callable[[str], None],
        on_commit: Callable[[Path], set[Path]] = lambda path: set(),
    ) -> None:
        self.run_dir = run_dir
        self.ranks = ranks
        self.snapshot = snapshot
        self.retention = retention
        self.newest: Path | None = None
        """The last one committed; rank 0 knows it first."""
        self.seconds = 0.0
        """What the last save took in all, had training waited for it; rank 0 knows it first."""
        self.failures = 0
        self.fault: str | None = None
        """Why the last save failed, None if it did not; rank 0 knows it first."""
        self.last_fault = ""
        """Why a save failed the last time one did."""
        self._before = before
        self._say = say
        self._on_commit = on_commit
        self._threads = ThreadPoolExecutor(1, "checkpoint")
        self._save: _Save | None = None
        self._is_awaited = False

    @property
    def is_written(self) -> bool:
        """Whether this rank has written its share of the save under way, or there is none."""
        return self._save is None or self._save.is_committing or self._save.writing.done()

    def begin(self, contents: Contents) -> None:
        """Wait for the save under way, then copy and have the copy written. A step that is saved already is left."""
        self.settle()
        self.fault = None
        final = self.run_dir / "checkpoints" / folder_name(contents.step)
        if distributed.on_main(self.ranks, lambda: final == self.newest or is_intact(final)):
            self.newest = final
            return
        try:
            distributed.on_main(self.ranks, lambda: self._stage(final, contents.num_bytes))
        except CheckpointError as error:
            self._fail(str(error))
            return
        started = time.perf_counter()
        fault = self.snapshot.take({"weights": contents.weights, "moments": contents.moments})
        meta = {"format": FORMAT, "step": contents.step, "world_size": self.ranks.world_size, **contents.meta}
        seconds = time.perf_counter() - started
        writing = self._threads.submit(self._write, final, contents.rank_state, fault)
        self._save = _Save(final, contents.architecture, meta, seconds, writing)

    def advance(self, all_written: bool) -> None:
        """Once all ranks have written, have rank 0 commit; all ranks call it with the same answer."""
        if self._save is None:
            return
        if not self._save.is_committing and all_written:
            self._start_commit(self._save)
        elif self._save.committing is not None and self._save.committing.done():
            self._take_note(self._save)

    def settle(self) -> None:
        """Wait until nothing is under way."""
        if self._save is not None and not self._save.is_committing:
            self._start_commit(self._save)
        if self._save is None:
            return
        save = self._save
        fault = distributed.on_main(self.ranks, lambda: self._take_note(save))
        if not self.ranks.is_main:
            self.newest, self.fault = (save.final, None) if fault is None else (self.newest, fault)
            self.failures += fault is not None
        self._save = None

    def finish(self, contents: Contents) -> Path:
        """Save, and wait until it is committed.

        Raises:
            CheckpointError: on all ranks alike, it cannot be.
        """
        self.settle()
        self._is_awaited = True
        self.begin(contents)
        self.settle()
        self._is_awaited = False
        if self.fault is not None:
            error = CheckpointError(self.fault)
            error.silent = not self.ranks.is_main
            raise error
        assert self.newest is not None
        return self.newest

    def close(self) -> None:
        """No save comes after this; call it with none under way."""
        self._threads.shutdown()
        self.snapshot.release()

    # ---- on the training thread

    def _stage(self, final: Path, num_bytes: int) -> None:
        self._before()
        committing.start_staging(final, num_bytes)

    def _start_commit(self, save: _Save) -> None:
        noted = distributed.gather_objects(save.writing.result(), self.ranks)
        faults = [text for text in noted if isinstance(text, str)]
        if faults:
            if self.ranks.is_main:
                committing.discard(save.final)
            self._fail(str(committing.unwritable(save.final, faults[0])))
            self._save = None
            return
        parts = [part for part in noted if isinstance(part, Written)]
        save.meta["files"] = {name: entry for part in parts for name, entry in part.files.items()}
        save.write_seconds = max(part.seconds for part in parts)
        save.is_committing = True
        if self.ranks.is_main:
            save.committing = self._threads.submit(self._commit, save)

    def _take_note(self, save: _Save) -> str | None:
        """How the commit went, once; the text of its error."""
        assert save.committing is not None
        try:
            seconds = save.committing.result()
        except CheckpointError as error:
            if self.fault is None:
                self._fail(str(error))
        else:
            self.newest = save.final
            self.seconds = save.copy_seconds + save.write_seconds + seconds
        return self.fault

    def _fail(self, text: str) -> None:
        self.fault = self.last_fault = text
        self.failures += 1
        if self.ranks.is_main and not self._is_awaited:  # else it is raised
            self._say(f"{text}; earlier checkpoints are as they were, and the next save is the next try")

    # ---- in the background

    def _write(self, final: Path, rank_state: dict[str, Any], fault: str | None) -> Written | str:
        if fault is not None:
            return f"rank {self.ranks.rank}: {fault}"
        staging = committing.staging_of(final)
        try:
            return committing.write_rank_files(staging, self.snapshot.parts, rank_state, self.ranks.rank)
        except Exception as error:  # raised on this rank alone it would leave the others waiting
            return f"rank {self.ranks.rank}: {type(error).__name__}: {error}"

    def _commit(self, save: _Save) -> float:
        started = time.perf_counter()
        committing.commit(save.final, save.architecture, save.meta)
        with contextlib.suppress(OSError, CheckpointError):  # what could not be deleted now is deleted after the next
            committing.rotate(self.run_dir, self.retention, self._on_commit(save.final))
        return time.perf_counter() - started

"""What makes a preparation restartable and parallel: a locked work folder, logs that survive a kill, worker processes.

Work goes in numbered chunks. A chunk's data is appended to a data file and flushed, then a line of JSON is appended to
a log and flushed: the log is the truth, and whatever a kill left behind its last line is cut off at the next start.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from sparselt_dist.errors import DataError

Job = TypeVar("Job")
Result = TypeVar("Result")


class _AppendOnly:
    """A file that only grows; what lies beyond the committed size is cut off at opening."""

    def __init__(self, path: Path, committed: int) -> None:
        self._file = path.open("ab")
        self._file.truncate(committed)
        self.size = committed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def _write(self, data: bytes) -> None:
        """Write and flush to disk."""
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.size += len(data)


class WorkLog(_AppendOnly):
    """A file of JSON lines; each is on disk before `append` returns."""

    def __init__(self, path: Path) -> None:
        self.records: list[dict[str, Any]] = []
        valid = 0
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                self.records.append(json.loads(line))
                valid += len(line)
        super().__init__(path, valid)

    def append(self, record: dict[str, Any]) -> None:
        self._write(json.dumps(record).encode() + b"\n")
        self.records.append(record)


class DataFile(_AppendOnly):
    """Data whose committed size a log knows."""

    def append(self, data: bytes) -> None:
        self._write(data)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a work folder for this process.

    Raises:
        DataError: another process holds it.
    """
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as cause:
            raise DataError(
                f"{folder.parent}: another `sparselt prepare` is at work there; wait for it, or choose another "
                "prepare.output_dir"
            ) from cause
        yield


def _start_worker() -> None:
    """Set up a worker: one thread a process, and no life without the parent, even when that is killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def follow() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class Workers:
    """Worker processes for pure functions; started at the second job, so that a small text needs none."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """Results in the order of the jobs; at most two jobs a worker are in memory.

        Raises:
            DataError: a worker was killed, as happens when memory runs out.
        """
        iterator = iter(jobs)
        first = list(itertools.islice(iterator, 2))
        if self._number == 1 or len(first) < 2:
            yield from map(function, itertools.chain(first, iterator))
            return
        if self._pool is None:
            # spawned, because forking a process that has threads (torch, the progress bar) can deadlock
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._number, mp_context=context, initializer=_start_worker)
        pending: deque[Future[Result]] = deque()
        try:
            for job in itertools.chain(first, iterator):
                pending.append(self._pool.submit(function, job))
                if len(pending) >= 2 * self._number:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as cause:
            raise DataError(
                "prepare: a worker process was killed, most likely for want of memory; lower prepare.num_workers and "
                "run the same command again: it continues where it was"
            ) from cause

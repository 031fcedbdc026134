"""What makes a preparation restartable and parallel: files that are whole or absent, logs, locks, worker processes.

Work goes in numbered jobs. A job writes whole files, each by rename, then a line of JSON is appended to a log and
flushed: the log is the truth. A torn last line, and files that no line speaks of, are written anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar

from sparselt_dist.errors import DataError

Job = TypeVar("Job")
Result = TypeVar("Result")


@contextlib.contextmanager
def committed(path: Path) -> Iterator[IO[bytes]]:
    """A new file that is there, flushed to disk, only after the block has ended well."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class WorkLog:
    """A file of JSON lines; each is on disk before `append` returns. A torn last line is cut off at opening."""

    def __init__(self, path: Path) -> None:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = list(itertools.takewhile(lambda line: line.endswith(b"\n"), lines))
        self.records: list[dict[str, Any]] = [json.loads(line) for line in whole]
        self._file = path.open("ab")
        self._file.truncate(sum(map(len, whole)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records.append(record)


class LogReader:
    """The lines that other processes, on other machines too, append to logs."""

    def __init__(self, folder: Path, pattern: str) -> None:
        self._folder = folder
        self._pattern = pattern
        self._read: dict[Path, int] = {}

    def new_records(self) -> Iterator[dict[str, Any]]:
        """What was completed since the last call; a line that is being written waits for the next."""
        for path in sorted(self._folder.glob(self._pattern)):
            with path.open("rb") as file:  # opened anew: a network file system shows then what others wrote
                file.seek(self._read.get(path, 0))
                lines = file.read().splitlines(keepends=True)
            for line in itertools.takewhile(lambda line: line.endswith(b"\n"), lines):
                self._read[path] = self._read.get(path, 0) + len(line)
                yield json.loads(line)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Holds a lock file for this process while the block runs; gives False if another process holds it."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def available_cores() -> int:
    """Cores that this process may use, which a batch system can limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker() -> None:
    """Set up a worker: one thread a process, and no life without the parent, even when that is killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the parent, which ends the workers
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
        """Results as they come; at most two jobs a worker are in memory.

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
        pending: set[Future[Result]] = set()
        try:
            for job in itertools.chain(first, iterator):
                pending.add(self._pool.submit(function, job))
                if len(pending) >= 2 * self._number:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool as cause:
            raise DataError(
                "prepare: a worker process was killed, most likely for want of memory; lower prepare.num_workers and "
                "run the same command again: it continues where it was"
            ) from cause

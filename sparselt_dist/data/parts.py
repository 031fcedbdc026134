"""One preparation done by several processes, on several machines, over a shared folder: its parts.

Every part runs the same stages. A stage is a list of numbered jobs; part i of n does the jobs i, i + n, i + 2n, ... and
writes what came of each to its own log, then waits until the logs of all parts together have every job. Stages of one
job fall to part 0. Jobs depend on the text and the configuration alone, so the result does not depend on the parts, and
a part that was killed continues when it is started again; the others wait for it. One process is part 0 of 1.

Parts see each other by files alone: a heartbeat tells that a part is alive, a note why it failed.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sparselt_dist.data.manifest import write_atomically
from sparselt_dist.data.stage_progress import StageProgress
from sparselt_dist.data.workspace import LogReader, Workers, WorkLog
from sparselt_dist.errors import ConfigError, DataError

Record = dict[str, Any]
Job = TypeVar("Job")

HEARTBEAT_SECONDS = 5.0
FIRST_POLL_SECONDS, LAST_POLL_SECONDS = 0.05, 2.0
# A failure noted shortly before this start is probably of the same attempt, unless that part starts again soon.
FRESH_SECONDS, GRACE_SECONDS = 60.0, 20.0
GOODBYE_SECONDS = 30.0  # how long part 0 waits at the end for the others to leave the work folder
ENDED = b"ended"


class OtherPartError(DataError):
    """Another part failed or is missing; this one can go on when that one is there."""


@dataclass(frozen=True)
class Part:
    """Which share of the jobs a process does."""

    number: int = 0
    count: int = 1
    wait_minutes: float = 30.0  # for a sign of life of another part

    @classmethod
    def parse(cls, text: str, wait_minutes: float) -> Part:
        """`2/8`: the third of eight.

        Raises:
            ConfigError: it is not that, or the time to wait is not positive.
        """
        number, _, count = text.partition("/")
        if not (number.isascii() and number.isdigit() and count.isascii() and count.isdigit()) or int(number) >= int(
            count
        ):
            raise ConfigError(
                f"--part: found {text!r}, expected I/N with I from 0 to N - 1, such as 0/4; start one command for each I"
            )
        if not wait_minutes > 0:
            raise ConfigError(f"--wait-minutes: found {wait_minutes:g}, expected more than 0; leave it out for 30")
        return cls(int(number), int(count), wait_minutes)

    def __str__(self) -> str:
        return f"part {self.number} of {self.count}"

    def alive(self, work: Path, number: int) -> Path:
        return work / f"part-{number}.alive"

    def failed(self, work: Path, number: int) -> Path:
        return work / f"part-{number}.failed"


@contextlib.contextmanager
def heartbeat(work: Path, part: Part) -> Iterator[None]:
    """Shows the other parts that this one is alive, and at the end whether it left in peace."""
    path = part.alive(work, part.number)
    stop = threading.Event()

    def beat() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError):  # a full disk is met where the work is done
                write_atomically(path, f"{time.time_ns()}".encode())
            stop.wait(HEARTBEAT_SECONDS)

    thread = threading.Thread(target=beat, daemon=True)
    if part.count > 1:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if part.count > 1:
            thread.join()
    if part.count > 1:
        write_atomically(path, ENDED)


def wait_for_goodbye(work: Path, part: Part) -> None:
    """Wait a little until no other part is at work in the folder, which is about to be removed."""
    deadline = time.monotonic() + GOODBYE_SECONDS
    others = [part.alive(work, number) for number in range(part.count) if number != part.number]
    while any(_content(path) != ENDED for path in others) and time.monotonic() < deadline:
        time.sleep(FIRST_POLL_SECONDS)


class _Failure(NamedTuple):
    """What a part noted at its end."""

    time: float
    message: str


def _failure(work: Path, part: Part, number: int) -> _Failure | None:
    content = _content(part.failed(work, number))
    if content is None:
        return None
    nanoseconds, _, message = content.decode().partition(" ")
    return _Failure(int(nanoseconds) / 1e9, message)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


class Crew:
    """Runs stages together with the other parts."""

    def __init__(self, work: Path, part: Part, workers: Workers, progress: StageProgress) -> None:
        self.part = part
        self._work = work
        self._workers = workers
        self._progress = progress
        others = [number for number in range(part.count) if number != part.number]
        self._signs = {number: (_content(part.alive(work, number)), time.monotonic()) for number in others}
        self._started = dict.fromkeys(others, False)
        self._born = time.time()
        # what failed before this start may be history: that part may be on its way again
        self._old_failures = {number: _failure(work, part, number) for number in others}

    def run(self, stage: str, function: Callable[[Job], Record], jobs: Sequence[Job], what: str = "") -> list[Record]:
        """What comes of each job, in their order; those of the other parts are waited for.

        Args:
            function: writes files by rename and returns what JSON can hold; pure, and picklable unless there is
                one job alone.
            what: is counted in the display.

        Raises:
            OtherPartError: another part failed, or gave no sign of life for too long.
        """
        results: dict[int, Record] = {}
        others = LogReader(self._work, f"{stage}.*.log")
        with WorkLog(self._work / f"{stage}.{self.part.number}.log") as log:
            results.update((record["job"], record["result"]) for record in others.new_records())
            own = range(self.part.number, len(jobs), self.part.count)
            todo = ((number, jobs[number]) for number in own if number not in results)
            for number, result in self._workers.map(functools.partial(_numbered, function), todo):
                log.append({"job": number, "result": result})
                results[number] = result
                self._progress.update(len(results) / len(jobs), f"{len(results)} of {len(jobs)} {what or stage}")
        self._wait(stage, others, results, len(jobs), what)
        return [results[number] for number in range(len(jobs))]

    def _wait(self, stage: str, logs: LogReader, results: dict[int, Record], count: int, what: str) -> None:
        pause = FIRST_POLL_SECONDS
        while len(results) < count:
            results.update((record["job"], record["result"]) for record in logs.new_records())
            missing = sorted({number % self.part.count for number in range(count) if number not in results})
            if not missing:
                return
            self._check(stage, missing)
            note = f"{len(results)} of {count} {what or stage}, waiting for part {', '.join(map(str, missing[:8]))}"
            self._progress.update(len(results) / count, note)
            time.sleep(pause)
            pause = min(1.5 * pause, LAST_POLL_SECONDS)

    def _check(self, stage: str, missing: list[int]) -> None:
        now = time.monotonic()
        for number in missing:
            self._check_failure(number, now)
            sign = _content(self.part.alive(self._work, number))
            last, since = self._signs[number]
            if sign != last:
                self._signs[number] = sign, now
                self._started[number] = True
            elif now - since > 60 * self.part.wait_minutes:
                raise OtherPartError(self._silence(stage, number))

    def _check_failure(self, number: int, now: float) -> None:
        failure, old = _failure(self._work, self.part, number), self._old_failures[number]
        silent = not self._started[number] and now - self._signs[number][1] > GRACE_SECONDS
        if failure is not None and (failure != old or (silent and failure.time > self._born - FRESH_SECONDS)):
            raise OtherPartError(f"part {number} of {self.part.count} failed: {failure.message}")

    def _silence(self, stage: str, number: int) -> str:
        found = "has given no sign of life" if self._started[number] else "has not started"
        failure = _failure(self._work, self.part, number)
        reason = f" (its last start ended with: {failure.message})" if failure else ""
        if not failure and not self._started[number]:
            reason = " (of a job array, a task that found no room: all must run at once, without %N)"
        return (
            f"prepare --part: part {number} of {self.part.count} {found} for {self.part.wait_minutes:g} minutes, and its "
            f"share of the stage {stage!r} is missing{reason}; start it with --part {number}/{self.part.count}, and this "
            "part again: both continue where they were; or finish all in one process, without --part"
        )


def _numbered(function: Callable[[Job], Record], job: tuple[int, Job]) -> tuple[int, Record]:
    number, payload = job
    return number, function(payload)


def note_failure(work: Path, part: Part, message: str) -> None:
    """Tell the other parts, and a later start, that this one ended with an error that the user has to mend."""
    write_atomically(part.failed(work, part.number), f"{time.time_ns()} {message}".encode())

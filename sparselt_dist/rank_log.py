"""Each rank's output in a file of its own, every line with time, rank and step.

From `start` on, what the rank writes to sys.stdout and sys.stderr, warnings and tracebacks included, goes where it went
before and into `logs/rank_00003.log` of the run folder, there without the passwords and tokens of addresses. What is
written before that folder is known is kept until then. A full disk costs the log, never the run. What C libraries write
themselves goes only where it went before.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import IO, Any, TextIO

from sparselt_dist.redaction import scrubbed

FOLDER = "logs"
_KEPT_LINES = 1000  # of what was written before the folder is known
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class RankLog:
    """The log of one rank: lines wait in memory until `open_in`."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.step = 0
        self._waiting: list[str] = []
        self._file: IO[str] | None = None
        self._failed = False
        self._mutex = threading.RLock()  # warnings may come from any thread, and from within a signal handler

    def open_in(self, run_dir: Path) -> None:
        """From now on lines go to the file, first those that have waited."""
        with self._mutex:
            if self._file is not None or self._failed:
                return
            try:
                (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
                path = run_dir / FOLDER / f"rank_{self.rank:05d}.log"
                self._file = path.open("a", encoding="utf-8", errors="replace")
                self._file.writelines(self._waiting)
                self._file.flush()
            except OSError:
                self._failed = True
            self._waiting.clear()

    def write(self, line: str) -> None:
        """Put down one line, without its end."""
        text = scrubbed(_ESCAPES.sub("", line.rstrip().rpartition("\r")[2]))
        if not text:
            return
        stamped = f"{time.strftime('%Y-%m-%dT%H:%M:%S')} rank {self.rank} step {self.step}: {text}\n"
        with self._mutex:
            if self._file is None:
                if not self._failed:
                    self._waiting = [*self._waiting[1 - _KEPT_LINES :], stamped]
                return
            with contextlib.suppress(OSError, ValueError):
                self._file.write(stamped)
                self._file.flush()

    def close(self) -> None:
        """End the file."""
        with self._mutex, contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
            self._file, self._failed = None, True


class _Tee:
    """A text stream that hands on what is written and gives each whole line to the log.

    A terminal that is gone or a full disk costs what would stand there, never the run.
    """

    def __init__(self, stream: TextIO, log: RankLog) -> None:
        self._stream = stream
        self._log = log
        self._partial = ""

    def write(self, text: str) -> int:
        """Length of the text, as of any stream."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            self._log.write(line)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write each of them."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand on what waits."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_log: RankLog | None = None
_streams: tuple[TextIO, TextIO] | None = None


def start(rank: int) -> None:
    """Begin to keep what this process writes."""
    global _log, _streams
    stop()
    _log, _streams = RankLog(rank), (sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = _Tee(sys.stdout, _log), _Tee(sys.stderr, _log)


def open_in(run_dir: Path) -> None:
    """The run's folder is known: begin the file. Nothing happens where `start` was not called."""
    if _log is not None:
        _log.open_in(run_dir)
        _log.write(f"process {os.getpid()} on {os.uname().nodename}")


def at_step(step: int) -> None:
    """Lines from now on are of this step."""
    if _log is not None:
        _log.step = step


def note(text: str) -> None:
    """A line for the file alone."""
    if _log is not None:
        _log.write(text)


def stop(error: BaseException | None = None) -> None:
    """End the log; an error that is about to end the process is put down first."""
    global _log, _streams
    if _log is None or _streams is None:
        return
    if error is not None:
        for line in traceback.format_exception(error):
            for part in line.splitlines():
                _log.write(part)
    sys.stdout, sys.stderr = _streams
    _log.close()
    _log, _streams = None, None

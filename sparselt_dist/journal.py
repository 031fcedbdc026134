"""`metrics.jsonl`, the journal of a run: written first, before any other place hears of a metric.

Invariants: valid JSON line by line, whatever the values and whenever the process dies; every step stands once, in
rising order; readers see whole lines only. Free of torch and MLflow.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from sparselt_dist.errors import CheckpointError, DataError

JOURNAL_NAME: Final = "metrics.jsonl"
_FSYNC_SECONDS: Final = 1.0


def _plain(value: Any) -> float | int | str | None:
    """A JSON value; JSON knows no NaN and no infinity, so a non-finite number is written as null."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None


def parse_lines(text: bytes) -> tuple[list[dict[str, Any]], int, int]:
    """Parse journal bytes: (lines, number of bytes they take, offset of the last of them).

    Only complete lines count, and a damaged tail (torn by a crash of the machine) is left out. Raises ValueError with
    the line number when a damaged line is followed by a sound one.
    """
    lines: list[dict[str, Any]] = []
    used = last = position = 0
    damaged: int | None = None
    for number, raw in enumerate(text.splitlines(keepends=True), start=1):
        try:
            line = json.loads(raw) if raw.endswith(b"\n") else None
        except ValueError:
            line = None
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            damaged = damaged or number
        elif damaged is not None:
            raise ValueError(f"line {damaged} is not a journal line, although line {number} after it is")
        else:
            lines.append(line)
            used, last = position + len(raw), position
        position += len(raw)
    return lines, used, last


class Journal:
    """`metrics.jsonl` of a run folder: one JSON object a step, `step` and `time` (epoch seconds) first.

    A line is written with one system call and is at once visible to readers; it is forced to disk at most once a
    second and on `close`. NaN and infinities become null. Appending to the last step again adds to that step's line.
    """

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = Path(run_dir) / JOURNAL_NAME
        self._clock = clock
        self._synced = -math.inf
        self._descriptor = -1
        self._last: dict[str, Any] | None = None
        self._last_offset = self._end = 0
        self._kept: list[tuple[float, Mapping[str, float | int | str]]] = []
        self._open()

    @staticmethod
    def read(run_dir: Path) -> list[dict[str, Any]]:
        """All complete lines; none for a run without a journal. Raises DataError if a middle line is damaged."""
        path = Path(run_dir) / JOURNAL_NAME
        return _read(path)[0]

    def append(self, line: Mapping[str, float | int | str]) -> None:
        """Write the line of step `line["step"]`. Raises ValueError if a later step is there, CheckpointError if the
        folder cannot be written (the journal then holds the earlier lines, complete)."""
        self._append(line, self._clock())

    def _append(self, line: Mapping[str, float | int | str], moment: float) -> None:
        step = int(line["step"])
        last = self._last
        if last is not None and step < last["step"]:
            raise ValueError(f"step {step} after step {last['step']} in {self.path}")
        fresh = last is None or step > last["step"]
        merged: dict[str, Any] = {"step": step, "time": moment} if last is None or fresh else dict(last)
        merged.update((key, _plain(value)) for key, value in line.items() if key != "step")
        self._write(json.dumps(merged, allow_nan=False).encode() + b"\n", self._end if fresh else self._last_offset)
        self._last = merged
        if time.monotonic() - self._synced >= _FSYNC_SECONDS:
            self._force()

    def offer(self, line: Mapping[str, float | int | str]) -> str | None:
        """Write the line and those kept before it; where the folder cannot be written keep it for the next try, and say
        why. Raises ValueError as `append`."""
        self._kept.append((self._clock(), line))
        try:
            self._write_kept()
        except CheckpointError as error:
            return f"{error}; {len(self._kept)} line(s) wait for the next try"
        return None

    def _write_kept(self) -> None:
        while self._kept:
            moment, line = self._kept[0]
            self._append(line, moment)
            del self._kept[0]

    def cut_back(self, last_step: int) -> None:
        """Keep the lines with step <= last_step (atomic rewrite); what a crash left torn goes too."""
        kept = [line for line in _read(self.path)[0] if line["step"] <= last_step]
        replace_file(self.path, b"".join(json.dumps(line).encode() + b"\n" for line in kept))
        os.close(self._descriptor)
        self._open()

    def sync(self) -> None:
        """Write the lines kept and force all to disk. Raises CheckpointError if the folder cannot be written."""
        self._write_kept()
        self._force()

    def _force(self) -> None:
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self._synced = time.monotonic()

    def close(self) -> None:
        """Force to disk and close. Raises CheckpointError if lines cannot be written."""
        if self._descriptor >= 0:
            try:
                self.sync()
            finally:
                os.close(self._descriptor)
                self._descriptor = -1

    def _open(self) -> None:
        lines, self._end, self._last_offset = _read(self.path)
        self._last = lines[-1] if lines else None
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(self._descriptor, self._end)
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def _write(self, data: bytes, offset: int) -> None:
        """Put the last line in place; on a full disk take the half-written piece back."""
        written = 0
        try:
            while written < len(data):
                written += os.pwrite(self._descriptor, data[written:], offset + written)
            if offset + written < self._end:
                os.ftruncate(self._descriptor, offset + written)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, offset)
            raise _unwritable(self.path, error) from error
        self._last_offset, self._end = offset, offset + written


def _read(path: Path) -> tuple[list[dict[str, Any]], int, int]:
    try:
        return parse_lines(path.read_bytes())
    except FileNotFoundError:
        return [], 0, 0
    except ValueError as error:
        raise DataError(
            f"{path}: {error}; expected one JSON object with `step` a line; restore the file or move it away"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a run's journal") from error


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be written ({error.strerror}); expected a writable run folder with free space; "
        "free space or choose another run.output_dir"
    )


def replace_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: temporary name, fsync, rename. Raises CheckpointError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _unwritable(path, error) from error

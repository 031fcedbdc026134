"""How a preparation shows where it is: a live bar in a terminal, a line now and then elsewhere; always on stderr."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

QUIET_SECONDS = 5.0


class StageProgress:
    """One stage at a time: its name, the share done where known, and a note."""

    def __init__(self, enabled: bool) -> None:
        self._console = console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
        self._enabled = enabled
        self._bar: Progress | None = None
        if enabled and console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:<18}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %  {task.fields[note]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
            )
        self._task: TaskID | None = None
        self._stage = ""
        self._last_line = 0.0

    def __enter__(self) -> StageProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, stage: str) -> None:
        """Begin a stage; the one before counts as done."""
        self.finish()
        self._stage = stage
        self._last_line = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(stage, total=None, note="")
        elif self._enabled:
            self._console.print(f"prepare: {stage}")

    def update(self, fraction: float | None, note: str) -> None:
        """Say how far the stage is; `fraction` in [0, 1], None if unknown."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=None if fraction is None else 1.0, completed=fraction or 0.0, note=note)
        elif self._enabled and time.monotonic() - self._last_line >= QUIET_SECONDS:
            self._last_line = time.monotonic()
            share = "" if fraction is None else f"{100 * fraction:.0f} %, "
            self._console.print(f"prepare: {self._stage}: {share}{note}")

    def finish(self) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=1.0, completed=1.0)
            self._task = None

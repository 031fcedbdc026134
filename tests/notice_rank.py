"""`pretrain` in which one rank sends itself, or its launcher, a notice as it comes to a chosen phase.

What is wanted stands in the environment. The phase is held until the notice has arrived at the rank, so that it meets that
phase and no other. What was sent and what arrived is noted in files, by the clock that all processes of a machine share.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

NOTICE = "SPARSELT_TESTS_NOTICE"  # a Notice as JSON
HOLD_SECONDS = 30.0
START = "start-up"
LEDGER_PHASES = ("data", "forward", "backward", "optimizer", "evaluate")
SAVING_PHASES = ("copying", "writing", "committing")  # the last on rank 0 alone
PHASES = (START, *LEDGER_PHASES, *SAVING_PHASES)


@dataclass
class Notice:
    """Who sends what to whom, and when."""

    rank: int
    phase: str
    occurrence: int  # how often the rank has come to the phase, from 1
    number: int  # the signal
    to_launcher: bool
    folder: str  # for the notes

    def __post_init__(self) -> None:
        self._seen = 0
        self.arrived = threading.Event()

    def meet(self) -> None:
        """The rank has come to the phase: send the notice if it is time, and hold the phase until it is here."""
        self._seen += 1
        if self._seen != self.occurrence:
            return
        self.send()
        deadline = time.monotonic() + HOLD_SECONDS
        while not self.arrived.is_set() and time.monotonic() < deadline:
            time.sleep(0.005)
        self.note("met", arrived=self.arrived.is_set())

    def send(self) -> None:
        """To this process or to the `deepspeed` command that it stands under."""
        pid = int(os.environ["SPARSELT_LAUNCHER"].split(":")[1]) if self.to_launcher else os.getpid()
        self.note("sent", phase=self.phase)
        os.kill(pid, self.number)

    def note(self, name: str, **facts: object) -> None:
        """Leave a file that says when."""
        path = Path(self.folder, f"{name}.json")
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"time": time.monotonic(), **facts}))
        partial.replace(path)


def plant(notice: Notice, rank: int) -> None:
    """Have arrivals noted on every rank, and the phase met on the one that sends."""
    from sparselt_dist.distributed import StopFlag

    remember = StopFlag._remember

    def remembered(self: StopFlag, number: int, frame: FrameType | None) -> None:
        remember(self, number, frame)
        notice.note(f"arrived_{rank}", signal=signal.Signals(number).name)
        notice.arrived.set()

    StopFlag._remember = remembered  # type: ignore[method-assign]
    if rank != notice.rank:
        return
    if notice.phase == START:
        _plant_start(notice)
    elif notice.phase in LEDGER_PHASES:
        _plant_ledger(notice)
    else:
        _plant_saving(notice)


def _plant_start(notice: Notice) -> None:
    """A launcher is told before this rank has its handlers, the rank itself as soon as it has."""
    from sparselt_dist import rank_report

    if notice.to_launcher:
        notice.send()
        return
    _before_or_after(rank_report, "announce", after=notice.meet)


def _plant_ledger(notice: Notice) -> None:
    from sparselt_dist.metrics import TimeLedger

    of_ledger = TimeLedger.phase

    @contextlib.contextmanager
    def phase(self: TimeLedger, name: str) -> Iterator[None]:
        with of_ledger(self, name):
            if name == notice.phase:
                notice.meet()
            yield

    TimeLedger.phase = phase  # type: ignore[method-assign]


def _plant_saving(notice: Notice) -> None:
    """The last two phases are those of a thread beside the one that trains."""
    from sparselt_dist import committing
    from sparselt_dist.snapshot import Snapshot

    if notice.phase == "copying":
        _before_or_after(Snapshot, "take", before=notice.meet)
    else:
        _before_or_after(
            committing, "commit" if notice.phase == "committing" else "write_rank_files", before=notice.meet
        )


def _before_or_after(
    owner: Any, name: str, before: Callable[[], None] = lambda: None, after: Callable[[], None] = lambda: None
) -> None:
    original = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        before()
        result = original(*arguments, **options)
        after()
        return result

    setattr(owner, name, wrapped)


if __name__ == "__main__":
    from sparselt_dist import cli, pretrain

    plant(Notice(**json.loads(os.environ[NOTICE])), int(os.environ["RANK"]))
    cli.leave(pretrain.main)

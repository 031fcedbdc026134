"""Whether the ranks stay as fast and as large as they were: stragglers, leaks, a run that slows down.

Once in a while, by the clock that all ranks have agreed on, each rank tells its own work a step (data and forward pass, in
which it waits for nobody) and its memory; a step itself pays nothing. Rank 0 says what has changed. On a GPU the forward
pass is launched and not awaited, so there it is the data that shows a slow rank.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from sparselt_dist import distributed
from sparselt_dist.metrics import TimeLedger
from sparselt_dist.timekeeping import Progress

FIRST_SECONDS, EVERY_SECONDS = 5.0, 60.0  # between looks: doubling from the first up to the second
OWN_WORK = ("data", "forward")
SLOW_RANK, LEAST_SLOW_SECONDS = 1.5, 0.002  # times the median, and more than it
LEAST_LEAK_GIB, LEAST_LEAK_SHARE, STEADY = 0.25, 0.1, 0.8
LEAK_LOOKS, SPEED_LOOKS = 10, 5
FIRST_LOOKS = 2  # fill caches
SLOWER, RECOVERED = 1.5, 1.2  # times the best


def slow_ranks(seconds: Sequence[float]) -> list[int]:
    """Ranks whose own work takes much longer than the (lower) median's."""
    middle = sorted(seconds)[(len(seconds) - 1) // 2]
    return [r for r, own in enumerate(seconds) if own > SLOW_RANK * middle and own > middle + LEAST_SLOW_SECONDS]


def leak(gibs: Sequence[float]) -> float | None:
    """GiB by which memory grew steadily over the looks; None if it did not, or they are few."""
    if len(gibs) < LEAK_LOOKS:
        return None
    grown = gibs[-1] - gibs[0]
    rises = sum(later > earlier for earlier, later in itertools.pairwise(gibs))
    is_steady = rises >= STEADY * (len(gibs) - 1)
    return grown if is_steady and grown > max(LEAST_LEAK_GIB, LEAST_LEAK_SHARE * gibs[0]) else None


class LeakWatch:
    """A memory of each rank over a whole run: looks that lie further apart the longer it lasts."""

    def __init__(self) -> None:
        self._looks: list[Sequence[float]] = []
        self._seen, self._every = 0, 1
        self._told: set[int] = set()

    def add(self, gibs: Sequence[float]) -> dict[int, float]:
        """The ranks whose memory grows, and by how many GiB, where that is new."""
        self._seen += 1
        if self._seen <= FIRST_LOOKS or self._seen % self._every:
            return {}
        self._looks.append(gibs)
        if len(self._looks) == 4 * LEAK_LOOKS:
            self._looks, self._every = self._looks[::2], 2 * self._every
        grown = {
            rank: leak([look[rank] for look in self._looks]) for rank in range(len(gibs)) if rank not in self._told
        }
        found = {rank: gib for rank, gib in grown.items() if gib is not None}
        self._told |= found.keys()
        return found


class SpeedWatch:
    """Seconds a token now against the best there were."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._best = float("inf")
        self._is_slow = False

    def add(self, seconds: float) -> float | None:
        """How many times slower the run has become, where that is new."""
        self._seconds = [*self._seconds, seconds][-SPEED_LOOKS:]
        if len(self._seconds) < SPEED_LOOKS:
            return None
        now = sorted(self._seconds)[SPEED_LOOKS // 2]
        self._best = min(self._best, now)
        was_slow, ratio = self._is_slow, now / self._best
        self._is_slow = ratio > SLOWER or (was_slow and ratio > RECOVERED)
        return ratio if self._is_slow and not was_slow else None


class Health:
    """One a rank; all call `look` after a step."""

    def __init__(
        self,
        ranks: distributed.Ranks,
        device: torch.device,
        ledger: TimeLedger,
        progress: Progress,
        say: Callable[[str], None],
    ) -> None:
        self.step_seconds: list[float] = []  # each rank's own work a step, at the last look
        self.step_share: dict[str, list[float]] = {}  # of them, by phase
        self._ranks, self._device, self._ledger, self._say = ranks, device, ledger, say
        self._pause = FIRST_SECONDS
        self._due = progress.seconds + FIRST_SECONDS
        self._before = (progress.step, progress.tokens, ledger.seconds())
        self._memory = {kind: LeakWatch() for kind in memory_gibs(device)}
        self._speed = SpeedWatch()
        self._slow: set[int] = set()
        self._told_slow: set[int] = set()

    def look(self, progress: Progress, *, now: bool = False) -> None:
        """Compare the ranks if it is time; all ranks call it together, with the same progress."""
        if progress.seconds < self._due and not now:
            return
        self._pause = min(2 * self._pause, EVERY_SECONDS)
        self._due = progress.seconds + self._pause
        steps, tokens, before = self._before
        seconds = self._ledger.seconds()
        self._before = (progress.step, progress.tokens, seconds)
        if (taken := progress.step - steps) < 1:
            return
        spent = {phase: (seconds[phase] - before[phase]) / taken for phase in seconds}
        training = sum(spent[phase] for phase in (*OWN_WORK, "backward", "optimizer", "communication")) * taken
        own = [spent[phase] for phase in OWN_WORK]
        rows = distributed.gather_objects((own, list(memory_gibs(self._device).values())), self._ranks)
        self.step_share = {phase: [work[place] for work, _ in rows] for place, phase in enumerate(OWN_WORK)}
        self.step_seconds = [sum(work) for work, _ in rows]
        self._compare()
        for place, (kind, watch) in enumerate(self._memory.items()):
            for rank, grown in watch.add([gibs[place] for _, gibs in rows]).items():
                self._say(f"rank {rank}: {kind} grows: {grown:.2f} GiB more than at first")
        if (drift := self._speed.add(training / max(progress.tokens - tokens, 1))) is not None:
            self._say(f"step {progress.step}: a token takes {drift:.1f} times as long as at the run's best; see perf/*")

    def summary(self) -> dict[str, Any]:
        """For `summary.json`: seconds of own work a step by rank, at the last look."""
        if len(self.step_seconds) < 2:
            return {}
        slowest = max(range(len(self.step_seconds)), key=self.step_seconds.__getitem__)
        return {"rank_step_seconds": [round(own, 6) for own in self.step_seconds], "slowest_rank": slowest}

    def _compare(self) -> None:
        """A rank is slow that was so at two looks in a row; said once until it recovers."""
        found = set(slow_ranks(self.step_seconds))
        if new := sorted((found & self._slow) - self._told_slow):
            table = ", ".join(f"{rank}: {own:.3f}" for rank, own in enumerate(self.step_seconds[:16]))
            for rank in new[:4]:
                parts = ", ".join(f"{phase} {each[rank]:.3f}" for phase, each in self.step_share.items())
                self._say(
                    f"rank {rank} is slow: {self.step_seconds[rank]:.3f} s of own work a step ({parts}); by rank {table}"
                )
        self._told_slow = (self._told_slow | set(new)) & found
        self._slow = found


def memory_gibs(device: torch.device) -> dict[str, float]:
    """What this rank and its loader processes hold of the host's memory, mapped files left out; on a GPU what it reserved too."""
    own = psutil.Process()
    held = {"memory": sum(_anonymous_gib(process) for process in (own, *own.children(recursive=True)))}
    return held | ({"device memory": torch.cuda.memory_reserved(device) / 2**30} if device.type == "cuda" else {})


def _anonymous_gib(process: psutil.Process) -> float:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{process.pid}/status").read_text().split("RssAnon:")[1].split()[0]) / 2**20
    with contextlib.suppress(psutil.Error):
        return float(process.memory_info().rss) / 2**30
    return 0.0  # it has ended

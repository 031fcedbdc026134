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
        self._memory: list[list[float]] = []  # of each look, by rank
        self._speed = SpeedWatch()
        self._slow: set[int] = set()
        self._told_slow: set[int] = set()
        self._told_leaks: set[int] = set()

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
        own = [*(spent[phase] for phase in OWN_WORK), _memory_gib(self._device)]
        rows = distributed.gather_objects(own, self._ranks)
        self.step_share = {phase: [row[place] for row in rows] for place, phase in enumerate(OWN_WORK)}
        self.step_seconds = [sum(row[:-1]) for row in rows]
        self._compare()
        self._look_for_leaks([row[-1] for row in rows])
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

    def _look_for_leaks(self, gibs: list[float]) -> None:
        self._memory = [*self._memory, gibs][-4 * LEAK_LOOKS :]
        for rank in set(range(len(gibs))) - self._told_leaks:
            grown = leak([look[rank] for look in self._memory[2:]])  # the first ones fill caches
            if grown is not None:
                self._told_leaks.add(rank)
                self._say(f"rank {rank}: memory grows: {grown:.2f} GiB more since {len(self._memory) - 2} looks ago")


def _memory_gib(device: torch.device) -> float:
    """Of the device, reserved; on a CPU what the process holds itself, mapped files left out."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device) / 2**30
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 2**20
    return float(psutil.Process().memory_info().rss) / 2**30

"""How a run with a budget in hours lands on its second: the clock, the reserve, and the size of its last steps.

The last checkpoint and the last held-out evaluation belong to the budget, so training ends earlier by what they are
predicted to take: the reserve. It follows from the last of each that was measured, before there was any from a rehearsal,
and holds a margin for what cannot be foreseen. Steps near the end are cut to the micro-batches that fit, so that the
run neither overruns nor leaves a step's length unused; the last one is the shortest, for its rate is the schedule's floor.

Invariants: pure functions of numbers that all ranks have agreed on; the clock never goes back. Free of torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

MARGIN_SHARE = 0.01  # of the budget, at most: what is kept free for a slow disk or a busy machine
LEAST_MARGIN_SECONDS = 1.0
NEW_WEIGHT = 0.3  # of the newest step in the pace
TRAINING_OVER_FORWARD = 3.0  # a micro-step beside an evaluation's forward pass: the backward pass is two more


class RunClock:
    """Seconds of the budget by a clock; time for which the clock went back, or stood, counts as none."""

    def __init__(self, spent: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seconds = spent
        self._mark = clock()

    def seconds(self) -> float:
        """Seconds spent up to now, earlier starts included."""
        now = self._clock()
        self._seconds += max(now - self._mark, 0.0)
        self._mark = now
        return self._seconds


class Pace(NamedTuple):
    """Seconds by rank 0's clock that things take; 0 is unknown."""

    micro_step: float = 0.0
    """To draw a micro-batch, forward and backward."""
    update: float = 0.0
    """The rest of a step: optimizer, logging."""
    slow_micro_step: float = 0.0
    """A slow one, by the slowest of late."""
    save: float = 0.0
    evaluate: float = 0.0

    def after_pass(self, seconds: float, micro_steps: int) -> Pace:
        """With the passes of one more step."""
        each = seconds / micro_steps
        mean = _blend(self.micro_step, each)
        return self._replace(micro_step=mean, slow_micro_step=max(each, _blend(self.slow_micro_step, mean)))

    def after_update(self, seconds: float) -> Pace:
        """With one more update."""
        return self._replace(update=_blend(self.update, seconds))


def _blend(old: float, new: float) -> float:
    return new if old == 0 else (1 - NEW_WEIGHT) * old + NEW_WEIGHT * new


def reserve_seconds(budget_seconds: float, pace: Pace) -> float:
    """What training leaves of the budget: an update, the last save and evaluation, and a margin."""
    after = pace.save + pace.evaluate
    return pace.update + after + min(MARGIN_SHARE * budget_seconds, LEAST_MARGIN_SECONDS + after / 2)


@dataclass(frozen=True)
class NextStep:
    """What to do next."""

    micro_steps: int
    """On each rank."""
    is_last: bool = False
    """No other fits after it: it is taken at the end of the schedule."""


def plan_step(left: float, wanted: int, pace: Pace) -> NextStep | None:
    """The next step, with `left` seconds until training ends; None: it ends here.

    A step of `wanted` micro-steps is cut to leave room for one more, short step, and that one to what is left, both at
    a slow pace: what is left over in the end is room for another short step, at the end of the schedule too. Where no
    pace is known yet, the step is taken whole while anything is left.
    """
    if pace.micro_step <= 0:
        return NextStep(wanted) if left > 0 else None
    shortest = pace.micro_step + pace.update
    if left < shortest / 2:  # half of a micro-step is within the margin
        return None
    slow = max(pace.slow_micro_step, pace.micro_step)
    before_last = math.floor((left - slow - 2 * pace.update) / slow)
    if before_last >= 1:
        return NextStep(min(wanted, before_last))
    fits = math.floor((left - pace.update) / slow)
    return NextStep(min(max(fits, 1), wanted), is_last=True)

"""The clock of a run: what all ranks agree on about time, and what follows from it for the next step.

Every rank holds one and calls `agree` together with the others; rank 0's clock and its measured pace then stand in the
progress of all, and plan, schedule and batch ramp are computed from these numbers alone (`landing.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from sparselt_dist import distributed
from sparselt_dist.budget import Budget, batch_size_at
from sparselt_dist.config import Config
from sparselt_dist.landing import NextStep, Pace, RunClock, plan_step, reserve_seconds

LATE = 0.9  # share of the budget from which on the reserve is predicted anew


@dataclass
class Progress:
    """What a run has done; with the weights, all that a resume needs."""

    step: int = 0
    tokens: int = 0
    position: int = 0  # samples drawn, over all ranks
    seconds: float = 0.0  # of the budget: prelude and training, restarts included, by rank 0's clock
    skipped: int = 0  # samples left out because their shard was bad
    prelude_seconds: float = 0.0  # of the objective's prelude, before the first step
    pace: Pace = field(default_factory=Pace)  # by rank 0's clock
    landed_seconds: float = 0.0  # the budget whose last step was taken
    discarded: int = 0  # steps without an update, for their loss or gradient was no number
    discarded_in_a_row: int = 0
    losses: list[float] = field(default_factory=list)  # of late, by which a spike is known
    left_out: list[list[int]] = field(default_factory=list)  # positions [from, to) of the stream, after spikes

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "pace": self.pace._asdict()}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Progress:
        """What `as_dict` gave; of another version's, what is known here."""
        values = {known.name: stored[known.name] for known in fields(cls) if known.name in stored}
        return cls(**values | {"pace": Pace(**stored.get("pace", {}))})


class Timekeeper:
    """Rank 0's clock for all, and the plan that follows from it."""

    def __init__(
        self,
        config: Config,
        progress: Progress,
        ranks: distributed.Ranks,
        *,
        micro_batch_size: int,
        device: torch.device,
        clock: Callable[[], float],
    ) -> None:
        self.config = config
        self.progress = progress
        self.ranks = ranks
        self.device = device
        self.clock = clock
        self.budget = Budget.from_section(config.budget, progress.prelude_seconds)
        self.unit = micro_batch_size * ranks.world_size  # sequences of a micro-step of all ranks
        self.pace = progress.pace  # by this rank's clock; what all go by is in `progress`
        self.next_step: NextStep | None = None
        self._run_clock: RunClock | None = None

    # ---- what is agreed

    def start(self) -> None:
        """Start the clock, where the checkpoint left it."""
        self._run_clock = RunClock(self.progress.seconds, self.clock)
        self.meet()

    def meet(self) -> None:
        """After something long: agree, and plan anew."""
        self.agree([])
        self.plan()

    def agree(self, votes: list[float]) -> list[float]:
        """The sum of the votes over ranks; with them goes what rank 0's clock says."""
        assert self._run_clock is not None
        clock = [self._run_clock.seconds(), *self.pace] if self.ranks.is_main else [0.0] * (1 + len(self.pace))
        numbers = torch.tensor([*votes, *clock], dtype=torch.float64).to(self.device)
        agreed: list[float] = distributed.reduce_sum(numbers).tolist()
        self.progress.seconds = agreed[len(votes)]
        self.progress.pace = Pace(*agreed[len(votes) + 1 :])
        return agreed[: len(votes)]

    # ---- what follows

    def plan(self) -> None:
        """Set the next step, None at the end of the budget. A run's first step is taken unless its prelude left no time."""
        self.next_step = self._planned()

    def _planned(self) -> NextStep | None:
        progress, limit = self.progress, self.budget.max_seconds
        seconds = progress.prelude_seconds if progress.step == 0 else progress.seconds
        if self.budget.spent(steps=progress.step, tokens=progress.tokens, seconds=seconds):
            return None
        wanted = self.batch_size(self.share(None)) // self.unit
        if limit is None or progress.step == 0:
            return NextStep(wanted)
        if progress.landed_seconds >= limit:  # a start after the last step
            return None
        return plan_step(self.left(), wanted, progress.pace)

    def landed_seconds(self, given_up: bool) -> float:
        """`Progress.landed_seconds` of a run that ends now: with more steps or tokens, one that these ended goes on."""
        progress, limit = self.progress, self.budget.max_seconds
        spent = self.budget.spent(steps=progress.step, tokens=progress.tokens, seconds=progress.prelude_seconds)
        return limit if limit is not None and (given_up or not spent) else 0.0

    def share(self, step: NextStep | None) -> float:
        """Where on the schedule a step lies: where the clock is; the last one at its end."""
        if self.progress.step == 0:
            return 0.0
        return 1.0 if step is not None and step.is_last else self.fraction()

    def fraction(self) -> float:
        """The share of the budget that is spent, of what the reserve leaves of it, in [0, 1]."""
        budget = replace(self.budget, reserve_seconds=self.reserve())
        return budget.fraction(steps=self.progress.step, tokens=self.progress.tokens, seconds=self.progress.seconds)

    def reserve(self) -> float:
        """Seconds of the budget for the last save and evaluation."""
        if self.budget.max_seconds is None:
            return 0.0
        given = self.config.budget.reserve_seconds
        return reserve_seconds(self.budget.max_seconds, self.progress.pace) if given is None else given

    def left(self) -> float:
        """Seconds until training ends, the reserve left out."""
        limit = np.inf if self.budget.max_seconds is None else self.budget.max_seconds
        return limit - self.reserve() - self.progress.seconds

    def batch_size(self, fraction: float) -> int:
        """Sequences of a global step; the ramp counts the micro-batches of all ranks as one."""
        target, ramp_end = self.config.train.global_batch_size, self.config.train.batch_ramp_end
        if ramp_end is None:
            return target
        return batch_size_at(fraction, micro_batch_size=self.unit, target=target, ramp_end=ramp_end)

    def needs_rehearsal(self) -> bool:
        """Whether the reserve is predicted and there is a step to come."""
        predicted = self.budget.max_seconds is not None and self.config.budget.reserve_seconds is None
        return predicted and self.next_step is not None

    def nears_the_end(self) -> bool:
        """Whether it is time to look again at what the reserve is for."""
        return self.needs_rehearsal() and self.fraction() >= LATE

    def complaint(self) -> str | None:
        """What to tell the user of a budget that leaves little for training, before the first step."""
        limit, pace = self.budget.max_seconds, self.progress.pace
        if limit is None or self.progress.step > 0 or self.left() > (limit - self.progress.prelude_seconds) / 2:
            return None
        return (
            f"budget.max_hours: of {limit:.1f} s the last save and evaluation are predicted to take "
            f"{pace.save + pace.evaluate:.1f} s; lower train.evaluate_samples, or give the run more time"
        )

    def verdict(self) -> str | None:
        """What to tell the user after the landing, if it was late."""
        limit = self.budget.max_seconds
        if limit is None or self.progress.seconds <= limit:
            return None
        return (
            f"budget.max_hours: the last save and evaluation ended {self.progress.seconds - limit:.1f} s after the budget of "
            f"{limit:.1f} s; a first step (compilation included), a save or an evaluation took longer than there was time"
        )

"""How much of a budget is spent, and everything that follows from it: learning rate and batch size.

A budget is a number of steps, tokens or hours; with several, the one spent furthest counts. All schedules
are pure functions of the spent share, `fraction` in [0, 1], so a resumed run continues them exactly.
The `budget-*` family and the batch ramp are those of cramming (Geiping & Goldstein 2022, official code,
`budget-triangle2` and the clock-driven ramp), clamped at the deadline, where the original goes negative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparselt_dist.config import BudgetSection

# Cramming's nominal step count: only a resolution of the clock (0.096 s of 24 h).
CLOCK_TICKS = 900_000

SCHEDULES = (
    "constant",
    "linear",
    "cosine",
    "wsd",
    "budget-constant",
    "budget-linear",
    "budget-cosine",
    "budget-triangle1",
    "budget-triangle2",
)


def _triangle(fraction: float, start: float, fall: float) -> float:
    """Rise from `start` to 1 over the first 1 - fall of the budget, then fall to 0."""
    return min(start + (1 - start) * fraction / (1 - fall), (1 - fraction) / fall)


def lr_multiplier(
    name: str, fraction: float, *, warmup: float = 0.0, decay: float = 0.2, min_lr_ratio: float = 0.0
) -> float:
    """The learning rate's share of its peak at a spent share of the budget.

    Args:
        name: one of SCHEDULES. The `budget-*` schedules are fixed shapes; warm-up and floor do not apply to them.
        fraction: spent share of the budget; below 0 counts as 0, at or past 1 gives the end value.
        warmup: share of the budget with a linear rise from 0 (first four schedules).
        decay: share of the budget of the final decay of `wsd`, as 1 - sqrt (Hägele et al. 2024).
        min_lr_ratio: floor that the decaying schedules reach at the end.

    Raises:
        ValueError: unknown name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule.name: found {name!r}, expected one of {', '.join(SCHEDULES)}")
    x = min(max(fraction, 0.0), 1.0)
    if name.startswith("budget-"):
        return _budget_multiplier(name, x, past_deadline=fraction > 1)
    if x < warmup:
        return x / warmup
    y = (x - warmup) / (1 - warmup)
    if name == "constant":
        return 1.0
    if name == "linear":
        shape = 1 - y
    elif name == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * y))
    else:
        shape = 1.0 if x <= 1 - decay else 1 - math.sqrt((x - (1 - decay)) / decay)
    return min_lr_ratio + (1 - min_lr_ratio) * shape


def _budget_multiplier(name: str, x: float, *, past_deadline: bool) -> float:
    if past_deadline:
        return 0.0
    if name == "budget-constant":
        return 1.0
    if name == "budget-linear":
        return 1 - x
    if name == "budget-cosine":
        return 0.5 * (1 + math.cos(math.pi * x))
    start = 0.5 if name == "budget-triangle1" else 0.25
    return max(_triangle(x, start, 0.25), 0.0)


def batch_size_at(fraction: float, *, micro_batch_size: int, target: int, ramp_end: float = 0.6) -> int:
    """Sequences of a global step at a spent share of the budget (cramming).

    Grows in whole micro-batches from one to `target`, which it reaches at `ramp_end`. With k clock ticks spent:
    min((floor(k * target / (ramp_end * ticks) / micro) + 1) * micro, target).
    """
    ticks = math.floor(fraction * CLOCK_TICKS)
    ramped = math.floor(ticks * target / (ramp_end * CLOCK_TICKS) / micro_batch_size) + 1
    return min(ramped * micro_batch_size, target)


@dataclass(frozen=True)
class Budget:
    """The limits of a run; None is off."""

    max_steps: int | None
    max_tokens: int | None
    max_seconds: float | None
    prelude_seconds: float = 0.0
    """What went before the first step. It counts against `max_seconds`; schedules run on what it left."""
    reserve_seconds: float = 0.0
    """What `max_seconds` holds for the last save and evaluation; schedules end before it."""

    @classmethod
    def from_section(cls, section: BudgetSection, prelude_seconds: float = 0.0) -> Budget:
        seconds = None if section.max_hours is None else section.max_hours * 3600
        return cls(section.max_steps, section.max_tokens, seconds, prelude_seconds)

    def fraction(self, *, steps: int, tokens: int, seconds: float) -> float:
        """Spent share in [0, 1] of the limit that is spent furthest; `seconds` with those of the prelude."""
        pairs: list[tuple[float, float]] = [
            (spent, limit) for spent, limit in ((steps, self.max_steps), (tokens, self.max_tokens)) if limit
        ]
        if self.max_seconds is not None:
            before = self.prelude_seconds
            pairs.append((seconds - before, self.max_seconds - self.reserve_seconds - before))
        shares = (spent / limit if limit > 0 else 1.0 for spent, limit in pairs)
        return min(max(shares, default=0.0), 1.0)

    def spent(self, *, steps: int, tokens: int, seconds: float) -> bool:
        """Whether a limit is reached."""
        return self.fraction(steps=steps, tokens=tokens, seconds=seconds) >= 1.0

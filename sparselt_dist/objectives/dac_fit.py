"""The training loop of stage 1 of DAC, for every kind of submodel: AdamW, a rate that follows steps and clock, a deadline.

A submodel is a module with an embedding `table`, whose rate is its own. The rate warms up over 2 % and falls by a cosine to
0, over the steps or, where they would not be done in time, over the clock. As long as the steps keep ahead of the clock, the
result is a function of the batches. A reconstruction; see `objectives/dac_submodels.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from sparselt_dist.objectives.settings import DACConfig

WARMUP = 0.02
GRACE = 0.02  # of the time limit: as long as the steps keep that pace, the clock has no say in the rate
_BETAS, _EPS = (0.9, 0.98), 1e-8
_Batch = TypeVar("_Batch")


class FitReport(NamedTuple):
    """What the training of a submodel took and gave."""

    steps: int
    seconds: float
    loss: float  # nats, mean over the last tenth of the steps; not a number without steps


def fit(
    submodel: nn.Module,
    batches: Iterable[_Batch],
    losses: Callable[[_Batch], tuple[Tensor, Tensor]],
    cfg: DACConfig,
    *,
    total_steps: int,
    max_seconds: float,
    clock: Callable[[], float],
    keep_going: Callable[[], None] = lambda: None,
    after_step: Callable[[], None] = lambda: None,
) -> FitReport:
    """Train a submodel in place until the batches, the configured minutes or `max_seconds` end; no step where these are 0.

    Args:
        submodel: its embedding is `submodel.table`.
        batches: one a step.
        losses: of a batch, fp32 scalars: what is minimised, and what is reported.
        cfg: rates and minutes.
        total_steps: number of batches.
        max_seconds: from now.
        clock: in seconds.
        keep_going: called before each step; may raise.
        after_step: called after each step.
    """
    started = clock()
    limit = min(60 * cfg.stage1_max_minutes, max_seconds)
    table = submodel.get_parameter("table.weight")
    rest = [parameter for parameter in submodel.parameters() if parameter is not table]
    peaks = (cfg.stage1_table_lr, cfg.stage1_peak_lr)
    groups = [{"params": params, "lr": peak} for params, peak in zip(([table], rest), peaks, strict=True)]
    optimizer = torch.optim.AdamW(groups, betas=_BETAS, eps=_EPS, weight_decay=0.0)
    reported: list[Tensor] = []
    elapsed = step_seconds = 0.0
    for batch in batches if limit > 0 else ():
        keep_going()
        now = clock() - started
        step_seconds, elapsed = now - elapsed, now
        if elapsed + step_seconds > limit:  # another step would end too late
            break
        fraction = max(len(reported) / total_steps, (elapsed / limit - GRACE) / (1 - GRACE))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate_at(fraction)
        total, shown = losses(batch)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        after_step()
        reported.append(shown.detach())
    last = reported[-max(1, len(reported) // 10) :]
    return FitReport(len(reported), clock() - started, float(torch.stack(last).mean()) if last else math.nan)


def index_batches(count: int, size: int, passes: int, seed: int) -> Iterator[Tensor]:
    """Indices of each step; every pass has its own order, and leaves out the rest that fills no batch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(passes):
        order = torch.randperm(count, generator=generator)
        yield from order[: count // size * size].split(size)


def rate_at(fraction: float) -> float:
    """Multiplier of the learning rate at a share [0, 1] of the training."""
    if fraction < WARMUP:
        return fraction / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (fraction - WARMUP) / (1 - WARMUP)))

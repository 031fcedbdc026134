"""Held-out means of an objective's loss and terms, over batches that do not depend on the run's seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from sparselt_dist.data.batch import Batch
from sparselt_dist.objectives.base import LossOutput


@torch.no_grad()
def heldout_means(
    model: Callable[[Batch], LossOutput], batches: Iterable[Batch], device: torch.device
) -> dict[str, float]:
    """`loss` (mean over all targets) and every term of the objective by its own name; empty without a target.

    Each term is its sum over its count, in float64, so the split into batches changes nothing. The caller puts the
    model into evaluation mode.
    """
    sums: dict[str, list[float]] = {}
    for batch in batches:
        targets = float(batch["num_targets"])
        output = model({key: value.to(device) for key, value in batch.items()})
        pairs = {**output.metrics, "loss": (output.loss * targets, torch.tensor(targets))}
        for name, (total, count) in pairs.items():
            held = sums.setdefault(name, [0.0, 0.0])
            held[0] += float(total)
            held[1] += float(count)
    return {name: total / count for name, (total, count) in sums.items() if count}

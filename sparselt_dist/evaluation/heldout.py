"""Held-out means of an objective's loss and terms, over batches that do not depend on the run's seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from sparselt_dist.data.batch import Batch
from sparselt_dist.objectives.base import LossOutput, SplitLossOutput, loss_terms


@torch.no_grad()
def heldout_means(
    model: Callable[[Batch], LossOutput | SplitLossOutput], batches: Iterable[Batch], device: torch.device
) -> dict[str, float]:
    """`loss` (mean over all targets) and every term of the objective by its own name; empty without a target.

    Each term is its sum over its count, in float64, so the split into batches changes nothing. The caller puts the
    model into evaluation mode.
    """
    sums: dict[str, list[float]] = {}
    for batch in batches:
        output = model({key: value.to(device) for key, value in batch.items()})
        parts = {f"loss/{key}": (part * batch[key], batch[key]) for key, part in loss_terms(output).items()}
        for name, (total, count) in {**output.metrics, **parts}.items():
            held = sums.setdefault(name, [0.0, 0.0])
            held[0] += float(total)
            held[1] += float(count)
    means = {name: total / count for name, (total, count) in sums.items() if count}
    parts_of_loss = [means.pop(name) for name in sorted(means) if name.startswith("loss/")]
    return {**means, "loss": sum(parts_of_loss)} if parts_of_loss else means

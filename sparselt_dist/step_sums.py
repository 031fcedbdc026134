"""What a global step adds up: the loss and its terms on a rank, and what all ranks drew together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from sparselt_dist import distributed
from sparselt_dist.data.batch import Batch
from sparselt_dist.objectives.base import loss_terms

if TYPE_CHECKING:
    from sparselt_dist.objectives.base import LossOutput, SplitLossOutput


@dataclass
class Sums:
    """Running (sum, count) of each metric of a step, on this rank."""

    values: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    losses: list[torch.Tensor] = field(default_factory=list)  # of each micro-batch, its parts added up

    def add(self, name: str, total: torch.Tensor, count: torch.Tensor) -> None:
        old = self.values.get(name)
        total, count = total.detach().double(), count.detach().double()  # each where it is: moving waits for the device
        self.values[name] = (total, count) if old is None else (old[0] + total, old[1] + count)

    def add_output(self, output: LossOutput | SplitLossOutput, batch: Batch) -> None:
        """Each part of the loss weighted by its own count in the batch, and every term of the objective."""
        parts = loss_terms(output)
        self.losses.append(sum(part.detach() for part in parts.values()))  # type: ignore[arg-type]
        for key, part in parts.items():
            self.add(f"loss/{key}", part * batch[key], batch[key])
        for name, (total, count) in output.metrics.items():
            self.add(f"term/{name}", total, count)

    def means(self, device: torch.device) -> dict[str, float]:
        """Means over all ranks; all ranks call it together. A metric that counted nothing is left out."""
        names = sorted(self.values)
        if not names:
            return {}
        flat = torch.stack([part.to(device) for name in names for part in self.values[name]])
        pairs = distributed.reduce_sum(flat).view(-1, 2).tolist()
        means = {name: total / count for name, (total, count) in zip(names, pairs, strict=True) if count}
        parts = [means.pop(name) for name in sorted(means) if name.startswith("loss/")]
        if not parts:
            return means
        # a loss of several denominators is no mean over one of them, so the objective's own total is replaced
        return {**means, "loss": sum(parts), "term/loss": sum(parts)}

    def share(self, counts: dict[str, int]) -> float:
        """This rank's part of the step's loss, where `counts` are those of all ranks: the parts add up to it."""
        named = ((name.removeprefix("loss/"), pair) for name, pair in self.values.items() if name.startswith("loss/"))
        return float(torch.stack([total / max(counts[key], 1) for key, (total, _) in named]).sum())

    def bad_losses(self) -> list[int]:
        """Numbers of the micro-batches whose loss is NaN or infinite."""
        return [number for number, loss in enumerate(self.losses) if not bool(torch.isfinite(loss).all())]


class Drawn(NamedTuple):
    """What the ranks drew together for a global step."""

    counts: dict[str, int]  # by batch key: num_targets, num_tokens and the objective's own
    positions: int  # of the rows, padding included
    skipped: int  # samples
    digest: int

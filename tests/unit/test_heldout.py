"""Held-out means: sums over counts, whatever the split into batches."""

import torch

from sparselt_dist.data.batch import Batch
from sparselt_dist.evaluation.heldout import heldout_means
from sparselt_dist.objectives.base import LossOutput

CPU = torch.device("cpu")


def _batch(losses: list[float]) -> Batch:
    return {"values": torch.tensor(losses, dtype=torch.float64), "num_targets": torch.tensor(len(losses))}


def _model(batch: Batch) -> LossOutput:
    values, count = batch["values"], torch.tensor(len(batch["values"]))
    loss = values.sum() / max(len(values), 1)
    return LossOutput(loss, {"loss": (values.sum() + 1, count), "above": ((values > 2).sum(), count)})


def test_means_weigh_by_targets_not_by_batches() -> None:
    whole = heldout_means(_model, [_batch([1.0, 2.0, 6.0, 3.0])], CPU)
    split = heldout_means(_model, [_batch([1.0]), _batch([]), _batch([2.0, 6.0, 3.0])], CPU)
    assert whole == split == {"loss": 3.0, "above": 0.5}


def test_nothing_is_reported_without_a_target() -> None:
    assert heldout_means(_model, [_batch([])], CPU) == {}

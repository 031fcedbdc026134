"""What a rank that is alone does not do, and what it does all the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparselt_dist.engine_start import reduce_nothing


class Engine:
    """Of DeepSpeed's engine what reduces gradients without ZeRO."""

    def __init__(self) -> None:
        self.used, self.unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.module = nn.ParameterList([self.used, self.unused, self.frozen])
        self.used.grad = torch.full((3,), 2.0)
        self.reduced = 0

    def buffered_allreduce_fallback(self, grads: Any = None, elements_per_buffer: int = 0) -> None:
        self.reduced += 1


def test_gradients_stay_where_they_are_and_missing_ones_become_zeros() -> None:
    engine: Any = Engine()
    before = engine.used.grad
    reduce_nothing(engine)
    engine.buffered_allreduce_fallback(grads=None, elements_per_buffer=5)  # as DeepSpeed calls it
    assert engine.reduced == 0 and engine.used.grad is before
    assert engine.unused.grad.tolist() == [0, 0, 0] and engine.frozen.grad is None

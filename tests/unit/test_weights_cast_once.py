"""Weights are cast for the first micro-batch of a step and not again, and the gradients are those of separate casts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparselt_dist.trainer import weights_cast_once

MICRO_BATCHES = 3


class CountCasts(TorchDispatchMode):
    """How often a tensor of this shape is cast to bfloat16."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.casts = shape, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._to_copy.default and args[0].shape == self.shape:
            self.casts += (kwargs or {}).get("dtype") == torch.bfloat16
        return function(*args, **(kwargs or {}))


def step(around: Callable[[], AbstractContextManager[object]]) -> tuple[int, Tensor]:
    """Casts of the weight, and its gradient, of a step of three micro-batches."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    rows = torch.randn(MICRO_BATCHES, 4, 6)
    with CountCasts(layer.weight.shape) as counted, around():
        for part in rows:
            with torch.autocast("cpu", torch.bfloat16):
                loss = layer(part).float().square().sum()
            loss.backward()
    assert layer.weight.grad is not None
    return counted.casts, layer.weight.grad


def test_a_step_casts_a_weight_once() -> None:
    apart_casts, apart = step(nullcontext)
    casts, gradient = step(lambda: weights_cast_once(torch.device("cpu"), 0))
    assert (apart_casts, casts) == (MICRO_BATCHES, 1)
    assert torch.equal(gradient, apart)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_casts_are_forgotten_after_the_step(stage: int) -> None:
    layer = nn.Linear(2, 2, bias=False)
    ones = torch.ones(1, 2)
    for value in (1.0, 3.0):  # an update between two steps
        nn.init.constant_(layer.weight, value)
        with weights_cast_once(torch.device("cpu"), stage), torch.autocast("cpu", torch.bfloat16):
            assert layer(ones).tolist() == [[2 * value, 2 * value]]


def test_stage_3_keeps_no_casts() -> None:
    casts, _ = step(lambda: weights_cast_once(torch.device("cpu"), 3))
    assert casts == MICRO_BATCHES

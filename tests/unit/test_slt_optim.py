"""Rates and decay by group, the optimizer of old transformers, and the schedule of the published run."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from sparselt_dist.budget import lr_multiplier
from sparselt_dist.objectives.contract import TinyBackbone
from sparselt_dist.objectives.settings import SLTConfig
from sparselt_dist.objectives.slt import SLTModule
from sparselt_dist.optim import HuggingFaceAdamW, parameter_groups


class _Model(nn.Module):
    """Backbone with a body and a head of its own, and the objective."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = TinyBackbone()
        self.backbone.body = nn.ModuleList([self.backbone.embedding, self.backbone.project, self.backbone.norm])
        self.backbone.mix_head = nn.LayerNorm(16)
        self.objective = SLTModule(SLTConfig(), self.backbone)


def test_the_encoder_has_its_own_rate_and_each_parameter_stands_once() -> None:
    model = _Model()
    groups = parameter_groups(model, 0.01, encoder_lr_ratio=0.1)
    assert [(group["weight_decay"], group["lr_ratio"]) for group in groups] == [
        (0.01, 1.0),
        (0.0, 1.0),
        (0.01, 0.1),
        (0.0, 0.1),
    ]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [[names[id(parameter)] for parameter in group["params"]] for group in groups]  # type: ignore[attr-defined]
    assert sorted(name for group in found for name in group) == sorted(names.values())
    assert set(found[2]) == {"backbone.embedding.weight", "backbone.project.weight"}
    assert set(found[3]) == {"backbone.project.bias", "backbone.norm.weight", "backbone.norm.bias"}
    assert {"objective.typer.type_vectors", "objective.typer.classifier.weight"} <= set(found[0])
    assert {"objective.decoder.head.bias", "objective.decoder.embedding_norm.weight"} <= set(found[1])


def test_equal_rates_make_two_groups() -> None:
    groups = parameter_groups(_Model(), 0.01)
    assert [(group["weight_decay"], group["lr_ratio"]) for group in groups] == [(0.01, 1.0), (0.0, 1.0)]


def _steps(optimizer_of: type[torch.optim.Optimizer], gradients: np.ndarray, decay: float) -> np.ndarray:
    parameter = nn.Parameter(torch.ones(gradients.shape[1], dtype=torch.float64))
    optimizer = optimizer_of([{"params": [parameter], "weight_decay": decay}], lr=0.01, eps=1e-3)  # type: ignore[call-arg]
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
    return parameter.detach().numpy()


def test_the_old_adamw_follows_its_formula() -> None:
    """Epsilon before the correction of v, decay after the update; torch's own differs visibly where v is small."""
    gradients = 1e-3 * np.random.default_rng(0).standard_normal((6, 5))
    value, first, second = np.ones(5), np.zeros(5), np.zeros(5)
    for taken, gradient in enumerate(gradients, start=1):
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        value = value - 0.01 * math.sqrt(1 - 0.999**taken) / (1 - 0.9**taken) * first / (np.sqrt(second) + 1e-3)
        value = value * (1 - 0.01 * 0.1)
    found = _steps(HuggingFaceAdamW, gradients, 0.1)
    np.testing.assert_allclose(found, value, rtol=1e-12)
    assert np.abs(found - _steps(torch.optim.AdamW, gradients, 0.1)).max() > 1e-3


def test_a_parameter_without_gradient_is_left_alone() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = HuggingFaceAdamW([{"params": [parameter]}], lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(3)) and not optimizer.state
    parameter.grad = torch.zeros(3)
    optimizer.step()
    assert torch.allclose(parameter, torch.full((3,), 0.95))  # a zero gradient still decays


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.0), (150, 0.5), (300, 1.0), (50_150, 0.5), (99_999, 1 / 99_700), (100_000, 0.0)]
)
def test_the_published_schedule(step: int, expected: float) -> None:
    assert lr_multiplier("linear", step / 100_000, warmup=0.003) == pytest.approx(expected, abs=1e-9)

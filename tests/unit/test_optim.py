"""Decay groups."""

import torch
from torch import nn

from sparselt_dist.config import OptimSection
from sparselt_dist.optim import build_optimizer, parameter_groups


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.ln_1 = nn.LayerNorm(4)
        self.dense = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 10, bias=False)
        self.decoder.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(1))


def test_biases_and_norms_are_not_decayed_and_tied_weights_stand_once() -> None:
    model = Tied()
    decayed, kept = parameter_groups(model, 0.01)
    assert {id(p) for p in decayed["params"]} == {id(model.embed.weight), id(model.dense.weight), id(model.scale)}
    assert {id(p) for p in kept["params"]} == {id(model.dense.bias), id(model.ln_1.weight), id(model.ln_1.bias)}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.01, 0.0)


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight.requires_grad_(False)
    (group,) = parameter_groups(model, 0.1)
    assert group["params"] == [model[0].weight]


def test_optimizer_takes_the_sections_values() -> None:
    optimizer = build_optimizer(Tied(), OptimSection(peak_lr=0.5, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.2))
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]

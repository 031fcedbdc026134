"""Decay groups."""

import pytest
import torch
from torch import nn

from sparselt_dist.config import OptimSection
from sparselt_dist.errors import ConfigError
from sparselt_dist.optim import build_optimizer, hidden_matrices, parameter_groups, state_keys


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


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.up = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.down = nn.Linear(10, 6, bias=False)


class Whole(nn.Module):
    """The places of a pretraining model: a body, a tied and an untied head, an objective."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Module()
        self.backbone.body = Body()
        self.backbone.head = nn.Linear(6, 12, bias=False)
        self.objective = nn.Linear(6, 3)


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_muon_takes_the_matrices_of_the_body_and_adamw_all_else() -> None:
    model = Whole()
    body = model.backbone.body
    optimizer = build_optimizer(model, OptimSection(name="muon", peak_lr=0.1, weight_decay=0.5), encoder_lr_ratio=0.25)
    of_muon = [group for group in optimizer.param_groups if state_keys(group) == ("momentum_buffer",)]
    assert {id(p) for group in of_muon for p in group["params"]} == {id(body.up.weight), id(body.down.weight)}
    assert [(group["weight_decay"], group["lr_ratio"]) for group in of_muon] == [(0.5, 0.25)]
    everywhere = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(everywhere) == sorted(id(p) for p in model.parameters())


def test_a_table_tied_to_a_linear_layer_of_the_body_is_no_hidden_matrix() -> None:
    model = Whole()
    model.backbone.body.down = nn.Linear(6, 12, bias=False)
    model.backbone.body.down.weight = model.backbone.body.embed.weight
    assert hidden_matrices(model) == {id(model.backbone.body.up.weight)}


def test_muon_moves_along_the_orthogonal_factor_and_as_far_as_adamw() -> None:
    model, lr, decay = Whole(), 0.01, 0.5
    matrix = model.backbone.body.up.weight  # [10, 6]
    start, start_bias = matrix.detach().clone(), model.backbone.body.up.bias.detach().clone()
    optimizer = build_optimizer(model, OptimSection(name="muon", peak_lr=lr, weight_decay=decay))
    give_gradients(model, 1)
    gradient = matrix.grad.clone()
    optimizer.step()
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    moved = (start * (1 - lr * decay) - matrix.detach()) / (lr * 0.2 * 10**0.5)
    along = left.T @ moved @ right.T  # the identity, as nearly as five iterations in bfloat16 make it
    assert torch.allclose(along.diagonal(), torch.ones(6), atol=0.4)
    assert (along - along.diagonal().diag()).abs().max() < 0.1
    assert 0.7 < (moved * 0.2 * 10**0.5).square().mean().sqrt() / 0.2 < 1.3
    # AdamW's first step is the sign of the gradient
    moved_bias = start_bias - model.backbone.body.up.bias.detach()
    torch.testing.assert_close(moved_bias, lr * model.backbone.body.up.bias.grad.sign(), rtol=1e-3, atol=1e-6)


def test_rates_set_on_the_groups_reach_both_optimizers_and_states_are_one() -> None:
    model = Whole()
    optimizer = build_optimizer(model, OptimSection(name="muon"))
    before = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    give_gradients(model, 1)
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    for group in optimizer.param_groups:
        assert all(set(state_keys(group)) <= optimizer.state[p].keys() for p in group["params"])


def test_muon_without_a_matrix_is_refused() -> None:
    model = Whole()
    model.backbone.body = nn.Embedding(3, 4)
    with pytest.raises(ConfigError, match=r"optim\.name: found 'muon'"):
        build_optimizer(model, OptimSection(name="muon"))

"""Properties of the contrastive loss: bounds, invariances, paths of the gradient, edge cases, dtypes, memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparselt_dist.objectives.cwt import (
    contrast_with,
    contrastive_weight_tying_loss,
    contrastive_weight_tying_loss_from_ids,
    distinct_columns,
)

Form = Callable[..., Tensor]


def from_rows(hidden: Tensor, table: Tensor, ids: Tensor, **options: Any) -> Tensor:
    return contrastive_weight_tying_loss(hidden, F.embedding(ids, table), **options)


FORMS = pytest.mark.parametrize("form", [from_rows, contrastive_weight_tying_loss_from_ids])


def draw(count: int, vocabulary: int, width: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 hidden states [K, D] and table [V, D], both with gradients, and ids [K]."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, width, generator=generator, dtype=torch.float64, requires_grad=True)
    table = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64, requires_grad=True)
    return hidden, table, torch.randint(vocabulary, (count,), generator=generator)


@FORMS
def test_distinct_targets_make_it_a_cross_entropy_over_the_batch(form: Form) -> None:
    hidden, table, _ = draw(12, 30)
    ids = torch.randperm(30, generator=torch.Generator().manual_seed(1))[:12]
    expected = F.cross_entropy(hidden @ table[ids].T, torch.arange(12))
    assert form(hidden, table, ids).item() == pytest.approx(expected.item(), abs=1e-12)


@FORMS
def test_all_ids_once_make_it_the_full_tied_cross_entropy(form: Form) -> None:
    hidden, table, _ = draw(30, 30)
    ids = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(form(hidden, table, ids), [hidden, table])
    theirs = torch.autograd.grad(F.cross_entropy(hidden @ table.T, ids), [hidden, table])
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-12)


@FORMS
def test_equal_targets_give_log_k_and_no_gradient(form: Form) -> None:
    hidden, table, _ = draw(9, 30)
    loss = form(hidden, table, torch.full((9,), 4))
    assert loss.item() == pytest.approx(math.log(9), abs=1e-12)
    for gradient in torch.autograd.grad(loss, [hidden, table]):
        assert gradient.abs().max() < 1e-12


def test_the_rows_of_equal_targets_do_have_gradients() -> None:
    hidden, table, _ = draw(9, 30)
    rows = table.detach()[torch.full((9,), 4)].requires_grad_()
    contrastive_weight_tying_loss(hidden, rows).backward()
    expected = (hidden.detach().mean(dim=0) - hidden.detach()) / 9
    torch.testing.assert_close(rows.grad, expected, rtol=0, atol=1e-12)


@FORMS
def test_one_target_gives_zero(form: Form) -> None:
    hidden, table, ids = draw(1, 30)
    loss = form(hidden, table, ids)
    assert loss.item() == 0.0
    for gradient in torch.autograd.grad(loss, [hidden, table]):
        assert not gradient.any()


@FORMS
def test_no_target_gives_an_attached_zero(form: Form) -> None:
    hidden, table, ids = draw(0, 30)
    loss = form(hidden, table, ids)
    assert loss.item() == 0.0
    of_hidden, of_table = torch.autograd.grad(loss, [hidden, table])
    assert of_hidden.shape == (0, 8) and of_table.shape == table.shape and not of_table.any()


@FORMS
def test_order_of_the_targets_does_not_matter(form: Form) -> None:
    hidden, table, ids = draw(20, 9)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(5))
    loss, other = form(hidden, table, ids), form(hidden[order], table, ids[order])
    assert loss.item() == pytest.approx(other.item(), abs=1e-12)
    (first,), (second,) = torch.autograd.grad(loss, [hidden]), torch.autograd.grad(other, [hidden])
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


@FORMS
def test_one_vector_added_to_all_rows_of_the_table_changes_nothing(form: Form) -> None:
    hidden, table, ids = draw(20, 9)
    loss = form(hidden, table, ids)
    assert form(hidden, table + torch.randn(8, dtype=torch.float64), ids).item() == pytest.approx(
        loss.item(), abs=1e-11
    )
    (of_table,) = torch.autograd.grad(loss, [table])
    assert of_table.sum(dim=0).abs().max() < 1e-12


@FORMS
def test_loss_is_at_least_the_mean_log_count_and_log_k_at_the_start(form: Form) -> None:
    hidden, table, ids = draw(200, 20, width=64)
    counts = torch.bincount(ids, minlength=20)[ids]
    assert form(hidden * 50, table, ids).item() >= counts.log().mean().item()
    normed = F.layer_norm(hidden, (64,))
    assert form(normed, table * 0.02, ids).item() == pytest.approx(math.log(200), abs=0.3)


@FORMS
def test_gradient_reaches_exactly_the_rows_of_the_targets(form: Form) -> None:
    hidden, table, ids = draw(7, 30)
    (of_table,) = torch.autograd.grad(form(hidden.detach(), table, ids), [table])
    assert set(of_table.abs().sum(dim=1).nonzero().flatten().tolist()) == set(ids.tolist())


@FORMS
def test_temperature_divides_scores_and_nothing_is_normalised(form: Form) -> None:
    hidden, table, ids = draw(20, 9)
    cold = form(hidden, table, ids, temperature=0.25)
    assert cold.item() == pytest.approx(form(hidden / 0.25, table, ids).item(), abs=1e-12)
    assert abs(form(2 * hidden, table, ids).item() - form(hidden, table, ids).item()) > 1e-2


@FORMS
def test_bfloat16_inputs_are_scored_in_float32(form: Form) -> None:
    hidden, table, ids = draw(64, 40, width=32)
    exact = form(hidden, table, ids).item()
    low, low_table = (tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, table))
    loss = form(low, low_table, ids)
    assert loss.dtype == torch.float32
    of_rounded = form(low.detach().double(), low_table.detach().double(), ids).item()
    assert loss.item() == pytest.approx(of_rounded, rel=1e-6)  # nothing but the inputs is rounded
    assert loss.item() == pytest.approx(exact, rel=2e-2)
    loss.backward()
    assert low.grad is not None and low.grad.dtype == torch.bfloat16 and bool(low.grad.isfinite().all())


@FORMS
def test_autocast_leaves_the_loss_alone(form: Form) -> None:
    hidden, table, ids = (tensor.float() if tensor.is_floating_point() else tensor for tensor in draw(64, 40))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = form(hidden, table, ids)
    assert inside.dtype == torch.float32 and torch.equal(inside, form(hidden, table, ids))


class _Sizes(TorchDispatchMode):
    """Bytes of every tensor that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        parts = result if isinstance(result, (tuple, list)) else [result]
        self.bytes += [part.nbytes for part in parts if isinstance(part, Tensor)]
        return result


def sizes_of_loss(vocabulary: int, count: int = 256) -> list[int]:
    """What forward and backward hold, from the gathered rows of the table on."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(30_000, (count,), generator=generator)
    table = torch.zeros(vocabulary, 4)
    hidden = torch.randn(count, 4, generator=generator, requires_grad=True)
    columns = distinct_columns(ids)
    rows = F.embedding(columns.ids_C, table).requires_grad_()
    with _Sizes() as sizes:
        contrast_with(hidden, rows, columns).total.backward()
    return sizes.bytes


def test_memory_of_the_loss_does_not_depend_on_the_vocabulary() -> None:
    assert sizes_of_loss(30_000) == sizes_of_loss(1_000_000)


def test_scores_of_many_targets_exist_a_piece_at_a_time() -> None:
    """16,384 targets of 64 ids with 2,048 scores at once: no tensor comes near all scores."""
    hidden, table, _ = draw(4096, 64, width=4)
    ids = torch.arange(4096) % 64
    columns = distinct_columns(ids)
    rows = F.embedding(columns.ids_C, table.detach()).requires_grad_()
    with pytest.MonkeyPatch.context() as patch, _Sizes() as sizes:
        patch.setattr("sparselt_dist.objectives.linear_cross_entropy._SCORES_AT_ONCE", 128 * 64)
        loss = contrast_with(hidden, rows, columns)
        loss.total.backward()
    assert max(sizes.bytes) <= max(128 * 64, 4096 * 4) * 8 < 4096 * 64 * 8
    expected = contrastive_weight_tying_loss(hidden.detach(), table.detach()[ids])
    assert loss.total.item() / 4096 == pytest.approx(expected.item(), abs=1e-11)

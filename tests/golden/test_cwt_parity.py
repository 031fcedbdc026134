"""Contrastive weight tying against independent float64 forms: NumPy by the equations, the published formula, slow loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sparselt_dist.objectives.cwt import (
    contrast_with,
    contrastive_weight_tying_loss,
    contrastive_weight_tying_loss_from_ids,
    distinct_columns,
    repeated_columns,
)
from sparselt_dist.objectives.cwt_collation import HeadlessDraws, HeadlessRule, headless_corruption

Array = NDArray[np.float64]

# name -> (K, V, D, scale of the hidden states, temperature)
SHAPES = {
    "fewer targets than ids": (12, 40, 6, 1.0, 1.0),
    "as many": (30, 30, 5, 1.0, 1.0),
    "more": (90, 17, 8, 2.0, 1.0),
    "one id": (9, 1, 4, 1.0, 1.0),
    "one target": (1, 20, 4, 1.0, 1.0),
    "cold": (25, 30, 6, 1.0, 0.3),
    "large scores": (25, 30, 6, 40.0, 1.0),
}


def case(name: str) -> tuple[Array, Array, NDArray[np.int64], float]:
    """Hidden states [K, D], table [V, D], ids [K] and temperature."""
    count, vocabulary, width, scale, temperature = SHAPES[name]
    generator = np.random.default_rng(len(name))
    ids = generator.integers(0, vocabulary, count)
    return generator.normal(size=(count, width)) * scale, generator.normal(size=(vocabulary, width)), ids, temperature


def reference(hidden: Array, table: Array, ids: NDArray[np.int64], temperature: float) -> tuple[float, Array, Array]:
    """Loss, dL/dA and dL/dE written out from the equations, one row at a time."""
    count = len(ids)
    rows = table[ids]
    loss, of_hidden, of_table = 0.0, np.zeros_like(hidden), np.zeros_like(table)
    for i in range(count):
        scores = rows @ hidden[i] / temperature
        top = scores.max()
        shares = np.exp(scores - top)
        loss += top + math.log(shares.sum()) - scores[i]
        shares /= shares.sum()
        of_hidden[i] = (shares @ rows - rows[i]) / (count * temperature)
        for j in range(count):
            of_table[ids[j]] += (shares[j] - (i == j)) * hidden[i] / (count * temperature)
    return loss / count, of_hidden, of_table


def leaves(*arrays: Array, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.tensor(array, dtype=dtype, requires_grad=True) for array in arrays]


def repeated(hidden: Tensor, table: Tensor, ids: Tensor, temperature: float) -> Tensor:
    return contrastive_weight_tying_loss(hidden, F.embedding(ids, table), temperature=temperature)


def distinct(hidden: Tensor, table: Tensor, ids: Tensor, temperature: float) -> Tensor:
    return contrastive_weight_tying_loss_from_ids(hidden, table, ids, temperature=temperature)


def in_pieces(hidden: Tensor, table: Tensor, ids: Tensor, temperature: float) -> Tensor:
    columns = repeated_columns(ids)
    return contrast_with(hidden, F.embedding(ids, table), columns, temperature=temperature).total / len(ids)


@pytest.mark.parametrize("form", [repeated, distinct, in_pieces])
@pytest.mark.parametrize("name", SHAPES)
def test_loss_and_gradients_equal_the_equations(form: Any, name: str) -> None:
    hidden, table, ids, temperature = case(name)
    expected, of_hidden, of_table = reference(hidden, table, ids, temperature)
    predictions, weights = leaves(hidden, table)
    loss = form(predictions, weights, torch.from_numpy(ids), temperature)
    loss.backward()
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected, abs=1e-12 * max(1.0, abs(expected)))
    assert predictions.grad is not None and weights.grad is not None
    np.testing.assert_allclose(predictions.grad.numpy(), of_hidden, atol=1e-12)
    np.testing.assert_allclose(weights.grad.numpy(), of_table, atol=1e-11)


@pytest.mark.parametrize("form", [repeated, distinct])
def test_float32_is_close_to_float64(form: Any) -> None:
    for name in SHAPES:
        hidden, table, ids, temperature = case(name)
        expected, of_hidden, of_table = reference(hidden, table, ids, temperature)
        predictions, weights = leaves(hidden, table, dtype=torch.float32)
        loss = form(predictions, weights, torch.from_numpy(ids), temperature)
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6), name
        assert predictions.grad is not None and weights.grad is not None
        np.testing.assert_allclose(predictions.grad.numpy(), of_hidden, atol=2e-5)
        np.testing.assert_allclose(weights.grad.numpy(), of_table, atol=1e-4)


def published(hidden: Array, rows: Array, temperature: float = 1.0) -> float:
    """Exponentials first, 1e-9 in the denominator, as the published code computes it; in float64."""
    powers = np.exp(hidden @ rows.T / temperature)
    return float(-np.log(np.diagonal(powers) / (powers.sum(axis=1) + 1e-9)).mean())


@pytest.mark.parametrize("shift", [0.0, -7.0, -20.0, -60.0])
def test_eps_in_the_log_domain_is_the_published_formula(shift: float) -> None:
    """A constant added to all scores of a row shows with eps, and not without."""
    hidden, table, ids, _ = case("fewer targets than ids")
    # one more coordinate shifts every score
    hidden = np.concatenate([hidden, np.full((len(hidden), 1), shift)], axis=1)
    rows = np.concatenate([table[ids], np.ones((len(ids), 1))], axis=1)
    ours = contrastive_weight_tying_loss(torch.tensor(hidden), torch.tensor(rows), eps=1e-9)
    assert ours.item() == pytest.approx(published(hidden, rows), abs=1e-12)
    exact = contrastive_weight_tying_loss(torch.tensor(hidden), torch.tensor(rows)).item()
    hidden[:, -1] = 0
    unshifted = contrastive_weight_tying_loss(torch.tensor(hidden), torch.tensor(rows)).item()
    assert exact == pytest.approx(unshifted, abs=1e-12)
    assert (ours.item() - exact > 1e-4) == (shift <= -20)


@pytest.mark.parametrize("scores", [(120.0, 0.0), (-150.0, -160.0), (0.0, 60.0), (300.0, -300.0)])
def test_float32_survives_what_exponentials_do_not(scores: tuple[float, float]) -> None:
    """Overflow, underflow, and the lost gradient of a target far below a negative: loss and gradients as in float64."""
    right, wrong = scores
    hidden, rows = np.eye(3), np.full((3, 3), wrong)
    np.fill_diagonal(rows, right)
    found = {}
    for dtype in (torch.float32, torch.float64):
        predictions, targets = leaves(hidden, rows, dtype=dtype)
        for form in (repeated, distinct):
            predictions.grad = targets.grad = None
            loss = form(predictions, targets, torch.arange(3), 1.0)
            loss.backward()
            assert predictions.grad is not None and targets.grad is not None
            found[dtype, form] = [loss.item(), predictions.grad.double(), targets.grad.double()]
    for form in (repeated, distinct):
        single, double = found[torch.float32, form], found[torch.float64, form]
        assert math.isfinite(single[0]) and single[0] == pytest.approx(double[0], rel=1e-4, abs=1e-4)
        torch.testing.assert_close(single[1], double[1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(single[2], double[2], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- corruption


def slow_corruption(
    ids: NDArray[np.int64], draws: HeadlessDraws, row: int, rule: HeadlessRule
) -> tuple[list[int], list[int], set[int]]:
    """The published corruption of one row by loops: what the model sees, the copy, and the targets."""
    length = len(ids)
    copy = ids.tolist()
    for place in range(length):
        drawn = int(draws.random_ids_BL[row, place])
        if draws.random_step_BL[row, place] < rule.random_share and drawn not in rule.never_drawn:
            copy[place] = drawn
    eligible = [token not in rule.never_targets for token in copy]
    most = math.ceil(rule.target_share * length)
    ranked = sorted((p for p in range(length) if eligible[p]), key=lambda p: -draws.target_BL[row, p])
    limit = math.ceil(rule.target_share * sum(eligible))
    kept = [rank for rank in range(most) if sum(eligible[: rank + 1]) <= limit]
    targets = {ranked[rank] for rank in kept if rank < len(ranked)}
    seen = [
        rule.mask_id if p in targets and draws.mask_BL[row, p] < rule.mask_share else copy[p] for p in range(length)
    ]
    return seen, copy, targets


@pytest.mark.parametrize("specials", ["none", "leading", "scattered"])
def test_published_corruption_equals_slow_loops(specials: str) -> None:
    generator = np.random.default_rng(3)
    rows, length, vocabulary = 40, 64, 50
    ids = generator.integers(5, vocabulary, (rows, length))
    if specials == "leading":
        ids[:, 0], ids[:, -1] = 1, 2
    if specials == "scattered":
        ids[generator.random(ids.shape) < 0.2] = 2
    rule = HeadlessRule(0.15, 0.8, 0.1, mask_id=4, never_drawn=np.arange(5), never_targets=np.array([0, 1, 2]))
    draws = HeadlessDraws(
        generator.random(ids.shape),
        generator.integers(0, vocabulary, ids.shape),
        generator.random(ids.shape),
        generator.random(ids.shape),
    )
    found = headless_corruption(ids, np.ones_like(ids), draws, rule)
    for row in range(rows):
        seen, copy, targets = slow_corruption(ids[row], draws, row, rule)
        assert found.input_ids_BL[row].tolist() == seen
        assert found.copy_BL[row].tolist() == copy
        assert set(np.flatnonzero(found.targets_BL[row]).tolist()) == targets
    if specials != "scattered":  # a leading special token lets one more target in, up to the most
        assert (found.targets_BL.sum(axis=1) == 10).all()


def test_columns_count_what_stands_in_the_denominator() -> None:
    ids = torch.tensor([7, 3, 7, 7, 9])
    columns = distinct_columns(ids, first=1, count=3)
    assert columns.ids_C.tolist() == [3, 7, 9] and columns.labels_K.tolist() == [0, 1, 1]
    assert columns.log_multiplicity_C.exp().tolist() == pytest.approx([1, 3, 1])
    assert columns.log_counts_K.exp().tolist() == pytest.approx([1, 3, 3])
    whole = repeated_columns(ids, first=1, count=3)
    assert whole.ids_C.tolist() == ids.tolist() and whole.labels_K.tolist() == [1, 2, 3]
    assert whole.log_counts_K.tolist() == columns.log_counts_K.tolist()

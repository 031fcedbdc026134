"""The latent typer, its regularisers and the temperature against independent numpy forms, limits and published figures."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparselt_dist.objectives.latent_typing import best_types, draw_types, temperature_of_budget
from sparselt_dist.objectives.slt import LatentTyper, diversity_loss, sparsity_loss, temperature_at

B, T, D, K = 3, 5, 8, 6
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])


def _typer(num_types: int = K, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[LatentTyper, Tensor]:
    """A typer with moved weights, and hidden states [B, T, D]."""
    torch.manual_seed(0)
    typer = LatentTyper(D, num_types).to(dtype)
    hidden = scale * torch.randn(B, T, D, dtype=dtype)
    return typer, hidden


def _noise(num_types: int = K) -> Tensor:
    return torch.from_numpy(np.random.default_rng(3).gumbel(size=(B, T, num_types)))


def _reference(typer: LatentTyper, hidden: Tensor, noise: Tensor, temperature: float) -> dict[str, np.ndarray]:
    """Equations written down in float64, token by token."""
    table, vectors = typer.classifier.weight.detach().numpy(), typer.type_vectors.detach().numpy()
    scores = np.zeros((B, T, len(table)))
    for row in range(B):
        for place in range(T):
            for kind in range(1, len(table)):
                if MASK[row, place]:
                    scores[row, place, kind] = sum(table[kind] * hidden[row, place].numpy())
    exponentials = np.exp(scores)
    noisy = np.exp((scores + noise.numpy()) / temperature)
    draw = noisy / noisy.sum(-1, keepdims=True)
    mixture = sum(draw[..., kind, None] * vectors[kind] for kind in range(1, len(table)))
    return {
        "scores": scores,
        "probabilities": exponentials / exponentials.sum(-1, keepdims=True),
        "weights": draw,
        "type_vectors": np.asarray(mixture),
        "types": np.where(scores[..., 1:].max(-1) > 0, scores.argmax(-1), 0),
    }


def _regularisers(probabilities: np.ndarray) -> tuple[float, float]:
    """Sparsity and diversity by their definitions."""
    tokens = probabilities[MASK.numpy() == 1]
    mean = tokens.mean(axis=0)
    perplexity = math.exp(-sum(share * math.log(share + 1e-7) for share in mean))
    return -math.log(mean[0] + np.finfo(np.float64).tiny), (len(mean) - perplexity) / len(mean)


# ---------------------------------------------------------------- the typer


@pytest.mark.parametrize("temperature", [5.0, 1.3, 0.5])
def test_training_outputs_equal_the_equations(temperature: float) -> None:
    typer, hidden = _typer()
    found = typer(hidden, MASK, temperature=temperature, gumbel_noise=_noise())
    expected = _reference(typer, hidden, _noise(), temperature)
    for name in ("probabilities", "weights", "type_vectors"):
        value = getattr(found, name)
        assert value.dtype == torch.float64
        np.testing.assert_allclose(value.detach().numpy(), expected[name], rtol=1e-12, atol=1e-14)
    assert np.array_equal(found.types.numpy(), expected["types"])
    assert (found.types != 0).any() and (found.types == 0).any()


def test_evaluation_takes_the_best_type_without_noise_or_temperature() -> None:
    typer, hidden = _typer()
    types = typer(hidden, MASK, temperature=5.0, gumbel_noise=_noise()).types
    typer.eval()
    found = typer(hidden.requires_grad_(), MASK, temperature=0.5, gumbel_noise=_noise())
    assert torch.equal(found.types, types)  # the same in both modes
    assert torch.equal(found.weights, torch.nn.functional.one_hot(types, K).double())
    vectors = typer.type_vectors.detach().clone()
    vectors[0] = 0
    assert torch.equal(found.type_vectors, vectors[types])
    assert not found.weights.requires_grad  # no path to the scores
    assert (found.type_vectors[types == 0] == 0).all()


def test_a_token_is_null_exactly_where_no_other_score_is_above_zero() -> None:
    scores = torch.tensor([[[0.0, -1.0, -2.0], [0.0, 0.0, -1.0], [0.0, 0.0, 0.0], [0.0, 1e-30, -1.0], [0.0, 1.0, 2.0]]])
    assert best_types(scores).tolist() == [[0, 0, 0, 1, 2]]
    typer, hidden = _typer()
    assert (typer(0 * hidden, MASK, temperature=1.0).types == 0).all()
    scores, _ = typer.distribution(hidden, MASK)
    assert torch.equal(best_types(scores) == 0, scores[..., 1:].max(-1).values <= 0)


def test_the_null_row_of_both_tables_has_no_effect_and_no_gradient() -> None:
    typer, hidden = _typer()
    hidden.requires_grad_()

    def outputs() -> list[Tensor]:
        for value in (typer.classifier.weight, typer.type_vectors, hidden):
            value.grad = None
        found = typer(hidden, MASK, temperature=0.7, gumbel_noise=_noise())
        total = found.type_vectors.sin().sum() + sparsity_loss(found.probabilities, MASK)
        (total + diversity_loss(found.probabilities, MASK)).backward()
        gradients = [value.grad.clone() for value in (typer.classifier.weight, typer.type_vectors, hidden)]  # type: ignore[union-attr]
        return [*found, *gradients]

    before = outputs()
    assert (before[4][0] == 0).all() and (before[5][0] == 0).all()  # exactly
    assert (before[4][1:] != 0).all() and (before[5][1:] != 0).all()
    with torch.no_grad():
        typer.classifier.weight[0] += 1e6
        typer.type_vectors[0] -= 1e6
    assert all(torch.equal(old, new) for old, new in zip(before, outputs(), strict=True))


def test_padding_has_zero_scores_and_longer_padding_changes_nothing() -> None:
    typer, hidden = _typer()
    scores, probabilities = typer.distribution(hidden, MASK)
    assert (scores[MASK == 0] == 0).all() and torch.allclose(probabilities[MASK == 0], torch.tensor(1 / K).double())
    wider = torch.cat([hidden, torch.full((B, 2, D), float("nan"), dtype=hidden.dtype)], dim=1)
    mask = torch.cat([MASK, torch.zeros(B, 2, dtype=torch.int64)], dim=1)
    _, padded = typer.distribution(wider, mask)
    assert torch.equal(padded[:, :T], probabilities)
    for loss in (sparsity_loss, diversity_loss):
        assert abs(float((loss(padded, mask) - loss(probabilities, MASK)).detach())) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_are_typed_in_float32(dtype: torch.dtype) -> None:
    typer, hidden = _typer(dtype=torch.float32)
    found = typer(hidden.to(dtype), MASK, temperature=1.0, gumbel_noise=_noise())
    assert (found.probabilities.dtype, found.type_vectors.dtype) == (torch.float32, dtype)
    exact = typer(hidden.to(dtype).float(), MASK, temperature=1.0, gumbel_noise=_noise())
    assert torch.equal(found.probabilities, exact.probabilities) and torch.equal(found.weights, exact.weights)
    assert sparsity_loss(found.probabilities.to(dtype), MASK).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = typer(hidden, MASK, temperature=1.0, gumbel_noise=_noise())
    outside = typer(hidden, MASK, temperature=1.0, gumbel_noise=_noise())
    assert all(torch.equal(one, other) for one, other in zip(inside, outside, strict=True))


def test_initial_tables_are_uniform_with_the_published_spread() -> None:
    torch.manual_seed(0)
    typer = LatentTyper(768)
    table, vectors = typer.classifier.weight.detach(), typer.type_vectors.detach()
    assert table.shape == vectors.shape == (64, 768)
    bound = math.sqrt(3 / 768)
    assert 0.99 * bound < table.abs().max() <= bound and abs(float(table.std()) - 0.0361) < 3e-4
    assert 0.49 < vectors.abs().max() <= 0.5 and abs(float(vectors.std()) - 0.2887) < 2e-3
    assert sum(parameter.numel() for parameter in typer.parameters()) == 98_304


def test_the_temperature_must_be_above_zero() -> None:
    typer, hidden = _typer()
    with pytest.raises(ValueError, match=r"found temperature 0\.0, expected a number above 0"):
        typer(hidden, MASK, temperature=0.0)


# ---------------------------------------------------------------- the draw


def test_limits_of_the_temperature() -> None:
    typer, hidden = _typer()
    scores, _ = typer.distribution(hidden, MASK)
    cold = typer(hidden, MASK, temperature=1e-6, gumbel_noise=_noise())
    assert torch.equal(cold.weights.argmax(-1), (scores + _noise()).argmax(-1))
    assert torch.allclose(cold.weights.max(-1).values, torch.ones(B, T).double())
    hot = typer(hidden, MASK, temperature=1e9, gumbel_noise=_noise())
    assert torch.allclose(hot.weights, torch.full((B, T, K), 1 / K).double())
    assert torch.allclose(hot.type_vectors, (typer.type_vectors[1:].sum(0) / K).expand(B, T, D))


@pytest.mark.parametrize("temperature", [0.5, 5.0])
def test_the_largest_weight_follows_the_noise_free_distribution(temperature: float) -> None:
    """Gumbel-max, whatever the temperature: chi-square over 20,000 draws, 5 degrees of freedom, at p = 0.0001."""
    torch.manual_seed(1)
    scores = torch.tensor([0.0, 1.0, -0.5, 0.3, -2.0, 0.7]).double()
    typer = LatentTyper(K, K).double()
    with torch.no_grad():
        typer.classifier.weight.copy_(torch.eye(K))
    draws = 20_000
    ones = torch.ones(1, draws, dtype=torch.int64)
    found = typer(scores.expand(1, draws, K), ones, temperature=temperature)
    counts = torch.bincount(found.weights.argmax(-1).flatten(), minlength=K)
    expected = scores.softmax(-1) * draws
    assert float(((counts - expected) ** 2 / expected).sum()) < 25.7


def test_a_hard_draw_is_one_hot_forwards_and_soft_backwards() -> None:
    typer, hidden = _typer()
    direction = torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def gradients(hard: bool) -> tuple[Tensor, list[Tensor]]:
        states = hidden.clone().requires_grad_()
        found = typer(states, MASK, temperature=0.8, gumbel_noise=_noise(), hard=hard)
        loss = (found.type_vectors * direction).sum()  # linear in the mixture
        grads = torch.autograd.grad(loss, [states, typer.classifier.weight, typer.type_vectors])
        return found.weights.detach(), list(grads)

    (soft, of_soft), (hard, of_hard) = gradients(False), gradients(True)
    assert torch.equal(hard, torch.nn.functional.one_hot(soft.argmax(-1), K).double())
    assert torch.allclose(of_hard[0], of_soft[0], atol=1e-15) and torch.allclose(of_hard[1], of_soft[1], atol=1e-15)
    assert not torch.allclose(of_hard[2], of_soft[2], atol=1e-3)


def test_gradients_by_finite_differences() -> None:
    torch.manual_seed(2)
    scores = torch.randn(2, 3, K, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    noise = _noise()[:2, :3]
    assert torch.autograd.gradcheck(lambda s: sparsity_loss(s.softmax(-1), mask), scores)
    assert torch.autograd.gradcheck(lambda s: sparsity_loss(s.softmax(-1), mask, form="mean-log"), scores)
    assert torch.autograd.gradcheck(lambda s: diversity_loss(s.softmax(-1), mask), scores)
    assert torch.autograd.gradcheck(lambda s: diversity_loss(s.softmax(-1), mask, form="kl"), scores)
    assert torch.autograd.gradcheck(lambda s: draw_types(s, noise, 0.7, hard=False), scores)


# ---------------------------------------------------------------- regularisers


def test_regularisers_equal_their_definitions() -> None:
    typer, hidden = _typer(scale=2.0)
    _, probabilities = typer.distribution(hidden, MASK)
    sparsity, diversity = _regularisers(probabilities.detach().numpy())
    assert abs(float(sparsity_loss(probabilities, MASK).detach()) - sparsity) < 1e-12
    assert abs(float(diversity_loss(probabilities, MASK).detach()) - diversity) < 1e-12
    mean_log = -np.log(probabilities.detach().numpy()[MASK.numpy() == 1][:, 0]).mean()
    assert abs(float(sparsity_loss(probabilities, MASK, form="mean-log").detach()) - mean_log) < 1e-12
    assert mean_log > sparsity  # Jensen
    mean = probabilities.detach().numpy()[MASK.numpy() == 1].mean(axis=0)
    kl = float((mean * np.log(mean * K)).sum())
    assert abs(float(diversity_loss(probabilities, MASK, form="kl").detach()) - kl) < 1e-5  # the 1e-7 in the logarithm


def test_the_gradient_of_sparsity_is_its_formula() -> None:
    """dL/dl_k = m p_0 p_k / sum(m p_0) for k >= 1: tokens already near null are pushed hardest."""
    torch.manual_seed(3)
    scores = torch.randn(B, T, K, dtype=torch.float64, requires_grad=True)
    probabilities = scores.softmax(-1)
    (found,) = torch.autograd.grad(sparsity_loss(probabilities, MASK), scores)
    null = (probabilities[..., :1] * MASK[..., None]).detach()
    expected = null * probabilities.detach()[..., 1:] / null.sum()
    assert torch.allclose(found[..., 1:], expected, rtol=1e-12)


def test_no_state_means_uniform_types() -> None:
    typer = LatentTyper(D, 64)
    _, probabilities = typer.distribution(torch.zeros(B, T, D), MASK)
    assert abs(float(sparsity_loss(probabilities, MASK).detach()) - math.log(64)) < 1e-6
    assert abs(float(diversity_loss(probabilities, MASK).detach())) < 1e-5  # 64 times the 1e-7 in the logarithm
    assert (typer(torch.zeros(B, T, D), MASK, temperature=1.0).types == 0).all()


@pytest.mark.parametrize("all_but_null", [-100.0, -1000.0])
def test_all_null_is_the_other_end(all_but_null: float) -> None:
    scores = torch.full((B, T, 64), all_but_null)
    scores[..., 0] = 0
    probabilities = scores.softmax(-1)
    assert abs(float(sparsity_loss(probabilities, MASK))) < 1e-6
    assert abs(float(diversity_loss(probabilities, MASK)) - 63 / 64) < 1e-6


def test_an_underflown_null_probability_gives_the_ceiling_and_no_gradient() -> None:
    scores = torch.zeros(B, T, 64)
    scores[..., 5] = 200.0
    scores.requires_grad_()
    loss = sparsity_loss(scores.softmax(-1), MASK)
    loss.backward()
    assert abs(float(loss.detach()) - 87.3365) < 1e-3
    assert scores.grad is not None and bool((scores.grad == 0).all())


def test_ranges_over_random_distributions() -> None:
    generator = torch.Generator().manual_seed(4)
    for scale in (0.1, 1.0, 5.0, 30.0):
        probabilities = (scale * torch.randn(B, T, 64, generator=generator)).softmax(-1)
        assert -1e-6 <= float(diversity_loss(probabilities, MASK)) <= 63 / 64 + 1e-6
        assert -1e-6 <= float(sparsity_loss(probabilities, MASK)) <= 87.3366


def test_a_single_token_and_no_token() -> None:
    probabilities = torch.tensor([[[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]]).requires_grad_()
    one = torch.tensor([[1, 0]])
    perplexity = math.exp(1.5 * math.log(2))
    assert abs(float(diversity_loss(probabilities, one).detach()) - (3 - perplexity) / 3) < 1e-6
    assert abs(float(sparsity_loss(probabilities, one).detach()) - math.log(2)) < 1e-6
    for loss in (sparsity_loss(probabilities, 0 * one), diversity_loss(probabilities, 0 * one)):
        assert float(loss.detach()) == 0.0
        (gradient,) = torch.autograd.grad(loss, probabilities)
        assert bool((gradient == 0).all())


def _held(beta: float, null: np.ndarray, num_types: int = 64) -> np.ndarray:
    """beta * sparsity + 0.1 * diversity when every token is null with probability q and uses the rest alike."""
    probabilities = np.repeat(((1 - null) / (num_types - 1))[:, None], num_types, axis=1)
    probabilities[:, 0] = null
    one = torch.ones(1, 1, dtype=torch.int64)
    rows = torch.from_numpy(probabilities)
    return np.array(
        [float(beta * sparsity_loss(row[None, None], one) + 0.1 * diversity_loss(row[None, None], one)) for row in rows]
    )


@pytest.mark.parametrize(
    ("beta", "expected"), [(0.0, 1 / 64), (0.01, 0.069), (0.02, 0.110), (0.03, 0.154), (0.04, 0.205), (0.05, 0.280)]
)
def test_the_regularisers_alone_have_the_known_interior_minimum(beta: float, expected: float) -> None:
    null = np.linspace(max(expected - 0.02, 0.002), expected + 0.02, 61)
    lowest = null[_held(beta, null).argmin()]
    assert abs(lowest - expected) < 1.5e-3


def test_above_the_threshold_only_the_collapse_is_left() -> None:
    null = np.linspace(0.02, 0.999, 200)
    assert (np.diff(_held(0.056, null)) < 0).all()
    interior, collapsed = _held(0.05, np.array([0.280, 1 - 1e-9]))
    assert abs(interior - 0.1078) < 1e-4 and abs(collapsed - 0.0984) < 1e-4


def test_initial_losses_of_scores_with_a_known_spread() -> None:
    """Sparsity is near ln(1 + 63 exp(s^2 / 2)), 4.28 for s = 0.5; all types are in use."""
    scores = 0.5 * torch.randn(1, 40_000, 64, generator=torch.Generator().manual_seed(6))
    scores[..., 0] = 0
    ones = torch.ones(1, 40_000, dtype=torch.int64)
    assert abs(float(sparsity_loss(scores.softmax(-1), ones)) - 4.28) < 0.02
    assert float(diversity_loss(scores.softmax(-1), ones)) < 1e-3


# ---------------------------------------------------------------- temperature


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.5),
        (1, 5.0),
        (2, 4.99985),
        (1_000, 4.85237),
        (10_000, 3.70419),
        (25_000, 2.36188),
        (50_000, 1.11566),
        (70_000, 0.61228),
        (76_752, 0.50001),
        (76_753, 0.5),
        (100_000, 0.5),
    ],
)
def test_the_temperature_of_a_step(step: int, expected: float) -> None:
    assert abs(temperature_at(step) - expected) < 6e-6


def test_variants_of_the_temperature() -> None:
    settings: dict[str, Any] = {"start": 4.0, "floor": 1.0, "decay": 0.5, "first_at_floor": False}
    assert [temperature_at(step, **settings) for step in range(4)] == [4.0, 2.0, 1.0, 1.0]
    over = [temperature_of_budget(share, start=4.0, floor=1.0, share=0.5) for share in (0.0, 0.25, 0.5, 1.0)]
    assert over == pytest.approx([4.0, 2.0, 1.0, 1.0])
    whole = [(temperature_of_budget(step / 100_000), temperature_at(step + 1)) for step in (0, 30_000, 90_000)]
    assert all(abs(stretched - exact) < 1e-3 for stretched, exact in whole)

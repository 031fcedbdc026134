"""DAC stage 1: a submodel's losses against plain numpy, and its training."""

import math

import numpy as np
import pytest
import torch

from sparselt_dist.errors import DataError
from sparselt_dist.objectives.dac_fit import rate_at
from sparselt_dist.objectives.dac_submodels import (
    Pairs,
    Sides,
    Submodel,
    SubmodelLoss,
    contrastive_loss,
    fit_submodel,
)
from sparselt_dist.objectives.settings import DACConfig

VOCAB, WIDTH = 50, 8


def sides(rows: list[list[int]], weights: list[list[float]] | None = None) -> Sides:
    width = max(map(len, rows), default=1)
    given = weights or [[1.0] * len(row) for row in rows]
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int64).view(len(rows), width)
    padded = torch.tensor([row + [0.0] * (width - len(row)) for row in given]).view(len(rows), width)
    return Sides(ids, padded)


def some_pairs(count: int, seed: int = 0, flips: bool = True) -> Pairs:
    """Random pairs of 1 to 3 pieces a side, the first piece a root; every third pair has a flipped copy."""
    rng = np.random.default_rng(seed)

    def draw(number: int) -> Sides:
        rows = [rng.integers(5, VOCAB, rng.integers(1, 4)).tolist() for _ in range(number)]
        return sides(rows, [[2.0] + [1.0] * (len(row) - 1) for row in rows])

    flipped = torch.arange(0, count, 3) if flips else torch.zeros(0, dtype=torch.int64)
    labels = torch.from_numpy(rng.integers(0, 4, count))
    return Pairs(draw(count), draw(count), labels, flipped, draw(len(flipped)), draw(len(flipped)))


def reference_loss(submodel: Submodel, pairs: Pairs) -> tuple[float, float]:
    """Contrast and label loss, pair by pair in float64."""
    state = {name: value.detach().double().numpy() for name, value in submodel.state_dict().items()}
    table, temperature = state["table.weight"], math.exp(state["log_temperature"])

    def vector(side: Sides, row: int) -> np.ndarray:
        weights = side.weights_NS[row].double().numpy()
        return (table[side.ids_NS[row].numpy()] * weights[:, None]).sum(0) / weights.sum()

    def pieces(side: Sides, row: int) -> tuple[int, ...]:
        return tuple(int(i) for i, w in zip(side.ids_NS[row], side.weights_NS[row], strict=True) if w > 0)

    def score(head: np.ndarray, dependent: np.ndarray) -> float:
        u, d = state["head_map.weight"] @ head, state["dependent_map.weight"] @ dependent
        return float(u @ d / np.linalg.norm(u) / np.linalg.norm(d) / temperature)

    n = len(pairs)
    heads = [vector(pairs.heads, row) for row in range(n)]
    dependents = [vector(pairs.dependents, row) for row in range(n)]
    flipped = {
        int(row): score(vector(pairs.flipped_heads, k), vector(pairs.flipped_dependents, k))
        for k, row in enumerate(pairs.flipped_F)
    }
    contrast = label = 0.0
    for i in range(n):
        true = score(heads[i], dependents[i])
        extra = [flipped[i]] if i in flipped else []
        other_dependents = [j for j in range(n) if pieces(pairs.dependents, j) != pieces(pairs.dependents, i)]
        other_heads = [j for j in range(n) if pieces(pairs.heads, j) != pieces(pairs.heads, i)]
        for rivals in (
            [score(heads[i], dependents[j]) for j in other_dependents],
            [score(heads[j], dependents[i]) for j in other_heads],
        ):
            contrast += 0.5 * (math.log(sum(map(math.exp, [true, *rivals, *extra]))) - true) / n
        u, d = state["head_map.weight"] @ heads[i], state["dependent_map.weight"] @ dependents[i]
        logits = state["label_classifier.weight"] @ np.concatenate([u, d, u * d]) + state["label_classifier.bias"]
        label += (math.log(np.exp(logits).sum()) - logits[int(pairs.labels_N[i])]) / n
    return contrast, label


def trained_looking(seed: int = 0) -> Submodel:
    torch.manual_seed(seed)
    submodel = Submodel(VOCAB, num_labels=4, width=WIDTH, label_weight=0.3).double()
    with torch.no_grad():
        for parameter in (submodel.head_map.weight, submodel.dependent_map.weight):
            parameter.add_(0.3 * torch.randn_like(parameter))
        submodel.log_temperature.fill_(math.log(0.5))
    return submodel


def test_loss_equals_the_plain_form() -> None:
    submodel, pairs = trained_looking(), some_pairs(13)
    # a repeated dependent and a repeated head, which are no rivals of each other
    pairs.dependents.ids_NS[4], pairs.dependents.weights_NS[4] = (
        pairs.dependents.ids_NS[1],
        pairs.dependents.weights_NS[1],
    )
    pairs.heads.ids_NS[7], pairs.heads.weights_NS[7] = pairs.heads.ids_NS[2], pairs.heads.weights_NS[2]
    contrast, label = reference_loss(submodel, pairs)
    loss = submodel(pairs.batch(torch.arange(13)))
    # scores are compared in float32
    assert loss.contrast.item() == pytest.approx(contrast, rel=1e-5)
    assert loss.label.item() == pytest.approx(label, rel=1e-5)
    assert loss.total.item() == pytest.approx(contrast + 0.3 * label, rel=1e-5)


def test_root_pieces_weigh_double() -> None:
    submodel = trained_looking()
    (vector,) = submodel.vectors(sides([[7, 9]], [[2.0, 1.0]]))
    rows = submodel.table.weight
    torch.testing.assert_close(vector, (2 * rows[7] + rows[9]) / 3)


def test_flipped_copy_raises_the_loss_of_its_row_alone() -> None:
    scores = torch.zeros(3, 3)
    none = torch.full((3,), -torch.inf)
    one = none.clone()
    one[1] = 0.0
    different = torch.eye(3, dtype=torch.bool)
    assert float(contrastive_loss(scores, different, none)) == pytest.approx(math.log(3))
    assert float(contrastive_loss(scores, different, one)) == pytest.approx((2 * math.log(3) + math.log(4)) / 3)


def test_one_pair_has_no_rival() -> None:
    loss = Submodel(VOCAB, 4, WIDTH)(some_pairs(1, flips=False))
    assert loss.contrast.item() == 0.0
    loss.total.backward()


def test_fresh_submodel_guesses() -> None:
    torch.manual_seed(1)
    submodel = Submodel(VOCAB, num_labels=4, width=64)
    with torch.no_grad():
        submodel.log_temperature.fill_(0.0)
    pairs = some_pairs(256, flips=False)
    scores = torch.rand(256, 256) * 0.0  # no score at all: exactly ln N
    assert float(contrastive_loss(scores, torch.eye(256, dtype=torch.bool), torch.full((256,), -torch.inf))) == (
        pytest.approx(math.log(256))
    )
    assert submodel(pairs).contrast.item() == pytest.approx(math.log(256), rel=0.05)


def test_temperature_stays_in_its_range() -> None:
    submodel = Submodel(VOCAB, 4, WIDTH)
    assert submodel.log_temperature.exp().item() == pytest.approx(0.07)
    for wild, kept in ((5.0, 1.0), (-9.0, 0.01)):
        with torch.no_grad():
            submodel.log_temperature.fill_(wild)
        submodel.keep_temperature_in_range()
        assert submodel.log_temperature.exp().item() == pytest.approx(kept)


def test_batches_keep_copies_with_their_pairs() -> None:
    pairs = some_pairs(10)
    batch = pairs.batch(torch.tensor([9, 4, 3]))
    assert batch.flipped_F.tolist() == [0, 2]
    assert torch.equal(batch.heads.ids_NS, pairs.heads.ids_NS[[9, 4, 3]])
    assert torch.equal(batch.flipped_heads.ids_NS, pairs.flipped_heads.ids_NS[[3, 1]])


def test_shuffled_pairs_keep_both_sides_and_no_copy() -> None:
    pairs = some_pairs(40)
    shuffled = pairs.shuffled(seed=3)
    assert torch.equal(shuffled.heads.ids_NS, pairs.heads.ids_NS)
    assert sorted(map(tuple, shuffled.dependents.ids_NS.tolist())) == sorted(
        map(tuple, pairs.dependents.ids_NS.tolist())
    )
    assert not torch.equal(shuffled.dependents.ids_NS, pairs.dependents.ids_NS)
    assert len(shuffled.flipped_F) == 0
    assert torch.isfinite(Submodel(VOCAB, 4, WIDTH)(shuffled).total)


def fitted(seed: int, **settings: object) -> Submodel:
    torch.manual_seed(seed)
    submodel = Submodel(VOCAB, 4, WIDTH)
    fit_submodel(
        submodel, some_pairs(64), DACConfig(stage1_pairs_per_step=16, **settings), seed=seed, clock=lambda: 0.0
    )
    return submodel


def test_same_seed_same_table() -> None:
    first, again, other = fitted(5), fitted(5), fitted(6)
    assert torch.equal(first.table.weight, again.table.weight)
    assert not torch.equal(first.table.weight, other.table.weight)


def test_passes_end_the_training() -> None:
    submodel = Submodel(VOCAB, 4, WIDTH)
    cfg = DACConfig(stage1_pairs_per_step=16, stage1_max_passes=2)
    report = fit_submodel(submodel, some_pairs(70), cfg, seed=0, clock=lambda: 0.0)
    assert report.steps == 2 * (70 // 16)
    assert math.isfinite(report.loss)


def test_clock_ends_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now, forward = [0.0], Submodel.forward

    def slow(submodel: Submodel, pairs: Pairs) -> SubmodelLoss:
        now[0] += 4.0
        return forward(submodel, pairs)

    monkeypatch.setattr(Submodel, "forward", slow)
    cfg = DACConfig(stage1_pairs_per_step=2, stage1_max_passes=100, stage1_max_minutes=0.5)
    report = fit_submodel(Submodel(VOCAB, 4, WIDTH), some_pairs(64), cfg, seed=0, clock=lambda: now[0])
    assert (report.steps, report.seconds) == (7, 28.0)  # an eighth step would end past the 30 seconds
    report = fit_submodel(Submodel(VOCAB, 4, WIDTH), some_pairs(64), cfg, seed=0, max_seconds=9.0, clock=lambda: now[0])
    assert report.steps == 2


def test_no_pair_is_an_error() -> None:
    with pytest.raises(DataError, match=r"has no pair.*objective\.families"):
        fit_submodel(Submodel(VOCAB, 4, WIDTH), some_pairs(0, flips=False), DACConfig(), seed=0)


def test_rate_warms_up_and_falls_to_zero() -> None:
    assert rate_at(0.0) == 0.0
    assert rate_at(0.01) == pytest.approx(0.5)
    assert rate_at(0.02) == pytest.approx(1.0)
    assert rate_at(0.51) == pytest.approx(0.5)
    assert rate_at(1.0) == pytest.approx(0.0)

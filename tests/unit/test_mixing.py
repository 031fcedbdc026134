"""Weighted mixtures: stated shares over any stretch, each corpus in epochs of its own."""

import numpy as np
import pytest

from sparselt_dist.data.mixing import LONGEST_PERIOD, StreamOrder, interleave, turns
from sparselt_dist.data.order import SampleOrder

SIZES = [[7, 5, 9], [30, 11], [4]]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([1.0], [1]), ([0.7, 0.3], [7, 3]), ([2, 1, 1], [2, 1, 1]), ([0.1, 0.25, 0.65], [2, 5, 13]), ([1, 3e0], [1, 3])],
)
def test_turns_are_the_exact_shares(weights: list[float], expected: list[int]) -> None:
    assert turns(weights) == expected


def test_shares_without_a_small_denominator_are_rounded_to_the_longest_period() -> None:
    counts = turns([0.123456789, 0.876543211, 1e-9])
    assert sum(counts) in (LONGEST_PERIOD, LONGEST_PERIOD + 1) and counts[2] == 1
    assert counts[0] / sum(counts) == pytest.approx(0.123456789, abs=2 / LONGEST_PERIOD)


@pytest.mark.parametrize(
    "counts", [[1], [7, 3], [2, 1, 1], [2, 5, 13], [1, 1, 1, 1, 96], [333, 334, 1], [97, 89, 83, 5]]
)
def test_any_stretch_has_its_shares(counts: list[int]) -> None:
    order = interleave(counts)
    period = sum(counts)
    assert np.bincount(order).tolist() == counts
    twice = np.concatenate([order, order])
    for corpus, count in enumerate(counts):
        had = np.concatenate([[0], np.cumsum(twice == corpus)])
        behind = had - np.arange(len(had)) * count / period
        assert np.abs(behind).max() < 1  # after any number of positions
        assert behind.max() - behind.min() < 2  # hence over any stretch


@pytest.mark.parametrize("window", [0, 2])
def test_each_corpus_comes_in_its_own_epochs(window: int) -> None:
    order = StreamOrder(SIZES, [0.5, 0.3, 0.2], seed=3, window=window)
    epochs, samples = order.samples(np.arange(600))
    firsts = [0, 21, 62, 66]
    for corpus, share in enumerate([0.5, 0.3, 0.2]):
        own = (samples >= firsts[corpus]) & (samples < firsts[corpus + 1])
        assert own.sum() == 600 * share
        size = firsts[corpus + 1] - firsts[corpus]
        for epoch in range(int(own.sum()) // size):
            drawn = samples[own][epoch * size : (epoch + 1) * size]
            assert sorted(drawn) == list(range(firsts[corpus], firsts[corpus + 1]))
            assert set(epochs[own][epoch * size : (epoch + 1) * size]) == {epoch}


def test_any_position_is_found_at_once() -> None:
    order = StreamOrder(SIZES, [0.5, 0.3, 0.2], seed=3, window=2)
    whole = order.samples(np.arange(500))
    scattered = np.random.default_rng(0).permutation(500)
    for one, other in zip(order.samples(scattered), whole, strict=True):
        assert np.array_equal(one, other[scattered])
    far = order.samples(np.arange(10**12, 10**12 + 10))[0]
    assert far.min() > 10**9


def test_one_corpus_alone_is_its_own_order() -> None:
    positions = np.arange(100)
    alone, plain = StreamOrder([SIZES[0]], [5.0], 3, 2), SampleOrder(SIZES[0], 3, 2)
    for one, other in zip(alone.samples(positions), plain.samples(positions), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("window", [0, 1, 2])
def test_shards_ahead_hold_what_is_drawn_next(window: int) -> None:
    order = StreamOrder(SIZES, [0.5, 0.3, 0.2], seed=3, window=window)
    ends = np.cumsum([size for sizes in SIZES for size in sizes])
    for position in range(0, 300, 7):
        drawn = order.samples(np.arange(position, position + 3))[1]
        assert set(np.searchsorted(ends, drawn, side="right")) <= set(order.shards_ahead(position).tolist())

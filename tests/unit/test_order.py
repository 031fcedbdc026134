"""The order of samples is a permutation in each epoch, found by seeking, and the same wherever it is asked for."""

import time

import numpy as np
import pytest

from sparselt_dist.data.order import SampleOrder, permute
from sparselt_dist.data.randomness import sample_seed
from sparselt_dist.errors import DataError


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 13, 97, 101, 128, 129, 1000, 65_537, 1_000_003])
def test_permute_is_a_bijection(size: int) -> None:
    images = permute(np.arange(size), size, key=12345)
    assert np.array_equal(np.sort(images), np.arange(size))


@pytest.mark.parametrize("size", [2, 3, 5])
def test_permute_reaches_different_permutations_of_small_sizes(size: int) -> None:
    seen = {tuple(permute(np.arange(size), size, key).tolist()) for key in range(3000)}
    assert len(seen) == {2: 2, 3: 6, 5: 120}[size]


def test_permute_moves_values_far_and_depends_on_the_key() -> None:
    size = 100_000
    first, second = (permute(np.arange(size), size, key).astype(np.int64) for key in (1, 2))
    assert (first != second).mean() > 0.999
    distance = np.abs(first - np.arange(size)).mean() / size
    assert abs(distance - 1 / 3) < 0.01  # of a uniform permutation
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.02


def test_seek_far_into_a_huge_epoch_takes_milliseconds() -> None:
    permute(np.arange(4096), 4096, key=1)  # warm
    started = time.perf_counter()
    images = permute(np.arange(10**12, 10**12 + 4096), 2 * 10**12, key=7)
    assert time.perf_counter() - started < 0.5  # a few ms; the bound is for a loaded machine
    assert len(np.unique(images)) == 4096 and int(images.max()) < 2 * 10**12


def test_seek_in_a_stream_of_many_shards() -> None:
    order = SampleOrder([200_000_000] * 10_000, seed=1, window=16)
    order.samples(np.arange(2))
    started = time.perf_counter()
    epochs, samples = order.samples(np.arange(10**12, 10**12 + 4096))
    assert time.perf_counter() - started < 0.5
    assert set(epochs.tolist()) == {0} and len(np.unique(samples)) == 4096


@pytest.mark.parametrize("window", [1, 2, 3, 100])
@pytest.mark.parametrize("sizes", [[1], [5, 5, 5], [7, 1, 3, 12, 2], [4, 0, 9, 0, 0, 1]])
def test_every_epoch_visits_every_sample_once(sizes: list[int], window: int) -> None:
    order = SampleOrder(sizes, seed=3, window=window)
    total = sum(sizes)
    epochs, samples = order.samples(np.arange(3 * total))
    for epoch in range(3):
        own = samples[epochs == epoch]
        assert np.array_equal(np.sort(own), np.arange(total))
    if total > 4:
        assert not np.array_equal(samples[:total], samples[total : 2 * total])


def test_order_does_not_depend_on_how_it_is_asked_for() -> None:
    sizes = [7, 1, 3, 12, 2, 40]
    positions = np.arange(200)
    together = SampleOrder(sizes, seed=3, window=2).samples(positions)
    one_by_one = SampleOrder(sizes, seed=3, window=2)
    backwards = [one_by_one.samples(positions[place : place + 1]) for place in range(199, -1, -1)]
    assert [int(sample[0]) for _, sample in backwards] == together[1].tolist()[::-1]
    assert [int(epoch[0]) for epoch, _ in backwards] == together[0].tolist()[::-1]


def test_a_window_reads_its_shards_alone() -> None:
    sizes = [10] * 12
    _, samples = SampleOrder(sizes, seed=5, window=3).samples(np.arange(120))
    visited = []
    for start in range(0, 120, 30):
        shards = set((samples[start : start + 30] // 10).tolist())
        assert len(shards) == 3
        visited.append(shards)
    assert set().union(*visited) == set(range(12))
    assert not np.array_equal(samples[:30] // 10, np.repeat(samples[:30:10] // 10, 10))  # shuffled across its shards


def test_seed_changes_the_order() -> None:
    first, second = (SampleOrder([100], seed=seed, window=1).samples(np.arange(100))[1] for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_no_samples_is_an_error() -> None:
    with pytest.raises(DataError, match="hold no sample"):
        SampleOrder([0, 0], seed=0, window=1)


def test_sample_seeds_differ_by_run_epoch_and_sample() -> None:
    epochs, samples = np.repeat([0, 1], 500), np.tile(np.arange(500), 2)
    seeds = np.concatenate([sample_seed(run, epochs, samples) for run in (0, 1)])
    assert seeds.dtype == np.uint64 and len(np.unique(seeds)) == 2000
    assert np.array_equal(sample_seed(0, epochs[7:9], samples[7:9]), seeds[7:9])


def test_order_is_frozen() -> None:
    """A change here changes the data of every run: checkpoints of older versions would continue at other samples."""
    _, samples = SampleOrder([7, 1, 3, 12, 2], seed=3, window=2).samples(np.arange(8))
    seeds = sample_seed(3, np.zeros(2), samples[:2])
    assert samples.tolist() == [5, 6, 1, 2, 0, 9, 10, 4]
    assert seeds.tolist() == [6982675359238115089, 6324184851018989795]


def test_window_zero_reads_in_stored_order_epoch_after_epoch() -> None:
    epochs, samples = SampleOrder([3, 2], seed=7, window=0).samples(np.arange(12))
    assert samples.tolist() == [0, 1, 2, 3, 4] * 2 + [0, 1]
    assert epochs.tolist() == [0] * 5 + [1] * 5 + [2] * 2

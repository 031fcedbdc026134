"""Padding, and the counter-based randomness that every collator draws from."""

import numpy as np
import pytest
import torch

from sparselt_dist.data.batch import Example, pad_examples
from sparselt_dist.data.randomness import mix64, purpose_key, random_bits, random_uniform


def _examples(*lengths: int) -> list[Example]:
    return [
        {"key": f"shard-000000/{row}", "ids": np.arange(1, length + 1).astype(np.uint16), "seed": 2**63 + row}
        for row, length in enumerate(lengths)
    ]


def test_mix64_is_the_splitmix64_generator() -> None:
    """First outputs of splitmix64 from state 1234567, as published with the reference implementation."""
    state = np.uint64(1234567) + np.arange(1, 6, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert mix64(state).tolist() == published


def test_mix64_leaves_its_argument_alone() -> None:
    values = np.array([1, 2, 3], dtype=np.uint64)
    mix64(values)
    assert values.tolist() == [1, 2, 3]


def test_purpose_key_is_stable_across_processes() -> None:
    assert purpose_key("masking") == 3606083165681604603
    assert purpose_key("masking") != purpose_key("masking ")


def test_random_bits_depend_on_seed_position_and_purpose_alone() -> None:
    seeds = np.array([7, 2**64 - 1, 7], dtype=np.uint64)
    words = random_bits(seeds, 50, "a")
    assert np.array_equal(words[0], words[2])
    assert np.array_equal(words[:, :20], random_bits(seeds, 20, "a"))  # a longer row starts with the same words
    assert np.array_equal(words[1:2], random_bits(seeds[1:2], 50, "a"))
    assert len(np.unique(words[:2])) == 100
    assert not np.isin(random_bits(seeds, 50, "b"), words).any()


def test_random_uniform_is_uniform_and_uncorrelated() -> None:
    uniform = random_uniform(np.arange(2000, dtype=np.uint64), 128, "test")  # neighbouring seeds are the hard case
    assert uniform.min() >= 0 and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.003 and abs(uniform.var() - 1 / 12) < 0.002
    counts = np.histogram(uniform, bins=64, range=(0, 1))[0]
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert 25 < chi_square < 120  # 63 degrees of freedom
    assert abs(np.corrcoef(uniform[:-1].ravel(), uniform[1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(uniform[:, :-1].ravel(), uniform[:, 1:].ravel())[0, 1]) < 0.01


def test_drawing_moves_no_global_generator() -> None:
    before = (str(np.random.get_state()), torch.get_rng_state())
    random_bits(np.arange(3, dtype=np.uint64), 9, "x")
    assert str(np.random.get_state()) == before[0] and torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("lengths", [(3, 5, 1), (4, 4), (1,)])
def test_pad_examples(lengths: tuple[int, ...]) -> None:
    ids, mask, seeds = pad_examples(_examples(*lengths), pad_id=9)
    assert ids.dtype == mask.dtype == np.int64 and seeds.dtype == np.uint64
    assert ids.shape == mask.shape == (len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        assert ids[row].tolist() == [*range(1, length + 1), *[9] * (max(lengths) - length)]
        assert mask[row].sum() == length and mask[row, :length].all()
    assert seeds.tolist() == [2**63 + row for row in range(len(lengths))]

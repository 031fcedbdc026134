"""Noise from seeds: the words of the numpy hash, the Gumbel distribution, one row at a time."""

import math

import numpy as np
import torch

from sparselt_dist.data.randomness import random_bits
from sparselt_dist.objectives.gumbel import PURPOSE, gumbel_noise

SEEDS = np.array([0, 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF], dtype=np.uint64)


def _noise(seeds: np.ndarray, length: int, num_types: int) -> torch.Tensor:
    return gumbel_noise(torch.from_numpy(seeds.view(np.int64)), length, num_types)


def test_noise_comes_from_the_same_words_as_every_other_draw() -> None:
    words = random_bits(SEEDS, 7 * 11, PURPOSE)
    uniform = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    expected = -np.log(-np.log(uniform)).reshape(len(SEEDS), 7, 11)
    np.testing.assert_allclose(_noise(SEEDS, 7, 11).numpy(), expected, rtol=1e-6)


def test_a_rows_noise_depends_on_its_seed_alone() -> None:
    whole = _noise(SEEDS, 9, 5)
    assert torch.equal(_noise(SEEDS[2:3], 9, 5)[0], whole[2])
    assert torch.equal(_noise(SEEDS, 4, 5), whole[:, :4])  # nor on padding
    assert len({tuple(row.flatten().tolist()) for row in whole}) == len(SEEDS)


def test_the_noise_is_standard_gumbel() -> None:
    noise = _noise(np.arange(64, dtype=np.uint64), 64, 64).double().flatten()
    assert noise.numel() == 2**18 and bool(noise.isfinite().all())
    assert abs(float(noise.mean()) - 0.57722) < 0.01 and abs(float(noise.var()) - math.pi**2 / 6) < 0.03
    places = torch.linspace(-2.0, 8.0, 50).double()
    found = torch.searchsorted(noise.sort().values, places)
    distance = (found / noise.numel() - torch.exp(-torch.exp(-places))).abs().max()
    assert float(distance) < 1.95 / math.sqrt(noise.numel())  # Kolmogorov-Smirnov at p = 0.001
    columns = noise.view(-1, 64)
    correlation = torch.corrcoef(columns.T) - torch.eye(64)
    assert float(correlation.abs().max()) < 6 / math.sqrt(len(columns))

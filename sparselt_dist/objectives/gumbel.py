"""Gumbel noise made on the device from example seeds: a pure function of (seed, position, type).

The same counter-based hash as `data.randomness`, on int64 tensors: the noise of a row depends neither on the split over
ranks and micro-batches nor on padding, survives a resume, and only 8 bytes a row travel to the device. The words are
those of `random_bits(seeds, length * num_types, "slt gumbel")`, position by position.

B rows, T positions, K types, N draws of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparselt_dist.data.randomness import purpose_key

PURPOSE = "slt gumbel"

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as signed words, which wrap around like unsigned ones
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def gumbel_noise(seeds_B: Tensor, length: int, num_types: int) -> Tensor:
    """Standard Gumbel noise [B, T, K] float32, finite, on the device of the seeds ([B] int64, the bits of uint64)."""
    key = purpose_key(PURPOSE)
    streams_B1 = _mix64(seeds_B ^ (key - 2**64 if key >= 2**63 else key))[:, None]
    counters_N = torch.arange(1, length * num_types + 1, device=seeds_B.device)
    words_BN = _mix64(streams_B1 + counters_N * _GOLDEN)
    # 52 bits and a half: never 0 nor 1, between which both logarithms are finite.
    uniform_BN = (_shifted(words_BN, 12).double() + 0.5) * 2.0**-52
    noise_BN = -torch.log(-torch.log(uniform_BN))
    return noise_BN.float().view(len(seeds_B), length, num_types)


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own repeats the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _mix64(words: Tensor) -> Tensor:
    """`data.randomness.mix64` on int64."""
    words = (words ^ _shifted(words, 30)) * _MIX_1
    words = (words ^ _shifted(words, 27)) * _MIX_2
    return words ^ _shifted(words, 31)

"""Counter-based randomness: a draw is a pure function of its keys; no generator is kept anywhere.

So order, masks and noise survive a resume and any change of ranks, workers or micro-batch size. Without torch, for
worker processes that do without it.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np

_MASK_64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def mix64(values: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser (Steele, Lea, Flood 2014): uint64 array in, uint64 array out."""
    return _mix_in_place(values.astype(np.uint64, copy=True))


def _mix_in_place(z: np.ndarray) -> np.ndarray:
    shifted = z >> np.uint64(30)
    z ^= shifted
    z *= _MIX_1
    z ^= np.right_shift(z, np.uint64(27), out=shifted)
    z *= _MIX_2
    z ^= np.right_shift(z, np.uint64(31), out=shifted)
    return z


@functools.cache
def purpose_key(purpose: str) -> int:
    """A 64-bit number for a named use of randomness, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")


def random_bits(seeds_B: np.ndarray, length: int, purpose: str) -> np.ndarray:
    """Uniform 64-bit words [B, length] from example seeds [B] uint64; a pure function of its arguments."""
    streams_B1 = mix64(seeds_B.astype(np.uint64) ^ np.uint64(purpose_key(purpose)))[:, None]
    counters_L = np.arange(1, length + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        return _mix_in_place(streams_B1 + counters_L[None, :] * np.uint64(_GOLDEN))


def random_uniform(seeds_B: np.ndarray, length: int, purpose: str) -> np.ndarray:
    """Uniform float64 [B, length] in [0, 1), 53 random bits each."""
    return (random_bits(seeds_B, length, purpose) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def combine(key: int, number: int) -> int:
    """A new 64-bit key from a key and a number: `mix64` on Python integers, for single values."""
    z = (key + _GOLDEN * (number + 1)) & _MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return z ^ (z >> 31)


def sample_seed(run_seed: int, epochs: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """The 64-bit seeds of samples in their epochs: the source of all randomness of objectives."""
    golden = np.uint64(_GOLDEN)
    start = np.uint64(combine(purpose_key("sample seed"), run_seed))
    with np.errstate(over="ignore"):
        of_epoch = mix64(start + epochs.astype(np.uint64) * golden)
        return mix64(of_epoch + samples.astype(np.uint64) * golden)

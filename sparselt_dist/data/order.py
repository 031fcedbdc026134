"""The order of samples: a pure function of (seed, shard sizes, position), with no stored state.

Position p of the endless stream lies in epoch p // N of N samples. An epoch visits every sample exactly once:
its shards are permuted, cut into windows of consecutive shards, and the samples of a window are permuted. Both are
keyed Feistel permutations with cycle walking, so any position is found at once, wherever it lies: resuming is a seek.
A window bounds how many shards are read from at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sparselt_dist.data.randomness import combine, mix64, purpose_key
from sparselt_dist.errors import DataError

_STORED_WINDOW = 16  # shards counted as one window where samples are read in stored order
_ROUNDS = 6  # four give a strong pseudo-random permutation of a large domain; two more serve small ones


def permute(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """Images of positions [n], each in [0, size), under the permutation of [0, size) that `key` names.

    The domain is rounded up to a power of two and split in two halves of bits; what falls outside [0, size) is
    permuted again until it falls inside (at most two tries on average), which keeps the map a bijection.
    """
    bits = (size - 1).bit_length()
    values = _feistel(positions.astype(np.uint64), bits, key)
    while (outside := np.flatnonzero(values >= np.uint64(size))).size:
        values[outside] = _feistel(values[outside], bits, key)
    return values


def _feistel(values: np.ndarray, bits: int, key: int) -> np.ndarray:
    right_bits = np.uint64((bits + 1) // 2)
    left_mask = np.uint64((1 << (bits // 2)) - 1)
    right_mask = np.uint64((1 << ((bits + 1) // 2)) - 1)
    left, right = values >> right_bits, values & right_mask
    for number in range(_ROUNDS):
        round_key = np.uint64(combine(key, number))
        if number % 2:
            left ^= mix64(right ^ round_key) & left_mask
        else:
            right ^= mix64(left ^ round_key) & right_mask
    return (left << right_bits) | right


class _Epoch(NamedTuple):
    """Tables of one epoch; S shards in the epoch's order."""

    shards: np.ndarray  # [S] shard numbers
    starts: np.ndarray  # [S + 1] samples of the epoch before each shard
    window_starts: np.ndarray  # [windows + 1] samples of the epoch before each window
    key: int


class SampleOrder:
    """The order of an endless stream over shards of the given sizes; window 0 keeps the order in which they are stored."""

    def __init__(self, shard_samples: Sequence[int], seed: int, window: int) -> None:
        self._sizes = np.asarray(shard_samples, dtype=np.int64)
        self._firsts = np.concatenate([[0], np.cumsum(self._sizes)])
        self.epoch_samples = int(self._firsts[-1])
        if self.epoch_samples == 0:
            raise DataError("the shards hold no sample; expected at least one; prepare more text")
        self._key = combine(purpose_key("sample order"), seed)
        self._window = window
        self._cached: tuple[int, _Epoch] | None = None

    def samples(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and global sample numbers, both int64, at positions [n] of the stream; any n, any order."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, within = np.divmod(positions, self.epoch_samples)
        if self._window == 0:
            return epochs, within
        samples = np.empty_like(within)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            samples[here] = self._in_epoch(self._tables(int(epoch)), within[here])
        return epochs, samples

    def shards_ahead(self, position: int) -> np.ndarray:
        """Shards of the window that holds a position and of the one that follows, in the order of their windows."""
        epoch, within = divmod(position, self.epoch_samples)
        window = self._window or _STORED_WINDOW
        order = self._tables(epoch).shards if self._window else np.arange(len(self._sizes))
        starts = np.concatenate([[0], np.cumsum(self._sizes[order])])
        first = (int(np.searchsorted(starts, within, side="right")) - 1) // window * window
        ahead = order[first : first + 2 * window]
        if len(ahead) < 2 * window:  # the epoch ends: the first window of the next one
            following = self._shard_order(epoch + 1) if self._window else order
            ahead = np.concatenate([ahead, following[:window]])
        return ahead

    def _shard_order(self, epoch: int) -> np.ndarray:
        count = len(self._sizes)
        return permute(np.arange(count), count, combine(combine(self._key, epoch), 0)).astype(np.int64)

    def _tables(self, epoch: int) -> _Epoch:
        if self._cached is None or self._cached[0] != epoch:
            key = combine(self._key, epoch)
            count = len(self._sizes)
            shards = self._shard_order(epoch)
            starts = np.concatenate([[0], np.cumsum(self._sizes[shards])])
            window_starts = np.append(starts[: count : self._window], starts[-1])
            self._cached = (epoch, _Epoch(shards, starts, window_starts, key))
        return self._cached[1]

    def _in_epoch(self, epoch: _Epoch, within: np.ndarray) -> np.ndarray:
        windows = np.searchsorted(epoch.window_starts, within, side="right") - 1
        shuffled = np.empty_like(within)
        for window in np.unique(windows):
            here = windows == window
            first, end = (int(bound) for bound in epoch.window_starts[window : window + 2])
            key = combine(epoch.key, int(window) + 1)
            shuffled[here] = first + permute(within[here] - first, end - first, key).astype(np.int64)
        places = np.searchsorted(epoch.starts, shuffled, side="right") - 1
        return np.asarray(self._firsts[epoch.shards[places]] + shuffled - epoch.starts[places])

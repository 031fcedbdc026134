"""Several corpora as one stream: which corpus each position belongs to, as a pure function.

Shares become whole numbers over a period. Inside it, the j-th turn of a corpus of share w falls into the positions
[floor(j / w), ceil((j + 1) / w)); serving the earliest deadline first always finds such a place for unit tasks (Baruah
et al. 1996, proportionate fairness). So after any number of positions each corpus has had its share to within one sample,
and in any stretch of the stream to within two.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from sparselt_dist.data.order import SampleOrder
from sparselt_dist.data.randomness import combine

LONGEST_PERIOD = 65536  # positions; shares without a smaller common denominator are rounded to this


def turns(weights: Sequence[float]) -> list[int]:
    """Turns of each corpus in one period, in proportion to the weights; at least one each."""
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= LONGEST_PERIOD:
        return [int(share * period) for share in shares]
    counts = [max(1, math.floor(share * LONGEST_PERIOD)) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda corpus: counts[corpus] - shares[corpus] * LONGEST_PERIOD)
    for corpus in by_remainder[: max(0, LONGEST_PERIOD - sum(counts))]:
        counts[corpus] += 1
    return counts


def interleave(counts: Sequence[int]) -> np.ndarray:
    """Corpus numbers [sum(counts)] of one period, as even as can be."""
    period = sum(counts)
    released: list[list[tuple[int, int, int]]] = [[] for _ in range(period)]
    for corpus, count in enumerate(counts):
        for turn in range(count):
            deadline = -(-(turn + 1) * period // count)
            released[turn * period // count].append((deadline, corpus, turn))
    waiting: list[tuple[int, int, int]] = []
    order = np.empty(period, dtype=np.int64)
    for position in range(period):
        for job in released[position]:
            heapq.heappush(waiting, job)
        order[position] = heapq.heappop(waiting)[1]
    return order


class StreamOrder:
    """The order of an endless stream over weighted corpora, each permuted and repeated on its own.

    Args:
        corpora: samples of each shard, of each corpus; samples are numbered over all corpora in this order.
        weights: shares of the stream, in any unit.
        window: as in `SampleOrder`.
    """

    def __init__(self, corpora: Sequence[Sequence[int]], weights: Sequence[float], seed: int, window: int) -> None:
        seeds = [seed, *(combine(seed, number) for number in range(1, len(corpora)))]
        self._orders = [SampleOrder(sizes, own, window) for sizes, own in zip(corpora, seeds, strict=True)]
        self._first_samples = np.cumsum([0, *(order.epoch_samples for order in self._orders)])
        self._first_shards = np.cumsum([0, *(len(sizes) for sizes in corpora)])
        counts = turns(weights)
        self._turns = np.array(counts)
        self._corpus_at = interleave(counts)
        self._turn_at = np.empty_like(self._corpus_at)
        for corpus, count in enumerate(counts):
            self._turn_at[self._corpus_at == corpus] = np.arange(count)

    def samples(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epochs of their corpora and global sample numbers, both int64, at positions [n] of the stream."""
        if len(self._orders) == 1:
            return self._orders[0].samples(positions)
        corpora, own = self._split(positions)
        epochs, samples = np.empty_like(own), np.empty_like(own)
        for corpus in np.unique(corpora):
            here = corpora == corpus
            epochs[here], within = self._orders[corpus].samples(own[here])
            samples[here] = self._first_samples[corpus] + within
        return epochs, samples

    def shards_ahead(self, position: int) -> np.ndarray:
        """Global numbers of the shards that are read from at a position and in the window that follows."""
        corpora, own = self._split(np.arange(position, position + len(self._corpus_at)))
        return np.concatenate(
            [
                self._first_shards[corpus] + order.shards_ahead(int(own[corpora == corpus][0]))
                for corpus, order in enumerate(self._orders)
            ]
        )

    def _split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Corpus and position in the corpus's own stream, of each position."""
        periods, within = np.divmod(np.asarray(positions, dtype=np.int64), len(self._corpus_at))
        corpora = self._corpus_at[within]
        return corpora, periods * self._turns[corpora] + self._turn_at[within]

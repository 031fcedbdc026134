"""Best-fit packing is the textbook algorithm, loses nothing, and fills rows as well as the greedy packer of ModernBERT."""

from __future__ import annotations

import bisect

import numpy as np
import pytest
from greedy_packer import greedy_fill

from sparselt_dist.data.best_fit import cut_lengths, pack_best_fit
from sparselt_dist.data.packing import cut_windows
from sparselt_dist.errors import DataError


def _spaces_piece_by_piece(lengths: list[int], capacity: int) -> list[int]:
    """Space left in each row by best-fit decreasing as it is defined, sorted."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = bisect.bisect_left(spaces, length)
        space = spaces.pop(place) if place < len(spaces) else capacity
        bisect.insort(spaces, space - length)
    return spaces


def _lengths(kind: str, number: int, capacity: int) -> np.ndarray:
    draw = np.random.default_rng(number)
    if kind == "uniform":
        return draw.integers(1, capacity + 1, number)
    return np.clip(draw.lognormal(np.log(capacity / 3), 1.0, number).astype(np.int64), 1, capacity)


@pytest.mark.parametrize("kind", ["uniform", "text-like"])
@pytest.mark.parametrize(("number", "capacity"), [(1, 8), (7, 8), (500, 8), (400, 50), (60, 1000), (2000, 128)])
def test_it_is_best_fit_decreasing(kind: str, number: int, capacity: int) -> None:
    lengths = _lengths(kind, number, capacity)
    rows = pack_best_fit(lengths, capacity)
    used = np.bincount(rows, weights=lengths).astype(int)
    assert sorted(capacity - used) == _spaces_piece_by_piece(lengths.tolist(), capacity)
    first_seen = list(dict.fromkeys(rows.tolist()))
    assert first_seen == list(range(len(used))), "rows are numbered by their first piece"


def test_a_row_may_hold_many_equal_pieces_and_a_lone_rest() -> None:
    assert pack_best_fit(np.array([3, 3, 3, 3, 3, 3, 3, 1]), 10).tolist() == [0, 0, 0, 1, 1, 1, 2, 0]
    assert pack_best_fit(np.zeros(0, dtype=np.int64), 10).tolist() == []


@pytest.mark.parametrize("lengths", [[0, 3], [11]])
def test_lengths_that_cannot_be_packed_are_refused(lengths: list[int]) -> None:
    with pytest.raises(DataError, match="expected 1 to 10"):
        pack_best_fit(np.array(lengths), 10)


@pytest.mark.parametrize("capacity", [128, 512, 1024])
def test_rows_are_as_full_as_those_of_a_greedy_packer(capacity: int) -> None:
    lengths = _lengths("text-like", 20_000, capacity)
    rows = pack_best_fit(lengths, capacity)
    fill = lengths.sum() / ((rows.max() + 1) * capacity)
    assert fill >= 0.98 and fill >= greedy_fill(lengths.tolist(), capacity) - 0.01


def test_documents_are_cut_into_whole_rows_and_a_rest() -> None:
    lengths, starts = cut_lengths(np.array([3, 10, 25, 20, 1]), 10)
    assert lengths.tolist() == [3, 10, 10, 10, 5, 10, 10, 1]
    assert starts.tolist() == [0, 3, 13, 23, 33, 38, 48, 58]


def test_windows_cover_all_blocks_and_are_never_small() -> None:
    pieces = [30_000, 50_000, 90_000, 10_000, 60_000, 4000]
    windows = cut_windows(pieces)
    assert [(window.start, window.stop) for window in windows] == [(0, 2), (2, 3), (3, 6)]
    assert cut_windows([5]) == [slice(0, 1)] and cut_windows([]) == []

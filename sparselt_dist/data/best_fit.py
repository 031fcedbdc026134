"""Best-fit-decreasing bin packing of whole documents into rows, over a histogram of lengths.

Pieces are taken from the longest to the shortest; each goes to the row with the least space that still holds it, or
opens a row (Johnson 1973; with it "Fewer Truncations Improve Language Modeling", Ding et al. 2024, section 3, packs
documents). Lengths and spaces are integers up to the capacity, so pieces of one length and rows of one space are
handled together: the work grows with the number of different lengths, not of pieces, and the result is the very one of
the piece-by-piece algorithm, ties apart.
"""

from __future__ import annotations

import numpy as np

from sparselt_dist.errors import DataError


def cut_lengths(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of documents: all of `capacity` tokens but a document's last, which has the rest; nothing is dropped.

    Args:
        lengths: int64 [documents], each at least 1.

    Returns:
        (length of each piece, its offset in the concatenated documents), int64 [pieces] each.
    """
    counts = -(-lengths // capacity)
    last = np.cumsum(counts) - 1
    pieces = np.full(int(counts.sum()), capacity, dtype=np.int64)
    pieces[last] = lengths - (counts - 1) * capacity
    return pieces, np.cumsum(pieces) - pieces


def pack_best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece by best-fit decreasing; rows are numbered by the first piece in them.

    Args:
        lengths: integers [pieces], each from 1 to `capacity`.

    Returns:
        int64 [pieces].

    Raises:
        DataError: a length is not in that range.
    """
    if len(lengths) == 0:
        return np.zeros(0, dtype=np.int64)
    if int(lengths.min()) < 1 or int(lengths.max()) > capacity:
        raise DataError(f"lengths to pack: found {lengths.min()} to {lengths.max()}, expected 1 to {capacity}")
    # numpy sorts 16-bit integers by counting; longest first, pieces of one length in their order
    sortable = (capacity - lengths).astype(np.uint16 if capacity < 2**16 else np.uint32)
    pieces = np.argsort(sortable, kind="stable")
    rows = np.empty(len(lengths), dtype=np.int64)
    rows[pieces] = _rows_of_sorted(np.bincount(lengths, minlength=capacity + 1), capacity)
    _, first, row = np.unique(rows, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[row]


def _rows_of_sorted(histogram: np.ndarray, capacity: int) -> np.ndarray:
    """Rows of the pieces, longest first; `histogram` has the number of pieces of each length."""
    rows: list[np.ndarray] = []
    open_rows: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # by space left
    spaces = 0  # bit s is set where rows with space s are open
    num_rows = 0
    for length in np.flatnonzero(histogram)[::-1].tolist():
        left = int(histogram[length])
        while left:
            fitting = spaces >> length
            if fitting:
                space = length + (fitting & -fitting).bit_length() - 1
                group = open_rows[space].pop()
                if not open_rows[space]:
                    spaces ^= 1 << space
            else:
                space = capacity
                needed = -(-left // (capacity // length))
                group = np.arange(num_rows, num_rows + needed)
                num_rows += needed
            taken, rest = _fill(group, min(space // length, left), left)
            rows.append(taken.rows)
            left -= len(taken.rows)
            for members, used in ((taken.full, taken.each), (taken.partly, taken.remainder), (rest, 0)):
                remaining = space - used * length
                if len(members) and remaining:
                    open_rows[remaining].append(members)
                    spaces |= 1 << remaining
    return np.concatenate(rows)


class _Taken:
    """Which rows of a group took how many of the pieces."""

    def __init__(self, full: np.ndarray, each: int, partly: np.ndarray, remainder: int) -> None:
        self.full, self.each, self.partly, self.remainder = full, each, partly, remainder
        self.rows = full if each == 1 else np.repeat(full, each)
        if remainder:
            self.rows = np.concatenate([self.rows, np.repeat(partly, remainder)])


def _fill(group: np.ndarray, each: int, left: int) -> tuple[_Taken, np.ndarray]:
    """Give `each` of `left` pieces to each row of a group; what is over goes to one more; and the rows not needed."""
    full = min(len(group), left // each)
    remainder = min(left - full * each, each) if full < len(group) else 0
    end = full + (remainder > 0)
    return _Taken(group[:full], each, group[full:end], remainder), group[end:]

"""Ids to samples: rows cut from running text, rows packed with whole documents, or documents.

The ids of a split lie in one file a block, in source order. A sample is a list of *pieces* of that stream: a row of
running text is one piece known from its number; documents and packed rows are listed in *plans*, one for each window of
consecutive blocks. So any order of samples is a list of numbers, and ids are read where they lie, never held.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparselt_dist.data.best_fit import cut_lengths, pack_best_fit
from sparselt_dist.data.manifest import Kind
from sparselt_dist.data.order import permute
from sparselt_dist.data.workspace import committed
from sparselt_dist.errors import DataError

WINDOW_PIECES = 65_536  # packed together; more fill no better (99.9 % at 5,000), fewer are slower to pack
SAMPLES_AT_ONCE_IDS = 2**21  # ids in memory while samples are gathered
SHUFFLE_KEY = 0x5E1F  # the stored order does not depend on the run: `run.seed` orders what a run reads


# --- plans -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """Consecutive blocks whose documents are packed together."""

    name: str
    lengths: tuple[Path, ...]  # files of document lengths
    first_id: int  # where they begin in the ids of the split


def cut_windows(pieces: Sequence[int]) -> list[slice]:
    """Consecutive blocks with at least `WINDOW_PIECES` together; what is left over joins the last window."""
    windows: list[slice] = []
    start = total = 0
    for number, count in enumerate(pieces):
        total += count
        if total >= WINDOW_PIECES:
            windows.append(slice(start, number + 1))
            start, total = number + 1, 0
    if start < len(pieces):
        first = windows.pop().start if windows else 0
        windows.append(slice(first, len(pieces)))
    return windows


def plan_window(folder: Path, row_length: int | None, window: Window) -> dict[str, Any]:
    """Write which pieces each sample of a window has; samples are in the order of their first piece.

    Args:
        row_length: pack whole documents into rows of so many ids; None: each document is a sample.
    """
    lengths = np.concatenate([np.fromfile(path, dtype=np.uint32) for path in window.lengths]).astype(np.int64)
    if row_length is None:
        starts = np.cumsum(lengths) - lengths
        ends = np.arange(1, len(lengths) + 1)
    else:
        lengths, starts = cut_lengths(lengths, row_length)
        rows = pack_best_fit(lengths, row_length)
        by_row = np.argsort(rows, kind="stable")
        lengths, starts = lengths[by_row], starts[by_row]
        ends = np.cumsum(np.bincount(rows))
    for part, array in (("ends", ends), ("starts", starts + window.first_id), ("lengths", lengths.astype(np.uint32))):
        with committed(folder / f"{window.name}.{part}.npy") as file:
            np.save(file, array)
    return {"samples": len(ends), "pieces": len(starts)}


# --- samples ---------------------------------------------------------------------------------------------------------


class Pieces(NamedTuple):
    """Pieces of the ids of a split, sample after sample."""

    starts: np.ndarray  # int64 [pieces], ids before it in the split
    lengths: np.ndarray  # int64 [pieces]
    counts: np.ndarray  # int64 [samples], pieces of each


@dataclass(frozen=True)
class Samples:
    """The samples of one split by number."""

    kind: Kind
    dtype: str
    row_length: int | None
    files: tuple[str, ...]  # of ids, one a block; strings, for they are sent to a worker with every job
    first_ids: np.ndarray  # int64 [files + 1]
    plans: tuple[str, ...] = ()  # without the ending; none for rows of running text
    first_samples: np.ndarray | None = None  # int64 [plans + 1]

    @property
    def number(self) -> int:
        """How many there are."""
        if self.first_samples is not None:
            return int(self.first_samples[-1])
        assert self.row_length is not None
        return int(self.first_ids[-1]) // self.row_length

    def pieces(self, samples: np.ndarray) -> Pieces:
        """Where the given samples lie."""
        if self.first_samples is None:
            assert self.row_length is not None
            lengths = np.full(len(samples), self.row_length, dtype=np.int64)
            return Pieces(samples * self.row_length, lengths, np.ones(len(samples), dtype=np.int64))
        plans = np.searchsorted(self.first_samples, samples, side="right") - 1
        places = [np.flatnonzero(plans == plan) for plan in np.unique(plans)]
        parts = [self._planned(int(plans[place[0]]), samples[place]) for place in places]
        counts = np.concatenate([part.counts for part in parts])
        order = np.argsort(np.concatenate(places), kind="stable")
        gather = _ranges((np.cumsum(counts) - counts)[order], counts[order])
        starts, lengths = (np.concatenate([part[field] for part in parts])[gather] for field in (0, 1))
        return Pieces(starts, lengths, counts[order])

    def _planned(self, plan: int, samples: np.ndarray) -> Pieces:
        assert self.first_samples is not None
        ends, starts, lengths = (
            np.load(f"{self.plans[plan]}.{part}.npy", mmap_mode="r") for part in ("ends", "starts", "lengths")
        )
        inside = samples - self.first_samples[plan]
        last = ends[inside]
        counts = last - np.where(inside > 0, ends[inside - 1], 0)
        chosen = _ranges(last - counts, counts)
        return Pieces(starts[chosen], lengths[chosen].astype(np.int64), counts)

    def read(self, samples: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids, lengths of the pieces in them) of each sample, in the order asked."""
        pieces = self.pieces(samples)
        ends = np.cumsum(pieces.counts)
        sizes = np.add.reduceat(pieces.lengths, ends - pieces.counts)
        for group in _groups(sizes, SAMPLES_AT_ONCE_IDS):
            first, last = int(ends[group.start] - pieces.counts[group.start]), int(ends[group.stop - 1])
            ids = self._gather(pieces.starts[first:last], pieces.lengths[first:last])
            bounds = np.cumsum(sizes[group])
            lengths = np.split(pieces.lengths[first:last], ends[group][:-1] - first)
            yield from zip(np.split(ids, bounds[:-1]), lengths, strict=True)

    def _gather(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The ids of pieces, end to end; read in the order in which they lie."""
        ids = np.empty(int(lengths.sum()), dtype=self.dtype)
        itemsize, target = ids.itemsize, ids.view(np.uint8).data
        places = np.cumsum(lengths) - lengths
        order = np.argsort(starts, kind="stable")
        files = np.searchsorted(self.first_ids, starts[order], side="right") - 1
        listed = zip(
            files.tolist(), starts[order].tolist(), lengths[order].tolist(), places[order].tolist(), strict=True
        )
        with _Descriptors(self.files) as descriptors:
            for file, start, length, place in listed:
                while length:
                    inside = min(length, int(self.first_ids[file + 1]) - start)
                    offset = (start - int(self.first_ids[file])) * itemsize
                    view = target[place * itemsize : (place + inside) * itemsize]
                    if os.preadv(descriptors.of(file), [view], offset) != len(view):
                        raise DataError(
                            f"{self.files[file]}: shorter than it was written; remove it with all of its folder and prepare again"
                        )
                    file, start, length, place = file + 1, start + inside, length - inside, place + inside
        return ids


class _Descriptors(contextlib.AbstractContextManager["_Descriptors"]):
    """Opens files one at a time, as they come."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._open: tuple[int, int] | None = None  # (number, descriptor)

    def of(self, number: int) -> int:
        if self._open is None or self._open[0] != number:
            self.__exit__()
            self._open = number, os.open(self._paths[number], os.O_RDONLY)
        return self._open[1]

    def __exit__(self, *_: object) -> None:
        if self._open is not None:
            os.close(self._open[1])
            self._open = None


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start, start + 1, ... for each (start, count), one after another."""
    ends = np.cumsum(counts)
    return np.repeat(starts - ends + counts, counts) + np.arange(int(ends[-1]) if len(ends) else 0)


def _groups(sizes: np.ndarray, limit: int) -> Iterator[slice]:
    """Consecutive samples of about `limit` ids together."""
    group = (np.cumsum(sizes) - sizes) // limit
    cuts = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(sizes)]
    for start, end in itertools.pairwise(cuts):
        yield slice(start, end)


# --- order -----------------------------------------------------------------------------------------------------------


def stored_order(order: str, by_count: Path | None, total: int, first: int, count: int) -> np.ndarray:
    """Numbers of the samples that are stored at `first` and after, int64 [count]."""
    places = np.arange(first, first + count, dtype=np.int64)
    if by_count is not None:
        return np.array(np.load(by_count, mmap_mode="r")[first : first + count])
    if order == "shuffle":
        return permute(places.astype(np.uint64), total, SHUFFLE_KEY).astype(np.int64)
    return places


def count_id(samples: Samples, token: int, folder: Path, job: tuple[int, int, int]) -> dict[str, Any]:
    """Write how often an id occurs in each of some samples, int32; job: its number, the first sample, how many."""
    number, first, count = job
    counts = [int((ids == token).sum()) for ids, _ in samples.read(np.arange(first, first + count))]
    with committed(folder / f"{number:06d}.npy") as file:
        np.save(file, np.array(counts, dtype=np.int32))
    return {}


def sort_by_count(folder: Path, jobs: int, path: Path) -> dict[str, Any]:
    """Write the numbers of all samples, those with the most of an id first; equal ones stay in order."""
    counts = np.concatenate([np.load(folder / f"{number:06d}.npy") for number in range(jobs)])
    with committed(path) as file:
        np.save(file, np.argsort(-counts, kind="stable"))
    return {}

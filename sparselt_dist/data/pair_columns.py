"""Agreement pairs as columns: what is joined, thinned and stored instead of millions of objects.

A side of all pairs is a ragged list: `<name>_ids`, all ids end to end, `<name>_ends`, where each side ends, `<name>_roots`,
whether an id belongs to the root word. There are four (heads, dependents, and those of the wrong-number copies), `labels`,
a number into the list of labels, and `flipped`, the pairs that have a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sparselt_dist.data.piece_alignment import Side
from sparselt_dist.data.randomness import mix64, purpose_key

FREE_REPEATS = 10
_SIDES = ("heads", "dependents")
_FLIPPED_SIDES = ("flipped_heads", "flipped_dependents")
COLUMNS = (
    "labels",
    "flipped",
    *(f"{side}_{part}" for side in (*_SIDES, *_FLIPPED_SIDES) for part in ("ids", "ends", "roots")),
)


class Pair(NamedTuple):
    """A pair in pieces."""

    label: str
    head: Side
    dependent: Side
    flipped: tuple[Side, Side] | None  # (head, dependent) of the copy in the wrong number


@dataclass(frozen=True)
class Columns:
    """Pairs of one family."""

    labels: list[str]  # ascending
    arrays: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.arrays["labels"])


def to_columns(pairs: Sequence[Pair], vocab_size: int) -> Columns:
    """Pairs as columns; ids are uint16 where the vocabulary allows it, else uint32."""
    copies = [(number, pair.flipped) for number, pair in enumerate(pairs) if pair.flipped is not None]
    sides: dict[str, Iterable[Side]] = {
        "heads": (pair.head for pair in pairs),
        "dependents": (pair.dependent for pair in pairs),
        "flipped_heads": (head for _, (head, _) in copies),
        "flipped_dependents": (dependent for _, (_, dependent) in copies),
    }
    labels = sorted({pair.label for pair in pairs})
    number = {label: place for place, label in enumerate(labels)}
    arrays: dict[str, np.ndarray] = {
        "labels": np.array([number[pair.label] for pair in pairs], dtype=np.uint16),
        "flipped": np.array([place for place, _ in copies], dtype=np.uint32),
    }
    for name, listed in sides.items():
        known = list(listed)
        arrays[f"{name}_ids"] = np.array([piece for side in known for piece in side.ids], dtype=id_type(vocab_size))
        arrays[f"{name}_ends"] = np.cumsum([len(side.ids) for side in known], dtype=np.uint32)
        arrays[f"{name}_roots"] = np.array([root for side in known for root in side.of_root], dtype=bool)
    return Columns(labels, arrays)


def id_type(vocab_size: int) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
    return np.dtype(np.uint16) if vocab_size <= 2**16 else np.dtype(np.uint32)


def join(parts: Sequence[Columns], vocab_size: int) -> Columns:
    """Columns one after another, with one list of labels."""
    if not parts:
        return to_columns([], vocab_size)
    labels = sorted({label for part in parts for label in part.labels})
    number = {label: place for place, label in enumerate(labels)}
    renamed = [np.array([number[label] for label in part.labels], dtype=np.uint16) for part in parts]
    first_pairs = np.cumsum([0, *map(len, parts)])
    arrays: dict[str, np.ndarray] = {
        "labels": np.concatenate([new[part.arrays["labels"]] for new, part in zip(renamed, parts, strict=True)]),
        "flipped": np.concatenate(
            [part.arrays["flipped"] + np.uint32(first) for first, part in zip(first_pairs[:-1], parts, strict=True)]
        ),
    }
    for name in (*_SIDES, *_FLIPPED_SIDES):
        for column in ("ids", "roots"):
            arrays[f"{name}_{column}"] = np.concatenate([part.arrays[f"{name}_{column}"] for part in parts])
        arrays[f"{name}_ends"] = join_ends([part.arrays[f"{name}_ends"] for part in parts])
    return Columns(labels, arrays)


def join_ends(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Ends of ragged lists that come to lie one after another: uint32."""
    lengths = [np.diff(ends, prepend=np.uint32(0)) for ends in parts]
    return np.cumsum(np.concatenate(lengths), dtype=np.uint32)


def select(columns: Columns, kept: np.ndarray) -> Columns:
    """The pairs that a mask bool [pairs] names; labels that are left without pair stay in the list."""
    flipped = columns.arrays["flipped"]
    copies = kept[flipped]
    arrays = {
        "labels": columns.arrays["labels"][kept],
        "flipped": (np.cumsum(kept) - 1)[flipped[copies]].astype(np.uint32),
    }
    for names, mask in ((_SIDES, kept), (_FLIPPED_SIDES, copies)):
        for name in names:
            lengths = np.diff(columns.arrays[f"{name}_ends"], prepend=np.uint32(0))
            pieces = np.repeat(mask, lengths)
            arrays[f"{name}_ends"] = np.cumsum(lengths[mask], dtype=np.uint32)
            for column in ("ids", "roots"):
                arrays[f"{name}_{column}"] = columns.arrays[f"{name}_{column}"][pieces]
    return Columns(columns.labels, arrays)


def thin_repeats(columns: Columns, seed: int) -> np.ndarray:
    """Keep each pair that is seen c > 10 times with probability sqrt(10/c): mask [pairs], of the pairs and the seed."""
    keys = _side_keys(columns, "heads") + mix64(_side_keys(columns, "dependents"))
    _, of_pair, counts = np.unique(keys, return_inverse=True, return_counts=True)
    draws = np.random.default_rng(seed).random(len(columns))
    kept: np.ndarray = draws < np.sqrt(FREE_REPEATS / counts[of_pair])
    return kept


def _side_keys(columns: Columns, name: str) -> np.ndarray:
    """A 64-bit hash of the ids of each side, in their order."""
    ids, ends = columns.arrays[f"{name}_ids"], columns.arrays[f"{name}_ends"].astype(np.int64)
    lengths = np.diff(ends, prepend=0)
    places = np.arange(len(ids)) - np.repeat(ends - lengths, lengths)
    hashed = mix64((ids.astype(np.uint64) << np.uint64(8) | places.astype(np.uint64)) ^ np.uint64(purpose_key("side")))
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(hashed, dtype=np.uint64)])
    keys: np.ndarray = sums[ends] - sums[ends - lengths]
    return keys

"""Exact duplicates over the whole corpus, and which documents of a block are left.

A job takes one range of hash values from all blocks: memory holds that range, some ten bytes a document in it, and the
ranges are as many as keep it bounded whatever the corpus. Of equal documents the first of the corpus stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparselt_dist.data.blocks import Block
from sparselt_dist.data.deduplication import removed_documents
from sparselt_dist.data.workspace import committed

DOCUMENTS_A_RANGE = 2**22


def hash_bits(documents: int) -> int:
    """Ranges are 2 to the power of this."""
    return max(0, (documents - 1) // DOCUMENTS_A_RANGE).bit_length()


def find_repeats(documents: Path, repeats: Path, blocks: Sequence[Block], bits: int, number: int) -> dict[str, Any]:
    """Write the numbers, in the corpus, of the documents of one hash range that an earlier one equals."""
    hashes, positions = [], []
    for block in blocks:
        of_block = block.hashes(documents)
        inside = np.flatnonzero(of_block >> np.uint64(64 - bits) == number) if bits else np.arange(len(of_block))
        hashes.append(of_block[inside])
        positions.append(inside + block.first)
    joined = np.concatenate(hashes)
    del hashes
    order = np.argsort(joined, kind="stable")  # the first of the corpus stays first
    joined = joined[order]
    repeated = order[1:][joined[1:] == joined[:-1]]
    with committed(repeats / f"{number:06d}.npy") as file:
        np.save(file, np.sort(np.concatenate(positions)[repeated]))
    return {"repeats": len(repeated)}


@dataclass(frozen=True)
class Survivors:
    """Which documents of a block are left."""

    repeats: Path | None  # None: exact duplicates stay
    ranges: int
    number: int = 0  # exact duplicates that go
    near: Path | None = None  # None: near duplicates stay

    def first_copies(self, block: Block) -> np.ndarray:
        """Numbers in the block of the documents that no earlier one equals, ascending."""
        kept = np.ones(block.documents, dtype=bool)
        for number in range(self.ranges if self.repeats else 0):
            assert self.repeats is not None
            repeats = np.load(self.repeats / f"{number:06d}.npy", mmap_mode="r")
            start, end = np.searchsorted(repeats, [block.first, block.first + block.documents])
            kept[repeats[start:end] - block.first] = False
        return np.flatnonzero(kept)

    def of(self, block: Block) -> np.ndarray:
        """Numbers in the block of the documents that are left, ascending."""
        left = self.first_copies(block)
        if self.near is None:
            return left
        kept = np.ones(len(left), dtype=bool)
        kept[list(removed_documents(self.near, block.number))] = False
        return left[kept]

"""Which documents the agreement pairs come from: a sample by hash.

A document's place, a number in [0, 1), comes from its normalised text alone, so no worker, part or order changes the
sample: every document below a share is read. Places from 0.99 on are never read. That hundredth, and the held-out split,
stay text that no pair has seen.
"""

from __future__ import annotations

import numpy as np

from sparselt_dist.data.randomness import mix64, purpose_key

MAX_SHARE = 0.99
CHARACTERS_A_WORD = 5.0  # of English text, where a clitic or a mark is a word; the manifest says how many were read
KEPT_FACTOR = 8  # originals are chosen before it is known how many of the source's bytes stay as text
TEXT_PIECES = 2_000_000  # of labelled text


def places(split_hashes: np.ndarray) -> np.ndarray:
    """Where documents stand in the sample: float64 [n] in [0, 1), from their split hashes uint64 [n]."""
    mixed = mix64(split_hashes.astype(np.uint64) ^ np.uint64(purpose_key("agreement sample")))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def share_to_keep(words: int, source_bytes: int | None) -> float:
    """The share of documents whose original text is kept while it is read, before the sample can be cut.

    Args:
        words: wanted.
        source_bytes: of all sources on disk; None where unknown.
    """
    if not source_bytes:
        return MAX_SHARE
    return min(MAX_SHARE, KEPT_FACTOR * words * CHARACTERS_A_WORD / source_bytes)


def share_to_read(words: int, characters: int, kept: float) -> float:
    """The share of documents that gives about so many words of a training split of so many characters."""
    return min(kept, words * CHARACTERS_A_WORD / max(1, characters))


def share_to_label(share: float, pieces: int) -> float:
    """The share that gives about `TEXT_PIECES` pieces of labelled text, of a training split of so many."""
    return min(share, TEXT_PIECES / max(1, pieces))

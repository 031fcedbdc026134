"""A copy of a shard folder with made-up agreements beside its training shards."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from sparselt_dist.data.agreements import FAMILIES
from sparselt_dist.data.manifest import read_manifest
from sparselt_dist.data.pair_columns import Pair, to_columns
from sparselt_dist.data.pair_files import PairOrigin, StoredFamily, shards_identity, write_pairs
from sparselt_dist.data.piece_alignment import Side

PAIRS = 400


def add_agreements(folder: Path, *, pairs: int = PAIRS, first_id: int = 5) -> None:
    """Random pairs of ids from `first_id` on for every family, and a labelled text of as many pieces."""
    manifest = read_manifest(folder)
    rng = np.random.default_rng(0)

    def side() -> Side:
        size = int(rng.integers(1, 4))
        ids = rng.integers(first_id, min(manifest.vocab_size, first_id + 60), size)
        return Side(tuple(ids.tolist()), tuple(place == 0 for place in range(size)))

    def drawn(labels: tuple[str, str]) -> list[Pair]:
        return [Pair(labels[number % 2], side(), side(), None) for number in range(pairs)]

    size = manifest.vocab_size
    families = [
        StoredFamily(family, to_columns(drawn(("x", "y")), size), to_columns(drawn(("x", "y")), size))
        for family in FAMILIES
    ]
    text = {"ids": rng.integers(first_id, size, pairs).astype(np.uint16), "ends": np.arange(10, pairs + 1, 10)}
    text["begins"] = rng.integers(0, 2, pairs).astype(bool)
    for family in FAMILIES:
        text[f"roles_{family}"] = rng.integers(0, 3, pairs).astype(np.uint8)
        text[f"distances_{family}"] = rng.integers(0, 10, pairs).astype(np.uint8)
    origin = PairOrigin("strict", manifest.tokenizer_sha256, shards_identity(manifest.shards), size, 3, 0, 1000)
    write_pairs(folder, families, text, origin, extraction_seconds=2.5)


def with_agreements(shards: Path, folder: Path) -> Path:
    """Shard folders `train`, with agreements, and `validation`."""
    shutil.copytree(shards, folder)
    shutil.rmtree(folder / "train" / "agreements", ignore_errors=True)
    add_agreements(folder / "train")
    return folder

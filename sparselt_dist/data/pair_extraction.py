"""Blocks of documents to agreement pairs: one block at a time, a pure function run in worker processes; then all in one.

A block becomes one `.npz`: `<family>.<column>`, `<family>.window.<column>` and, of some documents, `text.<column>`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparselt_dist.data import pair_columns, pair_files, pair_sample
from sparselt_dist.data.agreement_sentences import parsing_reader, read_strictly
from sparselt_dist.data.agreements import FAMILIES, Family
from sparselt_dist.data.blocks import Block, read_with_originals
from sparselt_dist.data.cleaning import Normalization
from sparselt_dist.data.duplicates import Survivors
from sparselt_dist.data.labelled_text import join_text
from sparselt_dist.data.pair_columns import Columns
from sparselt_dist.data.pair_drawing import Document, Drawer, Drawn
from sparselt_dist.data.pair_files import PairOrigin, StoredFamily, Track
from sparselt_dist.data.piece_alignment import align
from sparselt_dist.data.tokenization import compressible, is_held_out, load_encoder
from sparselt_dist.data.workspace import committed
from sparselt_dist.errors import DataError

THINNING_SEED = 0


@dataclass(frozen=True)
class PairRules:
    """What a worker needs to turn a block into pairs."""

    documents: Path
    output: Path
    tokenizer: Path
    tokenizer_sha256: str
    vocab_size: int
    survivors: Survivors
    normalization: Normalization
    max_tokens_per_character: float | None
    held_out_below: int
    share: float  # of the documents, by `pair_sample.places`
    text_share: float  # of the documents whose text is labelled
    track: Track
    parser: str


# --- a block ---------------------------------------------------------------------------------------------------------


def extract_block(rules: PairRules, block: Block) -> dict[str, Any]:
    """Write the pairs of a block's documents; nothing is written where the sample has none of them."""
    started = time.process_time()
    index, left = block.index(rules.documents), rules.survivors.of(block)
    places = pair_sample.places(index["split_hash"])
    numbers = left[~is_held_out(index, rules.held_out_below)[left] & (places[left] < rules.share)]
    counts = {"documents": 0, "unaligned": 0, "words": 0}
    parts: dict[str, list[Columns]] = {}
    text: list[dict[str, np.ndarray]] = []
    for drawn in _draw(rules, block, index, numbers, places < rules.text_share, counts):
        for family in FAMILIES:
            for name, pairs in ((family, drawn.pairs[family]), (f"{family}.window", drawn.windows[family])):
                parts.setdefault(name, []).append(pair_columns.to_columns(pairs, rules.vocab_size))
        text += drawn.text
        counts["words"] += drawn.words
    if counts["documents"]:
        joined = {name: pair_columns.join(of_name, rules.vocab_size) for name, of_name in parts.items()}
        _write_block(rules, block, joined, join_text(text, rules.vocab_size, pair_sample.TEXT_PIECES))
    return {**counts, "seconds": time.process_time() - started}


def _draw(
    rules: PairRules, block: Block, index: np.ndarray, numbers: np.ndarray, labelled: np.ndarray, counts: dict[str, int]
) -> Iterator[Drawn]:
    """What comes of the documents of these numbers, some at a time."""
    encoder = load_encoder(rules.tokenizer, rules.tokenizer_sha256, rules.normalization)
    drawer = Drawer(encoder, rules.normalization, rules.vocab_size)
    read = parsing_reader(rules.parser) if rules.track == "parser" else read_strictly
    for batch, originals in read_with_originals(rules.documents, block, index, numbers):
        encodings = encoder.encode_with_spans(batch.texts)
        pieces = np.array([len(encoded.ids) for encoded in encodings])
        kept = compressible(rules.max_tokens_per_character, pieces, index["characters"][batch.numbers]).tolist()
        drawn = Drawn()
        for place, sentences in zip(kept, read([originals[place] for place in kept]), strict=True):
            counts["documents"] += 1
            number = int(batch.numbers[place])
            try:
                aligned = align(originals[place], batch.texts[place])
            except DataError:  # of a rare script; no reason to end the work of hours
                counts["unaligned"] += 1
                continue
            document = Document(batch.texts[place], encodings[place], aligned, sentences)
            seed = int(index["split_hash"][number])
            drawer.draw(document, drawn, seed=seed, with_text=bool(labelled[number]))
        yield drawn


def _write_block(rules: PairRules, block: Block, families: dict[str, Columns], text: dict[str, np.ndarray]) -> None:
    arrays = {f"{pair_files.TEXT}.{name}": array for name, array in text.items()}
    for family, columns in families.items():
        arrays |= {f"{family}.{name}": array for name, array in columns.arrays.items()}
        arrays[f"{family}.names"] = np.array(columns.labels, dtype=np.str_)
    with committed(rules.output / f"{block.name}.npz") as file:
        np.savez(file, allow_pickle=False, **arrays)


# --- all blocks ------------------------------------------------------------------------------------------------------


def merge_blocks(blocks: Sequence[Path], origin: PairOrigin, extraction_seconds: float, folder: Path) -> dict[str, Any]:
    """Thin the pairs of all blocks and store them under a folder; a family is in memory at a time.

    Raises:
        DataError: there is not a single pair.
    """
    families = (_merge_family(blocks, family, origin.vocab_size) for family in FAMILIES)
    text = join_text([_load_text(path) for path in blocks], origin.vocab_size, pair_sample.TEXT_PIECES)
    pairs = pair_files.write_pairs(folder, families, text, origin, extraction_seconds=extraction_seconds)
    if not sum(pairs.values()):
        raise DataError(
            f"prepare.agreements: found no agreement in the {origin.words:,} words of {origin.documents:,} documents, "
            "expected English text; give more or other text, or set prepare.agreements=none"
        )
    return {"pairs": pairs}


def _merge_family(blocks: Sequence[Path], family: Family, vocab_size: int) -> StoredFamily:
    agreements = pair_columns.join([_load(path, family) for path in blocks], vocab_size)
    kept = pair_columns.thin_repeats(agreements, THINNING_SEED)
    agreements = pair_columns.select(agreements, kept)
    window = pair_columns.join([_load(path, f"{family}.window") for path in blocks], vocab_size)
    return StoredFamily(family, agreements, pair_columns.select(window, kept))


def _load(path: Path, name: str) -> Columns:
    with np.load(path, allow_pickle=False) as stored:
        arrays = {column: stored[f"{name}.{column}"] for column in pair_columns.COLUMNS}
        return Columns(stored[f"{name}.names"].tolist(), arrays)


def _load_text(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as stored:
        prefix = f"{pair_files.TEXT}."
        return {name.removeprefix(prefix): stored[name] for name in stored.files if name.startswith(prefix)}

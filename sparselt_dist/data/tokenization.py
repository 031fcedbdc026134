"""Documents to ids: one block at a time, a pure function run in worker processes.

A block becomes two files a split, in source order: `.ids`, framed documents end to end, and `.lengths`, one uint32 a
document. Of rows cut from running text each document ends with sep; documents kept whole begin with cls as well.
"""

from __future__ import annotations

import contextlib
import functools
import json
import unicodedata
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from sparselt_dist.data.blocks import Block, read_texts
from sparselt_dist.data.cleaning import Normalization
from sparselt_dist.data.duplicates import Survivors
from sparselt_dist.data.manifest import Kind
from sparselt_dist.data.tokenizer import end_of_document, load_for_text, tokenizer_info
from sparselt_dist.data.tokenizer_training import own_normalizer
from sparselt_dist.data.workspace import committed

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True)
class TokenizeRules:
    """What a worker needs to turn a block into ids."""

    documents: Path
    output: Path
    tokenizer: Path
    tokenizer_sha256: str
    survivors: Survivors
    normalization: Normalization
    max_tokens_per_character: float | None
    held_out_below: int  # documents whose split hash is lower are held out
    kind: Kind
    row_length: int | None
    dtype: str


class Encoded(NamedTuple):
    """Pieces of a text."""

    ids: list[int]
    spans: list[tuple[int, int]]  # characters from, to


class Encoder:
    """A tokenizer for text that `cleaning.normalize` has gone over."""

    def __init__(self, folder: Path, normalization: Normalization) -> None:
        self._tokenizer = load_for_text(folder)
        self._without = self._without_normalizer(folder, normalization)
        self._always = normalization == "crammed"
        info = tokenizer_info(folder)
        self.special_ids = frozenset(info.special_ids)
        self.begin = info.cls_id if info.cls_id is not None else info.bos_id
        self.end = end_of_document(info, str(folder))

    def _without_normalizer(self, folder: Path, normalization: Normalization) -> Tokenizer | None:
        """A normaliser that would repeat what was done is left out: it takes a sixth of the time, crammed half."""
        own = own_normalizer(normalization)
        if own is None or json.loads(self._tokenizer.to_str())["normalizer"] != own:
            return None
        tokenizer = load_for_text(folder)
        tokenizer.normalizer = None
        return tokenizer

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text."""
        encodings = self._chosen(texts).encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_with_spans(self, texts: list[str]) -> list[Encoded]:
        """The same ids, and where each piece stands in its text."""
        encodings = self._chosen(texts).encode_batch(texts, add_special_tokens=False)
        return [Encoded(encoding.ids, encoding.offsets) for encoding in encodings]

    def _chosen(self, texts: list[str]) -> Tokenizer:
        # tidying up can leave, in rare texts, marks side by side that compose
        if self._without is not None and (
            self._always or all(unicodedata.is_normalized("NFC", text) for text in texts)
        ):
            return self._without
        return self._tokenizer


@functools.lru_cache(maxsize=1)
def load_encoder(folder: Path, sha256: str, normalization: Normalization) -> Encoder:
    """Loaded once a process; the hash tells it from another preparation's in the same place."""
    return Encoder(folder, normalization)


@dataclass
class _SplitFiles:
    """The files of one split of a block, and what is counted on the way."""

    ids: IO[bytes]
    lengths: IO[bytes]
    index: list[np.ndarray]
    num_ids: int = 0
    text_tokens: int = 0  # without cls and sep
    pieces: int = 0

    def write(self, rules: TokenizeRules, encoder: Encoder, entries: np.ndarray, documents: list[list[int]]) -> None:
        """Append documents, framed."""
        if not documents:
            return
        begin = [encoder.begin] if rules.kind != "rows" and encoder.begin is not None else []
        framed = array("H" if rules.dtype == "uint16" else "I")
        for ids in documents:
            framed.fromlist(begin)
            framed.fromlist(ids)
            framed.append(encoder.end)
        lengths = np.array([len(ids) for ids in documents], dtype=np.uint32) + len(begin) + 1
        self.ids.write(framed)
        self.lengths.write(lengths.tobytes())
        self.index.append(entries)
        self.num_ids += len(framed)
        self.text_tokens += len(framed) - len(documents) * (len(begin) + 1)
        whole = rules.row_length if rules.kind == "packed" else None
        self.pieces += int((-(-lengths.astype(np.int64) // whole)).sum()) if whole else len(documents)

    def record(self, block: Block) -> dict[str, Any]:
        index = np.concatenate(self.index) if self.index else np.empty(0, dtype=[("source", "u4")])
        by_source = {}
        for source in np.unique(index["source"]).tolist():
            of_source = index[index["source"] == source]
            by_source[str(block.sources[source])] = [len(of_source), int(of_source["characters"].sum(dtype=np.int64))]
        return {
            "ids": self.num_ids,
            "samples": len(index),
            "pieces": self.pieces,
            "text_tokens": self.text_tokens,
            "text_bytes": int(index["bytes"].sum(dtype=np.int64)) if self.index else 0,
            "sources": by_source,
        }


def tokenize_block(rules: TokenizeRules, block: Block) -> dict[str, Any]:
    """Encode a block: leave out duplicates and incompressible documents, frame each document, split."""
    encoder = load_encoder(rules.tokenizer, rules.tokenizer_sha256, rules.normalization)
    index, left = block.index(rules.documents), rules.survivors.of(block)
    held_out = is_held_out(index, rules.held_out_below)
    incompressible = 0
    with contextlib.ExitStack() as stack:
        files = {split: _open_split(stack, rules.output, block, split) for split in SPLITS}
        for batch in read_texts(rules.documents, block, index, left):
            encoded = encoder.encode(batch.texts)
            counts = np.array([len(ids) for ids in encoded])
            kept = compressible(rules.max_tokens_per_character, counts, index["characters"][batch.numbers])
            incompressible += len(encoded) - len(kept)
            for split in SPLITS:
                places = kept[held_out[batch.numbers[kept]] == (split == "validation")]
                chosen = [encoded[place] for place in places.tolist()]
                files[split].write(rules, encoder, index[batch.numbers[places]], chosen)
        records: dict[str, Any] = {split: files[split].record(block) for split in SPLITS}
    return {"left": len(left), "incompressible": incompressible, **records}


def _open_split(stack: contextlib.ExitStack, folder: Path, block: Block, split: Split) -> _SplitFiles:
    ids, lengths = (
        stack.enter_context(committed(folder / f"{block.name}.{split}.{ending}")) for ending in ("ids", "lengths")
    )
    return _SplitFiles(ids, lengths, [])


def is_held_out(index: np.ndarray, held_out_below: int) -> np.ndarray:
    """bool [documents] of a block's index."""
    return index["split_hash"] < held_out_below if held_out_below < 2**64 else np.ones(len(index), bool)


def compressible(max_tokens_per_character: float | None, counts: np.ndarray, characters: np.ndarray) -> np.ndarray:
    """Places of the documents that the compressibility filter leaves, from their tokens and characters."""
    if max_tokens_per_character is None:
        return np.arange(len(counts))
    return np.flatnonzero(counts < max_tokens_per_character * characters)

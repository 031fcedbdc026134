"""Documents to ids, ids to rows, rows to shards.

`tokenize_chunk` and `write_shard` are pure functions run in worker processes. Between them stands one file of ids a
split (and one of document lengths), in source order. Rows are cut from it by number, so any order of rows is a list of
numbers, and the file is read, never held.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from sparselt_dist.data.cleaning import StoredDocument, parse_records
from sparselt_dist.data.deduplication import Chunk, removed_documents
from sparselt_dist.data.shards import Kind, ShardEntry, ShardWriter
from sparselt_dist.data.tokenizer import end_of_document, load_for_text, tokenizer_info

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from sparselt_dist.objectives.base import TokenizerInfo

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
ENCODE_CHARACTERS = 500_000  # text handed to the tokenizer at once; its working memory is some hundred times this
SHUFFLE_KEY = 0x5E1F  # the stored order does not depend on the run: `run.seed` orders what a run reads


# --- documents to ids ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizeRules:
    """What a worker needs to turn a chunk into ids."""

    documents: Path
    tokenizer: Path
    tokenizer_sha256: str
    near_duplicates: Path | None
    max_tokens_per_character: float | None
    held_out_below: int  # documents whose split hash is lower are held out
    kind: Kind
    dtype: str


@dataclass
class SplitIds:
    """The ids of one split of a chunk, and what they stand for."""

    ids: bytes = b""
    lengths: bytes = b""  # uint32 a document
    documents: Counter[int] = field(default_factory=Counter)  # by source number
    characters: Counter[int] = field(default_factory=Counter)
    text_bytes: int = 0
    text_tokens: int = 0  # without cls and sep


@dataclass
class ChunkIds:
    splits: dict[Split, SplitIds]
    near_duplicates: int
    incompressible: int


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: Path, sha256: str) -> tuple[Tokenizer, TokenizerInfo]:
    """Loaded once a process; the hash tells it from another preparation's in the same place."""
    return load_for_text(folder), tokenizer_info(folder)


def tokenize_chunk(rules: TokenizeRules, chunk: Chunk) -> ChunkIds:
    """Encode a chunk: drop near duplicates and incompressible documents, close each document with sep, split."""
    info = _tokenizer(rules.tokenizer, rules.tokenizer_sha256)[1]
    end = end_of_document(info, str(rules.tokenizer))
    begin = info.cls_id if info.cls_id is not None else info.bos_id
    frame_begin = [begin] if rules.kind == "documents" and begin is not None else []
    removed = removed_documents(rules.near_duplicates, chunk.number) if rules.near_duplicates else frozenset()
    result = ChunkIds({split: SplitIds() for split in SPLITS}, near_duplicates=len(removed), incompressible=0)
    ids_of: dict[Split, list[np.ndarray]] = {split: [] for split in SPLITS}
    lengths_of: dict[Split, list[int]] = {split: [] for split in SPLITS}
    limit = rules.max_tokens_per_character
    for document, ids in _encoded(rules, chunk, removed):
        if limit is not None and len(ids) >= limit * len(document.text):
            result.incompressible += 1
            continue
        split: Split = "validation" if document.split_hash < rules.held_out_below else "train"
        framed = np.array([*frame_begin, *ids, end], dtype=rules.dtype)
        ids_of[split].append(framed)
        lengths_of[split].append(len(framed))
        _count(result.splits[split], document, len(ids))
    for split, part in result.splits.items():
        part.ids = np.concatenate(ids_of[split]).tobytes() if ids_of[split] else b""
        part.lengths = np.array(lengths_of[split], dtype=np.uint32).tobytes()
    return result


def _count(part: SplitIds, document: StoredDocument, tokens: int) -> None:
    part.documents[document.source] += 1
    part.characters[document.source] += len(document.text)
    part.text_bytes += len(document.text.encode())
    part.text_tokens += tokens


def _encoded(rules: TokenizeRules, chunk: Chunk, removed: frozenset[int]) -> Iterator[tuple[StoredDocument, list[int]]]:
    tokenizer = _tokenizer(rules.tokenizer, rules.tokenizer_sha256)[0]
    batch: list[StoredDocument] = []
    characters = 0

    def flush() -> Iterator[tuple[StoredDocument, list[int]]]:
        encodings = tokenizer.encode_batch_fast([document.text for document in batch], add_special_tokens=False)
        for document, encoding in zip(batch, encodings, strict=True):
            yield document, encoding.ids

    for number, document in enumerate(parse_records(chunk.read(rules.documents))):
        if number in removed:
            continue
        batch.append(document)
        characters += len(document.text)
        if characters >= ENCODE_CHARACTERS:
            yield from flush()
            batch, characters = [], 0
    if batch:
        yield from flush()


# --- ids to rows -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IdFile:
    """The samples of one split: rows of `row_length` ids, or documents by their lengths."""

    ids: Path
    dtype: str
    row_length: int | None
    starts: np.ndarray | None = None  # documents: int64 [samples + 1], in ids

    @classmethod
    def open(cls, ids: Path, lengths: Path, dtype: str, row_length: int | None) -> IdFile:
        if row_length is not None:
            return cls(ids, dtype, row_length)
        ends = np.cumsum(np.fromfile(lengths, dtype=np.uint32), dtype=np.int64)
        return cls(ids, dtype, None, np.concatenate(([0], ends)))

    @property
    def num_ids(self) -> int:
        return self.ids.stat().st_size // np.dtype(self.dtype).itemsize

    @property
    def num_samples(self) -> int:
        if self.starts is not None:
            return len(self.starts) - 1
        assert self.row_length is not None
        return self.num_ids // self.row_length

    def ranges(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(first id, number of ids) of the given samples, int64 each."""
        if self.starts is not None:
            return self.starts[samples], self.starts[samples + 1] - self.starts[samples]
        assert self.row_length is not None
        return samples * self.row_length, np.full(len(samples), self.row_length, dtype=np.int64)


def sample_order(file: IdFile, order: str, full_stop: int | None) -> np.ndarray:
    """All sample numbers in the order they are stored; int64."""
    if order == "sentence-length":
        assert full_stop is not None
        counts = _count_of_id(file, full_stop)
        by_count: np.ndarray = np.argsort(-counts, kind="stable")
        return by_count
    numbers = np.arange(file.num_samples, dtype=np.int64)
    if order == "shuffle":
        from sparselt_dist.data.order import permute  # late: it imports torch, which worker processes do without

        return permute(numbers.astype(np.uint64), file.num_samples, SHUFFLE_KEY).astype(np.int64)
    return numbers


def _count_of_id(file: IdFile, token: int, samples_at_once: int = 65536) -> np.ndarray:
    """How often an id occurs in each sample, int32 [samples]."""
    counts = np.zeros(file.num_samples, dtype=np.int32)
    with file.ids.open("rb") as stream:
        for first in range(0, file.num_samples, samples_at_once):
            samples = np.arange(first, min(first + samples_at_once, file.num_samples))
            starts, lengths = file.ranges(samples)
            data = stream.read(int(lengths.sum()) * np.dtype(file.dtype).itemsize)
            hits = np.frombuffer(data, dtype=file.dtype) == token
            counts[samples] = np.add.reduceat(hits.astype(np.int32), starts - starts[0])
    return counts


# --- rows to shards --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardJob:
    """One shard: its number and where its samples lie in the file of ids, in bytes."""

    number: int
    starts: np.ndarray
    sizes: np.ndarray


def shard_jobs(file: IdFile, order: np.ndarray, samples_per_shard: int, skip: int) -> Iterator[ShardJob]:
    """The shards still to be written, the first `skip` being done."""
    itemsize = np.dtype(file.dtype).itemsize
    for number, first in enumerate(range(0, len(order), samples_per_shard)):
        if number >= skip:
            starts, lengths = file.ranges(order[first : first + samples_per_shard])
            yield ShardJob(number, starts * itemsize, lengths * itemsize)


def write_shard(ids: Path, folder: Path, kind: Kind, dtype: str, job: ShardJob) -> ShardEntry:
    """Write one shard and its index."""
    writer = ShardWriter(folder, kind=kind, dtype=dtype, samples_per_shard=len(job.starts), first_shard=job.number)
    with ids.open("rb") as file:
        for start, size in zip(job.starts.tolist(), job.sizes.tolist(), strict=True):
            writer.add(np.frombuffer(os.pread(file.fileno(), size, start), dtype=dtype))
    return writer.close()[0]

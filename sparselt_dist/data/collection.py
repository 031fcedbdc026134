"""The first stage of a preparation: read, normalise, filter by length, drop exact duplicates, number sources.

What is kept goes to `documents.bin`; `collect.log` has a line a batch, with the reader's position after it.
"""

from __future__ import annotations

import functools
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparselt_dist.data.cleaning import CleanBatch, CleaningRules, HashSet, clean_batch, scan_exact_hashes
from sparselt_dist.data.context import Context
from sparselt_dist.data.deduplication import Chunk
from sparselt_dist.data.sources import Item, Reader
from sparselt_dist.data.workspace import DataFile, WorkLog
from sparselt_dist.errors import DataError

BATCH_CHARACTERS = 2_000_000  # text a job; also the unit that a kill can cost
DOCUMENT_OVERHEAD = 64  # counted for each document, so that a batch of empty ones ends too
MAX_SOURCES = 256  # rows of a JSONL file may each name another source; the rest is counted together
OTHER_SOURCES = ("other sources", "various")


@dataclass
class Collected:
    """The cleaned documents on disk."""

    item: int = 0  # position of the reader
    document: int = 0
    chunks: list[Chunk] = field(default_factory=list)
    sources: list[tuple[str, str]] = field(default_factory=list)  # (name, licence) by source number
    counts: Counter[str] = field(default_factory=Counter)
    lowest_split_hash: int = 2**64
    complete: bool = False

    @property
    def end(self) -> int:
        return self.chunks[-1].start + self.chunks[-1].size if self.chunks else 0

    def apply(self, record: dict[str, Any]) -> None:
        """Take in one line of the log."""
        if "complete" in record:
            self.complete = True
            return
        self.item, self.document = record["position"]
        self.chunks.append(Chunk(len(self.chunks), self.end, record["bytes"]))
        self.sources += [(name, license) for name, license in record["sources"]]
        self.counts.update(record["counts"])
        self.lowest_split_hash = min(self.lowest_split_hash, record["lowest_split_hash"])


class _RawBatch(NamedTuple):
    documents: list[tuple[int, str]]  # (source number, text)
    position: tuple[int, int]  # of the reader after it
    sources: list[tuple[str, str]]  # first met in it


def collect_documents(context: Context, items: list[Item]) -> Collected:
    """Read, normalise, filter by length and drop exact duplicates.

    Raises:
        DataError: a source cannot be read, or nothing is left.
    """
    context.progress.start("reading")
    collected = Collected()
    with WorkLog(context.work / "collect.log") as log:
        for record in log.records:
            collected.apply(record)
        if not collected.complete:
            _collect_rest(context, items, log, collected)
            log.append({"complete": True})
    counts = collected.counts
    if not counts["kept"]:
        raise DataError(
            f"prepare.source: nothing is left of {counts['read']} documents: {counts['too_short']} had fewer "
            f"characters than prepare.min_characters ({context.config.prepare.min_characters}), {counts['too_long']} more than "
            "prepare.max_characters; lower or raise these limits, or give more text"
        )
    return collected


def _collect_rest(context: Context, items: list[Item], log: WorkLog, collected: Collected) -> None:
    prepare = context.config.prepare
    rules = CleaningRules(prepare.normalize, prepare.min_characters, prepare.max_characters)
    seen = _seen_before(context.documents, collected.end) if prepare.deduplicate_exact else None
    reader = Reader(items, collected.item, collected.document)
    read_ahead: deque[_RawBatch] = deque()

    def jobs() -> Iterator[list[tuple[int, str]]]:
        for batch in _batches(reader, list(collected.sources)):
            read_ahead.append(batch)
            yield batch.documents

    with DataFile(context.documents, collected.end) as data:
        for cleaned in context.workers.map(functools.partial(clean_batch, rules), jobs()):
            batch = read_ahead.popleft()
            keep = seen.add(cleaned.exact_hashes) if seen is not None else np.ones(len(cleaned.records), dtype=bool)
            stored = b"".join(record for record, kept in zip(cleaned.records, keep, strict=True) if kept)
            data.append(stored)
            record = _batch_record(batch, cleaned, keep, len(stored))
            log.append(record)
            collected.apply(record)
            read = collected.counts["read"]
            context.progress.update(reader.fraction, f"{read:,} documents, {data.size / 1e6:,.1f} MB kept")


def _seen_before(documents: Path, end: int) -> HashSet:
    seen = HashSet()
    if end:
        with documents.open("rb") as file:
            seen.add(np.fromiter(scan_exact_hashes(file, end), dtype=np.uint64))
    return seen


def _batches(reader: Reader, sources: list[tuple[str, str]]) -> Iterator[_RawBatch]:
    numbers = {source: number for number, source in enumerate(sources)}
    known = len(numbers)
    documents: list[tuple[int, str]] = []
    characters = 0
    for document in reader:
        source = (document.source, document.license)
        if source not in numbers and len(numbers) >= MAX_SOURCES:
            source = OTHER_SOURCES
        documents.append((numbers.setdefault(source, len(numbers)), document.text))
        characters += len(document.text) + DOCUMENT_OVERHEAD
        if characters >= BATCH_CHARACTERS:
            yield _RawBatch(documents, (reader.item, reader.document), list(numbers)[known:])
            documents, characters, known = [], 0, len(numbers)
    if documents:
        yield _RawBatch(documents, (reader.item, reader.document), list(numbers)[known:])


def _batch_record(batch: _RawBatch, cleaned: CleanBatch, keep: np.ndarray, size: int) -> dict[str, Any]:
    split_hashes = cleaned.split_hashes[keep]
    return {
        "position": batch.position,
        "bytes": size,
        "sources": batch.sources,
        "lowest_split_hash": int(split_hashes.min()) if len(split_hashes) else 2**64,
        "counts": {
            "read": len(batch.documents),
            "read_characters": sum(len(text) for _, text in batch.documents),
            "too_short": cleaned.too_short,
            "too_long": cleaned.too_long,
            "exact_duplicates": int(len(keep) - keep.sum()),
            "kept": int(keep.sum()),
            "kept_characters": int(cleaned.characters[keep].sum()),
        },
    }


def held_out_below(collected: Collected, fraction: float) -> int:
    """Documents whose split hash is lower are held out; with few documents at least one is."""
    if fraction == 0:
        return 0
    threshold = int(fraction * 2**64)
    return threshold if collected.lowest_split_hash < threshold else collected.lowest_split_hash + 1

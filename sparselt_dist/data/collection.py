"""The first stage of a preparation: read, normalise, filter by length, store in blocks.

A job is a segment of the source. It makes one block, or several where a segment cannot be cut beforehand (a large
compressed file); each that is done is noted beside it, so a kill costs no more than one.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselt_dist.data import pair_sample
from sparselt_dist.data.blocks import Block, BlockWriter
from sparselt_dist.data.cleaning import CleaningRules, clean_batch
from sparselt_dist.data.context import Context
from sparselt_dist.data.manifest import write_atomically
from sparselt_dist.data.reading import Reader
from sparselt_dist.data.sources import Item, cut_segments, segment_bytes
from sparselt_dist.errors import DataError

BATCH_CHARACTERS = 500_000  # raw text in memory at once
DOCUMENT_OVERHEAD = 64  # counted for each document, so that a batch of empty ones ends too
BLOCK_SLACK = 1.5  # a segment may exceed its size by so much before it makes another block
MAX_SOURCES = 256  # rows of a JSONL file may each name another source; the rest is counted together
OTHER_SOURCES = ("other sources", "various")


@dataclass(frozen=True)
class Collected:
    """The cleaned documents on disk."""

    folder: Path
    blocks: tuple[Block, ...]
    sources: tuple[tuple[str, str], ...]  # (name, licence) by source number
    counts: Counter[str]
    lowest_split_hash: int
    originals_share: float = 0.0  # of the documents, by `pair_sample.places`, whose text was kept as it was

    @property
    def documents(self) -> int:
        return self.blocks[-1].first + self.blocks[-1].documents if self.blocks else 0


def collect_documents(context: Context, items: list[Item]) -> Collected:
    """Read, normalise and filter by length.

    Raises:
        DataError: a source cannot be read, or nothing is left.
    """
    context.progress.start("reading")
    prepare = context.config.prepare
    kept = 0.0
    if prepare.agreements != "none":
        known = all(item.bytes for item in items)
        kept = pair_sample.share_to_keep(prepare.agreement_words, sum(item.bytes for item in items) if known else None)
    rules = CleaningRules(prepare.normalize, prepare.min_characters, prepare.max_characters, kept)
    size = segment_bytes(items)
    jobs = list(enumerate(cut_segments(items, size)))
    collect = functools.partial(collect_segment, rules, context.documents, int(BLOCK_SLACK * size))
    records = context.crew.run("collect", collect, jobs, "segments")
    collected = _joined(context.documents, [block for record in records for block in record["blocks"]], kept)
    counts = collected.counts
    if not collected.documents:
        raise DataError(
            f"prepare.source: nothing is left of {counts['read']} documents: {counts['too_short']} had fewer "
            f"characters than prepare.min_characters ({prepare.min_characters}), {counts['too_long']} more than "
            "prepare.max_characters; lower or raise these limits, or give more text"
        )
    return collected


def _joined(folder: Path, stored: list[dict[str, Any]], originals_share: float) -> Collected:
    numbers: dict[tuple[str, str], int] = {}
    counts: Counter[str] = Counter()
    blocks: list[Block] = []
    first = 0
    for record in stored:
        counts.update(record["counts"])
        of_block = []
        for name, license in record["sources"]:
            known = (name, license) in numbers or len(numbers) < MAX_SOURCES
            of_block.append(numbers.setdefault((name, license) if known else OTHER_SOURCES, len(numbers)))
        if record["documents"]:
            blocks.append(Block(len(blocks), record["name"], first, record["documents"], tuple(of_block)))
        first += record["documents"]
    lowest = min((record["lowest_split_hash"] for record in stored), default=2**64)
    return Collected(folder, tuple(blocks), tuple(numbers), counts, lowest, originals_share)


def collect_segment(
    rules: CleaningRules, folder: Path, block_bytes: int, job: tuple[int, tuple[Item, ...]]
) -> dict[str, Any]:
    """Read one segment into blocks; continues after the last block that is noted."""
    number, items = job
    blocks: list[dict[str, Any]] = []
    while (note := folder / f"{number:06d}-{len(blocks):03d}.json").exists():
        blocks.append(json.loads(note.read_bytes()))
    reader = Reader(items, *(blocks[-1]["position"] if blocks else (0, 0)))
    batches = _batches(reader)
    more = True
    while more:
        name = f"{number:06d}-{len(blocks):03d}"
        stored, more = _write_block(rules, folder, name, reader, batches, block_bytes)
        blocks.append(stored)
        if more:
            write_atomically(folder / f"{name}.json", json.dumps(blocks[-1]).encode())
    return {"blocks": blocks}


def _write_block(
    rules: CleaningRules,
    folder: Path,
    name: str,
    reader: Reader,
    batches: Iterator[list[tuple[tuple[str, str], str]]],
    block_bytes: int,
) -> tuple[dict[str, Any], bool]:
    """Write a block; returns what the log says of it, and whether there may be more to read."""
    numbers: dict[tuple[str, str], int] = {}
    counts: Counter[str] = Counter()
    with BlockWriter(folder, name, keep_originals=rules.originals_share > 0) as writer:
        while writer.text_bytes < block_bytes and (batch := next(batches, None)) is not None:
            documents = [(_source_number(numbers, source), text) for source, text in batch]
            cleaned = clean_batch(rules, documents)
            writer.add(cleaned)
            counts["read"] += len(batch)
            counts["read_characters"] += sum(len(text) for _, text in batch)
            counts["too_short"] += cleaned.too_short
            counts["too_long"] += cleaned.too_long
    counts["kept_characters"] = writer.characters
    stored = {
        "name": name,
        "position": [reader.item, reader.document],  # after it
        "sources": list(numbers),
        "counts": counts,
        "documents": writer.documents,
        "lowest_split_hash": writer.lowest_split_hash,
    }
    return stored, writer.text_bytes >= block_bytes


def _source_number(numbers: dict[tuple[str, str], int], source: tuple[str, str]) -> int:
    if source not in numbers and len(numbers) >= MAX_SOURCES:
        source = OTHER_SOURCES
    return numbers.setdefault(source, len(numbers))


def _batches(reader: Reader) -> Iterator[list[tuple[tuple[str, str], str]]]:
    """((source, licence), text) in batches; the reader then stands after the last of the batch."""
    documents: list[tuple[tuple[str, str], str]] = []
    characters = 0
    for document in reader:
        documents.append(((document.source, document.license), document.text))
        characters += len(document.text) + DOCUMENT_OVERHEAD
        if characters >= BATCH_CHARACTERS:
            yield documents
            documents, characters = [], 0
    if documents:
        yield documents


def held_out_below(collected: Collected, fraction: float) -> int:
    """Documents whose split hash is lower are held out; with few documents at least one is."""
    if fraction == 0:
        return 0
    threshold = int(fraction * 2**64)
    return threshold if collected.lowest_split_hash < threshold else collected.lowest_split_hash + 1

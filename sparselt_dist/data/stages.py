"""The stages of a preparation, each of which continues where a killed one was.

| stage | log | data |
|---|---|---|
| collect: read, normalise, filter, drop exact duplicates | collect.log | documents.bin |
| near duplicates (datatrove) | near.log | near/ |
| tokenizer: train or copy | - | tokenizer/, by rename |
| tokenize, split | tokenize.log | train.ids, train.lengths, validation.ids, ... |
| shards | shards-train.log, ... | the shard folders |

Chunk boundaries depend on the text alone, so neither the number of workers nor a kill changes a byte of the result.
Memory is bounded: some batches of text a worker, 8 bytes a document for exact duplicates, 16 bytes a row for the order.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sparselt_dist.data import deduplication
from sparselt_dist.data.cleaning import (
    parse_records,
)
from sparselt_dist.data.collection import Collected
from sparselt_dist.data.context import Context
from sparselt_dist.data.packing import (
    SPLITS,
    IdFile,
    Split,
    TokenizeRules,
    sample_order,
    shard_jobs,
    tokenize_chunk,
    write_shard,
)
from sparselt_dist.data.shards import Dtype, ShardEntry, file_sha256, id_dtype
from sparselt_dist.data.tokenizer import TOKENIZER_FILE, TRAINED_KINDS, copy_tokenizer, load_for_text, tokenizer_info
from sparselt_dist.data.tokenizer_training import save_trained, train_tokenizer
from sparselt_dist.data.workspace import DataFile, WorkLog
from sparselt_dist.errors import DataError

# --- near duplicates -------------------------------------------------------------------------------------------------


def remove_near_duplicates(context: Context, collected: Collected) -> Path | None:
    """Find near duplicates; returns the folder that lists them, None if that is not asked for."""
    if not context.config.prepare.deduplicate_near:
        return None
    context.progress.start("near duplicates")
    with WorkLog(context.work / "near.log") as log:
        _find_near_duplicates(context, collected, log)
    return context.near


def _find_near_duplicates(context: Context, collected: Collected, log: WorkLog) -> None:
    done = {kind: sum(kind in record for record in log.records) for kind in ("signatures", "bucket", "clusters")}
    total = len(collected.chunks) + deduplication.num_buckets()
    signatures = functools.partial(deduplication.write_signatures, context.documents, context.near)
    for number in context.workers.map(signatures, iter(collected.chunks[done["signatures"] :])):
        log.append({"signatures": number})
        context.progress.update((number + 1) / total, f"signatures {number + 1} of {len(collected.chunks)}")
    pairs = functools.partial(deduplication.find_duplicates, context.near)
    for number in context.workers.map(pairs, iter(range(done["bucket"], deduplication.num_buckets()))):
        log.append({"bucket": number})
        context.progress.update((len(collected.chunks) + number + 1) / total, f"bucket {number + 1}")
    if not done["clusters"]:
        shutil.rmtree(context.near / "remove", ignore_errors=True)
        deduplication.cluster_duplicates(context.near)
        log.append({"clusters": True})


# --- tokenizer -------------------------------------------------------------------------------------------------------


def make_tokenizer(context: Context, collected: Collected, near: Path | None, held_out: int) -> None:
    """Train the tokenizer on the training split, or copy the one named."""
    if context.tokenizer.exists():
        return
    context.progress.start("tokenizer")
    prepare = context.config.prepare
    partial = context.work / "tokenizer.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if prepare.tokenizer in TRAINED_KINDS:
        texts = functools.partial(_training_texts, context, collected, near, held_out)
        tokenizer = train_tokenizer(
            texts, kind=prepare.tokenizer, vocab_size=prepare.vocab_size, crammed=context.crammed
        )
        save_trained(tokenizer, partial, crammed=context.crammed, model_max_length=context.config.data.sequence_length)
    else:
        copy_tokenizer(prepare.tokenizer, partial)
    partial.rename(context.tokenizer)


def _training_texts(context: Context, collected: Collected, near: Path | None, held_out: int) -> Iterator[str]:
    """Documents of the training split; of a large corpus a sample by hash, `tokenizer_characters` long on average."""
    share = context.config.prepare.tokenizer_characters / max(1, collected.counts["kept_characters"])
    below = int(min(1.0, share) * 2**64)
    for chunk in collected.chunks:
        removed = deduplication.removed_documents(near, chunk.number) if near else frozenset()
        for number, document in enumerate(parse_records(chunk.read(context.documents))):
            if number not in removed and document.split_hash >= held_out and document.exact_hash < below:
                yield document.text
        context.progress.update((chunk.number + 1) / len(collected.chunks), "reading text for training")
    context.progress.update(None, "training")


# --- tokenize --------------------------------------------------------------------------------------------------------


@dataclass
class SplitTotals:
    """What tokenization made of one split."""

    ids: int = 0
    samples: int = 0  # documents
    documents: Counter[int] = field(default_factory=Counter)  # by source number
    characters: Counter[int] = field(default_factory=Counter)
    text_bytes: int = 0
    text_tokens: int = 0

    def apply(self, record: dict[str, Any]) -> None:
        self.ids += record["ids"]
        self.samples += record["samples"]
        self.text_bytes += record["text_bytes"]
        self.text_tokens += record["text_tokens"]
        self.documents.update({int(number): count for number, count in record["documents"].items()})
        self.characters.update({int(number): count for number, count in record["characters"].items()})


@dataclass
class Tokenized:
    """The ids on disk."""

    dtype: Dtype
    splits: dict[Split, SplitTotals] = field(default_factory=lambda: {split: SplitTotals() for split in SPLITS})
    near_duplicates: int = 0
    incompressible: int = 0

    def apply(self, record: dict[str, Any]) -> None:
        for split in SPLITS:
            self.splits[split].apply(record[split])
        self.near_duplicates += record["near_duplicates"]
        self.incompressible += record["incompressible"]


def tokenize_documents(context: Context, collected: Collected, near: Path | None, held_out: int) -> Tokenized:
    """Encode all documents in parallel; ids are appended to one file a split, in source order.

    Raises:
        DataError: the compressibility filter leaves nothing.
    """
    context.progress.start("tokenizing")
    dtype = id_dtype(tokenizer_info(context.tokenizer).vocab_size)
    limit = context.config.prepare.max_tokens_per_character
    rules = TokenizeRules(
        documents=context.documents,
        tokenizer=context.tokenizer,
        tokenizer_sha256=file_sha256(context.tokenizer / TOKENIZER_FILE),
        near_duplicates=near,
        max_tokens_per_character=limit,
        held_out_below=held_out,
        kind=context.kind,
        dtype=dtype,
    )
    result = Tokenized(dtype)
    with WorkLog(context.work / "tokenize.log") as log:
        for line in log.records:
            result.apply(line)
        _tokenize_rest(context, collected, rules, log, result)
    if not any(totals.samples for totals in result.splits.values()):
        raise DataError(
            f"prepare.max_tokens_per_character: {limit} leaves none of {result.incompressible} documents; raise it, "
            "or set it to null"
        )
    return result


def _tokenize_rest(
    context: Context, collected: Collected, rules: TokenizeRules, log: WorkLog, result: Tokenized
) -> None:
    itemsize = np.dtype(result.dtype).itemsize
    with contextlib.ExitStack() as stack:
        files = {}
        for split in SPLITS:
            totals = result.splits[split]
            files[split] = (
                stack.enter_context(DataFile(context.work / f"{split}.ids", totals.ids * itemsize)),
                stack.enter_context(DataFile(context.work / f"{split}.lengths", totals.samples * 4)),
            )
        chunks = collected.chunks[len(log.records) :]
        encoded = context.workers.map(functools.partial(tokenize_chunk, rules), iter(chunks))
        for chunk, ids in zip(chunks, encoded, strict=True):
            record: dict[str, Any] = {"near_duplicates": ids.near_duplicates, "incompressible": ids.incompressible}
            for split, part in ids.splits.items():
                for file, data in zip(files[split], (part.ids, part.lengths), strict=True):
                    file.append(data)
                counts = {key: value for key, value in vars(part).items() if key not in ("ids", "lengths")}
                record[split] = counts | {"ids": len(part.ids) // itemsize, "samples": len(part.lengths) // 4}
            log.append(record)
            result.apply(record)
            tokens = sum(totals.ids for totals in result.splits.values())
            context.progress.update((chunk.start + chunk.size) / collected.end, f"{tokens:,} tokens")


# --- shards ----------------------------------------------------------------------------------------------------------


def check_enough(context: Context, tokenized: Tokenized, split: Split) -> None:
    """Refuse a split without a single sample, before any shard is written."""
    totals = tokenized.splits[split]
    if (totals.ids // context.row_length if context.row_length else totals.samples) == 0:
        raise DataError(_too_little(context, tokenized, split))


def write_split(context: Context, tokenized: Tokenized, split: Split, folder: Path) -> list[ShardEntry]:
    """Write the shards of one split, in parallel.

    Raises:
        DataError: the order needs a token that is missing.
    """
    context.progress.start(f"{split} shards")
    prepare = context.config.prepare
    ids, lengths = context.work / f"{split}.ids", context.work / f"{split}.lengths"
    file = IdFile.open(ids, lengths, tokenized.dtype, context.row_length)
    full_stop = load_for_text(context.tokenizer).token_to_id(".") if prepare.order == "sentence-length" else None
    if prepare.order == "sentence-length" and full_stop is None:
        raise DataError(
            'prepare.order: sentence-length needs a token "." and the tokenizer has none; choose shuffle or source'
        )
    order = sample_order(file, prepare.order, full_stop)
    write = functools.partial(write_shard, file.ids, folder, context.kind, tokenized.dtype)
    with WorkLog(context.work / f"shards-{split}.log") as log:
        entries = [ShardEntry(**record) for record in log.records]
        for entry in context.workers.map(write, shard_jobs(file, order, prepare.samples_per_shard, len(entries))):
            log.append(asdict(entry))
            entries.append(entry)
            done = sum(entry.samples for entry in entries)
            context.progress.update(done / file.num_samples, f"{len(entries)} shards, {done:,} samples")
    return entries


def _too_little(context: Context, tokenized: Tokenized, split: Split) -> str:
    found = f"{tokenized.splits[split].ids} tokens from {tokenized.splits[split].samples} documents"
    need = f"one row of data.sequence_length={context.row_length}" if context.row_length else "one document"
    key = "prepare.validation_fraction" if split == "validation" else "prepare.source"
    fix = "raise the fraction or give more text" if split == "validation" else "give more text or hold less of it out"
    return f"{key}: the {split} split has {found}, expected at least {need}; {fix}"


def row_remainder(context: Context, totals: SplitTotals) -> int:
    """Tokens at the end of a split that fill no row."""
    return totals.ids % context.row_length if context.row_length else 0

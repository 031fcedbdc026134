"""The stages of a preparation. Each is a list of jobs (`parts.py`), and continues where a killed one was.

| stage | a job | writes, in the work folder |
|---|---|---|
| collect: read, normalise, filter | a segment of the source | documents/ |
| exact duplicates | a range of hashes | repeats/ |
| near duplicates (datatrove) | a block, a bucket, all clusters | near/ |
| tokenizer: train or copy | all of it | tokenizer/ |
| tokenize, split | a block | tokens/ |
| agreement pairs, if wanted (`pair_stages.py`) | a block, then all | pairs/, agreements/ |
| plan: pack documents into rows | a window of blocks | plans/ |
| order, by sentence length alone | some samples, then all | counts-train/, order-train.npy, ... |
| shards | a shard | the shard folders |

Jobs depend on the text and the configuration alone, so neither the number of workers and parts nor a kill changes a byte
of the result. Memory is bounded whatever the corpus: what a job holds is, and of the rest only a line a job is held; the
order by sentence length alone sorts 12 bytes a sample in memory, and near duplicates are clustered in memory.
"""

from __future__ import annotations

import functools
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sparselt_dist.data import deduplication, duplicates
from sparselt_dist.data.blocks import Block, read_texts
from sparselt_dist.data.collection import Collected
from sparselt_dist.data.context import Context
from sparselt_dist.data.duplicates import Survivors
from sparselt_dist.data.manifest import Dtype, ShardEntry, file_sha256
from sparselt_dist.data.packing import Samples, Window, count_id, cut_windows, plan_window, sort_by_count
from sparselt_dist.data.shard_jobs import ShardRules, shard_jobs, write_shard
from sparselt_dist.data.shard_writer import id_dtype
from sparselt_dist.data.tokenization import SPLITS, Split, TokenizeRules, tokenize_block
from sparselt_dist.data.tokenizer import TOKENIZER_FILE, TRAINED_KINDS, copy_tokenizer, load_for_text, tokenizer_info
from sparselt_dist.data.tokenizer_training import save_trained, train_tokenizer
from sparselt_dist.errors import DataError
from sparselt_dist.objectives.base import TokenizerInfo

COUNTED_AT_ONCE = 2**18  # samples a job, where an order needs their content

# --- duplicates ------------------------------------------------------------------------------------------------------


def remove_duplicates(context: Context, collected: Collected) -> Survivors:
    """Find exact and near duplicates, as far as they are to go."""
    prepare = context.config.prepare
    survivors = Survivors(None, 0)
    if prepare.deduplicate_exact:
        context.progress.start("exact duplicates")
        bits = duplicates.hash_bits(collected.documents)
        repeats = context.folder("repeats")
        find = functools.partial(duplicates.find_repeats, collected.folder, repeats, collected.blocks, bits)
        records = context.crew.run("repeats", find, range(2**bits), "ranges of hashes")
        survivors = Survivors(repeats, 2**bits, sum(record["repeats"] for record in records))
    if prepare.deduplicate_near:
        context.progress.start("near duplicates")
        near = context.folder("near")
        sign = functools.partial(_write_signatures, collected.folder, survivors, near)
        context.crew.run("signatures", sign, collected.blocks)
        pairs = functools.partial(deduplication.find_duplicates, near)
        context.crew.run("buckets", pairs, range(deduplication.num_buckets()))
        context.crew.run("clusters", deduplication.cluster_duplicates, [near])
        survivors = replace(survivors, near=near)
    return survivors


def _write_signatures(documents: Path, survivors: Survivors, near: Path, block: Block) -> dict[str, Any]:
    numbers = survivors.first_copies(block)
    batches = read_texts(documents, block, block.index(documents), numbers)
    deduplication.write_signatures(near, block.number, (text for batch in batches for text in batch.texts))
    return {}


# --- tokenizer -------------------------------------------------------------------------------------------------------


def make_tokenizer(context: Context, collected: Collected, survivors: Survivors, held_out: int) -> None:
    """Train the tokenizer on the training split, or copy the one named."""
    context.progress.start("tokenizer")
    make = functools.partial(_make_tokenizer, context, collected, survivors, held_out)
    context.crew.run("tokenizer", make, [context.tokenizer])


def _make_tokenizer(
    context: Context, collected: Collected, survivors: Survivors, held_out: int, folder: Path
) -> dict[str, Any]:
    prepare = context.config.prepare
    partial = folder.with_name(folder.name + ".partial")
    for left_over in (partial, folder):
        shutil.rmtree(left_over, ignore_errors=True)
    if prepare.tokenizer in TRAINED_KINDS:
        texts = functools.partial(_training_texts, context, collected, survivors, held_out)
        tokenizer = train_tokenizer(
            texts, kind=prepare.tokenizer, vocab_size=prepare.vocab_size, crammed=context.crammed
        )
        save_trained(tokenizer, partial, crammed=context.crammed, model_max_length=context.config.data.sequence_length)
    else:
        copy_tokenizer(prepare.tokenizer, partial)
    partial.rename(folder)
    return {}


def _training_texts(context: Context, collected: Collected, survivors: Survivors, held_out: int) -> Iterator[str]:
    """Documents of the training split; of a large corpus a sample by hash, `tokenizer_characters` long on average.

    Only what is chosen is read of the text.
    """
    wanted, available = context.config.prepare.tokenizer_characters, collected.counts["kept_characters"]
    below = 2**64 - 1
    if wanted < available:
        available = sum(int(block.characters.sum()) for block in _training_blocks(collected, survivors, held_out))
        below = min(below, int(wanted / max(1, available) * 2**64))
    for number, part in enumerate(_training_blocks(collected, survivors, held_out), 1):
        chosen = part.left[part.block.hashes(collected.folder)[part.left] <= below]
        for batch in read_texts(collected.folder, part.block, part.index, chosen):
            yield from batch.texts
        context.progress.update(number / len(collected.blocks), "reading text for training")
    context.progress.update(None, "training")


@dataclass(frozen=True)
class _TrainingBlock:
    block: Block
    index: np.ndarray
    left: np.ndarray  # numbers of its documents that belong to the training split
    characters: np.ndarray  # of these


def _training_blocks(collected: Collected, survivors: Survivors, held_out: int) -> Iterator[_TrainingBlock]:
    for block in collected.blocks:
        index = block.index(collected.folder)
        left = survivors.of(block)
        left = left[index["split_hash"][left] >= min(held_out, 2**64 - 1)]
        yield _TrainingBlock(block, index, left, index["characters"][left].astype(np.int64))


# --- tokenize --------------------------------------------------------------------------------------------------------


@dataclass
class SplitTotals:
    """What tokenization made of one split."""

    blocks: list[Block] = field(default_factory=list)  # that have documents of it
    block_ids: list[int] = field(default_factory=list)
    block_pieces: list[int] = field(default_factory=list)
    samples: int = 0  # documents
    sources: Counter[int] = field(default_factory=Counter)  # documents by source number
    characters: Counter[int] = field(default_factory=Counter)
    text_bytes: int = 0
    text_tokens: int = 0

    @property
    def ids(self) -> int:
        return sum(self.block_ids)

    def add(self, block: Block, record: dict[str, Any]) -> None:
        if not record["samples"]:
            return
        self.blocks.append(block)
        self.block_ids.append(record["ids"])
        self.block_pieces.append(record["pieces"])
        self.samples += record["samples"]
        self.text_bytes += record["text_bytes"]
        self.text_tokens += record["text_tokens"]
        for source, (documents, characters) in record["sources"].items():
            self.sources[int(source)] += documents
            self.characters[int(source)] += characters


@dataclass(frozen=True)
class Tokenized:
    """The ids on disk."""

    tokenizer: TokenizerInfo
    dtype: Dtype
    folder: Path
    splits: dict[Split, SplitTotals]
    exact_duplicates: int
    near_duplicates: int
    incompressible: int


def tokenize_documents(context: Context, collected: Collected, survivors: Survivors, held_out: int) -> Tokenized:
    """Encode all documents.

    Raises:
        DataError: the compressibility filter leaves nothing.
    """
    context.progress.start("tokenizing")
    prepare = context.config.prepare
    info = tokenizer_info(context.tokenizer)
    dtype = id_dtype(info.vocab_size)
    rules = TokenizeRules(
        documents=collected.folder,
        output=context.folder("tokens"),
        tokenizer=context.tokenizer,
        tokenizer_sha256=file_sha256(context.tokenizer / TOKENIZER_FILE),
        survivors=survivors,
        normalization=prepare.normalize,
        max_tokens_per_character=prepare.max_tokens_per_character,
        held_out_below=held_out,
        kind=context.kind,
        row_length=context.row_length,
        dtype=dtype,
    )
    records = context.crew.run("tokenize", functools.partial(tokenize_block, rules), collected.blocks, "blocks")
    splits = {split: SplitTotals() for split in SPLITS}
    for block, record in zip(collected.blocks, records, strict=True):
        for split in SPLITS:
            splits[split].add(block, record[split])
    left = sum(record["left"] for record in records)
    incompressible = sum(record["incompressible"] for record in records)
    if left == incompressible:
        raise DataError(
            f"prepare.max_tokens_per_character: {prepare.max_tokens_per_character} leaves none of {left} documents; "
            "raise it, or set it to null"
        )
    exact = survivors.number
    near = collected.documents - exact - left
    return Tokenized(info, dtype, rules.output, splits, exact, near, incompressible)


# --- samples ---------------------------------------------------------------------------------------------------------


def make_samples(context: Context, tokenized: Tokenized, split: Split) -> Samples:
    """Say where the samples of a split lie; documents are packed here.

    Raises:
        DataError: there is not a single one.
    """
    totals = tokenized.splits[split]
    names = [tokenized.folder / f"{block.name}.{split}" for block in totals.blocks]
    first_ids = np.concatenate([[0], np.cumsum(totals.block_ids, dtype=np.int64)])
    files = tuple(f"{name}.ids" for name in names)
    samples = Samples(context.kind, tokenized.dtype, context.row_length, files, first_ids)
    if (totals.ids // context.row_length if context.kind == "rows" and context.row_length else totals.samples) == 0:
        raise DataError(_too_little(context, totals, split))
    if context.kind == "rows":
        return samples
    context.progress.start(f"{split} rows" if context.kind == "packed" else f"{split} documents")
    windows = [
        Window(
            f"{split}-{number:06d}",
            tuple(Path(f"{name}.lengths") for name in names[blocks]),
            int(first_ids[blocks.start]),
        )
        for number, blocks in enumerate(cut_windows(totals.block_pieces))
    ]
    folder = context.folder("plans")
    plan = functools.partial(plan_window, folder, context.row_length)
    records = context.crew.run(f"plan-{split}", plan, windows, "windows of documents")
    first_samples = np.cumsum([0, *(record["samples"] for record in records)])
    return replace(samples, plans=tuple(str(folder / window.name) for window in windows), first_samples=first_samples)


def _too_little(context: Context, totals: SplitTotals, split: Split) -> str:
    found = f"{totals.ids} tokens from {totals.samples} documents"
    need = f"one row of data.sequence_length={context.row_length}" if context.kind == "rows" else "one document"
    key = "prepare.validation_fraction" if split == "validation" else "prepare.source"
    fix = "raise the fraction or give more text" if split == "validation" else "give more text or hold less of it out"
    return f"{key}: the {split} split has {found}, expected at least {need}; {fix}"


# --- shards ----------------------------------------------------------------------------------------------------------


def write_split(
    context: Context, tokenized: Tokenized, samples: Samples, split: Split, folder: Path
) -> list[ShardEntry]:
    """Write the shards of one split.

    Raises:
        DataError: the order needs a token that is missing.
    """
    prepare = context.config.prepare
    by_count = _order_by_full_stops(context, samples, split) if prepare.order == "sentence-length" else None
    context.progress.start(f"{split} shards")
    folder.mkdir(parents=True, exist_ok=True)
    rules = ShardRules(samples, folder, prepare.order, by_count, tokenized.tokenizer.pad_id)
    write = functools.partial(write_shard, rules)
    jobs = shard_jobs(samples.number, prepare.samples_per_shard)
    return [ShardEntry(**record) for record in context.crew.run(f"shards-{split}", write, jobs, "shards")]


def _order_by_full_stops(context: Context, samples: Samples, split: Split) -> Path:
    full_stop = load_for_text(context.tokenizer).token_to_id(".")
    if full_stop is None:
        raise DataError(
            'prepare.order: sentence-length needs a token "." and the tokenizer has none; choose shuffle or source'
        )
    context.progress.start(f"{split} order")
    firsts = range(0, samples.number, COUNTED_AT_ONCE)
    jobs = [(number, first, min(COUNTED_AT_ONCE, samples.number - first)) for number, first in enumerate(firsts)]
    counts = context.folder(f"counts-{split}")
    context.crew.run(f"count-{split}", functools.partial(count_id, samples, full_stop, counts), jobs)
    path = context.work / f"order-{split}.npy"
    context.crew.run(f"order-{split}", functools.partial(sort_by_count, counts, len(jobs)), [path])
    return path


def row_remainder(context: Context, totals: SplitTotals) -> int:
    """Tokens at the end of a split that fill no row."""
    return totals.ids % context.row_length if context.kind == "rows" and context.row_length else 0

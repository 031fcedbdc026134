"""Everything the benchmarks of the data plane use of the product, in one place; B rows, L positions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from sparselt_dist.data.batch import Batch, Example, pad_examples
from sparselt_dist.data.best_fit import cut_lengths, pack_best_fit
from sparselt_dist.data.corpora import open_folder
from sparselt_dist.data.loader import Loader, MicroBatch
from sparselt_dist.data.manifest import Kind, write_manifest
from sparselt_dist.data.order import SampleOrder
from sparselt_dist.data.shard_writer import ShardWriter
from sparselt_dist.data.tokenizer import tokenizer_info
from sparselt_dist.objectives.base import Collator, TokenizerInfo
from sparselt_dist.objectives.mlm import MLMCollator
from sparselt_dist.objectives.settings import MLMConfig

WINDOW = 16  # the default of data.shuffle_window
VOCAB_SIZE = 8192
_PLAIN = TokenizerInfo(vocab_size=VOCAB_SIZE, pad_id=0, mask_id=4, special_ids=(0, 1, 2, 3, 4))


class Stack:
    """The least a collator can do: rows to one int64 tensor; packed rows come without their padding."""

    def __call__(self, examples: list[Example]) -> Batch:
        if "documents" in examples[0]:
            return {"input_ids": torch.from_numpy(pad_examples(examples, _PLAIN.pad_id)[0])}
        return {"input_ids": torch.from_numpy(np.stack([example["ids"] for example in examples]).astype(np.int64))}


def mlm_collator(tokenizer: Path | None = None) -> Collator:
    """MLM with the default settings, for the tokenizer in a folder, or for synthetic rows."""
    return MLMCollator(MLMConfig(), _PLAIN if tokenizer is None else tokenizer_info(tokenizer))


def micro_batches(
    folder: Path, collator: Collator, *, micro_batch_size: int = 32, num_workers: int = 0, start_position: int = 0
) -> Iterator[MicroBatch]:
    """The endless stream of a single rank, opened from nothing."""
    loader = Loader(
        open_folder(folder),
        collator,
        seed=0,
        window=WINDOW,
        micro_batch_size=micro_batch_size,
        rank=0,
        world_size=1,
        num_workers=num_workers,
        start_position=start_position,
    )
    return iter(loader)


def write_shards(folder: Path, rows: Iterable[np.ndarray], *, length: int, samples_per_shard: int = 8192) -> None:
    """A shard folder of rows of that length."""
    writer = ShardWriter(folder, kind="rows", dtype="uint16", samples_per_shard=samples_per_shard)
    writer.extend(rows)
    _complete(folder, writer, "rows", length)


def write_packed(folder: Path, documents: list[np.ndarray], *, length: int) -> None:
    """A shard folder of rows of whole documents by best fit; longer documents are cut."""
    writer = ShardWriter(folder, kind="packed", dtype="uint16")
    lengths, offsets = cut_lengths(np.array([len(ids) for ids in documents]), length)
    joined = np.concatenate(documents)
    rows = pack_best_fit(lengths, length)
    by_row = np.split(np.argsort(rows, kind="stable"), np.cumsum(np.bincount(rows))[:-1])
    for pieces in by_row:
        row = np.full(length, _PLAIN.pad_id, dtype=np.uint16)
        ids = np.concatenate([joined[offsets[piece] : offsets[piece] + lengths[piece]] for piece in pieces])
        row[: len(ids)] = ids
        writer.add(row, lengths[pieces])
    _complete(folder, writer, "packed", length)


def _complete(folder: Path, writer: ShardWriter, kind: Kind, length: int) -> None:
    write_manifest(
        folder,
        writer.close(),
        kind=kind,
        sequence_length=length,
        dtype="uint16",
        vocab_size=VOCAB_SIZE,
        tokenizer_sha256="",
    )


def random_rows(count: int, length: int) -> Iterator[np.ndarray]:
    """Rows of random ids, none of them special."""
    generator = np.random.default_rng(0)
    for first in range(0, count, 8192):
        yield from generator.integers(5, VOCAB_SIZE, (min(8192, count - first), length), dtype=np.uint16)


def stored_ids(folder: Path) -> list[np.ndarray]:
    """All samples of a folder in stored order."""
    opened = open_folder(folder)
    return opened.ids(np.arange(opened.num_samples))


def tar_files(folder: Path) -> list[Path]:
    """The shards of a folder, in order."""
    return [folder / entry.name for opened in open_folder(folder).folders for entry in opened.shards]


def sample_order(shard_samples: list[int], seed: int, window: int) -> SampleOrder:
    """The order of the stream over shards of the given sizes."""
    return SampleOrder(shard_samples, seed, window)


def rank_plan(
    shard_samples: list[int], *, rank: int, world_size: int, micro_batch_size: int, start_position: int
) -> Loader:
    """The loader of one rank over shards that are nothing but sizes: it can plan, and read nothing."""
    return Loader(
        _Sizes(shard_samples),
        Stack(),
        seed=0,
        window=WINDOW,
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
        num_workers=0,
        start_position=start_position,
    )


class _Sizes:
    """As much of a corpus as planning looks at."""

    is_remote = False
    weights = (1.0,)

    def __init__(self, shard_samples: list[int]) -> None:
        self.shard_samples = [shard_samples]

"""Stored samples to a batch: reads them, cuts what is longer than a row, has the objective's collator make the batch,
and adds what keeps the documents of packed rows apart."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from sparselt_dist.data.batch import IGNORE_INDEX, Batch, Example
from sparselt_dist.data.corpora import Corpora
from sparselt_dist.data.randomness import combine
from sparselt_dist.data.shards import Stored
from sparselt_dist.errors import DataError, SparseltError
from sparselt_dist.objectives.base import Collator


class Collated(NamedTuple):
    """A batch and which of its samples are in it."""

    batch: Batch
    delivered: np.ndarray | None  # bool [samples]; False: of a shard that is skipped; None: all are in it


def collate(
    corpora: Corpora, collator: Collator, samples: np.ndarray, seeds: np.ndarray, row_length: int | None
) -> Collated:
    """The batch of the given samples [n] with their seeds [n]; samples longer than `row_length` take several rows.

    Raises:
        DataError: a sample cannot be read or collated; its shard and number are named.
    """
    stored = corpora.read(samples)
    examples = [
        example
        for key, sample, seed in zip(corpora.keys(samples), stored, seeds.tolist(), strict=True)
        if sample is not None
        for example in _examples(key, sample, seed, row_length)
    ]
    delivered = None if None not in stored else np.array([sample is not None for sample in stored])
    if not examples:
        nothing: Example = {"key": "", "ids": np.zeros(1, dtype=np.uint16), "seed": 0}
        return Collated(without_targets(collator([nothing])), delivered)
    try:
        batch = collator(examples)
    except SparseltError:
        raise
    except Exception as cause:  # an objective's collator may fail in any way
        raise DataError(_blame(corpora, collator, examples, cause)) from cause
    if any("documents" in example for example in examples):
        add_documents(batch, examples)
    return Collated(batch, delivered)


def _examples(key: str, stored: Stored, seed: int, row_length: int | None) -> list[Example]:
    """One sample as rows; nothing of it is lost."""
    if stored.documents is not None:
        return [{"key": key, "ids": stored.ids, "seed": seed, "documents": stored.documents}]
    if row_length is None or len(stored.ids) <= row_length:
        return [{"key": key, "ids": stored.ids, "seed": seed}]
    rows: list[Example] = []
    for number, start in enumerate(range(0, len(stored.ids), row_length)):
        own_seed = combine(seed, number) if number else seed
        rows.append({"key": f"{key}+{start}", "ids": stored.ids[start : start + row_length], "seed": own_seed})
    return rows


def add_documents(batch: Batch, examples: list[Example]) -> None:
    """Add `segment_ids` (from 1; 0: padding) and `position_ids`, which begin anew in each document; int64 [B, L]."""
    rows, width = batch["input_ids"].shape
    lengths = [example.get("documents", np.array([len(example["ids"])])) for example in examples]
    in_row = np.array([len(documents) for documents in lengths])
    lengths_D = np.concatenate(lengths).astype(np.int64)
    first_D = np.cumsum(lengths_D) - lengths_D  # of each document in the tokens end to end
    number_D = np.arange(len(lengths_D)) - np.repeat(np.cumsum(in_row) - in_row, in_row)
    tokens = int(lengths_D.sum())
    within_T = np.arange(tokens) - np.repeat(first_D, lengths_D)
    row_D = np.repeat(np.arange(rows), in_row)
    row_first = np.concatenate([[0], np.cumsum(np.bincount(row_D, weights=lengths_D, minlength=rows))])[:-1]
    row_T = np.repeat(row_D, lengths_D)
    places_T = row_T * width + np.arange(tokens) - row_first.astype(np.int64)[row_T]
    for key, values_T in (("segment_ids", np.repeat(number_D + 1, lengths_D)), ("position_ids", within_T)):
        flat = np.zeros(rows * width, dtype=np.int64)
        flat[places_T] = values_T
        batch[key] = torch.from_numpy(flat.reshape(rows, width))


def without_targets(batch: Batch) -> Batch:
    """The batch with nothing to learn from and nothing counted; its rows only keep the ranks together."""
    zero = torch.zeros((), dtype=torch.int64)
    counts = {key: zero for key, value in batch.items() if value.ndim == 0}  # those of the objective too
    return {**batch, "labels": torch.full_like(batch["labels"], IGNORE_INDEX), **counts}


def _blame(corpora: Corpora, collator: Collator, examples: list[Example], cause: Exception) -> str:
    """Name the sample that the collator fails on, by giving it one at a time."""
    keys = f"samples {examples[0]['key']} to {examples[-1]['key']}"
    for example in examples:
        try:
            collator([example])
        except Exception as own:  # the same fault, now of one sample
            keys, cause = f"sample {example['key']}", own
            break
    return (
        f"{corpora.name}: {keys}: the collator {type(collator).__name__} failed: {type(cause).__name__}: {cause}; "
        "run `sparselt shards verify`; if the folder is sound the objective is at fault"
    )

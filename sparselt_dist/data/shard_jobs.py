"""Samples to shards: one shard a job, a pure function run in worker processes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparselt_dist.data.packing import Samples, stored_order
from sparselt_dist.data.shard_writer import ShardWriter


@dataclass(frozen=True)
class ShardRules:
    """What all shards of a split have in common."""

    samples: Samples
    folder: Path
    order: str
    by_count: Path | None  # the order, where it is not known from the numbers
    pad_id: int


@dataclass(frozen=True)
class ShardJob:
    number: int
    first: int  # place of its first sample in the stored order
    count: int


def shard_jobs(samples: int, samples_per_shard: int) -> list[ShardJob]:
    """All shards of a split."""
    firsts = range(0, samples, samples_per_shard)
    return [ShardJob(number, first, min(samples_per_shard, samples - first)) for number, first in enumerate(firsts)]


def write_shard(rules: ShardRules, job: ShardJob) -> dict[str, Any]:
    """Write one shard and its index; returns its line of the manifest."""
    samples = rules.samples
    numbers = stored_order(rules.order, rules.by_count, samples.number, job.first, job.count)
    writer = ShardWriter(
        rules.folder, kind=samples.kind, dtype=samples.dtype, samples_per_shard=job.count, first_shard=job.number
    )
    for ids, pieces in samples.read(numbers):
        if samples.kind != "packed":
            writer.add(ids)
            continue
        row = np.full(samples.row_length or 0, rules.pad_id, dtype=samples.dtype)
        row[: len(ids)] = ids
        writer.add(row, pieces.astype(np.uint32))
    return asdict(writer.close()[0])

"""The stream of micro-batches: a pure function of (seed, shard folder, position), whoever asks for it.

Micro-step m of a rank takes the positions `start + m * micro * world + rank * micro + [0, micro)` of the stream, so a
global step covers the same positions, in the same global order, for any number of ranks, workers and micro-batches.
Continuing means starting at another position; nothing is stored and nothing is replayed. Whole micro-batches are made
by one worker, and a worker's faults come back as one message that names shard and sample.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from sparselt_dist.data.batch import IGNORE_INDEX, Batch, Example, mix64, purpose_key
from sparselt_dist.data.order import SampleOrder, combine, sample_seed
from sparselt_dist.data.shards import ShardFolder
from sparselt_dist.errors import DataError, SparseltError
from sparselt_dist.objectives.base import Collator

PREFETCH_FACTOR = 4  # micro-batches ready per worker
_PLANNED_POSITIONS = 2048  # positions whose order is computed at a time: permuting 2048 costs little more than 32
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_IGNORED_IN_WORKERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class MicroBatch(NamedTuple):
    """A collated micro-batch and its share of the global step's digest."""

    batch: Batch
    digest: int
    """Sum mod 2**64 of a hash of (position, epoch, sample): sums over micro-batches and ranks do not depend on the split."""


class _Failure(NamedTuple):
    """A fault on its way from a worker: an exception would arrive wrapped in the worker's traceback."""

    message: str


def digest_hex(total: int) -> str:
    """The text form of a global step's digest, from the sum over its micro-batches and ranks (taken mod 2**64)."""
    return f"{total % 2**64:016x}"


def _digest(positions: np.ndarray, epochs: np.ndarray, samples: np.ndarray) -> int:
    with np.errstate(over="ignore"):
        hashes = mix64(positions.astype(np.uint64) * _GOLDEN + np.uint64(purpose_key("batch digest")))
        hashes = mix64(hashes + epochs.astype(np.uint64))
        hashes = mix64(hashes + samples.astype(np.uint64))
        return int(hashes.sum(dtype=np.uint64))


def _collate(folder: ShardFolder, collator: Collator, samples: np.ndarray, seeds: np.ndarray) -> Batch:
    """Read samples and collate them.

    Raises:
        DataError: a sample cannot be read or collated; its shard and number are named.
    """
    examples: list[Example] = [
        {"key": folder.key(sample), "ids": ids, "seed": seed}
        for sample, ids, seed in zip(samples.tolist(), folder.read(samples), seeds.tolist(), strict=True)
    ]
    try:
        return collator(examples)
    except SparseltError:
        raise
    except Exception as cause:  # an objective's collator may fail in any way
        raise DataError(_blame(folder, collator, examples, cause)) from cause


def _blame(folder: ShardFolder, collator: Collator, examples: list[Example], cause: Exception) -> str:
    """Name the sample that the collator fails on, by giving it one at a time."""
    keys = f"samples {examples[0]['key']} to {examples[-1]['key']}"
    for example in examples:
        try:
            collator([example])
        except Exception as own:  # the same fault, now of one sample
            keys, cause = f"sample {example['key']}", own
            break
    return (
        f"{folder.path}: {keys}: the collator {type(collator).__name__} failed: {type(cause).__name__}: {cause}; "
        "run `sparselt shards verify`; if the folder is sound the objective is at fault"
    )


class _MicroSteps(Dataset["MicroBatch | _Failure"]):
    """Micro-batches by number; what a worker holds."""

    def __init__(
        self,
        folder: ShardFolder,
        collator: Collator,
        *,
        seed: int,
        window: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        start_position: int,
    ) -> None:
        self.folder = folder
        self._collator = collator
        self._seed = seed
        self._order = SampleOrder(folder.shard_samples, seed, window)
        self._micro = micro_batch_size
        self._stride = micro_batch_size * world_size
        self._first = start_position + rank * micro_batch_size
        self._per_plan = max(1, _PLANNED_POSITIONS // micro_batch_size)
        self._plan: tuple[int, np.ndarray, np.ndarray, np.ndarray] | None = None
        self.at_work: torch.Tensor | None = None  # int64 [workers, 2]: process id and micro-step, in shared memory

    def planned(self, micro_step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions, epochs and samples of a micro-step, each [micro_batch_size]; the order is computed in blocks."""
        block, place = divmod(micro_step, self._per_plan)
        if self._plan is None or self._plan[0] != block:
            steps = np.arange(block * self._per_plan, (block + 1) * self._per_plan)
            positions = self._first + steps[:, None] * self._stride + np.arange(self._micro)[None, :]
            epochs, samples = self._order.samples(positions.ravel())
            self._plan = (block, positions, epochs.reshape(positions.shape), samples.reshape(positions.shape))
        _, positions, epochs, samples = self._plan
        return positions[place], epochs[place], samples[place]

    def make(self, micro_step: int) -> MicroBatch:
        """The micro-batch of that number. Raises DataError."""
        positions, epochs, samples = self.planned(micro_step)
        batch = _collate(self.folder, self._collator, samples, sample_seed(self._seed, epochs, samples))
        return MicroBatch(batch, _digest(positions, epochs, samples))

    def __getitem__(self, micro_step: int) -> MicroBatch | _Failure:
        """In a worker: the micro-batch, or its fault as data."""
        worker = torch.utils.data.get_worker_info()
        if worker is not None and self.at_work is not None:
            self.at_work[worker.id] = torch.tensor([os.getpid(), micro_step])
        try:
            return self.make(micro_step)
        except SparseltError as fault:
            return _Failure(str(fault))

    def __len__(self) -> int:
        raise TypeError("the stream has no end")


def _start_worker(worker: int) -> None:
    """Leave stopping to the training process: a signal to the whole group must not cut off its last batches."""
    for number in _IGNORED_IN_WORKERS:
        signal.signal(number, signal.SIG_IGN)


def _as_is(item: MicroBatch | _Failure) -> MicroBatch | _Failure:
    return item


class Loader:
    """Endless micro-batches of one rank, from a position of the stream.

    `iter()` starts the workers and prefetching at once; call it before the accelerator is initialised, for workers are
    forked: they start in milliseconds where a spawned one imports torch for seconds, and they touch neither device nor
    thread pool. With no worker the batches are made when asked for.

    Args:
        window: shards whose samples are permuted together, hence read at a time.
        start_position: samples of the stream that were consumed before, over all ranks.
        pin_memory: page-locked batches, for asynchronous copies to an accelerator.
    """

    def __init__(
        self,
        folder: ShardFolder,
        collator: Collator,
        *,
        seed: int,
        window: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        num_workers: int,
        start_position: int,
        pin_memory: bool = False,
    ) -> None:
        self._steps = _MicroSteps(
            folder,
            collator,
            seed=seed,
            window=window,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            start_position=start_position,
        )
        self._num_workers = num_workers
        self._pin_memory = pin_memory

    def __iter__(self) -> Iterator[MicroBatch]:
        if self._num_workers == 0:
            return self._in_process()
        self._steps.at_work = torch.full((self._num_workers, 2), -1, dtype=torch.int64).share_memory_()
        loader = DataLoader(
            self._steps,
            batch_size=None,
            sampler=count(),
            num_workers=self._num_workers,
            collate_fn=_as_is,
            worker_init_fn=_start_worker,
            multiprocessing_context=multiprocessing.get_context("fork"),
            prefetch_factor=PREFETCH_FACTOR,
            persistent_workers=True,
            pin_memory=self._pin_memory,
        )
        return self._from_workers(iter(loader))

    def _in_process(self) -> Iterator[MicroBatch]:
        for micro_step in count():
            made = self._steps.make(micro_step)
            if self._pin_memory:
                made = made._replace(batch={key: value.pin_memory() for key, value in made.batch.items()})
            yield made

    def _from_workers(self, results: Iterator[MicroBatch | _Failure]) -> Iterator[MicroBatch]:
        while True:
            try:
                result = next(results)
            except RuntimeError as fault:  # how torch reports that a worker is gone
                raise DataError(self._lost_worker(fault)) from fault
            if isinstance(result, _Failure):
                raise DataError(result.message)
            yield result

    def _lost_worker(self, fault: RuntimeError) -> str:
        assert self._steps.at_work is not None
        pids = {int(number) for number in re.findall(r"\d+", str(fault))}
        at_work = {pid: step for pid, step in self._steps.at_work.tolist() if pid in pids}
        where = "before its first batch"
        if at_work:
            samples = self._steps.planned(next(iter(at_work.values())))[2]
            keys = [self._steps.folder.key(int(sample)) for sample in samples]
            where = f"at the samples {', '.join(keys)}"
        cause = str(fault).splitlines()[0]
        return (
            f"{self._steps.folder.path}: a loader worker died {where}: {cause}; "
            "check the machine's memory, run `sparselt shards verify`, or set data.num_workers=0 to see the fault itself"
        )


def evaluation_batches(
    folder: ShardFolder,
    collator: Collator,
    *,
    max_samples: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
) -> Iterator[Batch]:
    """The first `max_samples` samples in stored order, each on one rank once, with seeds of their own.

    The batches do not depend on the run's seed, so runs are compared on the same targets. Every rank gets the same
    number of batches, for all take part in each forward pass under ZeRO-3; a rank that has run out gets a batch
    without a target (labels all IGNORE_INDEX, `num_targets` and `num_tokens` 0).
    """
    total = min(max_samples, folder.num_samples)
    run_seed = combine(purpose_key("evaluation"), 0)
    for first in range(rank * micro_batch_size, _round_up(total, micro_batch_size * world_size), micro_batch_size * world_size):
        samples = np.arange(first, min(first + micro_batch_size, total))
        surplus = len(samples) == 0
        if surplus:
            samples = np.zeros(1, dtype=np.int64)
        batch = _collate(folder, collator, samples, sample_seed(run_seed, np.zeros_like(samples), samples))
        yield _without_targets(batch) if surplus else batch


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _without_targets(batch: Batch) -> Batch:
    zero = torch.zeros((), dtype=torch.int64)
    return {**batch, "labels": torch.full_like(batch["labels"], IGNORE_INDEX), "num_targets": zero, "num_tokens": zero}

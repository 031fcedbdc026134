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
import threading
from collections.abc import Iterator
from itertools import count
from typing import Any, NamedTuple

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
_IGNORED_IN_WORKERS = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class MicroBatch(NamedTuple):
    """A collated micro-batch and its share of the global step's digest."""

    batch: Batch
    digest: int
    """Sum mod 2**64 of a hash of (position, epoch, sample): its sum over micro-batches and ranks ignores the split."""


class _Made(NamedTuple):
    """A micro-batch on its way from a worker, as arrays.

    They travel by value through a pipe: torch would pass each tensor as shared memory of its own, which takes ten
    times as long for micro-batches of usual size and can run out of file descriptors.
    """

    arrays: dict[str, np.ndarray]
    digest: int


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
        {"key": key, "ids": ids, "seed": seed}
        for key, ids, seed in zip(folder.keys(samples), folder.read(samples), seeds.tolist(), strict=True)
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


class _MicroSteps(Dataset["_Made | _Failure"]):
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
        self._start_position = start_position
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

    def keys(self, position: int, count: int) -> list[str]:
        """Keys of this rank's first `count` samples from the global step that begins at `position` of the stream."""
        micro_step = (position - self._start_position) // self._stride
        steps = range(micro_step, micro_step - (-count // self._micro))
        samples = np.concatenate([self.planned(step)[2] for step in steps])
        return [self.folder.key(int(sample)) for sample in samples[:count]]

    def make(self, micro_step: int) -> MicroBatch:
        """The micro-batch of that number. Raises DataError."""
        positions, epochs, samples = self.planned(micro_step)
        batch = _collate(self.folder, self._collator, samples, sample_seed(self._seed, epochs, samples))
        return MicroBatch(batch, _digest(positions, epochs, samples))

    def __getitem__(self, micro_step: int) -> _Made | _Failure:
        """In a worker: the micro-batch, or its fault as data."""
        worker = torch.utils.data.get_worker_info()
        if worker is not None and self.at_work is not None:
            self.at_work[worker.id] = torch.tensor([os.getpid(), micro_step])
        try:
            made = self.make(micro_step)
        except SparseltError as fault:
            return _Failure(str(fault))
        return _Made({key: value.numpy() for key, value in made.batch.items()}, made.digest)

    def __len__(self) -> int:
        raise TypeError("the stream has no end")


def _start_worker(worker: int) -> None:
    """Leave stopping to the training process: a signal to the whole group must not cut off its last batches."""
    for number in _IGNORED_IN_WORKERS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    """End this worker when the training process says so at its exit, and on nobody else's SIGTERM."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _as_is(item: Any) -> Any:
    """In place of torch's conversion to tensors."""
    return item


def _shared_table(workers: int) -> torch.Tensor:
    table = torch.full((workers, 2), -1, dtype=torch.int64)
    table.share_memory_()
    return table


def _start(loader: DataLoader[Any]) -> Iterator[_Made | _Failure]:
    """Start the workers, leaving SIGCHLD as it is.

    Torch raises from a handler of it, wherever the training process happens to be; without, the loss of a worker is
    found where the next batch is awaited.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler if handler is not None else signal.SIG_DFL)
    return iterator


class Loader:
    """Endless micro-batches of one rank, from a position of the stream.

    `iter()` starts the workers and prefetching at once. They are forked: a fork starts in milliseconds, where a spawned
    process imports torch for seconds, and it is safe here, for workers touch no device and torch gives them one thread.
    With no worker the batches are made when asked for.

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
            return map(self._pinned, map(self._steps.make, count()))
        self._steps.at_work = _shared_table(self._num_workers)
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
            generator=torch.Generator(),  # else the start of workers draws from the global one, and dropout with it
        )
        return map(self._pinned, self._from_workers(_start(loader)))

    def keys(self, position: int, count: int) -> list[str]:
        """Keys of the first `count` samples that this rank takes of the global step that begins at `position`."""
        return self._steps.keys(position, count)

    def _pinned(self, made: MicroBatch) -> MicroBatch:
        if not self._pin_memory:
            return made
        return made._replace(batch={key: value.pin_memory() for key, value in made.batch.items()})

    def _from_workers(self, results: Iterator[_Made | _Failure]) -> Iterator[MicroBatch]:
        while True:
            try:
                result = next(results)
            except RuntimeError as fault:  # how torch reports that a worker is gone
                raise DataError(self._lost_worker(fault)) from fault
            if isinstance(result, _Failure):
                raise DataError(result.message)
            yield MicroBatch({key: torch.from_numpy(array) for key, array in result.arrays.items()}, result.digest)

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
            "check the machine's memory, run `sparselt shards verify`, or see the fault itself with data.num_workers=0"
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
    stride = micro_batch_size * world_size
    for start in range(0, total, stride):
        first = start + rank * micro_batch_size
        samples = np.arange(first, min(first + micro_batch_size, total))
        surplus = len(samples) == 0
        if surplus:
            samples = np.zeros(1, dtype=np.int64)
        batch = _collate(folder, collator, samples, sample_seed(run_seed, np.zeros_like(samples), samples))
        yield _without_targets(batch) if surplus else batch


def _without_targets(batch: Batch) -> Batch:
    zero = torch.zeros((), dtype=torch.int64)
    return {**batch, "labels": torch.full_like(batch["labels"], IGNORE_INDEX), "num_targets": zero, "num_tokens": zero}

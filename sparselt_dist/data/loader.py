"""The stream of micro-batches: a pure function of (seed, shards, position), whoever asks for it.

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

from sparselt_dist.data.batch import Batch
from sparselt_dist.data.collation import collate, without_targets
from sparselt_dist.data.corpora import Corpora
from sparselt_dist.data.mixing import StreamOrder
from sparselt_dist.data.randomness import combine, mix64, purpose_key, sample_seed
from sparselt_dist.errors import DataError, SparseltError
from sparselt_dist.objectives.base import Collator
from sparselt_dist.spikes import Ranges, drawn_between, shifted

_PLANNED_POSITIONS = 2048  # positions whose order is computed at a time: permuting 2048 costs little more than 32
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_IGNORED_IN_WORKERS = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class MicroBatch(NamedTuple):
    """A collated micro-batch and its share of the global step's digest."""

    batch: Batch
    digest: int
    """Sum mod 2**64 of a hash of (position, epoch, sample): its sum over micro-batches and ranks ignores the split."""
    skipped: int = 0
    """Samples left out because their shard is bad."""
    complaints: tuple[str, ...] = ()
    """What to tell the user of shards that were given up."""


class _Made(NamedTuple):
    """A micro-batch on its way from a worker, its tensors as arrays.

    They travel by value through a pipe: torch would pass each tensor as shared memory of its own, which takes ten
    times as long for micro-batches of usual size and can run out of file descriptors.
    """

    arrays: dict[str, np.ndarray]
    rest: tuple[int, int, tuple[str, ...]]


class _Failure(NamedTuple):
    """A fault on its way from a worker: an exception would arrive wrapped in the worker's traceback."""

    message: str


def digest_hex(total: int) -> str:
    """The text form of a global step's digest, from the sum over its micro-batches and ranks (taken mod 2**64)."""
    return f"{total % 2**64:016x}"


class _Plan(NamedTuple):
    """Consecutive micro-steps of a rank, each array [micro-steps, micro_batch_size]."""

    block: int
    positions: np.ndarray
    epochs: np.ndarray
    samples: np.ndarray
    seeds: np.ndarray
    hashes: np.ndarray  # of (position, epoch, sample): what the digest sums


def _hashes(positions: np.ndarray, epochs: np.ndarray, samples: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        hashes = mix64(positions.astype(np.uint64) * _GOLDEN + np.uint64(purpose_key("batch digest")))
        hashes = mix64(hashes + epochs.astype(np.uint64))
        return mix64(hashes + samples.astype(np.uint64))


class _MicroSteps(Dataset["_Made | _Failure"]):
    """Micro-batches by number; what a worker holds."""

    def __init__(
        self,
        corpora: Corpora,
        collator: Collator,
        *,
        seed: int,
        window: int,
        row_length: int | None,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        start_position: int,
        left_out: Ranges,
    ) -> None:
        self.corpora = corpora
        self._collator = collator
        self._seed = seed
        self._row_length = row_length
        self._order = StreamOrder(corpora.shard_samples, corpora.weights, seed, window)
        self._micro = micro_batch_size
        self._stride = micro_batch_size * world_size
        self._start_position = start_position
        self._left_out = left_out
        self._first = start_position + rank * micro_batch_size
        self._per_plan = max(1, _PLANNED_POSITIONS // micro_batch_size)
        self._plan: _Plan | None = None
        self.at_work: torch.Tensor | None = None  # int64 [workers, 2]: process id and micro-step, in shared memory

    def planned(self, micro_step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions, epochs and samples of a micro-step, each [micro_batch_size]; the order is computed in blocks."""
        plan, place = self._plan_of(micro_step)
        return plan.positions[place], plan.epochs[place], plan.samples[place]

    def _plan_of(self, micro_step: int) -> tuple[_Plan, int]:
        """The block that a micro-step lies in, made if need be, and its place there."""
        block, place = divmod(micro_step, self._per_plan)
        if self._plan is None or self._plan.block != block:
            steps = np.arange(block * self._per_plan, (block + 1) * self._per_plan)
            positions = self._first + steps[:, None] * self._stride + np.arange(self._micro)[None, :]
            positions = shifted(positions, self._start_position, self._left_out)
            if self.corpora.is_remote:
                self.corpora.prefetch(self._order.shards_ahead(int(positions[0, 0])))
            epochs, samples = self._order.samples(positions.ravel())
            epochs, samples = epochs.reshape(positions.shape), samples.reshape(positions.shape)
            seeds = sample_seed(self._seed, epochs, samples)
            self._plan = _Plan(block, positions, epochs, samples, seeds, _hashes(positions, epochs, samples))
        return self._plan, place

    def keys(self, position: int, count: int) -> list[str]:
        """Keys of this rank's first `count` samples from the global step that begins at `position` of the stream."""
        micro_step = drawn_between(self._start_position, position, self._left_out) // self._stride
        steps = range(micro_step, micro_step - (-count // self._micro))
        samples = np.concatenate([self.planned(step)[2] for step in steps])
        return self.corpora.keys(samples[:count])

    def make(self, micro_step: int) -> MicroBatch:
        """The micro-batch of that number. Raises DataError."""
        plan, place = self._plan_of(micro_step)
        samples, seeds = plan.samples[place], plan.seeds[place]
        batch, delivered = collate(self.corpora, self._collator, samples, seeds, self._row_length)
        hashes = plan.hashes[place]
        if delivered is None:
            return MicroBatch(batch, int(hashes.sum()))
        digest, skipped = int(hashes[delivered].sum()), int((~delivered).sum())
        return MicroBatch(batch, digest, skipped, tuple(self.corpora.take_complaints()))

    def __getitem__(self, micro_step: int) -> _Made | _Failure:
        """In a worker: the micro-batch, or its fault as data."""
        worker = torch.utils.data.get_worker_info()
        if worker is not None and self.at_work is not None:
            self.at_work[worker.id] = torch.tensor([os.getpid(), micro_step])
        try:
            made = self.make(micro_step)
        except SparseltError as fault:
            return _Failure(str(fault))
        return _Made({key: value.numpy() for key, value in made.batch.items()}, made[1:])

    def __len__(self) -> int:
        raise TypeError("the stream has no end")


def _start_worker(worker: int) -> None:
    """Leave stopping to the training process: a signal to the whole group must not cut off its last batches."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # raw text is tokenized here: one thread a worker, as for all else
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
        row_length: longer samples take several rows; None: they are kept whole.
        prefetch: micro-batches that a worker keeps ready.
        start_position: samples of the stream that were consumed before, over all ranks.
        pin_memory: page-locked batches, for asynchronous copies to an accelerator.
        left_out: positions [from, to) that are jumped over, after loss spikes.
    """

    def __init__(
        self,
        corpora: Corpora,
        collator: Collator,
        *,
        seed: int,
        window: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        num_workers: int,
        start_position: int,
        row_length: int | None = None,
        prefetch: int = 4,
        pin_memory: bool = False,
        left_out: Ranges = (),
    ) -> None:
        self._steps = _MicroSteps(
            corpora,
            collator,
            seed=seed,
            window=window,
            row_length=row_length,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            start_position=start_position,
            left_out=left_out,
        )
        self._num_workers = num_workers
        self._prefetch = prefetch
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
            prefetch_factor=self._prefetch,
            persistent_workers=True,
            generator=torch.Generator(),  # else the start of workers draws from the global one, and dropout with it
        )
        return map(self._pinned, self._from_workers(_start(loader)))

    def planned(self, micro_step: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and global sample numbers of this rank's micro-step of that number, int64 [micro_batch_size] each."""
        return self._steps.planned(micro_step)[1:]

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
            yield MicroBatch({key: torch.from_numpy(array) for key, array in result.arrays.items()}, *result.rest)

    def _lost_worker(self, fault: RuntimeError) -> str:
        assert self._steps.at_work is not None
        pids = {int(number) for number in re.findall(r"\d+", str(fault))}
        at_work = {pid: step for pid, step in self._steps.at_work.tolist() if pid in pids}
        where = "before its first batch"
        if at_work:
            keys = self._steps.corpora.keys(self._steps.planned(next(iter(at_work.values())))[2])
            where = f"at the samples {', '.join(keys)}"
        cause = str(fault).splitlines()[0]
        return (
            f"{self._steps.corpora.name}: a loader worker died {where}: {cause}; "
            "check the machine's memory, run `sparselt shards verify`, or see the fault itself with data.num_workers=0"
        )


def evaluation_batches(
    corpora: Corpora,
    collator: Collator,
    *,
    max_samples: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    row_length: int | None = None,
) -> Iterator[Batch]:
    """The first `max_samples` samples in stored order, each on one rank once, with seeds of their own.

    The batches do not depend on the run's seed, so runs are compared on the same targets. Every rank gets the same
    number of batches, for all take part in each forward pass under ZeRO-3; a rank that has run out gets a batch
    without a target (labels all IGNORE_INDEX, `num_targets` and `num_tokens` 0).
    """
    total = min(max_samples, corpora.num_samples)
    run_seed = combine(purpose_key("evaluation"), 0)
    stride = micro_batch_size * world_size
    for start in range(0, total, stride):
        first = start + rank * micro_batch_size
        samples = np.arange(first, min(first + micro_batch_size, total))
        surplus = len(samples) == 0
        if surplus:
            samples = np.zeros(1, dtype=np.int64)
        seeds = sample_seed(run_seed, np.zeros_like(samples), samples)
        batch = collate(corpora, collator, samples, seeds, row_length).batch
        yield without_targets(batch) if surplus else batch

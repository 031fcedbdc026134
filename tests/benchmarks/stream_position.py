"""What the place in the stream and the number of shards cost: resume, first batch, and a whole epoch planned by ranks.

    python tests/benchmarks/stream_position.py                       # all three, in a temporary folder
    python tests/benchmarks/stream_position.py epoch --ranks 512 --shards 10000 --changes 20

- resume: from nothing (folder, order, loader) to the first micro-batch at 1, 50 and 99 % of an epoch of a million rows;
- first-batch: the same at the start, over 1, 100 and 10,000 shards; beside it stock webdataset with a shuffle buffer,
  one document a member;
- epoch: every rank plans every step of one epoch by the loader's own code, without a byte of any shard, while the number
  of ranks changes at random. A bitmap over all samples must be full, with nothing taken twice.

Each timed start happens in a forked process that has opened nothing yet; imports are done, and the files are in the
page cache.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import ours
import peers
import torch

LENGTH = 128  # tokens a row
MICRO_BATCH = 32


# --- a start from nothing --------------------------------------------------------------------------------------------


def seconds_in_fork(task: Callable[[], object]) -> float:
    """Wall seconds of a task in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def run() -> None:
        torch.set_num_threads(1)
        start = time.perf_counter()
        task()
        sending.send(time.perf_counter() - start)
        os._exit(0)  # workers of a loader are left to the system

    process = context.Process(target=run)
    process.start()
    sending.close()
    seconds = float(receiving.recv())
    process.join()
    return seconds


def timings(task: Callable[[], object], repeats: int) -> str:
    """Median and range over repeats, in milliseconds; a first one warms the page cache."""
    seconds_in_fork(task)
    found = [1000 * seconds_in_fork(task) for _ in range(repeats)]
    return f"{statistics.median(found):9.1f} {min(found):9.1f} {max(found):9.1f}"


def first_micro_batch(folder: Path, start_position: int = 0, num_workers: int = 0) -> object:
    """Open all there is and take one micro-batch."""
    stream = ours.micro_batches(
        folder,
        ours.mlm_collator(),
        micro_batch_size=MICRO_BATCH,
        num_workers=num_workers,
        start_position=start_position,
    )
    return next(stream)


# --- resume ----------------------------------------------------------------------------------------------------------


def resume(work: Path, samples: int, repeats: int) -> Iterator[str]:
    """Latency by position."""
    folder = work / f"resume-{samples}"
    if not folder.exists():
        ours.write_shards(folder, ours.random_rows(samples, LENGTH), length=LENGTH, samples_per_shard=8192)
    yield f"resume in an epoch of {samples:,} rows of {LENGTH}: milliseconds to the first micro-batch of {MICRO_BATCH}"
    yield f"{'position':>12} {'workers':>8} {'median':>9} {'least':>9} {'most':>9}"
    for workers in (0, 1):
        for share in (0.0, 0.01, 0.5, 0.99):
            position = int(share * samples)
            found = timings(lambda p=position, w=workers: first_micro_batch(folder, p, w), repeats)
            yield f"{share:>12.0%} {workers:>8} {found}"


# --- first batch -----------------------------------------------------------------------------------------------------


def first_batch(work: Path, shard_counts: list[int], foreign_limit: int, repeats: int) -> Iterator[str]:
    """Latency by number of shards."""
    yield "first batch: milliseconds, from nothing"
    yield f"{'shards':>12} {'reader':>14} {'median':>9} {'least':>9} {'most':>9}"
    for shards in shard_counts:
        folder = work / f"shards-{shards}"
        if not folder.exists():
            rows = ours.random_rows(shards * MICRO_BATCH, LENGTH)
            ours.write_shards(folder, rows, length=LENGTH, samples_per_shard=MICRO_BATCH)
        yield f"{shards:>12,} {'sparselt_dist':>14} {timings(lambda f=folder: first_micro_batch(f), repeats)}"
        if shards <= foreign_limit:
            foreign = foreign_shards(work / f"webdataset-{shards}", shards)
            found = timings(lambda f=foreign: next(foreign_batches(f)), repeats)
            yield f"{shards:>12,} {'webdataset':>14} {found}"


def foreign_shards(folder: Path, shards: int) -> Path:
    """As many tars in webdataset's own way, of as many documents each."""
    import webdataset

    if not folder.exists():
        folder.mkdir()
        options = {"maxcount": MICRO_BATCH, "verbose": 0}
        with webdataset.ShardWriter(str(folder / "shard-%06d.tar"), **options) as writer:
            for number, ids in enumerate(ours.random_rows(shards * MICRO_BATCH, LENGTH)):
                writer.write({"__key__": f"{number:09d}", "ids.npy": ids})
    return folder


def foreign_batches(folder: Path) -> Iterator[object]:
    """The first batches of a shuffle buffer filled before the first sample leaves it."""
    import webdataset

    tars = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0)
    dataset = dataset.shuffle(peers.SHUFFLE_BUFFER, initial=peers.SHUFFLE_BUFFER).decode()
    return iter(dataset.map(lambda sample: sample["ids.npy"]).batched(MICRO_BATCH, collation_fn=peers.stack))


# --- an epoch, planned -----------------------------------------------------------------------------------------------


def shard_sizes(shards: int, mean: int) -> list[int]:
    """Sizes between half and one and a half times the mean."""
    return np.random.default_rng(1).integers(mean // 2, mean + mean // 2, shards).tolist()


def plan_cost(sizes: list[int], ranks: int, global_batch: int) -> Iterator[str]:
    """Time and memory until one rank knows its first samples."""
    middle = sum(sizes) // 2 // global_batch * global_batch

    def plan() -> object:
        micro = global_batch // ranks
        rank = ours.rank_plan(sizes, rank=ranks - 1, world_size=ranks, micro_batch_size=micro, start_position=middle)
        return rank, rank.planned(0)

    seconds = [seconds_in_fork(plan) for _ in range(5)]
    tracemalloc.start()
    kept = plan()
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept
    yield (
        f"plan of one rank of {ranks} in the middle of the epoch: {1000 * statistics.median(seconds):.1f} ms, "
        f"{peak / 2**20:.2f} MiB at the peak, {held / 2**20:.2f} MiB kept"
    )


def segments(steps: int, global_batch: int, ranks: int, changes: int, seed: int) -> list[tuple[int, int, int, int]]:
    """(first step, end, ranks, micro-batch) of an epoch: the ranks change at random steps to another divisor."""
    generator = np.random.default_rng(seed)
    bounds = [0, *sorted(generator.choice(np.arange(1, steps), changes, replace=False).tolist()), steps]
    divisors = [number for number in range(1, ranks + 1) if global_batch % number == 0]
    found, world = [], ranks
    for first, end in pairwise(bounds):
        most = global_batch // world
        micro = int(generator.choice([number for number in range(1, most + 1) if most % number == 0]))
        found.append((first, end, world, micro))
        world = int(generator.choice([number for number in divisors if number != world]))
    return found


def take_segment(sizes: list[int], segment: tuple[int, int, int, int], global_batch: int, taken: np.ndarray) -> None:
    """Count in `taken` what all ranks take of the first epoch in a segment."""
    first, end, world, micro = segment
    micro_steps = (end - first) * global_batch // (world * micro)
    start = first * global_batch
    for rank in range(world):
        plan = ours.rank_plan(sizes, rank=rank, world_size=world, micro_batch_size=micro, start_position=start)
        for micro_step in range(micro_steps):
            epochs, samples = plan.planned(micro_step)
            np.add.at(taken, samples[epochs == 0], 1)


def epoch(shards: int, mean: int, global_batch: int, ranks: int, changes: int, seed: int) -> Iterator[str]:
    """The whole simulation."""
    sizes = shard_sizes(shards, mean)
    samples = sum(sizes)
    yield (
        f"epoch of {samples:,} samples in {shards:,} shards of {min(sizes)} to {max(sizes)}, "
        f"{global_batch:,} samples a step"
    )
    yield from plan_cost(sizes, ranks, global_batch)
    taken = np.zeros(samples, dtype=np.uint8)
    start = time.perf_counter()
    parts = segments(math.ceil(samples / global_batch), global_batch, ranks, changes, seed)
    for part in parts:
        take_segment(sizes, part, global_batch, taken)
    worlds = " ".join(str(world) for _, _, world, _ in parts)
    yield f"ranks, {changes} changes: {worlds}"
    lost, repeated = int((taken == 0).sum()), int((taken > 1).sum())
    yield f"lost {lost}, repeated {repeated}; all ranks planned in {time.perf_counter() - start:.1f} s"
    assert lost == 0 and repeated == 0, "the epoch is not exact"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["resume", "first-batch", "epoch", []], help="default: all")
    parser.add_argument("--work-dir", type=Path, help="keeps the shards that are made; default: a temporary folder")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--samples", type=int, default=1_000_000, help="rows of the epoch of `resume`")
    parser.add_argument("--shard-counts", type=int, nargs="+", default=[1, 100, 1000, 10_000])
    parser.add_argument("--foreign-limit", type=int, default=1000, help="most shards that are also made for webdataset")
    parser.add_argument("--shards", type=int, default=10_000, help="of `epoch`")
    parser.add_argument("--mean-samples", type=int, default=1000, help="of a shard of `epoch`")
    parser.add_argument("--global-batch", type=int, default=1024)
    parser.add_argument("--ranks", type=int, default=512, help="at the start, and the most of `epoch`")
    parser.add_argument("--changes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    parts = arguments.parts or ["resume", "first-batch", "epoch"]
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work_dir or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        lines = {
            "resume": lambda: resume(work, arguments.samples, arguments.repeats),
            "first-batch": lambda: first_batch(
                work, arguments.shard_counts, arguments.foreign_limit, arguments.repeats
            ),
            "epoch": lambda: epoch(
                arguments.shards,
                arguments.mean_samples,
                arguments.global_batch,
                arguments.ranks,
                arguments.changes,
                arguments.seed,
            ),
        }
        for part in parts:
            for line in lines[part]():
                print(line, flush=True)


if __name__ == "__main__":
    main()

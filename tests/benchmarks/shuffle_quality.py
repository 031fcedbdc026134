"""How well the order of samples is mixed, beside a full shuffle and beside webdataset's shuffle buffer.

    python tests/benchmarks/shuffle_quality.py

Over one epoch, with samples numbered as they are stored:

- distance: how far a sample stands from its stored place, the mean, as a share of a full shuffle's;
- spread: how far apart two stored neighbours come to stand, the mean, as a share of a full shuffle's;
- adjacent: the share of consecutive samples that were stored neighbours;
- shards a batch: from how many shards a batch of 256 comes, as a share of a full shuffle's.

Whole shards change places in every order here, which alone makes distances large: spread tells the orders apart.
`prepare` stores rows already shuffled (prepare.order=shuffle), so what is left adjacent were no neighbours in the text.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator

import numpy as np
import ours

BATCH = 256


def measures(order: np.ndarray, samples_per_shard: int) -> np.ndarray:
    """Distance, spread, adjacency and shards a batch, not yet compared with anything."""
    count = len(order)
    assert np.array_equal(np.sort(order), np.arange(count)), "not a permutation"
    places = np.empty(count, dtype=np.int64)
    places[order] = np.arange(count)
    distance = np.abs(places - np.arange(count)).mean()
    spread = np.abs(np.diff(places)).mean()
    adjacent = (np.abs(np.diff(order)) == 1).mean()
    batches = order[: count // BATCH * BATCH].reshape(-1, BATCH) // samples_per_shard
    shards = np.mean([len(np.unique(batch)) for batch in batches])
    return np.array([distance, spread, adjacent, shards])


def buffered(count: int, samples_per_shard: int, buffer: int, generator: np.random.Generator) -> np.ndarray:
    """Shards in random order through webdataset's own shuffle buffer."""
    import webdataset

    shards = generator.permutation(count // samples_per_shard)
    stored = (shards[:, None] * samples_per_shard + np.arange(samples_per_shard)).ravel()
    shuffled = webdataset.filters.shuffle(buffer, rng=random.Random(int(generator.integers(2**32))))
    return np.fromiter(shuffled(iter(stored.tolist())), dtype=np.int64, count=count)


def orders(
    shards: int, samples_per_shard: int, windows: list[int], buffers: list[int], seed: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and orders; the full shuffle first."""
    count = shards * samples_per_shard
    generator = np.random.default_rng(seed)
    yield "full shuffle (NumPy)", generator.permutation(count)
    for window in windows:
        order = ours.sample_order([samples_per_shard] * shards, seed, window)
        yield f"sparselt_dist, window of {window} shards", order.samples(np.arange(count))[1]
    for buffer in buffers:
        yield f"webdataset, buffer of {buffer}", buffered(count, samples_per_shard, buffer, generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=256)
    parser.add_argument("--samples-per-shard", type=int, default=8192, help="the default of prepare.samples_per_shard")
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--buffers", type=int, nargs="+", default=[1000, 5000])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    made = orders(arguments.shards, arguments.samples_per_shard, arguments.windows, arguments.buffers, arguments.seed)
    print(f"{arguments.shards} shards of {arguments.samples_per_shard:,} samples\n")
    print("| order | distance | spread | adjacent | shards a batch |\n|---|---|---|---|---|")
    full = None
    for name, order in made:
        found = measures(order, arguments.samples_per_shard)
        full = found if full is None else full
        distance, spread, shards = found[[0, 1, 3]] / full[[0, 1, 3]]
        print(f"| {name} | {distance:.3f} | {spread:.4f} | {found[2]:.1e} | {shards:.3f} |", flush=True)


if __name__ == "__main__":
    main()

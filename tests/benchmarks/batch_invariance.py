"""SHA-256 of global batches over ranks x loader workers x micro-batch sizes: all equal, and an epoch without gap or double.

    python tests/benchmarks/batch_invariance.py

Packed rows of whole documents, a mixture of two corpora, masked for MLM. Hashed are ids, masked ids, labels, segments
and positions of every row in global order, without padding, over somewhat more than one epoch; and the keys.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from corpus_files import write_folder

from sparselt_dist.config import Config, CorpusSection
from sparselt_dist.data.batch import Batch
from sparselt_dist.data.best_fit import pack_best_fit
from sparselt_dist.data.corpora import Corpora, open_corpora
from sparselt_dist.data.loader import Loader, MicroBatch
from sparselt_dist.objectives.base import TokenizerInfo
from sparselt_dist.objectives.mlm import MLMCollator
from sparselt_dist.objectives.settings import MLMConfig

GLOBAL_BATCH = 96  # divisible by 8 ranks of 4, and by 3
ROW = 64
HASHED = ("input_ids", "labels", "segment_ids", "position_ids")
COLLATOR = MLMCollator(MLMConfig(), TokenizerInfo(vocab_size=96, pad_id=0, mask_id=4, special_ids=(0, 1, 2, 3, 4)))


def packed_rows(documents: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Rows of whole documents of log-normal length, and the lengths of the documents in each."""
    generator = np.random.default_rng(seed)
    lengths = np.clip(generator.lognormal(2.6, 0.7, documents).astype(int), 2, ROW)
    assignment = pack_best_fit(lengths, ROW)
    rows, in_rows = [], []
    for row in range(int(assignment.max()) + 1):
        own = lengths[assignment == row]
        ids = np.zeros(ROW, dtype=np.uint16)
        ids[: own.sum()] = generator.integers(5, 96, int(own.sum()))
        rows.append(ids)
        in_rows.append(own)
    return rows, in_rows


def make_corpora(folder: Path) -> Corpora:
    """Two packed corpora, mixed 3 to 1."""
    for name, documents, seed in (("a", 3000, 0), ("b", 1500, 1)):
        rows, lengths = packed_rows(documents, seed)
        write_folder(folder / name, rows, kind="packed", documents=lengths, samples_per_shard=50)
    parts = [CorpusSection(shards=str(folder / name), weight=weight) for name, weight in (("a", 0.75), ("b", 0.25))]
    return open_corpora(parts, Config())


def rows_of(batch: Batch) -> Iterator[bytes]:
    """Each row's bytes, without padding."""
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    for row, length in enumerate(lengths):
        yield b"".join(batch[key][row, :length].numpy().tobytes() for key in HASHED)


def global_hash(corpora: Corpora, steps: int, ranks: int, workers: int, micro: int) -> tuple[str, list[int]]:
    """The hash of all global batches in order, and their digests."""
    streams: list[Iterator[MicroBatch]] = [
        iter(
            Loader(
                corpora,
                COLLATOR,
                seed=7,
                window=4,
                micro_batch_size=micro,
                rank=rank,
                world_size=ranks,
                num_workers=workers,
                start_position=0,
            )
        )
        for rank in range(ranks)
    ]
    found, digests = hashlib.sha256(), []
    for _ in range(steps):
        parts = [next(stream) for _ in range(GLOBAL_BATCH // (ranks * micro)) for stream in streams]
        for part in parts:
            for row in rows_of(part.batch):
                found.update(row)
        digests.append(sum(part.digest for part in parts) % 2**64)
    return found.hexdigest(), digests


def count_epoch(corpora: Corpora, ranks: int) -> tuple[int, int]:
    """(doubles, misses) among the samples of one epoch of the first corpus, over ranks."""
    size = sum(corpora.shard_samples[0])
    counted: Counter[int] = Counter()
    drawn = 0
    loaders = [
        Loader(
            corpora,
            COLLATOR,
            seed=7,
            window=4,
            micro_batch_size=4,
            rank=rank,
            world_size=ranks,
            num_workers=0,
            start_position=0,
        )
        for rank in range(ranks)
    ]
    for step in itertools.count():
        for micro in range(GLOBAL_BATCH // (4 * ranks)):
            for loader in loaders:
                epochs, samples = loader.planned(step * GLOBAL_BATCH // (4 * ranks) + micro)
                own = (samples < size) & (epochs == 0)
                counted.update(samples[own].tolist())
                drawn += int(own.sum())
        if drawn >= size or step > size:
            break
    return sum(count - 1 for count in counted.values()), size - len(counted)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4, 8])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--micro", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpora = make_corpora(Path(folder))
        manifest = corpora.manifest
        fill = manifest.tokens / (manifest.samples * ROW)
        print(f"{manifest.samples} rows of {ROW}, fill {100 * fill:.2f} %, {args.steps} steps of {GLOBAL_BATCH}")
        hashes: Counter[tuple[str, tuple[int, ...]]] = Counter()
        for ranks, workers, micro in itertools.product(args.ranks, args.workers, args.micro):
            started = time.perf_counter()
            found, digests = global_hash(corpora, args.steps, ranks, workers, micro)
            hashes[found, tuple(digests)] += 1
            seconds = time.perf_counter() - started
            print(f"ranks {ranks}  workers {workers}  micro-batch {micro}  {found[:16]}  {seconds:5.1f} s", flush=True)
        doubles = {ranks: count_epoch(corpora, ranks) for ranks in args.ranks}
        print(
            f"{sum(hashes.values())} settings, {len(hashes)} different hash(es); per ranks (doubles, misses): {doubles}"
        )
    return 0 if len(hashes) == 1 and set(doubles.values()) == {(0, 0)} else 1


if __name__ == "__main__":
    sys.exit(main())

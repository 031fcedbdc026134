"""The stream of micro-batches over real shard folders."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparselt_dist.data.batch import IGNORE_INDEX, Batch, Example
from sparselt_dist.data.corpora import Corpora, open_folder
from sparselt_dist.data.loader import Loader, MicroBatch, digest_hex, evaluation_batches
from sparselt_dist.data.manifest import write_manifest
from sparselt_dist.data.order import SampleOrder
from sparselt_dist.data.shard_writer import ShardWriter
from sparselt_dist.errors import DataError
from sparselt_dist.objectives.base import TokenizerInfo
from sparselt_dist.objectives.mlm import MLMCollator
from sparselt_dist.objectives.settings import MLMConfig

VOCAB = 500
SAMPLES = 83
TOKENIZER = TokenizerInfo(vocab_size=VOCAB, pad_id=0, mask_id=4, special_ids=(0, 1, 2, 3, 4))
COLLATOR = MLMCollator(MLMConfig(mlm_probability=0.3), TOKENIZER)


def write_shards(path: Path, *, rows: bool = True, bad_sample: int | None = None) -> Corpora:
    """83 samples in shards of 10; a sample begins with its own number plus 100."""
    writer = ShardWriter(path, kind="rows" if rows else "documents", dtype="uint16", samples_per_shard=10)
    generator = np.random.default_rng(0)
    for sample in range(SAMPLES):
        ids = generator.integers(5, VOCAB, 16 if rows else 4 + sample % 13).astype(np.uint16)
        ids[0] = 100 + sample
        if sample == bad_sample:
            ids[1] = VOCAB
        writer.add(ids)
    write_manifest(
        path,
        writer.close(),
        kind="rows" if rows else "documents",
        sequence_length=16 if rows else None,
        dtype="uint16",
        vocab_size=VOCAB,
        tokenizer_sha256="",
    )
    return open_folder(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    return write_shards(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    return write_shards(tmp_path_factory.mktemp("documents"), rows=False)


class Plain:
    """Ids as they are, the key as bytes, and on one sample a fault."""

    def __init__(self, faulty_key: str = "", fault: str = "") -> None:
        self.faulty_key = faulty_key
        self.fault = fault

    def __call__(self, examples: list[Example]) -> Batch:
        for example in examples:
            if example["key"] == self.faulty_key and self.fault == "raise":
                raise ValueError("three is not two")
            if example["key"] == self.faulty_key and self.fault == "die":
                os.kill(os.getpid(), signal.SIGKILL)
        ids = torch.from_numpy(np.stack([example["ids"] for example in examples]).astype(np.int64))
        seeds = torch.tensor([example["seed"] % 2**62 for example in examples])
        tokens = torch.tensor(ids.numel())
        return {"input_ids": ids, "labels": ids, "num_targets": tokens, "num_tokens": tokens, "plain/seeds": seeds}


def make_loader(folder: Corpora, collator: Any = COLLATOR, **changes: Any) -> Loader:
    options: dict[str, Any] = {
        "seed": 1,
        "window": 3,
        "micro_batch_size": 4,
        "rank": 0,
        "world_size": 1,
        "num_workers": 0,
        "start_position": 0,
    }
    return Loader(folder, collator, **{**options, **changes})


def global_steps(folder: Corpora, steps: int, *, world: int, micro: int, workers: int, start: int = 0) -> list[Any]:
    """(digest, input_ids, labels) of global steps of 16 samples, the rows in global order."""
    ranks: list[Iterator[MicroBatch]] = [
        iter(
            make_loader(
                folder, rank=rank, world_size=world, micro_batch_size=micro, num_workers=workers, start_position=start
            )
        )
        for rank in range(world)
    ]
    found = []
    for _ in range(steps):
        parts = [next(rank) for _ in range(16 // (micro * world)) for rank in ranks]
        digest = digest_hex(sum(part.digest for part in parts))
        found.append((digest, *(torch.cat([part.batch[key] for part in parts]) for key in ("input_ids", "labels"))))
    return found


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_global_step_does_not_depend_on_how_it_is_split(
    folder: Corpora, world: int, micro: int, workers: int
) -> None:
    expected = global_steps(folder, 7, world=1, micro=16, workers=0)  # 112 samples: across an epoch's end
    found = global_steps(folder, 7, world=world, micro=micro, workers=workers)
    assert [step[0] for step in found] == [step[0] for step in expected]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[1], other[1]) and torch.equal(one[2], other[2])


def test_continuing_is_starting_elsewhere(folder: Corpora) -> None:
    straight = global_steps(folder, 9, world=1, micro=4, workers=0)
    continued = global_steps(folder, 5, world=2, micro=2, workers=0, start=4 * 16)
    assert [step[0] for step in continued] == [step[0] for step in straight[4:]]
    assert all(torch.equal(one[2], other[2]) for one, other in zip(continued, straight[4:], strict=True))


def test_an_epoch_holds_every_sample_once_and_the_next_one_new_masks(folder: Corpora) -> None:
    batches = islice(make_loader(folder, Plain(), micro_batch_size=1), 2 * SAMPLES)
    drawn = [(int(b.batch["input_ids"][0, 0]) - 100, int(b.batch["plain/seeds"][0])) for b in batches]
    assert sorted(sample for sample, _ in drawn[:SAMPLES]) == list(range(SAMPLES))
    assert sorted(sample for sample, _ in drawn[SAMPLES:]) == list(range(SAMPLES))
    assert len({seed for _, seed in drawn}) == 2 * SAMPLES
    expected = SampleOrder(folder.shard_samples[0], 1, 3).samples(np.arange(2 * SAMPLES))[1]
    assert [sample for sample, _ in drawn] == expected.tolist()


def test_documents_keep_their_own_lengths(documents: Corpora) -> None:
    batch = next(iter(make_loader(documents, micro_batch_size=SAMPLES))).batch
    assert int(batch["num_tokens"]) == documents.manifest.tokens == int(batch["attention_mask"].sum())
    assert sorted(batch["attention_mask"].sum(dim=1).tolist()) == sorted(4 + sample % 13 for sample in range(SAMPLES))


@pytest.mark.parametrize("change", [{"seed": 2}, {"start_position": 16}, {"window": 5}])
def test_digest_depends_on_what_is_delivered_and_when(folder: Corpora, change: dict[str, int]) -> None:
    first = next(iter(make_loader(folder, micro_batch_size=16)))
    assert next(iter(make_loader(folder, micro_batch_size=16, **change))).digest != first.digest
    assert next(iter(make_loader(folder, Plain(), micro_batch_size=16))).digest == first.digest


def test_digest_hex() -> None:
    assert digest_hex(0) == "0" * 16
    assert digest_hex(2**64 + 255) == "00000000000000ff"


@pytest.mark.parametrize("workers", [0, 1])
def test_keys_name_the_samples_of_a_step(folder: Corpora, workers: int) -> None:
    loader = make_loader(folder, Plain(), rank=1, world_size=2, start_position=8, num_workers=workers)
    batches = iter(loader)
    next(batches)
    following = torch.cat([next(batches).batch["input_ids"][:, 0] for _ in range(2)]) - 100
    assert loader.keys(8 + 8, 6) == folder.keys(following[:6].numpy())


def test_batches_from_workers_are_writable_tensors(folder: Corpora) -> None:
    batch = next(iter(make_loader(folder, num_workers=1))).batch
    assert all(isinstance(value, torch.Tensor) for value in batch.values())
    batch["labels"].fill_(IGNORE_INDEX)  # numpy warns of arrays that are not; warnings are errors


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_moves_no_global_generator(folder: Corpora, workers: int) -> None:
    before = (torch.get_rng_state(), str(np.random.get_state()))
    next(iter(make_loader(folder, num_workers=workers)))
    assert torch.equal(torch.get_rng_state(), before[0]) and str(np.random.get_state()) == before[1]


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_id_names_shard_and_sample(tmp_path: Path, workers: int) -> None:
    folder = write_shards(tmp_path, bad_sample=42)
    with pytest.raises(DataError, match=r"shard-000004.tar: sample 2 ") as caught:
        list(islice(make_loader(folder, num_workers=workers), SAMPLES))
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failing_collator_names_shard_and_sample(folder: Corpora, workers: int) -> None:
    collator = Plain("shard-000003/7", "raise")
    with pytest.raises(
        DataError, match=r"sample shard-000003/7: the collator Plain failed: ValueError: three"
    ) as caught:
        list(islice(make_loader(folder, collator, num_workers=workers), SAMPLES))
    assert "Traceback" not in str(caught.value)


def test_a_dead_worker_ends_the_stream_and_names_its_samples(folder: Corpora) -> None:
    collator = Plain("shard-000003/7", "die")
    started = time.monotonic()
    with pytest.raises(DataError, match=r"worker died at the samples .*shard-000003/7.*data.num_workers=0"):
        list(islice(make_loader(folder, collator, num_workers=2), SAMPLES))
    assert time.monotonic() - started < 30


def test_workers_leave_signals_to_the_training_process(folder: Corpora) -> None:
    loader = make_loader(folder, num_workers=2)
    batches = iter(loader)
    list(islice(batches, 2))  # one from each worker, so that both have told their process ids
    assert loader._steps.at_work is not None
    workers = [int(pid) for pid in loader._steps.at_work[:, 0]]
    assert min(workers) > 1
    reaped = signal.getsignal(signal.SIGCHLD)
    for pid in workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            # from another process, as a launcher or Slurm would
            assert os.spawnlp(os.P_WAIT, "sh", "sh", "-c", f"kill -{int(number)} {pid}") == 0
    assert len(list(islice(batches, 60))) == 60
    assert reaped is signal.getsignal(signal.SIGCHLD)
    del batches
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their loader"
        time.sleep(0.05)


_LEAVES_WORKERS_BEHIND = """
import sys
from sparselt_dist.data.loader import Loader
from sparselt_dist.data.corpora import open_folder

class Ones:
    def __call__(self, examples):
        import torch
        return {"labels": torch.ones(1)}

batches = iter(Loader(open_folder(sys.argv[1]), Ones(), seed=0, window=1, micro_batch_size=1, rank=0, world_size=1,
                      num_workers=2, start_position=0))
next(batches)
sys.exit(7)
"""


def test_leaving_the_process_with_live_workers_does_not_hang(folder: Corpora) -> None:
    command = [sys.executable, "-c", _LEAVES_WORKERS_BEHIND, folder.name]
    assert subprocess.run(command, timeout=120, check=False).returncode == 7


# ---------------------------------------------------------------- evaluation


def _evaluation(folder: Corpora, world: int, micro: int, max_samples: int) -> list[list[Batch]]:
    return [
        list(
            evaluation_batches(
                folder, COLLATOR, max_samples=max_samples, micro_batch_size=micro, rank=rank, world_size=world
            )
        )
        for rank in range(world)
    ]


@pytest.mark.parametrize(("world", "micro"), [(1, 4), (2, 4), (4, 2), (3, 5), (4, 16)])
def test_evaluation_covers_the_first_samples_once_on_equal_numbers_of_batches(
    folder: Corpora, world: int, micro: int
) -> None:
    ranks = _evaluation(folder, world, micro, max_samples=21)
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for together in zip(*ranks, strict=True) for batch in together]
    real = [batch for batch in batches if int(batch["num_tokens"])]
    whole = _evaluation(folder, 1, 21, max_samples=21)[0][0]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in real]), whole["input_ids"])
    assert torch.equal(torch.cat([batch["labels"] for batch in real]), whole["labels"])
    assert len(whole["labels"]) == 21
    for batch in batches:
        assert int(batch["num_targets"]) == int((batch["labels"] != IGNORE_INDEX).sum())


def test_evaluation_stops_at_the_end_of_the_folder(folder: Corpora) -> None:
    batches = _evaluation(folder, 1, 10, max_samples=10_000)[0]
    assert sum(len(batch["labels"]) for batch in batches) == SAMPLES


def test_loader_reads_a_pickled_folder(folder: Corpora) -> None:
    other = pickle.loads(pickle.dumps(folder))
    one, two = (next(iter(make_loader(each))).batch["input_ids"] for each in (folder, other))
    assert torch.equal(one, two)

"""A spike taken back: the run goes on without its data, and whoever continues it gets the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import Finished, run_ranks, slow

from sparselt_dist import checkpoint

pytestmark = pytest.mark.distributed

# So few sigmas, and so small a rate, that the ordinary losses of a model that hardly learns have spikes.
SPIKY = ("train.spike_sigmas=1.5", "train.on_spike=rewind", "train.spike_steps=2", "checkpoint.every_steps=16")
SETUP = (
    "schedule.name=constant",
    "schedule.warmup=0",
    "optim.peak_lr=1e-5",
    "train.global_batch_size=4",
    "checkpoint.keep=100",
)


def left_out(run: Finished) -> list[list[int]]:
    positions: list[list[int]] = json.loads((run.folder / "left_out.json").read_text())["positions"]
    return positions


def crashed(run: Finished, folder: Path, noted: bool) -> Path:
    """The run's folder as if it had died before its checkpoint at step 48, with or without the note on its spikes."""
    shutil.copytree(run.folder, folder)
    for step in (48, 64):
        shutil.rmtree(folder / "checkpoints" / checkpoint.folder_name(step))
    if not noted:
        (folder / "left_out.json").unlink()
    return folder


@pytest.mark.parametrize(("ranks", "zero"), [(1, 0), slow(2, 3), slow(2, 2)])
def test_a_rewind_is_repeated_by_a_resume(shards: Path, tmp_path: Path, ranks: int, zero: int) -> None:
    options = (*SPIKY, *SETUP, f"train.zero_stage={zero}")
    straight = run_ranks(ranks, shards, tmp_path / "straight", *options, "budget.max_steps=64")
    assert straight.code == 0, straight.output
    spans = left_out(straight)
    assert "sigmas above the median" in straight.output and "back to the last checkpoint" in straight.output
    assert [line["step"] for line in straight.journal] == list(range(1, 65))
    assert straight.journal[-1]["progress/left_out_samples"] == sum(end - begin for begin, end in spans) > 0
    # a digest says which samples a step had: none of a spike's was trained on
    assert len({line["batch_digest"] for line in straight.journal}) == 64
    for noted in (True, False):  # with the folder's note of what is left out, and from the checkpoint alone
        resumed = run_ranks(
            ranks, shards, crashed(straight, tmp_path / f"noted-{noted}", noted), *options, "budget.max_steps=64"
        )
        assert resumed.code == 0, resumed.output
        assert ("back to the last checkpoint" in resumed.output) != noted
        assert left_out(resumed) == spans
        assert [line["train/loss"] for line in resumed.journal] == [line["train/loss"] for line in straight.journal]
        ours, theirs = resumed.tensors(), straight.tensors()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # told to continue there in another folder, and with nothing saved in it yet, a spike leads back there again
    there = straight.folder / "checkpoints" / checkpoint.folder_name(32)
    rarely = ("checkpoint.every_steps=1000", "budget.max_steps=64")
    other = run_ranks(ranks, shards, tmp_path / "other", *options, *rarely, flags=("--resume", str(there)))
    assert other.code == 0 and "back to the last checkpoint" in other.output, other.output
    ours, theirs = other.tensors(), straight.tensors()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

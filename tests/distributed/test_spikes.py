"""A spike taken back: the run goes on without its data, and whoever continues it gets the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs import Finished, run_ranks, slow

pytestmark = pytest.mark.distributed

# So few sigmas that the tiny model's ordinary losses have spikes.
SPIKY = ("train.spike_sigmas=1.5", "train.on_spike=rewind", "train.spike_steps=2", "checkpoint.every_steps=16")
SETUP = ("schedule.name=constant", "train.global_batch_size=4", "checkpoint.keep=100")


def left_out(run: Finished) -> list[list[int]]:
    positions: list[list[int]] = json.loads((run.folder / "left_out.json").read_text())["positions"]
    return positions


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
    # stopped between a rewind and the next checkpoint, so that only the folder's note tells of the first spikes
    first = run_ranks(ranks, shards, tmp_path / "parts", *options, "budget.max_steps=48")
    second = run_ranks(ranks, shards, tmp_path / "parts", *options, "budget.max_steps=64")
    assert (first.code, second.code) == (0, 0), first.output + second.output
    assert left_out(second) == spans
    assert [line["batch_digest"] for line in second.journal] == [line["batch_digest"] for line in straight.journal]
    ours, theirs = second.tensors(), straight.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

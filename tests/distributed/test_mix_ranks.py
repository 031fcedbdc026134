"""Mixtures over ranks and ZeRO stages: parts with counts of their own, parts that rest, turns; and a resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from runs import Finished, run_ranks, slow

from sparselt_dist import checkpoint

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]

# The last part, which has parameters and counts of its own and shares statistics, rests for the second half.
SUM = (
    "objective.name=mix",
    "budget.max_steps=4",
    "objective.parts=[{name: mlm}, {name: mlm, weight: 0.5, mlm_probability: 0.3, masking: exact},"
    " {name: slt, weight: [[0, 1], [0.5, 1], [0.5, 0]], decoder_dropout: 0.0, decoder_layer_drop: 0.0}]",
)
# The model has a vocabulary head, which one of the parts uses.
TURNS = (
    "objective.name=mix",
    "budget.max_steps=4",
    "objective.sharing=alternate",
    "objective.parts=[{name: mlm, weight: 2.0}, {name: cwt, weight: 2.0, negatives: global}]",
)


def assert_equal_runs(ours: Finished, theirs: Finished) -> None:
    """The same samples, losses, terms and weights up to rounding."""
    assert ours.code == theirs.code == 0, ours.output + theirs.output
    assert len(ours.journal) == len(theirs.journal) == 4
    for mine, other in zip(ours.journal, theirs.journal, strict=True):
        assert mine["batch_digest"] == other["batch_digest"]
        assert mine["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=2e-5)
        terms = [name for name in other if name == "train/loss" or name.endswith("_loss") or name.endswith("/weight")]
        assert [mine.get(name) for name in terms] == pytest.approx([other[name] for name in terms], rel=5e-6)
    weights, expected = ours.weights(), theirs.weights()
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        if not name.endswith("key.bias"):  # its gradient is nothing but rounding
            torch.testing.assert_close(
                weights[name], weight, rtol=1e-4, atol=3e-5, msg=lambda text, name=name: name + text
            )


@pytest.fixture(scope="module")
def summed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One rank, one micro-batch a step."""
    return run_ranks(1, shards, tmp_path_factory.mktemp("summed"), *SUM, "train.micro_batch_size=8")


@pytest.mark.parametrize(("ranks", "micro_batch_size", "zero_stage"), [slow(1, 2, 0), slow(2, 2, 1), (2, 4, 3)])
def test_a_sum_of_parts_does_not_depend_on_the_split(
    shards: Path, tmp_path: Path, summed: Finished, ranks: int, micro_batch_size: int, zero_stage: int
) -> None:
    settings = (f"train.micro_batch_size={micro_batch_size}", f"train.zero_stage={zero_stage}")
    split = run_ranks(ranks, shards, tmp_path, *SUM, *settings)
    assert_equal_runs(split, summed)
    assert split.journal[-1]["eval/loss"] == pytest.approx(summed.journal[-1]["eval/loss"], rel=2e-6)
    assert ["mix/slt/mlm_loss" in line for line in split.journal] == [True, True, False, False]


def test_parts_in_turn_are_the_same_on_two_ranks(shards: Path, tmp_path: Path) -> None:
    one = run_ranks(1, shards, tmp_path / "one", *TURNS, "train.micro_batch_size=8")
    two = run_ranks(2, shards, tmp_path / "two", *TURNS, "train.micro_batch_size=4", "train.zero_stage=3")
    assert_equal_runs(two, one)
    assert ["mix/mlm/loss" in line for line in one.journal] == ["mix/cwt/loss" not in line for line in one.journal]
    assert 1 <= sum("mix/mlm/loss" in line for line in one.journal) <= 3


def test_a_resume_finds_the_weights_and_turns_of_its_step(shards: Path, tmp_path: Path) -> None:
    settings = (*TURNS, "checkpoint.every_steps=1", "checkpoint.keep=9")
    whole = run_ranks(1, shards, tmp_path / "whole", *settings)
    folder = tmp_path / "resumed"
    shutil.copytree(whole.folder, folder)
    for later in (2, 3, 4):
        shutil.rmtree(folder / "checkpoints" / checkpoint.folder_name(later))
    resumed = run_ranks(1, shards, folder, *settings, flags=("--resume", "must"))
    assert resumed.code == 0 and "at step 1" in resumed.output, resumed.output
    expected = whole.tensors()
    assert [name for name, value in resumed.tensors().items() if not torch.equal(value, expected[name])] == []

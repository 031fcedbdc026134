"""N steps = N/2, stop, N/2: bitwise in every ZeRO stage; and a checkpoint continues on other stages and rank numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import Finished, run_ranks, slow

from sparselt_dist import checkpoint

pytestmark = pytest.mark.distributed

RUN = (
    "budget.max_steps=6",
    "checkpoint.every_steps=3",
    "train.micro_batch_size=2",
    "model.config.hidden_dropout_prob=0.1",
)


def half_of(run: Finished, folder: Path) -> Path:
    """A run folder as it was after step 3, with the journal of all six steps still in it, as after a crash."""
    shutil.copytree(run.folder, folder)
    shutil.rmtree(folder / "checkpoints" / checkpoint.folder_name(6))
    return folder


def assert_same(ours: Finished, theirs: Finished) -> None:
    assert ours.code == 0, ours.output
    for mine, other in zip(ours.journal, theirs.journal, strict=True):
        for key in ("step", "train/loss", "train/lr", "train/grad_norm", "batch_digest", "progress/tokens"):
            assert mine[key] == other[key], (mine["step"], key)
    assert ours.journal[-1]["eval/loss"] == theirs.journal[-1]["eval/loss"]
    tensors, expected = ours.tensors(), theirs.tensors()
    assert tensors.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(tensors[name], value)] == []


@pytest.mark.parametrize("zero_stage", [slow(0), slow(1), slow(2), 3])
def test_resume_is_bitwise(shards: Path, tmp_path: Path, zero_stage: int) -> None:
    stage = f"train.zero_stage={zero_stage}"
    straight = run_ranks(2, shards, tmp_path / "straight", *RUN, stage)
    assert straight.code == 0, straight.output
    resumed = run_ranks(2, shards, half_of(straight, tmp_path / "resumed"), *RUN, stage, flags=("--resume", "must"))
    assert "at step 3" in resumed.output
    assert_same(resumed, straight)


def test_what_the_steps_of_a_budget_ended_goes_on_with_more_of_them(shards: Path, tmp_path: Path) -> None:
    folder, hour = tmp_path / "run", "budget.max_hours=1"
    assert run_ranks(1, shards, folder, "budget.max_steps=2", hour).summary["steps"] == 2
    more = run_ranks(1, shards, folder, "budget.max_steps=4", hour)
    assert (more.code, more.summary["steps"]) == (0, 4), more.output


def test_a_requeued_job_begins_again_where_it_was_told_to(shards: Path, tmp_path: Path) -> None:
    first = run_ranks(1, shards, tmp_path / "first", "budget.max_steps=2")
    requeued = ("--resume", str(first.folder), "--resume", "auto")  # as slurm/pretrain.sh adds it
    other = run_ranks(1, shards, tmp_path / "other", "budget.max_steps=3", flags=requeued)
    assert other.code == 0 and f"continuing from {first.folder}" in other.output and "at step 2" in other.output
    again = run_ranks(1, shards, tmp_path / "other", "budget.max_steps=4", flags=requeued)
    assert again.code == 0 and f"continuing from {other.folder}" in again.output and "at step 3" in again.output


@pytest.mark.parametrize("precision", [slow("fp32"), "bf16"])
def test_resume_is_bitwise_with_muon(shards: Path, tmp_path: Path, precision: str) -> None:
    options = (*RUN, "optim.name=muon", f"train.precision={precision}")
    straight = run_ranks(1, shards, tmp_path / "straight", *options)
    assert straight.code == 0, straight.output
    assert any(
        name.endswith("qkv.weight#momentum_buffer") and value.any() for name, value in straight.tensors().items()
    )
    resumed = run_ranks(1, shards, half_of(straight, tmp_path / "resumed"), *options, flags=("--resume", "must"))
    assert_same(resumed, straight)


def test_batches_that_follow_the_budget_resume_bitwise_and_do_not_depend_on_the_split(
    shards: Path, tmp_path: Path
) -> None:
    schedules = ("objective.mlm_probability=[[0,0.4],[0.9,0.1]]", "objective.row_lengths=[[0,8],[0.6,32]]")
    options = (*RUN[:3], *schedules)
    straight = run_ranks(2, shards, tmp_path / "straight", *options, "data.num_workers=1")
    assert straight.code == 0, straight.output
    resumed = run_ranks(2, shards, half_of(straight, tmp_path / "resumed"), *options, flags=("--resume", "must"))
    assert_same(resumed, straight)
    alone = run_ranks(1, shards, tmp_path / "alone", *options, "train.micro_batch_size=8")
    losses = [line["train/loss"] for line in straight.journal]
    assert [line["train/loss"] for line in alone.journal] == pytest.approx(losses, rel=2e-6)


@pytest.mark.slow  # test_objectives_matrix.py always has a case of it
def test_continues_on_another_stage_and_number_of_ranks(shards: Path, tmp_path: Path) -> None:
    plain = RUN[:3]  # dropout is drawn by each rank for itself, so it is left out here
    straight = run_ranks(2, shards, tmp_path / "straight", *plain, "train.zero_stage=1")
    source = straight.folder / "checkpoints" / checkpoint.folder_name(3)
    other = run_ranks(1, shards, tmp_path / "other", *plain, "train.zero_stage=3", flags=("--resume", str(source)))
    assert other.code == 0, other.output
    assert [line["step"] for line in other.journal] == [4, 5, 6]
    for mine, theirs in zip(other.journal, straight.journal[3:], strict=True):
        assert mine["batch_digest"] == theirs["batch_digest"]
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=2e-6)


def test_weights_and_moments_pass_unchanged_through_every_stage_and_number_of_ranks(
    shards: Path, tmp_path: Path
) -> None:
    """Nothing is trained after the first start: each other one loads, and saves in its own way."""
    in_turns = tmp_path / "in_turns.json"
    in_turns.write_text(json.dumps({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}))
    ways = [(3, "train.zero_stage=1"), (2, "train.zero_stage=0"), (3, f"train.deepspeed_config={in_turns}")]
    ways += [(2, "train.zero_stage=3"), (1, "train.zero_stage=1")]
    source, expected = "", dict[str, torch.Tensor]()
    for number, (ranks, way) in enumerate(ways):
        plain = ("budget.max_steps=2", "train.global_batch_size=12", "train.micro_batch_size=2", way)
        flags = ("--resume", source) if source else ()
        run = run_ranks(ranks, shards, tmp_path / str(number), *plain, flags=flags, fault="0,0,0,small-shares")
        assert run.code == 0, run.output
        tensors, source = run.tensors(), str(run.folder)
        expected = expected or tensors
        assert tensors.keys() == expected.keys()
        assert [name for name, value in expected.items() if not torch.equal(tensors[name], value)] == [], way
        newest = checkpoint.find(run.folder)
        for kind in ("weights", "moments"):
            assert len(list(newest.glob(f"{kind}-*"))) == ranks


@pytest.mark.slow
def test_one_run_on_one_then_four_then_two_ranks_draws_what_one_rank_draws(shards: Path, tmp_path: Path) -> None:
    plain = ("checkpoint.every_steps=2", "train.micro_batch_size=1", "data.num_workers=1")
    straight = run_ranks(1, shards, tmp_path / "straight", *plain, "budget.max_steps=6")
    for ranks, steps in ((1, 2), (4, 4), (2, 6)):
        elastic = run_ranks(ranks, shards, tmp_path / "elastic", *plain, f"budget.max_steps={steps}")
        assert elastic.code == 0, elastic.output
    assert [line["step"] for line in elastic.journal] == [1, 2, 3, 4, 5, 6]
    digests = [line["batch_digest"] for line in elastic.journal]
    assert digests == [line["batch_digest"] for line in straight.journal]


def test_a_damaged_checkpoint_is_passed_over(shards: Path, tmp_path: Path) -> None:
    straight = run_ranks(1, shards, tmp_path / "straight", *RUN)
    lost = straight.journal[-1]["time/repeated_seconds"]
    damaged = straight.folder / "checkpoints" / checkpoint.folder_name(6) / "weights-00000.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    again = run_ranks(1, shards, straight.folder, *RUN)
    assert "was changed after it was saved" in again.output and "at step 3" in again.output
    assert again.code == 0, again.output
    checkpoint.verify(damaged.parent)  # written anew; the damaged one is kept beside it
    (aside,) = damaged.parent.parent.glob("step_00000006.aside-*")
    assert (aside / damaged.name).read_bytes() == bytes(content)
    assert [line["step"] for line in again.journal] == [1, 2, 3, 4, 5, 6]
    assert lost == 0 < again.journal[-1]["time/repeated_seconds"]  # steps 4 to 6 were made twice


def test_a_finished_run_stays_finished_and_another_model_is_refused(shards: Path, tmp_path: Path) -> None:
    first = run_ranks(1, shards, tmp_path / "run", *RUN)
    journal = [line["train/loss"] for line in first.journal]
    again = run_ranks(1, shards, tmp_path / "run", *RUN)
    assert again.code == 0, again.output
    assert [line["train/loss"] for line in again.journal] == journal
    other = run_ranks(1, shards, tmp_path / "run", *RUN, "model.config.intermediate_size=128")
    assert other.code == 2
    assert "belongs to another model" in other.output and "Traceback" not in other.output

"""Contrastive weight tying over ranks: negatives of the micro-batch or of all ranks, ZeRO stages, recovery, resume."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import Finished, free_port, rank_environment, run_ranks, slow

from sparselt_dist import checkpoint

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]

CWT = ("objective.name=cwt", "budget.max_steps=4")
RECOVERY = (
    "objective.recover_from=0.5",
    "objective.recovered_table=copy",
    "checkpoint.every_steps=1",
    "checkpoint.keep=9",
)


def assert_equal_runs(ours: Finished, theirs: Finished, *, loss_within: float = 2e-6) -> None:
    """The same samples, losses and weights up to rounding."""
    assert ours.code == theirs.code == 0, ours.output + theirs.output
    assert len(ours.journal) == len(theirs.journal)
    for mine, other in zip(ours.journal, theirs.journal, strict=True):
        assert mine["batch_digest"] == other["batch_digest"]
        assert mine["train/loss"] == pytest.approx(other["train/loss"], rel=loss_within)
        assert mine["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=2e-5)
    weights, expected = ours.weights(), theirs.weights()
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=3e-5)


@pytest.fixture(scope="module")
def local_reference(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One rank, two micro-batches of 4 a step."""
    return run_ranks(1, shards, tmp_path_factory.mktemp("local"), *CWT, "train.micro_batch_size=4")


@pytest.fixture(scope="module")
def global_reference(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One rank, one micro-batch of 8 a step."""
    return run_ranks(1, shards, tmp_path_factory.mktemp("global"), *CWT, "train.micro_batch_size=8")


@pytest.mark.parametrize("zero_stage", [slow(0), slow(2), 3])
def test_local_negatives_at_a_fixed_micro_batch(
    shards: Path, tmp_path: Path, local_reference: Finished, zero_stage: int
) -> None:
    stage = f"train.zero_stage={zero_stage}"
    split = run_ranks(2, shards, tmp_path, *CWT, "train.micro_batch_size=4", stage)
    assert_equal_runs(split, local_reference)
    assert split.journal[-1]["eval/loss"] == pytest.approx(local_reference.journal[-1]["eval/loss"], rel=2e-6)


def test_local_negatives_are_not_global_ones(local_reference: Finished, global_reference: Finished) -> None:
    ours, theirs = local_reference.journal, global_reference.journal
    assert ours[0]["batch_digest"] == theirs[0]["batch_digest"]
    assert ours[0]["cwt/targets"] == pytest.approx(theirs[0]["cwt/targets"] / 2)
    assert theirs[0]["train/loss"] - ours[0]["train/loss"] == pytest.approx(0.693, abs=0.1)  # log 2


@pytest.mark.parametrize(("ranks", "zero_stage"), [slow(2, 0), slow(4, 1), (2, 3)])
def test_global_negatives_over_ranks_equal_one_rank(
    shards: Path, tmp_path: Path, global_reference: Finished, ranks: int, zero_stage: int
) -> None:
    micro = f"train.micro_batch_size={8 // ranks}"
    stage = f"train.zero_stage={zero_stage}"
    split = run_ranks(ranks, shards, tmp_path, *CWT, micro, stage, "objective.negatives=global")
    assert_equal_runs(split, global_reference)


@pytest.mark.parametrize("objective", [slow("mlm"), slow("cwt")])
def test_chunked_cross_entropy_under_zero_3(shards: Path, tmp_path: Path, objective: str) -> None:
    settings = [f"objective.name={objective}", "budget.max_steps=3"]
    settings += ["objective.cross_entropy_weight=0.5", "objective.negatives=global"] if objective == "cwt" else []
    full = run_ranks(1, shards, tmp_path / "full", *settings, "train.micro_batch_size=8")
    chunked = run_ranks(
        *(2, shards, tmp_path / "chunked", *settings),
        *("train.micro_batch_size=4", "train.zero_stage=3", "objective.cross_entropy=chunked"),
    )
    assert_equal_runs(chunked, full)


@pytest.mark.parametrize(("zero_stage", "resume_from"), [slow(1, 1), (3, 3)])
def test_recovery_is_the_same_on_two_ranks_and_after_a_resume(
    shards: Path, tmp_path: Path, zero_stage: int, resume_from: int
) -> None:
    """The head takes over after step 2: a resume before and one after it."""
    settings = (*CWT, *RECOVERY, "train.micro_batch_size=4")
    single = run_ranks(1, shards, tmp_path / "single", *settings)
    stage = f"train.zero_stage={zero_stage}"
    double = run_ranks(2, shards, tmp_path / "double", *settings, stage)
    assert_equal_runs(double, single)
    losses = [("cwt/cross_entropy" in line, "cwt/contrastive" in line) for line in double.journal]
    assert losses == [(False, True), (False, True), (True, False), (True, False)]
    folder = tmp_path / "resumed"
    shutil.copytree(double.folder, folder)
    for later in range(resume_from + 1, 5):
        shutil.rmtree(folder / "checkpoints" / checkpoint.folder_name(later))
    resumed = run_ranks(2, shards, folder, *settings, stage, flags=("--resume", "must"))
    assert resumed.code == 0 and f"at step {resume_from}" in resumed.output, resumed.output
    tensors, expected = resumed.tensors(), double.tensors()
    assert [name for name, value in expected.items() if not torch.equal(tensors[name], value)] == []
    assert resumed.journal[-1]["train/loss"] == double.journal[-1]["train/loss"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_of_ragged_ranks_add_up_in_float64(ranks: int) -> None:
    script = Path(__file__).with_name("cwt_rank.py")
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env=rank_environment(rank, ranks, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(outputs)

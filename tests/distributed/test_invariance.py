"""Numbers do not depend on how the work is split: ranks, accumulation, ZeRO stage, micro-batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import Finished, run_ranks, slow

pytestmark = pytest.mark.distributed

STEPS = "budget.max_steps=5"


@pytest.fixture(scope="module")
def reference(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    run = run_ranks(1, shards, tmp_path_factory.mktemp("reference"), STEPS, "train.micro_batch_size=8")
    assert run.code == 0, run.output
    return run


@pytest.mark.parametrize(
    ("ranks", "micro_batch_size", "zero_stage"),
    [slow(1, 2, 0), slow(2, 1, 0), slow(2, 4, 1), (2, 2, 3), (4, 1, 2)],
)
def test_same_losses_weights_and_samples(
    shards: Path, tmp_path: Path, reference: Finished, ranks: int, micro_batch_size: int, zero_stage: int
) -> None:
    split = run_ranks(
        ranks, shards, tmp_path, STEPS, f"train.micro_batch_size={micro_batch_size}", f"train.zero_stage={zero_stage}"
    )
    assert split.code == 0, split.output
    assert len(split.journal) == len(reference.journal) == 5
    for ours, theirs in zip(split.journal, reference.journal, strict=True):
        assert ours["batch_digest"] == theirs["batch_digest"]
        assert ours["progress/tokens"] == theirs["progress/tokens"]
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=2e-6)
        assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=1e-5)
    assert split.journal[-1]["eval/loss"] == pytest.approx(reference.journal[-1]["eval/loss"], rel=2e-6)
    ours, theirs = split.weights(), reference.weights()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        # Adam divides by the root of a squared gradient, which lifts rounding where gradients are near zero.
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("ranks", "zero_stage"), [slow(1, 0), slow(1, 1), (2, 2), slow(2, 3)])
def test_the_gradient_is_clipped_before_the_update(shards: Path, tmp_path: Path, ranks: int, zero_stage: int) -> None:
    """After one step Adam's first moment is (1 - beta1) times the gradient that it was given."""
    moments, norms = [], []
    for name, limit in (("free", "null"), ("clipped", "0.05")):
        settings = ("budget.max_steps=1", f"train.zero_stage={zero_stage}", f"optim.clip_norm={limit}")
        run = run_ranks(ranks, shards, tmp_path / name, *settings)
        assert run.code == 0, run.output
        moments.append({key: value for key, value in run.tensors().items() if key.endswith("exp_avg")})
        norms.append(run.journal[0]["train/grad_norm"])
    free, clipped = moments
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 0.5, "the norm said is that before clipping"
    for name, moment in free.items():
        torch.testing.assert_close(clipped[name], moment * (0.05 / norms[0]), rtol=1e-4, atol=1e-9)
    given = torch.stack([value.norm() for value in clipped.values()]).norm() / (1 - 0.9)
    assert float(given) == pytest.approx(0.05, rel=1e-3)


def test_half_precision_agrees_within_its_rounding(shards: Path, tmp_path: Path, reference: Finished) -> None:
    half = run_ranks(2, shards, tmp_path, STEPS, "train.precision=bf16", "train.zero_stage=2")
    assert half.code == 0, half.output
    losses = [line["train/loss"] for line in half.journal]
    assert losses == pytest.approx([line["train/loss"] for line in reference.journal], rel=2e-2)


def test_another_seed_gives_another_run(shards: Path, tmp_path: Path, reference: Finished) -> None:
    other = run_ranks(1, shards, tmp_path, STEPS, "run.seed=1")
    assert other.journal[0]["batch_digest"] != reference.journal[0]["batch_digest"]
    assert other.journal[-1]["train/loss"] != reference.journal[-1]["train/loss"]


def test_muon_agrees_within_the_rounding_of_its_iteration(shards: Path, tmp_path: Path) -> None:
    """Its matrices are made orthogonal in bfloat16, which lifts the last bits of a gradient's sum."""
    runs = [
        run_ranks(ranks, shards, tmp_path / str(ranks), STEPS, f"train.micro_batch_size={micro}", "optim.name=muon")
        for ranks, micro in ((1, 8), (2, 2))
    ]
    assert [run.code for run in runs] == [0, 0], runs[-1].output
    whole, split = ([line["train/loss"] for line in run.journal] for run in runs)
    assert split == pytest.approx(whole, rel=1e-4)
    assert whole[-1] < whole[0]

"""A budget in hours: schedule and batch ramp follow the clock, the run ends at the deadline, a stop does not stretch it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from runs import run_ranks

pytestmark = pytest.mark.distributed

SECONDS = 8.0
RECIPE = (
    f"budget.max_hours={SECONDS / 3600}",
    "schedule.name=budget-triangle2",
    "train.global_batch_size=32",
    "train.micro_batch_size=2",
    "train.batch_ramp_end=0.6",
    "train.precision=bf16",
    "objective.mlm_probability=0.25",
    "objective.masking=exact",
    "objective.exempt_special=false",
    "data.shuffle_window=0",
)


def test_the_crammed_recipe_ends_at_its_deadline_on_all_ranks(shards: Path, tmp_path: Path) -> None:
    run = run_ranks(2, shards, tmp_path / "run", *RECIPE)
    assert run.code == 0, run.output
    lines = run.journal
    last = lines[-1]
    assert 0.8 * SECONDS < last["budget/elapsed_seconds"] <= 1.05 * SECONDS  # with the last save and evaluation
    assert run.summary["seconds"] == last["budget/elapsed_seconds"] and "eval/loss" in last
    rates = [line["train/lr"] for line in lines]
    peak = max(rates)
    assert rates[0] == pytest.approx(0.25 * 3e-3, rel=0.2)
    assert rates[-1] < 0.2 * peak and rates.index(peak) > len(rates) // 3
    tokens = [later["progress/tokens"] - line["progress/tokens"] for line, later in itertools.pairwise(lines)]
    ramp = tokens[: tokens.index(32 * 32) + 1]
    assert lines[0]["progress/tokens"] == 4 * 32 and max(tokens) == 32 * 32 and ramp == sorted(ramp)
    assert tokens[-1] < 32 * 32, "the last step is cut to fit"
    assert run.summary["steps"] == last["step"]
    ledger = sum(value for key, value in last.items() if key.startswith("time/"))
    assert ledger > last["budget/elapsed_seconds"]

    again = run_ranks(2, shards, tmp_path / "run", *RECIPE)  # the clock is in the checkpoint: nothing is left to spend
    assert again.code == 0, again.output
    assert again.summary["steps"] == last["step"]

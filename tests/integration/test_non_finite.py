"""A run whose loss is no number any more: it stops before the update and says where."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from runs import run_ranks, slow


@pytest.mark.parametrize("objective", ["cwt", slow("mlm"), slow("slt")])
def test_the_run_stops_at_its_step_with_code_1_and_its_samples(shards: Path, tmp_path: Path, objective: str) -> None:
    run = run_ranks(
        1,
        shards,
        tmp_path,
        f"objective.name={objective}",
        *("budget.max_steps=8", "optim.peak_lr=1e30", "optim.clip_norm=1e9", "schedule.name=constant"),
    )
    assert run.code == 1, run.output
    found = re.search(r"step (\d+): the loss on rank 0 is not finite; its samples are (\S+)", run.output)
    assert found and "No update was made" in run.output
    steps = [line["step"] for line in run.journal]
    assert 0 < len(steps) < 8 and steps[-1] <= int(found[1])
    assert all(line["train/loss"] is not None for line in run.journal)
    assert run.summary["status"] == "failed"

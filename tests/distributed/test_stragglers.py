"""A rank that is slower than the others is named while the run goes on, and stands in its summary."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from runs import run_ranks

# Two looks, at 5 and 15 seconds, must find the same rank slow.
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_a_slow_rank_is_named_with_its_times(shards: Path, tmp_path: Path) -> None:
    run = run_ranks(2, shards, tmp_path / "run", "budget.max_steps=1000", fault="1,0,1000,slow")
    assert run.code == 0, run.output
    assert (
        len(
            re.findall(
                r"rank 1 is slow: \d+\.\d+ s of own work a step \(data .*, forward .*\); by rank 0: ", run.output
            )
        )
        == 1
    )
    assert "rank 0 is slow" not in run.output
    assert run.summary["slowest_rank"] == 1
    first, second = run.summary["rank_step_seconds"]
    assert second > first + 0.015  # of the 0.02 s that it sleeps

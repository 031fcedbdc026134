"""One process: the search of the micro-batch leaves no trace, a profile is written, a short budget lands, the ledger adds up."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from runs import run_ranks
from warm_rank import TIMED_MARK


def test_the_search_leaves_no_trace_and_its_choice_is_kept(shards: Path, tmp_path: Path) -> None:
    dropout = ("model.config.hidden_dropout_prob=0.1", "schedule.name=constant")
    searched = run_ranks(1, shards, tmp_path / "a", *dropout, "train.micro_batch_size=fastest", "budget.max_steps=2")
    assert searched.code == 0, searched.output
    size = yaml.safe_load((searched.folder / "config.resolved.yaml").read_text())["train"]["micro_batch_size"]
    assert 8 % size == 0 and re.search(rf"\n +{size} .*<- taken", searched.output)
    on = run_ranks(1, shards, tmp_path / "a", *dropout, "train.micro_batch_size=fastest", "budget.max_steps=4")
    assert on.code == 0 and "<- taken" not in on.output, on.output
    given = run_ranks(1, shards, tmp_path / "b", *dropout, f"train.micro_batch_size={size}", "budget.max_steps=4")
    for key in ("train/loss", "train/grad_norm", "batch_digest"):
        assert [line[key] for line in on.journal] == [line[key] for line in given.journal]


def test_a_profile_and_a_ledger_that_adds_up(shards: Path, tmp_path: Path) -> None:
    run = run_ranks(
        1,
        shards,
        tmp_path,
        *("budget.max_steps=9", "train.profile=4", "checkpoint.every_steps=5", "log.device_watts=100"),
        *("train.give_up_loss=0.01", "train.give_up_hours=1e-9", "log.expected_loss=[[0, 1.0, 0.01], [1, 1.0, 0.01]]"),
        "log.every_steps=9",
        "log.batch_digest=false",
    )
    assert run.code == 0, run.output
    table = (tmp_path / "profile" / "steps.txt").read_text()
    assert "steps 4 to 7" in table
    shares = dict(re.findall(r"^(\w+(?: wait)?) +[\d.]+ +([\d.]+) %", table.split("\n\n")[1], re.MULTILINE))
    assert {"forward", "backward", "optimizer", "data wait", "communication", "log", "checkpoint"} <= set(shares)
    assert sum(map(float, shares.values())) == pytest.approx(100, abs=1)
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    assert any("mm" in event.get("name", "") for event in events)
    last = run.journal[-1]
    ledger = sum(value for key, value in last.items() if key.startswith("time/"))
    assert run.summary["energy_kwh"] == pytest.approx(100 * ledger / 3.6e6, rel=0.1)
    assert run.output.count("sigma above") == 1 and last["expected/sigmas"] > 3
    assert "above train.give_up_loss (0.01): the run ends here" in run.output and run.summary["gave_up"]


def test_the_ledger_is_the_wall_clock_of_the_command(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TIMED_MARK, "1")
    run = run_ranks(1, shards, tmp_path, "budget.max_hours=0.001", "checkpoint.every_steps=40", "log.every_steps=10")
    assert run.code == 0, run.output
    outside = float(re.search(r"the command took ([\d.]+) s", run.output)[1])
    told, phases = re.search(r"\n  time +([\d.]+) s: (.*)", run.output).groups()
    assert float(told) == pytest.approx(outside, rel=0.01)
    assert sum(map(int, re.findall(r"(\d+) %", phases))) == pytest.approx(100, abs=3)
    logged = sum(value for key, value in run.journal[-1].items() if key.startswith("time/"))
    assert logged == pytest.approx(outside, rel=0.01)


def test_a_budget_shorter_than_a_step_ends_with_code_0_and_says_that_it_was_late(shards: Path, tmp_path: Path) -> None:
    run = run_ranks(1, shards, tmp_path, "budget.max_hours=1e-6", "schedule.name=budget-triangle2")
    assert run.code == 0, run.output
    assert run.summary["steps"] == 1 and run.summary["seconds"] > 0.0036
    assert "ended" in run.output and "after the budget" in run.output
    assert run.journal[-1]["train/lr"] > 0, "the one step is taken at the start of the schedule"


def test_a_dry_run_goes_through_everything_and_leaves_nothing(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = run_ranks(1, shards, folder, "budget.max_hours=1", "checkpoint.every_steps=1", flags=("--dry-run",))
    assert run.code == 0, run.output
    assert "dry run: two steps, evaluation, checkpoint and export went through" in run.output
    assert "finished after 2 steps" in run.output
    assert list(tmp_path.iterdir()) == []

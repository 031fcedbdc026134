"""The worked example of an objective of one's own in real runs: found by its entry point, alone and in a mixture."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from runs import run_ranks

RTD = ("objective.name=rtd", "objective.generator_width=16", "objective.mlm_probability=0.3")


@pytest.fixture(autouse=True)
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example as an installed distribution, as far as Python looks for one."""
    info = tmp_path / "site" / "rtd_objective-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rtd-objective\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[sparselt_dist.objectives]\nrtd = rtd_plugin:RTD\n")
    tests = Path(__file__).parents[1]
    paths = [str(info.parent), str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def test_it_learns_and_does_not_depend_on_the_split(shards: Path, tmp_path: Path) -> None:
    steps = "budget.max_steps=60"
    whole = run_ranks(1, shards, tmp_path / "whole", *RTD, steps, "train.micro_batch_size=8")
    assert whole.code == 0, whole.output
    first, last = whole.journal[0], whole.journal[-1]
    for term in ("rtd/generator_loss", "rtd/discriminator_loss"):
        early, late = (sum(line[term] for line in lines) / 10 for lines in (whole.journal[:10], whole.journal[-10:]))
        assert late < early - 0.1
    assert 0.15 < first["rtd/replaced_share"] < 0.35
    assert last["eval/loss"] == pytest.approx(
        last["eval/generator_loss"] + 50 * last["eval/discriminator_loss"], rel=1e-5
    )
    assert any("generator" in name for name in whole.weights())  # the second model is saved with the first
    split = run_ranks(1, shards, tmp_path / "split", *RTD, "budget.max_steps=3", "train.micro_batch_size=2")
    losses = [line["train/loss"] for line in split.journal]
    assert split.journal[0]["rtd/replaced_share"] == pytest.approx(first["rtd/replaced_share"], abs=1e-9)
    assert losses[0] == pytest.approx(first["train/loss"], rel=2e-6)


def test_it_is_a_part_of_a_mixture_like_any_other(shards: Path, tmp_path: Path) -> None:
    parts = "objective.parts=[{name: mlm}, {name: rtd, weight: 0.02, generator_width: 16}]"
    run = run_ranks(1, shards, tmp_path / "mix", "objective.name=mix", parts, "budget.max_steps=2")
    assert run.code == 0, run.output
    for line in run.journal:
        terms = line["mix/mlm/loss"] + 0.02 * line["mix/rtd/generator_loss"] + line["mix/rtd/discriminator_loss"]
        assert line["train/loss"] == pytest.approx(terms, rel=1e-5)
        assert line["mix/rtd/weight"] == pytest.approx(0.02)

"""`train.compile` in real runs: a compiler that changes results is refused before the first step; a real one is on the clock."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import pretrain_arguments, run_ranks

# What `python -m sparselt_dist.pretrain` does, but for the compiler: it scales what the body gives.
WRONGLY_COMPILED = """
import sys, torch
from sparselt_dist import cli, pretrain

def backend(graph, inputs):
    return lambda *given: [FACTOR * graph(*given)[0]]

compiled = torch.nn.Module.compile
torch.nn.Module.compile = lambda module: compiled(module, backend=backend)
sys.exit(pretrain.main(sys.argv[1:]))
"""


def run_compiled_by(factor: float, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WRONGLY_COMPILED.replace("FACTOR", str(factor)), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.mark.slow
def test_a_compiler_that_changes_results_ends_the_run_before_its_first_step(shards: Path, tmp_path: Path) -> None:
    arguments = pretrain_arguments(shards, tmp_path, "train.compile=true", "budget.max_steps=2")
    done = run_compiled_by(1.2, arguments)
    output = done.stdout + done.stderr
    assert done.returncode == 2 and "Traceback" not in output, output
    assert "error: train.compile: compiled and eager passes disagree on the first micro-batch (8 rows, fp32)" in output
    assert not list((tmp_path / "checkpoints").glob("step_*")) and not (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "zero_stage"), [(1, 0), (1, 1), (2, 2), (2, 3)])
def test_a_compiled_run_is_the_eager_one(shards: Path, tmp_path: Path, ranks: int, zero_stage: int) -> None:
    options = ("budget.max_steps=4", f"train.zero_stage={zero_stage}", "train.micro_batch_size=4")
    eager = run_ranks(ranks, shards, tmp_path / "eager", *options)
    run = run_ranks(ranks, shards, tmp_path / "compiled", *options, "train.compile=true", timeout=500)
    assert run.code == 0, run.output
    assert "compiled equals eager on the first micro-batch (4 rows, fp32)" in run.output
    assert ("gradients" in run.output) == (zero_stage < 3)
    for mine, theirs in zip(run.journal, eager.journal, strict=True):
        assert mine["batch_digest"] == theirs["batch_digest"]
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-5)


@pytest.mark.slow
def test_a_budget_shorter_than_compilation_takes_one_step(shards: Path, tmp_path: Path) -> None:
    run = run_ranks(
        1, shards, tmp_path, "train.compile=true", "train.precision=bf16", "budget.max_hours=1e-4", timeout=500
    )
    assert run.code == 0, run.output
    assert run.summary["steps"] == 1
    assert "after the budget of 0.4 s; a first step (compilation included)" in run.output
    compiling = run.journal[-1]["time/compile_seconds"]
    assert 0.4 < compiling < run.summary["seconds"] < 1.5 * compiling + 5

"""A loss or gradient that is no number on one rank: all ranks alike make no update, and do what the user wants then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import run_ranks, slow
from safetensors import safe_open

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("zero", "kind"),
    [(0, "gradient"), (2, "loss"), slow(0, "loss"), slow(2, "gradient"), slow(3, "loss"), slow(1, "gradient")],
)
def test_a_skipped_step_leaves_no_trace_in_the_weights(shards: Path, tmp_path: Path, zero: int, kind: str) -> None:
    options = (f"train.zero_stage={zero}", "budget.max_steps=4", "train.on_non_finite=skip", "schedule.name=constant")
    run = run_ranks(2, shards, tmp_path / "run", *options, fault=f"1,2,1,nan-{kind}")
    assert run.code == 0, run.output
    assert run.output.count(f"step 3: the {kind} on rank 1 is not finite; its samples are") == 1, run.output
    assert run.output.count("the run goes on with the next step") == 1
    assert [line.get("progress/discarded_steps") for line in run.journal] == [None, None, 1, 1]
    assert "train/loss" not in run.journal[2] or kind == "gradient"
    (kept,) = (run.folder / "bad_batches").iterdir()
    with safe_open(kept, framework="pt") as file:
        about = file.metadata()
        assert (about["step"], about["rank"], about["not_finite"]) == ("3", "1", kind)
        assert len(about["samples"].split()) == 4 and file.get_tensor("0/input_ids").shape[0] == 4
    assert all(bool(torch.isfinite(tensor).all()) for tensor in run.tensors().values())


@pytest.mark.parametrize("zero", [2, slow(0), slow(3)])
def test_too_many_in_a_row_end_the_run_with_one_message_and_code_1(shards: Path, tmp_path: Path, zero: int) -> None:
    options = (f"train.zero_stage={zero}", "budget.max_steps=8", "train.on_non_finite=skip")
    run = run_ranks(2, shards, tmp_path / "run", *options, "train.max_discarded_steps=2", fault="0,1,9,nan-loss")
    assert run.codes == (1, 1), run.output
    assert "Traceback" not in run.output
    assert run.output.count("error: step 4: the loss on rank 0 is not finite") == 1 and "3 steps in a row" in run.output
    assert [line["step"] for line in run.journal] == [1, 2, 3] and run.summary["status"] == "failed"

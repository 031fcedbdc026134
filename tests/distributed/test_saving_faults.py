"""Real runs whose saving meets kills and full disks: only the save under way is lost, and the run lives on."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest
from runs import run_ranks, slow
from save_kills import EVERY, finish, options, same, start_and_kill
from small_disk import fill, small_disk

from sparselt_dist import checkpoint

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("zero_stage", [slow(0), slow(1), 2, slow(3)])
def test_kills_while_saving_lose_only_the_save_under_way(shards: Path, tmp_path: Path, zero_stage: int) -> None:
    overrides, generator = options(zero_stage, steps=6 * EVERY), random.Random(zero_stage)
    kills = [
        start_and_kill(shards, tmp_path / "killed", overrides, generator) for _ in range(1 if zero_stage == 2 else 4)
    ]
    assert kills[0] is not None
    ended = finish(shards, tmp_path / "killed", overrides)
    if zero_stage != 2:
        assert same(ended, run_ranks(2, shards, tmp_path / "undisturbed", *overrides))


def _fill_for_a_while(folder: Path, forever: bool) -> None:
    """From the first checkpoint on the disk is full, for a second or for good."""
    while not checkpoint.complete_checkpoints(folder):
        time.sleep(0.005)
    fill(folder.parent / "filler")
    if not forever:
        time.sleep(1.0)
        (folder.parent / "filler").unlink()


@pytest.mark.parametrize(("forever", "steps"), [slow(False, 200), (True, 30)])
def test_a_full_disk_stops_no_run_but_the_last_save_must_be(
    shards: Path, tmp_path: Path, forever: bool, steps: int
) -> None:
    with small_disk(tmp_path / "disk", 16) as disk:
        folder = disk / "run"
        filler = threading.Thread(target=_fill_for_a_while, args=(folder, forever), daemon=True)
        filler.start()
        options = (f"budget.max_steps={steps}", "checkpoint.every_steps=2", "schedule.name=constant")
        run = run_ranks(2, shards, folder, *options)
        filler.join()
        assert "cannot be written" in run.output and "Traceback" not in run.output, run.output
        newest = checkpoint.newest_intact(folder, pytest.fail)
        assert newest is not None
        if forever:
            assert run.codes == (2, 2), run.output
            return
        assert run.code == 0, run.output
        assert checkpoint.step_of(newest) == steps
        assert [line["step"] for line in run.journal] == list(range(1, steps + 1))
        told = [line for line in run.journal if "checkpoint/error" in line]
        assert "No space left" in told[0]["checkpoint/error"] and told[-1]["checkpoint/failures"] >= 1

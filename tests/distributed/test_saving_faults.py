"""Real runs whose saving meets kills and full disks: only the save under way is lost, and the run lives on."""

from __future__ import annotations

import random
import threading
import time
import uuid
from pathlib import Path

import pytest
from runs import run_ranks, slow
from s3_server import S3Server
from save_kills import EVERY, finish, options, same, start_and_kill
from small_disk import fill, small_disk

from sparselt_dist import checkpoint

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("zero_stage", "asynchronous"),
    [slow(0, True), slow(0, False), slow(1, True), (2, True), slow(3, True), slow(3, False)],
)
def test_kills_while_saving_lose_only_the_save_under_way(
    shards: Path, tmp_path: Path, zero_stage: int, asynchronous: bool
) -> None:
    overrides = options(zero_stage, steps=6 * EVERY, asynchronous=asynchronous)
    generator = random.Random(zero_stage)
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


def test_a_disk_that_takes_no_checkpoint_is_told_before_the_first_step(shards: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 8) as disk:
        run = run_ranks(1, shards, disk / "run", "budget.max_steps=2", "model.config.hidden_size=512")
        assert run.code == 2 and "Traceback" not in run.output, run.output
        assert "are free at" in run.output and "a checkpoint takes" in run.output
        assert run.journal == []


@pytest.mark.parametrize("asynchronous", ["true", slow("false")])
def test_a_run_saves_from_a_scratch_disk_and_copies_to_object_storage(
    shards: Path, tmp_path: Path, s3_process: S3Server, monkeypatch: pytest.MonkeyPatch, asynchronous: str
) -> None:
    for name, value in {**s3_process.environment(), "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    client, bucket = s3_process.client(), f"sparselt-run-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=bucket)
    scratch = tmp_path / "scratch"
    run = run_ranks(
        2,
        shards,
        tmp_path / "run",
        *("budget.max_steps=5", "checkpoint.every_steps=1", "checkpoint.keep=1", "checkpoint.keep_every_steps=2"),
        *(f"checkpoint.scratch_dir={scratch}", f"checkpoint.upload=s3://{bucket}/runs"),
        f"checkpoint.asynchronous={asynchronous}",
    )
    assert run.code == 0, run.output
    kept = [checkpoint.step_of(path) for path in checkpoint.complete_checkpoints(run.folder)]
    assert {2, 4, 5} <= set(kept), kept  # others may have waited for their copy
    assert list(scratch.iterdir()) == []
    newest = checkpoint.find(run.folder)
    stored = client.get_object(Bucket=bucket, Key=f"runs/{newest.name}/COMPLETE")["Body"].read()
    assert stored == (newest / "COMPLETE").read_bytes()
    assert all(line["perf/checkpoint_stall_seconds"] > 0 for line in run.journal[1:])

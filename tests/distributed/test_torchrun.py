"""`torchrun` starts the same run as any other launcher, and its SIGTERM leaves a checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from runs import Finished, free_port, pretrain_arguments, run_ranks

from sparselt_dist import checkpoint

pytestmark = pytest.mark.distributed

# Nothing that depends on where the budget ends.
SETTINGS = ("train.micro_batch_size=2", "schedule.name=constant", "schedule.warmup=0", "train.hang_minutes=null")


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a launcher and all that it has started; each rank has a session of its own."""
    family = [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
    for member in family:
        member.kill()
    process.wait(timeout=30)


def stopped_by_sigterm(shards: Path, folder: Path) -> Finished:
    """Two ranks of `torchrun`, told to stop when they have journalled three steps."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    command += [
        "-m",
        "sparselt_dist.pretrain",
        *pretrain_arguments(shards, folder, "budget.max_steps=100000", *SETTINGS),
    ]
    journal, written = folder / "metrics.jsonl", folder.parent / "output"
    deadline = time.monotonic() + 240
    with written.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
                assert process.poll() is None and time.monotonic() < deadline, written.read_text()
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=120)
        finally:
            end(process)
    return Finished(code, written.read_text(), folder)


def test_torchrun_gives_the_same_run_and_a_stop_leaves_its_checkpoint(shards: Path, tmp_path: Path) -> None:
    """One start for both: training takes seconds less than starting."""
    run = stopped_by_sigterm(shards, tmp_path / "torchrun")
    steps = len(run.journal)
    assert run.code == 1, run.output  # torchrun's own, whatever its ranks say
    assert (run.summary["status"], run.summary["steps"], run.summary["world_size"]) == ("stopped", steps, 2), run.output
    newest = checkpoint.find_intact(run.folder)
    assert checkpoint.read_meta(newest)["step"] == steps

    other = run_ranks(2, shards, tmp_path / "other", f"budget.max_steps={steps}", *SETTINGS)
    assert other.code == 0, other.output
    for key in ("step", "batch_digest", "train/loss"):
        assert [line[key] for line in run.journal] == [line[key] for line in other.journal]
    ours, theirs = run.tensors(), other.tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

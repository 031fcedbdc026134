"""A stop signal, wherever it arrives, ends in a committed checkpoint, exit code 75, and no process left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from runs import Finished, pretrain_arguments, run_ranks, slow

from sparselt_dist import checkpoint

pytestmark = pytest.mark.distributed

LONG = ("budget.max_steps=100000", "train.micro_batch_size=2", "schedule.name=constant")
LAUNCH = "from sparselt_dist.launch import main; import sys; sys.exit(main())"


@contextmanager
def started(shards: Path, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The `deepspeed` command with two ranks, once it has journalled a step."""
    command = [sys.executable, "-c", LAUNCH, "--num_gpus", "2", "-m", "sparselt_dist.pretrain"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder.parent / "output").open("w") as output:
        process = subprocess.Popen(
            [*command, *pretrain_arguments(shards, folder, *LONG)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 240
        while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
            assert process.poll() is None, (folder.parent / "output").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        family = psutil.Process(process.pid).children(recursive=True)
        yield process
    finally:
        left = [member for member in family if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]
        for member in [*left, process]:
            member.kill()
    assert left == []


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if any(part.startswith("--local_rank=") for part in child.cmdline())]


def assert_stopped_and_committed(code: int, folder: Path) -> None:
    output = (folder.parent / "output").read_text()
    assert code == 75, output
    run = Finished(code, output, folder)
    assert run.summary["status"] == "stopped"
    newest = checkpoint.find(folder)
    assert checkpoint.read_meta(newest)["step"] == run.summary["steps"] == run.journal[-1]["step"]
    checkpoint.verify(newest)


@pytest.mark.parametrize(("target", "number"), [("one rank", signal.SIGUSR1), slow("node launcher", signal.SIGTERM)])
def test_stop_is_committed_and_says_75(shards: Path, tmp_path: Path, target: str, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    with started(shards, folder) as process:
        rank_1 = ranks_of(process)[1]
        told = rank_1 if target == "one rank" else rank_1.parent()
        told.send_signal(number)
        code = process.wait(timeout=120)
    assert_stopped_and_committed(code, folder)


def test_the_command_stops_and_meanwhile_no_second_process_trains_in_its_folder(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with started(shards, folder) as process:
        second = run_ranks(1, shards, folder, *LONG)
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=120)
    assert_stopped_and_committed(code, folder)
    assert second.code == 2 and "another process trains in" in second.output
    steps = [line["step"] for line in second.journal]
    assert steps == list(range(1, len(steps) + 1))


def test_a_stop_breaks_off_the_preparation_of_shards(shards: Path, tmp_path: Path) -> None:
    run = run_ranks(2, shards, tmp_path / "run", "data.train=null", "data.validation=null", fault="0,0,0,stop")
    assert run.codes == (75, 75), run.output
    assert "stopped while the shards were prepared" in run.output


def test_a_stop_after_the_budget_leaves_the_rest_to_the_next_start(shards: Path, tmp_path: Path) -> None:
    options = ("budget.max_steps=3", "train.yardsticks=true")
    stopped = run_ranks(2, shards, tmp_path / "run", *options, fault="0,0,0,late-stop")
    assert stopped.codes == (75, 75) and stopped.summary["status"] == "stopped", stopped.output
    assert "stopped after the budget was spent" in stopped.output and not (stopped.folder / "model").exists()
    again = run_ranks(2, shards, stopped.folder, *options)
    assert (again.code, again.summary["status"]) == (0, "finished"), again.output
    assert [line["step"] for line in again.journal] == [1, 2, 3] and (again.folder / "model").exists()
    assert "yardstick/masked_ce" in again.journal[-1]

"""A rank that is killed or stopped, a launcher that is killed: the job ends, with one message, and leaves no process."""

from __future__ import annotations

import contextlib
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
from runs import free_port, pretrain_arguments, rank_environment, run_ranks
from warm_rank import start_rank

pytestmark = pytest.mark.distributed

LONG = ("budget.max_steps=1000000", "schedule.name=constant", "log.batch_digest=false", "checkpoint.every_steps=20")


@contextmanager
def ranks_at_work(shards: Path, folder: Path, *overrides: str) -> Iterator[list[psutil.Process]]:
    """Two ranks, once they have saved; none is left at the end."""
    arguments, port = pretrain_arguments(shards, folder, *LONG, *overrides), free_port()
    started = [
        start_rank(arguments, rank_environment(rank, 2, port), folder.parent / f"out{rank}", fresh=False)
        for rank in range(2)
    ]
    processes = [psutil.Process(process.pid) for process in started]
    try:
        wait_until(lambda: list((folder / "checkpoints").glob("step_*/COMPLETE")), 200)
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for waited in started:
            waited.join()


def wait_until(is_so: object, seconds: float) -> float:
    begun = time.monotonic()
    while not is_so():  # type: ignore[operator]
        assert time.monotonic() - begun < seconds
        time.sleep(0.05)
    return time.monotonic() - begun


def outputs(folder: Path) -> str:
    return "".join((folder.parent / f"out{rank}").read_text() for rank in range(2))


def is_over(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_is_noticed_at_once_and_named_once(shards: Path, tmp_path: Path, victim: int) -> None:
    folder = tmp_path / "run"
    with ranks_at_work(shards, folder) as processes:
        family = [child for process in processes for child in process.children(recursive=True)]
        processes[victim].kill()
        wait_until(lambda: is_over(processes[1 - victim]), 30)
        wait_until(lambda: all(map(is_over, family)), 30)
    said = outputs(folder)
    assert said.count(f"error: rank {victim} ") == 1 and "died, last seen at step" in said, said
    assert "Traceback" not in said and said.count("error:") == 1, said


def test_the_error_of_one_rank_alone_ends_the_others_with_a_message(shards: Path, tmp_path: Path) -> None:
    run = run_ranks(2, shards, tmp_path / "run", "budget.max_steps=6", fault="1,2,1,error")
    assert run.codes == (1, 2), run.output
    assert run.output.count("error: a row that only this rank has seen") == 1, run.output
    assert run.output.count("ended with an error of its own, which it has said") == 1, run.output
    assert "Traceback" not in run.output, run.output


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named_with_its_phase_and_killed(shards: Path, tmp_path: Path, victim: int) -> None:
    folder = tmp_path / "run"
    with ranks_at_work(shards, folder, "train.hang_minutes=0.05") as processes:
        processes[victim].suspend()
        wait_until(lambda: all(map(is_over, processes)), 60)
    said = outputs(folder)
    assert said.count("error: the run hangs: nothing got on for 0.05 minutes (train.hang_minutes)") == 1, said
    assert f"behind: rank {victim} on " in said and "stopped by a signal" in said
    assert f"waits:  rank {1 - victim} on " in said and "Traceback" not in said
    traces = (folder / "hang" / f"rank_{1 - victim:05d}.txt").read_text()
    assert "trainer.py" in traces


@pytest.mark.slow
def test_ranks_stop_when_their_launcher_is_killed(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", "from sparselt_dist.launch import main; import sys; sys.exit(main())"]
    command += ["--num_gpus", "2", "-m", "sparselt_dist.pretrain", *pretrain_arguments(shards, folder, *LONG)]
    with (tmp_path / "output").open("w") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    family: list[psutil.Process] = []
    try:
        wait_until(lambda: list((folder / "checkpoints").glob("step_*/COMPLETE")), 200)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_until(lambda: all(map(is_over, family)), 60)
    finally:
        process.kill()
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    assert '"status": "stopped"' in (folder / "summary.json").read_text(), (tmp_path / "output").read_text()

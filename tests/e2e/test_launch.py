"""The `deepspeed` command with DeepSpeed's real launcher: signals reach every rank, exit codes return, nothing is left.

The program launched mimics a rank of `pretrain` without importing torch: handlers that set a flag, 75 when stopped.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from main_job import journal_steps, main_job_arguments, summary
from runs import slow

REPOSITORY = Path(__file__).parents[2]

RANK_PROGRAM = """
import json, os, signal, sys, time
from sparselt_dist import rank_report
from sparselt_dist.extensions import prepare_environment

seen = []
for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
    signal.signal(getattr(signal, name), lambda number, frame: seen.append(signal.Signals(number).name))
reporting = "--silent" not in sys.argv
prepare_environment()
if reporting:
    rank_report.announce()
rank = int(os.environ["RANK"])
note = {"pid": os.getpid(), "argv": sys.argv[1:], "launch": os.getppid(),
        "env": {k: os.environ.get(k) for k in ("WORLD_SIZE", "OMP_NUM_THREADS", "DS_ACCELERATOR", "MASTER_PORT")}}
def save():
    with open(f"note_{rank}.tmp", "w") as file:
        json.dump(note | {"signals": seen}, file)
    os.replace(f"note_{rank}.tmp", f"note_{rank}.json")
save()
codes = {int(k): int(v) for k, v in (word.split("=") for word in sys.argv[1:] if word[0].isdigit())}
deadline = time.monotonic() + (0 if codes else 120)
while not seen and time.monotonic() < deadline:
    time.sleep(0.05)
time.sleep(0.3 + 0.2 * rank)  # ranks never end at the same moment
code = codes.get(rank, 0) if codes else 75 if seen else 99
save()
if reporting:
    rank_report.record_exit(code)
sys.exit(code)
"""


@dataclass
class Launch:
    """One running `deepspeed` command in its own folder and process group."""

    process: subprocess.Popen[str]
    folder: Path

    def note(self, rank: int) -> dict[str, object]:
        """What the rank wrote about itself; waits until it has."""
        path = self.folder / f"note_{rank}.json"
        wait_until(path.exists, f"rank {rank} has started")
        return dict(json.loads(path.read_text()))

    def end(self) -> int:
        """Exit code, after checking that no process of this launch is left."""
        code = self.process.wait(timeout=120)
        assert self.leftovers() == []
        return code

    def leftovers(self) -> list[psutil.Process]:
        """Processes that work in this launch's folder."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(self.folder):
                    found.append(process)
            except psutil.Error:
                continue
        return found


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain until {what}"
        time.sleep(0.05)


Start = Callable[..., Launch]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    (tmp_path / "rank_program.py").write_text(RANK_PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "RANK")}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    launches: list[Launch] = []

    def _start(*arguments: str, **extra: str) -> Launch:
        command = [sys.executable, "-m", "sparselt_dist.launch", *arguments]
        process = subprocess.Popen(command, cwd=tmp_path, env=environment | extra, text=True, start_new_session=True)
        launches.append(Launch(process, tmp_path))
        return launches[-1]

    yield _start
    for launch in launches:
        for process in launch.leftovers():
            process.kill()
        launch.process.wait(timeout=30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, slow(signal.SIGUSR1)])
def test_a_signal_to_the_command_reaches_every_rank_and_75_returns(start: Start, number: signal.Signals) -> None:
    launch = start("--num_gpus", "2", "-m", "rank_program")
    pids = {launch.note(rank)["pid"] for rank in (0, 1)}
    assert len(pids) == 2
    launch.process.send_signal(number)
    assert launch.end() == 75
    # Each rank was told itself; DeepSpeed's own SIGTERM to the slower rank may follow.
    assert [launch.note(rank)["signals"][0] for rank in (0, 1)] == [number.name] * 2  # type: ignore[index]


def test_a_signal_before_the_ranks_exist_is_kept_for_them(start: Start) -> None:
    launch = start("--num_gpus", "2", "-m", "rank_program")
    wait_until(lambda: len(psutil.Process(launch.process.pid).children()) > 0, "the runner has started")
    launch.process.send_signal(signal.SIGUSR1)
    assert launch.end() == 75
    assert all("SIGUSR1" in launch.note(rank)["signals"] for rank in (0, 1))  # type: ignore[operator]


@pytest.mark.parametrize("number", [slow(signal.SIGTERM), signal.SIGUSR1])
def test_a_signal_to_the_ranks_process_group_gives_75(start: Start, number: signal.Signals) -> None:
    launch = start("--num_gpus", "2", "-m", "rank_program")
    pid = int(str(launch.note(0)["pid"]))
    launch.note(1)
    os.killpg(os.getpgid(pid), number)
    assert launch.end() == 75


def test_a_killed_node_launcher_stops_the_ranks_and_gives_75(start: Start) -> None:
    launch = start("--num_gpus", "2", "-m", "rank_program")
    launch.note(1)
    os.kill(int(str(launch.note(0)["launch"])), signal.SIGKILL)
    assert launch.end() == 75
    assert [launch.note(rank)["signals"] for rank in (0, 1)] == [["SIGTERM"]] * 2


def test_a_killed_rank_is_a_failure(start: Start) -> None:
    launch = start("--num_gpus", "2", "-m", "rank_program")
    launch.note(0)
    os.kill(int(str(launch.note(1)["pid"])), signal.SIGKILL)
    assert launch.end() not in (0, 75)


@pytest.mark.parametrize("ranks", [slow(1), 8])
def test_any_number_of_cpu_ranks_starts(start: Start, ranks: int) -> None:
    launch = start(f"--num_gpus={ranks}", "--module", "rank_program", "0=0", "--flag", "-m", DS_ACCELERATOR="cpu")
    assert launch.end() == 0
    notes = [launch.note(rank) for rank in range(ranks)]
    cores = len(os.sched_getaffinity(0))
    for rank, note in enumerate(notes):
        assert note["argv"] == [f"--local_rank={rank}", "0=0", "--flag", "-m"]
        assert note["env"]["WORLD_SIZE"] == str(ranks)  # type: ignore[index]
        assert 1 <= int(note["env"]["OMP_NUM_THREADS"]) <= max(1, cores // ranks)  # type: ignore[index]
    assert not (launch.folder / f"note_{ranks}.json").exists()


def test_the_first_failing_ranks_code_returns_though_the_others_are_then_stopped(start: Start) -> None:
    assert start("--num_gpus", "2", "-m", "rank_program", "0=2", "1=75").end() == 2


def test_a_script_that_reports_nothing_keeps_the_stock_exit_code(start: Start) -> None:
    assert start("--num_gpus", "2", "rank_program.py", "0=0", "1=7", "--silent").end() == 7


def test_the_main_job_stops_on_request_and_continues(start: Start, tmp_path: Path) -> None:
    """Ctrl-C saves and gives 75; the same command again finishes, each step once in the journal."""
    steps = 150
    command = ["--num_gpus", "2", "-m", "sparselt_dist.pretrain", *main_job_arguments(tmp_path, steps)]
    first = start(*command, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    wait_until(lambda: len(journal_steps(tmp_path)) >= 3, "three steps are trained", seconds=240)
    first.process.send_signal(signal.SIGINT)
    assert first.end() == 75
    stopped_at = journal_steps(tmp_path)[-1]
    assert (tmp_path / "run" / "checkpoints" / f"step_{stopped_at:08d}" / "COMPLETE").exists()
    assert summary(tmp_path)["status"] == "stopped"
    assert stopped_at < steps
    assert start(*command, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1").end() == 0
    assert journal_steps(tmp_path) == list(range(1, steps + 1))


def test_a_configuration_error_gives_2_and_one_message(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    assert start("--num_gpus", "2", "-m", "sparselt_dist.pretrain", "train.global_batch_sise=8").end() == 2
    shown = capfd.readouterr()
    assert (shown.out + shown.err).count("error: ") == 1
    assert "global_batch_size" in shown.err

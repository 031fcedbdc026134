"""`slurm/pretrain.sh` with stand-ins for srun, scontrol and python: what it starts, and what it makes of an exit code.

The same script against a real Slurm is tested in tests/cluster.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "slurm" / "pretrain.sh"

SRUN = """#!/bin/bash
printf '%s\\n' "$@" > srun.arguments
env > srun.environment
trap 'echo USR1 >> srun.signals; exit ${ON_USR1:-75}' USR1
trap 'echo TERM >> srun.signals; exit 143' TERM # it kills the ranks
for _ in $(seq ${STEP_TICKS:-0}); do sleep 0.1; done
exit ${STEP_CODE:-0}
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
"show hostnames") printf 'node7\\nnode8\\n' ;;
"show node") echo "   NodeAddr=10.1.2.3 NodeHostName=$3 Version=22.05" ;;
"show job") echo "   JobState=${JOB_STATE:-RUNNING} Reason=None" ;;
requeue*) echo "$@" >> scontrol.requeued; exit ${REQUEUE_CODE:-0} ;;
*) exit 1 ;;
esac
"""


@dataclass
class Job:
    """A job script that runs, or has run, in its folder."""

    process: subprocess.Popen[str]
    folder: Path

    def end(self) -> int:
        return self.process.wait(timeout=30)

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def environment(self, name: str) -> str | None:
        return dict(line.split("=", 1) for line in self.lines("srun.environment") if "=" in line).get(name)


def run_job(folder: Path, *arguments: str, job_id: str = "123", **environment: str) -> Job:
    for name, text in (
        ("srun", SRUN),
        ("scontrol", SCONTROL),
        ("python", "#!/bin/sh\n"),
        ("getent", "#!/bin/sh\nexit 2\n"),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    base = {"SLURM_JOB_ID": job_id, "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2"}
    env = base | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"} | environment
    process = subprocess.Popen(["bash", str(SCRIPT), *arguments], cwd=folder, env=env, text=True)
    return Job(process, folder)


def send(job: Job, number: signal.Signals) -> None:
    """Send a signal once the step runs."""
    deadline = time.monotonic() + 20
    while not (job.folder / "srun.environment").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    job.process.send_signal(number)


def test_arguments_go_to_pretrain_as_they_stand(tmp_path: Path) -> None:
    job = run_job(tmp_path, "--config", "my own.yaml", "run.name=a b", "--resume", "must")
    assert job.end() == 0
    arguments = job.lines("srun.arguments")
    program = arguments.index(str(tmp_path / "python"))
    assert arguments[program + 1 :] == [
        "-m", "sparselt_dist.pretrain", "--config", "my own.yaml", "run.name=a b", "--resume", "must",
    ]  # fmt: skip
    assert not [word for word in arguments[:program] if word.startswith("--ntasks")]  # the job's own tasks
    assert job.environment("MASTER_ADDR") == "10.1.2.3"  # the name does not resolve
    assert job.environment("MASTER_PORT") == "20123"


@pytest.mark.parametrize(("tasks", "overcommit"), [("16", False), ("2", True), (None, True)])
def test_one_process_starts_for_each_gpu(tmp_path: Path, tasks: str | None, overcommit: bool) -> None:
    asked = {} if tasks is None else {"SLURM_NTASKS": tasks}
    job = run_job(tmp_path, SLURM_GPUS_ON_NODE="8", SLURM_CPUS_PER_TASK="4", **asked)
    assert job.end() == 0
    arguments = job.lines("srun.arguments")
    assert "--ntasks=16" in arguments
    assert "--ntasks-per-node=8" in arguments
    assert ("--overcommit" in arguments) is overcommit
    assert job.environment("SRUN_CPUS_PER_TASK") == "4"


def test_options_of_the_jobs_tasks_are_kept_from_one_task_a_gpu(tmp_path: Path) -> None:
    job = run_job(tmp_path, SLURM_GPUS_ON_NODE="8", SLURM_GPUS="16", SLURM_GPUS_PER_TASK="8", SLURM_NTASKS="2")
    assert job.end() == 0 and "--ntasks=16" in job.lines("srun.arguments")
    assert job.environment("SLURM_GPUS_PER_TASK") is None


def test_places_left_by_another_launcher_do_not_reach_the_ranks(tmp_path: Path) -> None:
    left = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "gone", "MASTER_PORT": "1"}
    job = run_job(tmp_path, **left)
    assert job.end() == 0
    assert [job.environment(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == [None] * 3
    assert (job.environment("MASTER_ADDR"), job.environment("MASTER_PORT")) == ("10.1.2.3", "20123")


@pytest.mark.parametrize("env_code", ["125", "0"])
def test_a_container_with_an_old_env_starts_without_the_hold(tmp_path: Path, env_code: str) -> None:
    """The command that each task runs, where `env` does or does not know --block-signal."""
    job = run_job(tmp_path, "run.name=a b", CONTAINER="--container-image=old")
    assert job.end() == 0
    arguments = job.lines("srun.arguments")
    command = arguments[arguments.index("sh") :]
    programs = tmp_path / "image"
    programs.mkdir()
    for name, text in (
        ("env", f'#!/bin/sh\n[ {env_code} = 0 ] || exit {env_code}\n[ "$2" = true ] || echo held\nshift\nexec "$@"\n'),
        ("python", '#!/bin/sh\necho "$@"\n'),
    ):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    shown = subprocess.run(
        command, env={"PATH": f"{programs}:{os.defpath}"}, capture_output=True, text=True, check=True
    ).stdout
    assert shown == ("held\n" if env_code == "0" else "") + "-m sparselt_dist.pretrain run.name=a b\n"


def sweep(folder: Path, text: str, task: int, *arguments: str) -> Job:
    return run_job(folder, *arguments, SWEEP=text, SLURM_ARRAY_JOB_ID="120", SLURM_ARRAY_TASK_ID=str(task))


@pytest.mark.parametrize(("task", "label"), [(0, "0.1-_1_12_"), (1, "0.1-_11_2_")])
def test_combinations_that_differ_in_signs_have_folders_of_their_own(tmp_path: Path, task: int, label: str) -> None:
    job = sweep(tmp_path, "optim.peak_lr=0.1; data.mixture=[1,12]|[11,2]", task, "--config", "with_a_folder.yaml")
    assert job.end() == 0
    assert job.lines("srun.arguments")[-2:] == [f"run.name=sweep-{label}", f"run.output_dir=runs/sweep-{label}"]


def test_a_folder_that_was_given_is_that_of_no_two_tasks(tmp_path: Path) -> None:
    job = sweep(tmp_path, "run.seed=1|2", 1, "run.name=both", "run.output_dir=/scratch/both/")
    assert job.end() == 0
    assert job.lines("srun.arguments")[-3:] == ["run.seed=2", "run.name=both-2", "run.output_dir=/scratch/both-2"]


@pytest.mark.parametrize("text", ["objective.name=a+b|a/b", "run.seed=1|1", "a=x|x-y; b=y-z|z"])
@pytest.mark.parametrize("task", [0, 3])
def test_combinations_of_one_folder_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str, task: int
) -> None:
    job = sweep(tmp_path, text, task)
    assert job.end() == 2 and not job.lines("srun.arguments")
    message = capfd.readouterr().err
    assert message.count("error: ") == 1 and "would share a folder" in message


def test_gpus_that_lie_unevenly_are_refused(tmp_path: Path) -> None:
    job = run_job(tmp_path, SLURM_GPUS_ON_NODE="8", SLURM_GPUS="a100:12")
    assert job.end() != 0 and not job.lines("srun.arguments")


def test_a_port_in_use_is_passed_over(tmp_path: Path) -> None:
    with socket.socket() as server:
        job_id = next(number for number in range(5000, 9000) if can_bind(server, 20000 + number))
        server.listen()
        job = run_job(tmp_path, job_id=str(job_id))
        assert job.end() == 0
    assert job.environment("MASTER_PORT") == str(20000 + (job_id + 3571) % 10000)


def can_bind(server: socket.socket, port: int) -> bool:
    try:
        server.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True


def test_code_75_requeues_the_same_job(tmp_path: Path) -> None:
    job = run_job(tmp_path, STEP_CODE="75")
    assert job.end() == 0
    assert job.lines("scontrol.requeued") == ["requeue 123"]


def test_an_array_task_keeps_its_index(tmp_path: Path) -> None:
    job = run_job(tmp_path, STEP_CODE="75", SLURM_ARRAY_JOB_ID="120", SLURM_ARRAY_TASK_ID="3")
    assert job.end() == 0
    assert job.lines("scontrol.requeued") == ["requeue 120_3"]


@pytest.mark.parametrize("code", [1, 2, 137])
def test_other_codes_are_the_jobs(tmp_path: Path, code: int) -> None:
    job = run_job(tmp_path, STEP_CODE=str(code))
    assert job.end() == code
    assert job.lines("scontrol.requeued") == []


def test_a_job_that_cannot_be_requeued_ends_with_75(tmp_path: Path) -> None:
    assert run_job(tmp_path, STEP_CODE="75", REQUEUE_CODE="1").end() == 75


@pytest.mark.parametrize("notice", [signal.SIGUSR1, signal.SIGTERM])
def test_a_notice_to_the_shell_alone_reaches_the_ranks(tmp_path: Path, notice: signal.Signals) -> None:
    job = run_job(tmp_path, STEP_TICKS="100", STEP_CODE="9")
    send(job, notice)
    assert job.end() == 0
    assert job.lines("srun.signals") == ["USR1"]
    assert job.lines("scontrol.requeued") == ["requeue 123"]


def test_a_notice_does_not_hide_the_exit_code(tmp_path: Path) -> None:
    job = run_job(tmp_path, STEP_TICKS="100", ON_USR1="2")
    send(job, signal.SIGUSR1)
    assert job.end() == 2


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED"])
def test_a_cancelled_job_is_not_brought_back(tmp_path: Path, state: str) -> None:
    job = run_job(tmp_path, STEP_TICKS="100", JOB_STATE=state)
    send(job, signal.SIGTERM)
    assert job.end() == 75
    assert job.lines("srun.signals") == ["USR1"]
    assert job.lines("scontrol.requeued") == []


def test_outside_of_slurm_it_says_how_to_start_it(tmp_path: Path) -> None:
    result = subprocess.run(["bash", str(SCRIPT)], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert result.returncode != 0
    assert "sbatch" in result.stderr

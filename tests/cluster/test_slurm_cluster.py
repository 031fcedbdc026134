"""`sbatch slurm/pretrain.sh` on a real Slurm of two nodes that the tests start on this machine.

The first tests replace the trainer by a small program, so that they show the script's part alone: where ranks start,
that a notice becomes a checkpoint, a requeue and a continuation. The last one trains.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from main_job import journal_steps, main_job_arguments, summary
from slurm_cluster import FINAL_STATES, SlurmCluster, missing_programs, slurm_cluster

from sparselt_dist import checkpoint
from sparselt_dist.data.manifest import file_sha256

REPOSITORY = Path(__file__).parents[2]
SCRIPT = str(REPOSITORY / "slurm" / "pretrain.sh")

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(missing_programs()), reason=f"needs Slurm and munge; missing: {missing_programs()}"),
]

# Mimics `python -m sparselt_dist.pretrain`: a stop signal leaves a checkpoint and 75; with a checkpoint it finishes.
TRAINER = """\
import os, signal, socket, sys, time
from pathlib import Path
if "--tasks" in sys.argv:  # evaluate
    print(*sys.argv[1:])
    sys.exit(4)
rank = os.environ["SLURM_PROCID"]
Path(f"began_{rank}").touch()
time.sleep(3 if "late" in sys.argv else 0)  # before the handlers
stop = []
for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
    signal.signal(getattr(signal, name), lambda number, frame: stop.append(signal.Signals(number).name))
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
names = "SLURM_STEP_NUM_TASKS SLURM_LOCALID SLURM_NODEID SLURM_CPUS_ON_NODE MASTER_ADDR MASTER_PORT".split()
print("rank", rank, *(f"{name}={os.environ[name]}" for name in names), *sys.argv[1:], flush=True)
if "hold" in sys.argv:
    print(*sys.argv[2:], "inside" if "INSIDE" in os.environ else "", flush=True)
    with socket.create_server(("", int(os.environ["MASTER_PORT"]))):
        time.sleep(4)
    sys.exit(0)
code = next((int(word[5:]) for word in sys.argv if word.startswith("code=")), None)
if code is not None:
    sys.exit(code)
checkpoint = Path(f"checkpoint_{rank}")
if checkpoint.exists():
    sys.exit(0)
Path(f"started_{rank}").touch()
deadline = time.monotonic() + 200
while not stop and time.monotonic() < deadline:
    time.sleep(0.1)
time.sleep(0.5 + int(rank))  # ranks never end at the same moment
checkpoint.write_text(" ".join(stop))
sys.exit(75 if stop else 9)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    """A `python` on PATH that runs TRAINER whatever module it is asked for."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "trainer.py").write_text(TRAINER)
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {tmp_path / "trainer.py"} "$@"\n')
    python.chmod(0o755)
    return {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}


def wait_for(paths: list[Path], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {paths}"
        time.sleep(0.1)


def wait_until_trained(folder: Path, steps: int, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while len(journal_steps(folder)) < steps:
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {steps} steps"
        time.sleep(0.1)


def output(folder: Path, job: str) -> str:
    return (folder / f"slurm-{job}.out").read_text()


def test_ranks_start_on_both_nodes_and_meet(cluster: SlurmCluster, stand_in: dict[str, str], tmp_path: Path) -> None:
    arguments = ["--nodes=2", "--ntasks-per-node=2", SCRIPT, "code=0", "run.name=two words"]
    job = cluster.submit(*arguments, cwd=tmp_path, env=stand_in)
    assert cluster.wait(job, 60)["JobState"] == "COMPLETED"
    lines = ranks_of(output(tmp_path, job))
    assert len(lines) == 4
    for rank, line in enumerate(lines):
        assert f"{rank}: rank {rank} SLURM_STEP_NUM_TASKS=4 SLURM_LOCALID={rank % 2} SLURM_NODEID={rank // 2} " in line
        assert f"MASTER_ADDR=127.0.0.1 MASTER_PORT={20000 + int(job)} code=0 run.name=two words" in line


def ranks_of(shown: str) -> list[str]:
    """What each rank of the stand-in printed, in order."""
    return sorted(line for line in shown.splitlines() if ": rank" in line)


@pytest.mark.parametrize(("asked", "cores"), [([], 1), (["--cpus-per-gpu=1"], 2), (["--exclusive"], 2)])
def test_one_rank_starts_for_each_gpu(
    cluster: SlurmCluster, stand_in: dict[str, str], tmp_path: Path, asked: list[str], cores: int
) -> None:
    job = cluster.submit("--nodes=2", "--gpus-per-node=2", *asked, SCRIPT, "code=0", cwd=tmp_path, env=stand_in)
    assert cluster.wait(job, 60)["JobState"] == "COMPLETED", output(tmp_path, job)
    places = [re.findall(r"SLURM_STEP_NUM_TASKS=4 SLURM_LOCALID=(\d) SLURM_NODEID=(\d) SLURM_CPUS_ON_NODE=(\d)", line)
              for line in ranks_of(output(tmp_path, job))]  # fmt: skip
    assert places == [[(local, node, str(cores))] for node in "01" for local in "01"]


def test_a_sweep_gives_each_task_its_combination_and_its_port(
    cluster: SlurmCluster, stand_in: dict[str, str], tmp_path: Path
) -> None:
    """Two tasks at once on each node: they hold their ports while the others choose theirs."""
    sweep = {"SWEEP": "objective.name=mlm|cwt; run.seed=1|2", "CONTAINER": "env INSIDE=1"}
    arguments = ["--array=0-3", SCRIPT, "hold", "run.name=both", f"run.output_dir={tmp_path / 'runs'}/"]
    job = cluster.submit(*arguments, cwd=tmp_path, env=stand_in | sweep)
    for task in range(4):
        ended = cluster.wait(f"{job}_{task}", 90)
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0")
    shown = [output(tmp_path, f"{job}_{task}") for task in range(4)]
    combinations = [("mlm", 1), ("mlm", 2), ("cwt", 1), ("cwt", 2)]
    for text, (objective, seed) in zip(shown, combinations, strict=True):
        label = f"{objective}-{seed}"
        wanted = f"objective.name={objective} run.seed={seed} run.name=both-{label}"
        assert f"{wanted} run.output_dir={tmp_path / 'runs'}-{label} inside\n" in text
    assert len({re.findall(r"MASTER_PORT=(\d+)", text)[0] for text in shown}) == 4


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("run.seed=1|2", "--array: found task 2, expected 0-1: SWEEP has 2 combinations"),
        ("run.seed", "SWEEP: found 'run.seed', expected key=VALUE|VALUE"),
    ],
)
def test_a_sweep_that_does_not_fit_is_refused(
    cluster: SlurmCluster, stand_in: dict[str, str], tmp_path: Path, sweep: str, message: str
) -> None:
    job = cluster.submit("--array=2", SCRIPT, cwd=tmp_path, env=stand_in | {"SWEEP": sweep})
    assert cluster.wait(f"{job}_2", 60)["ExitCode"] == "2:0"
    assert message in output(tmp_path, f"{job}_2")


def test_models_are_shared_out_over_an_array(cluster: SlurmCluster, stand_in: dict[str, str], tmp_path: Path) -> None:
    script = str(REPOSITORY / "slurm" / "evaluate.sh")
    job = cluster.submit(
        "--array=5-6", script, "runs/a", "runs/b", "runs/c", "--tasks", "heldout", cwd=tmp_path, env=stand_in
    )
    for task in (5, 6):
        assert cluster.wait(f"{job}_{task}", 60)["ExitCode"] == "4:0"  # of the model, not of the script
    first, second = (output(tmp_path, f"{job}_{task}").splitlines() for task in (5, 6))
    assert first == ["evaluating runs/a", "runs/a --tasks heldout", "evaluating runs/c", "runs/c --tasks heldout"]
    assert second == ["evaluating runs/b", "runs/b --tasks heldout"]


def test_a_notice_is_saved_requeued_and_continued(
    cluster: SlurmCluster, stand_in: dict[str, str], tmp_path: Path
) -> None:
    job = cluster.submit("--nodes=2", SCRIPT, cwd=tmp_path, env=stand_in)
    wait_for([tmp_path / "started_0", tmp_path / "started_1"])
    cluster.run("scancel", "--signal=USR1", job)
    ended = cluster.wait(job, 90)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), output(tmp_path, job)
    assert [(tmp_path / f"checkpoint_{rank}").read_text() for rank in (0, 1)] == ["SIGUSR1"] * 2
    shown = output(tmp_path, job)  # appended to, not overwritten, by the second start
    assert shown.count("rank 0") == 2
    assert "requeued" in shown


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_notice_to_the_batch_shell_alone_is_one_to_all(
    cluster: SlurmCluster, stand_in: dict[str, str], tmp_path: Path, name: str
) -> None:
    job = cluster.submit("--nodes=2", SCRIPT, cwd=tmp_path, env=stand_in)
    wait_for([tmp_path / "started_0", tmp_path / "started_1"])
    cluster.run("scancel", "--batch", f"--signal={name}", job)
    ended = cluster.wait(job, 90)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), output(tmp_path, job)
    assert [(tmp_path / f"checkpoint_{rank}").read_text() for rank in (0, 1)] == ["SIGUSR1"] * 2


def test_a_notice_before_the_ranks_can_take_it_is_not_lost(
    cluster: SlurmCluster, stand_in: dict[str, str], tmp_path: Path
) -> None:
    job = cluster.submit("--nodes=2", SCRIPT, "late", cwd=tmp_path, env=stand_in)
    wait_for([tmp_path / "began_0", tmp_path / "began_1"])
    cluster.run("scancel", "--signal=USR1", job)
    ended = cluster.wait(job, 90)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), output(tmp_path, job)


@pytest.mark.slow
def test_the_time_limit_gives_notice(cluster: SlurmCluster, stand_in: dict[str, str], tmp_path: Path) -> None:
    arguments = ["--nodes=2", "--time=1", "--signal=USR1@20", SCRIPT]
    job = cluster.submit(*arguments, cwd=tmp_path, env=stand_in)
    ended = cluster.wait(job, 180)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), output(tmp_path, job)
    assert (tmp_path / "checkpoint_0").read_text() == "SIGUSR1"


@pytest.mark.parametrize("code", [1, 2])
def test_a_failure_is_the_jobs_and_is_not_tried_again(
    cluster: SlurmCluster, stand_in: dict[str, str], tmp_path: Path, code: int
) -> None:
    job = cluster.submit("--nodes=2", SCRIPT, f"code={code}", cwd=tmp_path, env=stand_in)
    ended = cluster.wait(job, 60)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", f"{code}:0", "0")


def test_a_cancelled_job_saves_and_stays_cancelled(
    cluster: SlurmCluster, stand_in: dict[str, str], tmp_path: Path
) -> None:
    job = cluster.submit("--nodes=2", SCRIPT, cwd=tmp_path, env=stand_in)
    wait_for([tmp_path / "started_0", tmp_path / "started_1"])
    cluster.run("scancel", job)
    assert cluster.wait(job, 60)["JobState"] == "CANCELLED"
    wait_for([tmp_path / "checkpoint_0", tmp_path / "checkpoint_1"])
    time.sleep(8)  # longer than a requeued job would wait
    assert cluster.job(job)["JobState"] == "CANCELLED"


@pytest.mark.slow
def test_a_preempted_job_saves_and_continues(cluster: SlurmCluster, stand_in: dict[str, str], tmp_path: Path) -> None:
    job = cluster.submit("--nodes=2", "--exclusive", SCRIPT, cwd=tmp_path, env=stand_in)
    wait_for([tmp_path / "started_0", tmp_path / "started_1"])
    urgent = cluster.submit("--nodes=2", "--exclusive", "--partition=urgent", "--wrap=true", cwd=tmp_path)
    assert cluster.wait(urgent, 60)["JobState"] == "COMPLETED"
    assert (tmp_path / "checkpoint_0").read_text() == "SIGTERM"
    ended = cluster.wait(job, 90)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), output(tmp_path, job)


# A user's shell: an activated environment with sparselt_dist installed.
SHELL = {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
}


def test_the_main_job_continues_after_its_notice(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Two nodes prepare, train, get notice, save, are requeued and finish the same run folder."""
    steps = 150
    job = cluster.submit("--nodes=2", SCRIPT, *main_job_arguments(tmp_path, steps), cwd=tmp_path, env=SHELL)
    wait_until_trained(tmp_path, 3)
    cluster.run("scancel", "--signal=USR1", job)
    ended = cluster.wait(job, 300)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), output(tmp_path, job)
    assert journal_steps(tmp_path) == list(range(1, steps + 1))
    closing = summary(tmp_path)
    assert (closing["status"], closing["steps"], closing["world_size"]) == ("finished", steps, 2)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    for rank in range(2):
        log = (tmp_path / "run" / "logs" / f"rank_{rank:05d}.log").read_text().splitlines()
        assert all(re.match(rf"\S+ rank {rank} step \d+: ", line) for line in log)
        assert re.search(rf"rank {rank} step {steps}: loss ", "\n".join(log))


def what_was_trained(folder: Path) -> tuple[list[tuple[int, str, float]], str, list[str]]:
    """Step, samples and loss of every line of the journal, the exported weights, those of the last checkpoint."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["step"], line["batch_digest"], line["train/loss"]) for line in lines]
    newest = checkpoint.find(folder / "run")
    return steps, file_sha256(folder / "run" / "model" / "model.safetensors"), [
        file_sha256(path) for pattern in ("weights*", "moments*") for path in sorted(newest.glob(pattern))
    ]  # fmt: skip


def reach_the_time_limit(cluster: SlurmCluster, job: str, restarts: int) -> None:
    """Move the limit of a running job so near that its notice is due, and away again once the job is requeued."""
    hours, minutes, _ = cluster.job(job)["RunTime"].split(":")
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * int(hours) + int(minutes) + 2}")
    deadline = time.monotonic() + 200
    while int((shown := cluster.job(job))["Restarts"]) < restarts:
        assert shown["JobState"] not in FINAL_STATES, "ended before its time limit: give it more steps"
        assert time.monotonic() < deadline, shown
        time.sleep(0.5)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")


# Until each of the two notices a hundred steps are waited for, and then Slurm, which looks every 30 s: on a fast machine 3200.
TWO_LIMITS_STEPS = 4000


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_time_limits_change_no_bit(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Time limit, requeue, time limit, requeue, finish: samples, losses and weights are those of an undisturbed run."""
    trained = {}
    for name in ("undisturbed", "disturbed"):
        folder = tmp_path / name
        folder.mkdir()
        shared = main_job_arguments(tmp_path, TWO_LIMITS_STEPS)  # its shards too, so that the second starts soon
        arguments = [*shared, f"run.output_dir={folder / 'run'}", "log.batch_digest=true"]
        job = cluster.submit("--nodes=2", "--time=60", SCRIPT, *arguments, cwd=folder, env=SHELL)
        limits = 2 if name == "disturbed" else 0
        for number in range(limits):
            wait_until_trained(folder, len(journal_steps(folder)) + 100)
            reach_the_time_limit(cluster, job, number + 1)
        ended = cluster.wait(job, 600)
        assert ended["JobState"] == "COMPLETED", output(folder, job)
        assert int(ended["Restarts"]) >= limits
        trained[name] = what_was_trained(folder)
    steps, exported, weights = trained["disturbed"]
    assert len(steps) == TWO_LIMITS_STEPS and weights
    assert trained["undisturbed"] == (steps, exported, weights)


@pytest.mark.slow
def test_a_sweep_trains_side_by_side_and_is_evaluated(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Two objectives at once on one node, then both models, each by one task of another array."""
    sweep = {"SWEEP": "objective.name=mlm|cwt"}
    arguments = [*main_job_arguments(tmp_path, 20), "data.validation=null"]
    prepared = [argument for argument in arguments if argument.startswith(("prepare.", "data.sequence_length"))]
    prepare = [*prepared, "prepare.validation_fraction=0.2"]
    script = str(REPOSITORY / "slurm" / "prepare.sh")
    job = cluster.submit(script, *prepare, cwd=tmp_path, env=SHELL)
    assert cluster.wait(job, 120)["JobState"] == "COMPLETED", output(tmp_path, job)
    shards = [f"data.{name}={tmp_path / 'shards' / name}" for name in ("train", "validation")]
    trained = [argument for argument in arguments if argument not in prepared and "validation" not in argument]
    job = cluster.submit(
        "--array=0-1",
        "--nodelist=node0",
        SCRIPT,
        *trained,
        "data.sequence_length=32",
        *shards,
        cwd=tmp_path,
        env=SHELL | sweep,
    )
    for task in range(2):
        assert cluster.wait(f"{job}_{task}", 300)["JobState"] == "COMPLETED", output(tmp_path, f"{job}_{task}")
    runs = [str(tmp_path / f"run-{objective}") for objective in ("mlm", "cwt")]
    script = str(REPOSITORY / "slurm" / "evaluate.sh")
    job = cluster.submit("--array=0-1", script, *runs, "--tasks", "heldout", cwd=tmp_path, env=SHELL)
    for task, run in enumerate(runs):
        assert cluster.wait(f"{job}_{task}", 120)["JobState"] == "COMPLETED", output(tmp_path, f"{job}_{task}")
        assert json.loads(Path(run, "results.json").read_text())["metrics"]

"""`sbatch slurm/prepare.sh` on a real Slurm of two nodes: the same bytes as one process, also as an array and after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from slurm_cluster import SlurmCluster, missing_programs, slurm_cluster

from sparselt_dist.data.manifest import file_sha256

REPOSITORY = Path(__file__).parents[2]
SCRIPT = str(REPOSITORY / "slurm" / "prepare.sh")

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(missing_programs()), reason=f"needs Slurm and munge; missing: {missing_programs()}"),
]

# A user's shell: an activated environment with sparselt_dist installed.
SHELL = {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six megabytes in four files: variations of some documents, and three copies of one."""
    folder = tmp_path_factory.mktemp("text")
    bodies = [body for _, body in sorted(topics.items())]
    for number in range(4):
        varied = [body.replace(" the ", f" the {number}.{copy} ", 5) for copy in range(3) for body in bodies]
        lines = [json.dumps({"text": document}) + "\n" for document in [*varied, bodies[number], bodies[0]]]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return folder


def arguments(text: Path, output: Path) -> list[str]:
    return [
        f"prepare.source={text}",
        f"prepare.output_dir={output}",
        "prepare.vocab_size=512",
        "prepare.packing=best-fit",
        "prepare.validation_fraction=0.1",
        "prepare.samples_per_shard=512",
        "prepare.num_workers=1",
    ]


@pytest.fixture(scope="module")
def expected(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process makes of it."""
    output = tmp_path_factory.mktemp("alone") / "out"
    command = [sys.executable, "-m", "sparselt_dist.prepare", *arguments(text, output)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return hashes(output)


def output_of(folder: Path) -> str:
    """What the jobs submitted in a folder printed."""
    return "".join(path.read_text() for path in sorted(folder.glob("slurm-*.out")))


def hashes(output: Path) -> dict[str, str]:
    return {str(path.relative_to(output)): file_sha256(path) for path in sorted(output.rglob("*")) if path.is_file()}


def test_two_nodes_make_the_bytes_of_one_process(
    cluster: SlurmCluster, text: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    job = cluster.submit("--nodes=2", SCRIPT, *arguments(text, tmp_path / "out"), cwd=tmp_path, env=SHELL)
    ended = cluster.wait(job, 120)
    shown = (tmp_path / f"slurm-{job}.out").read_text()
    assert ended["JobState"] == "COMPLETED", shown
    assert "part 1 of 2: done" in shown and "next: sparselt pretrain" in shown
    assert hashes(tmp_path / "out") == expected


def test_an_array_goes_on_after_one_of_its_tasks_was_killed(
    cluster: SlurmCluster, text: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    job = cluster.submit("--array=3-4", SCRIPT, *arguments(text, output), cwd=tmp_path, env=SHELL)
    log = output / ".work" / "collect.1.log"
    deadline = time.monotonic() + 30
    while not (log.exists() and log.stat().st_size):
        assert time.monotonic() < deadline, f"waited in vain for {log}: {output_of(tmp_path)}"
        time.sleep(0.02)
    cluster.run("scontrol", "requeue", f"{job}_4")
    cluster.wait(f"{job}_4", 120)
    ended = cluster.wait(f"{job}_3", 120)
    assert ended["JobState"] == "COMPLETED", output_of(tmp_path)
    assert cluster.job(f"{job}_4")["Restarts"] == "1"
    assert hashes(output) == expected


def test_an_array_whose_tasks_may_not_all_run_is_refused(cluster: SlurmCluster, text: Path, tmp_path: Path) -> None:
    """They would wait for each other in vain; a limit that leaves room for all does no harm."""
    job = cluster.submit("--array=0-1%1", SCRIPT, *arguments(text, tmp_path / "out"), cwd=tmp_path, env=SHELL)
    assert [cluster.wait(f"{job}_{task}", 60)["ExitCode"] for task in (0, 1)] == ["2:0", "2:0"]
    assert "--array: found %1, but tasks wait for each other" in (tmp_path / f"slurm-{job}_0.out").read_text()
    job = cluster.submit("--array=0-1%2", SCRIPT, *arguments(text, tmp_path / "out"), cwd=tmp_path, env=SHELL)
    assert [cluster.wait(f"{job}_{task}", 120)["ExitCode"] for task in (0, 1)] == ["0:0", "0:0"], output_of(tmp_path)


def test_an_array_with_gaps_is_refused(cluster: SlurmCluster, text: Path, tmp_path: Path) -> None:
    job = cluster.submit("--array=0,2", SCRIPT, *arguments(text, tmp_path / "out"), cwd=tmp_path, env=SHELL)
    assert [cluster.wait(f"{job}_{task}", 60)["ExitCode"] for task in (0, 2)] == ["2:0", "2:0"]
    assert "found task numbers with gaps" in (tmp_path / f"slurm-{job}_0.out").read_text()

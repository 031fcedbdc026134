"""The README's commands, run as they stand: the first command on its own, then every task in order in one folder."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import pytest

README = Path(__file__).parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    """Code blocks of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def run_script(script: str, folder: Path, timeout: float) -> str:
    """Run lines as a user's shell would, stopping at the first that fails."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-6000:]
    return output


@pytest.mark.timeout(900)
def test_the_first_command_learns_something_in_minutes(tmp_path: Path) -> None:
    install, _, main_job = blocks("bash")[0].partition(" && ")
    assert install == "pip install -e ."  # what this environment was made with
    started = time.monotonic()
    output = run_script(main_job, tmp_path, timeout=800)
    assert time.monotonic() - started < 600
    run = tmp_path / "runs" / "quickstart"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["world_size"] == 2
    assert summary["yardstick/masked_ce"] < summary["yardstick/unigram_ce"] - 0.4
    assert summary["eval/loss"] < summary["yardstick/unigram_ce"] - 0.4
    for word in ("nats", "peak memory", "runs/quickstart/model", "sparselt compare"):
        assert word in output
    assert summary["mlflow_run_id"] and (tmp_path / "mlflow.db").exists()
    journal = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert journal[-1]["perf/data_wait_fraction"] < 0.05
    ledger = sum(value for key, value in journal[-1].items() if key.startswith("time/"))
    assert ledger > journal[-1]["budget/elapsed_seconds"]
    assert math.isclose(journal[-1]["progress/tokens"], summary["tokens"])


@pytest.mark.timeout(1200)
def test_every_task_runs_as_written(tmp_path: Path) -> None:
    (tmp_path / "my_text").mkdir()
    for number, (name, body) in enumerate(sorted(topics.items())):
        (tmp_path / "my_text" / f"{number}-{re.sub('[^a-z]', '', name.lower())}.txt").write_text(body)
    (mine,) = blocks("yaml")
    (tmp_path / "mine.yaml").write_text(mine)
    tasks = [block for block in blocks("bash") if "pip install" not in block]
    assert len(tasks) >= 7
    run_script("\n".join(tasks), tmp_path, timeout=1100)
    assert (tmp_path / "exported" / "model.safetensors").exists()
    assert "<svg" in (tmp_path / "comparison.html").read_text()
    steps = [json.loads(line)["step"] for line in (tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 30 and steps == sorted(set(steps))


def test_the_slurm_command_names_a_script_and_profile_that_exist() -> None:
    (line,) = [line for line in README.read_text().splitlines() if line.startswith("sbatch ")]
    words = shlex.split(line)
    script = next(word for word in words if word.endswith(".sh"))
    profile = words[words.index("--config") + 1]
    assert (README.parent / script).is_file()
    assert (README.parent / "sparselt_dist" / "profiles" / f"{profile}.yaml").is_file()

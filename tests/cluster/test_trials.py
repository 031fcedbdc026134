"""A few cases of each trial of this folder (README.md); the scripts themselves say whether all was as it must be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from launched_runs import environment

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(3600)]


def trial(name: str, *options: str) -> str:
    """What it printed; it must end with 0."""
    script = str(Path(__file__).with_name(name))
    done = subprocess.run(
        [sys.executable, script, *options], env=environment(), capture_output=True, text=True, timeout=3500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kills_while_saving() -> None:
    assert "| 3 |" in trial("kill_while_saving.py", "--kills", "16")


def test_one_random_fault_of_each_kind(tmp_path: Path) -> None:
    told = trial("random_faults.py", "--work-dir", str(tmp_path), "--cases", "9", "--steps", "100", "--seed", "3")
    assert "| rank killed | 1 | 1 | 1 | 0 | 0 |" in told


@pytest.mark.parametrize("phase", ["data", "evaluate", "writing"])
def test_notices(tmp_path: Path, phase: str) -> None:
    told = trial("notices.py", "--work-dir", str(tmp_path), "--phases", phase)
    assert told.count("| 1 | 1 | 1 |") == 6  # two signals to two ranks and the launcher


def test_elastic_matrix(tmp_path: Path) -> None:
    options = ["--ranks", "1", "2", "--stages", "1", "3"]
    assert "digests equal in 16" in trial("elastic_matrix.py", "--work-dir", str(tmp_path), *options)


def test_checkpoint_stall() -> None:
    assert "asynchronous" in trial("checkpoint_stall.py", "--layers", "1", "--steps", "11", "--every", "5")


def test_scaling_model(tmp_path: Path) -> None:
    assert "1,024" in trial("scaling_model.py", "--work-dir", str(tmp_path))

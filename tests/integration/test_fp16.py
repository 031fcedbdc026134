"""fp16: an overflow halves the loss scale and makes no update, at every ZeRO stage; clipping is of the true gradient."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from runs import free_port, slow

SCRIPT = Path(__file__).parents[1] / "fp16_rank.py"


@pytest.mark.parametrize("stage", [1, slow(0), slow(2), slow(3)])
def test_an_overflow_lowers_the_scale_until_steps_are_made(stage: int) -> None:
    command = [sys.executable, str(SCRIPT), str(stage), str(free_port())]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    lines = [line.removeprefix("outcome ") for line in run.stdout.splitlines() if line.startswith("outcome ")]
    first, second, third, fourth = (json.loads(line) for line in lines)
    assert (first["scale"], second["scale"]) == (2.0**15, 2.0**14)
    assert first["moved"] == second["moved"] == 0.0
    made = [step for step in (third, fourth) if math.isfinite(step["norm"])]
    assert made and made[-1] is fourth
    assert fourth["norm"] == pytest.approx(math.sqrt(20), rel=1e-3)
    assert fourth["moved"] == pytest.approx(0.5, rel=1e-3)

"""Help and configuration errors answer in under a second: nothing heavy is imported for them.

Processor seconds are measured, for the machine may be busy with other work.
"""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "deepspeed", "mlflow", "datasets", "webdataset")
_PROBE = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    loaded = sorted(set({heavy!r}) & set(sys.modules))
    print("LOADED", stop.code, *loaded)
"""


def _child_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _run(module: str, *arguments: str) -> tuple[str, str, float]:
    """Last line of output, all of stderr, and processor seconds, of a module run in a fresh interpreter."""
    started = _child_seconds()
    command = [sys.executable, "-c", _PROBE.format(heavy=HEAVY), f"sparselt_dist.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1], done.stderr, _child_seconds() - started


@pytest.mark.parametrize("module", ["cli", "pretrain", "plan", "doctor"])
def test_help_imports_nothing_heavy(module: str) -> None:
    last, _, seconds = min((_run(module, "--help") for _ in range(2)), key=lambda run: run[2])
    assert last == "LOADED 0"
    assert seconds < 1


@pytest.mark.parametrize("module", ["pretrain", "plan"])
def test_a_configuration_error_imports_nothing_heavy(module: str) -> None:
    arguments = ["--config", "base", "model.config.hiden_size=3", "train.precision=bf61"]
    last, error, seconds = min((_run(module, *arguments) for _ in range(2)), key=lambda run: run[2])
    assert last == "LOADED 2"
    assert "2 faults in the configuration" in error
    assert seconds < 1

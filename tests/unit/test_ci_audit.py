"""The audit of the pinned packages: what fails, what is only said."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CI = Path(__file__).parents[2] / ".ci"
PINS = {"a-a": "1.0", "b": "2.0"}


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", CI / "audit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tool(folder: Path, *packages: dict[str, Any]) -> str:
    """A program in the place of pip-audit: its report is on those packages that it is asked for."""
    (folder / "packages.json").write_text(json.dumps(packages))
    program = folder / "pip-audit"
    program.write_text(
        "#!/usr/bin/env python3\n"
        "import json, pathlib, sys\n"
        "asked = pathlib.Path(sys.argv[sys.argv.index('--requirement') + 1]).read_text()\n"
        f"known = json.loads(pathlib.Path({str(folder / 'packages.json')!r}).read_text())\n"
        "found = [package for package in known if package['name'] + '==' in asked]\n"
        "print(json.dumps({'dependencies': found, 'fixes': []}))\n"
        "sys.exit(any(package.get('vulns') for package in found))\n"
    )
    program.chmod(0o755)
    return str(program)


SOUND = {"name": "a-a", "version": "1.0", "vulns": []}
BAD = {"name": "b", "version": "2.0", "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["3.0"]}]}


@pytest.mark.parametrize(
    ("accepted", "code", "said"),
    [
        ({}, 1, "b 2.0: PYSEC-1: VULNERABLE"),
        ({"PYSEC-1": "never called"}, 0, "b 2.0: PYSEC-1: never called"),
        ({"CVE-1": "never called"}, 0, "never called"),
        ({"PYSEC-2": "gone"}, 1, "PYSEC-2 is accepted and was not found"),
    ],
)
def test_a_vulnerability_fails_unless_it_is_accepted(
    audit: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    accepted: dict[str, str],
    code: int,
    said: str,
) -> None:
    assert audit.audit(tool(tmp_path, SOUND, BAD), PINS, accepted) == code
    assert said in capsys.readouterr().out


def test_what_could_not_be_asked_is_said_and_fails_nothing(
    audit: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    skipped = {"name": "a-a", "skip_reason": "not found"}
    assert audit.audit(tool(tmp_path, skipped, BAD), PINS, {}) == 0  # the first is asked for alone
    assert audit.audit(str(tmp_path / "none"), PINS, {}) == 0
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    failing.chmod(0o755)
    assert audit.audit(str(failing), PINS, {}) == 0
    assert audit.audit(tool(tmp_path, SOUND, {"name": "b", "skip_reason": "not found"}), PINS, {}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("NOT audited" in line for line in lines) == 4
    assert any("no network" in line for line in lines) and "1 of 2 packages were NOT audited: b" in lines[-2]


def test_everything_installed_is_pinned(audit: ModuleType) -> None:
    installed = [("A_a", "1.0+cpu"), ("pip", "26.3"), ("sparselt_dist", "0.1.0")]
    assert audit.pin_faults(installed, PINS) == []
    faults = audit.pin_faults([*installed, ("B", "2.1"), ("stranger", "1")], PINS)
    assert [fault.partition(":")[0] for fault in faults] == ["b 2.1", "stranger 1"]


def test_the_lists_are_read(audit: ModuleType) -> None:
    pins = audit.read_pins(audit.CONSTRAINTS.read_text())
    assert pins["torch"] and pins["pyyaml"] and len(pins) > 100
    audit.read_accepted(audit.ACCEPTED.read_text())
    with pytest.raises(ValueError, match="expected `NAME reason`"):
        audit.read_accepted("# why\nCVE-1 never called\nCVE-2\n")

"""Known vulnerabilities of the pinned packages, by pip-audit; and that nothing is installed that is not pinned.

    python .ci/audit.py pins                    in the environment to be checked
    python .ci/audit.py vulnerabilities TOOL    TOOL: the program pip-audit

A vulnerability fails unless .ci/accepted_vulnerabilities.txt names it with a reason. A service that cannot be reached, or
knows nothing of the packages, is said and fails nothing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

CI = Path(__file__).parent
CONSTRAINTS = CI.parent / "docker" / "constraints.txt"
ACCEPTED = CI / "accepted_vulnerabilities.txt"
# What a new environment holds by itself, and this package.
UNPINNED = {"pip", "setuptools", "wheel", "sparselt-dist"}
SECONDS = 900
Vulnerable = dict[str, list[str]]  # "name version" -> names of the vulnerability, the first one its own


def canonical(name: str) -> str:
    """A package's name as every spelling of it is compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(text: str) -> dict[str, str]:
    """Version by name."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return {canonical(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def read_accepted(text: str) -> dict[str, str]:
    """Reason by the name of the vulnerability; raises ValueError for a line without a reason."""
    accepted = {}
    for line in (line.strip() for line in text.splitlines()):
        name, _, reason = line.partition(" ")
        if line and not line.startswith("#"):
            if not reason.strip():
                raise ValueError(f"{ACCEPTED.name}: found {line!r}, expected `NAME reason`")
            accepted[name] = reason.strip()
    return accepted


def pin_faults(installed: Iterable[tuple[str, str]], pins: Mapping[str, str]) -> list[str]:
    """Installed packages without a pin, or of another version than theirs (a local part such as +cpu left out)."""
    faults = []
    for name, version in sorted((canonical(name), version.partition("+")[0]) for name, version in installed):
        if name not in UNPINNED and pins.get(name) != version:
            faults.append(f"{name} {version}: docker/constraints.txt says {pins.get(name, 'nothing')}")
    return faults


def findings(report: Mapping[str, Any]) -> tuple[Vulnerable, list[str]]:
    """What pip-audit found, and the packages that its service knows nothing of."""
    found: Vulnerable = {}
    unknown = []
    for package in report["dependencies"]:
        if "skip_reason" in package:
            unknown.append(package["name"])
        for each in package.get("vulns", []):
            found[f"{package['name']} {package['version']}: {each['id']}"] = [each["id"], *each.get("aliases", [])]
    return found, unknown


def ask(tool: str, pins: Sequence[str]) -> dict[str, Any] | str:
    """pip-audit's report on pins, `name==version`; or why there is none."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(pins) + "\n")
        file.flush()
        command = [tool, "--requirement", file.name, "--no-deps", "--disable-pip", "--format", "json"]
        try:
            done = subprocess.run(
                [*command, "--progress-spinner", "off"], capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as cause:
            return str(cause)
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return report


def audit(tool: str, pins: Mapping[str, str], accepted: Mapping[str, str]) -> int:
    """0, or 1 for a vulnerability that is not accepted. One package is asked for first: a service without data is told once."""
    wanted = [f"{name}=={version}" for name, version in sorted(pins.items())]
    for asked in (wanted[:1], wanted):
        report = ask(tool, asked)
        if isinstance(report, str):
            print(f"WARNING: the pinned packages were NOT audited: {report}")
            return 0
        found, unknown = findings(report)
        if len(unknown) == len(asked):
            print("WARNING: the pinned packages were NOT audited: the service knows none of the releases asked for")
            return 0
    if unknown:
        print(f"WARNING: {len(unknown)} of {len(wanted)} packages were NOT audited: {', '.join(unknown)}")
    code = 0
    for where, names in found.items():
        reason = next((accepted[name] for name in names if name in accepted), None)
        print(f"{where}: " + ("VULNERABLE; renew the pin, or accept it with a reason" if reason is None else reason))
        code = code if reason is not None else 1
    for name in accepted.keys() - {name for names in found.values() for name in names}:
        print(f"note: {name} is accepted and was not found; remove it from {ACCEPTED.name}")
    print(f"{len(wanted) - len(unknown)} pinned packages audited, {len(found)} vulnerabilities")
    return code


def main(arguments: Sequence[str]) -> int:
    """Exit code: 1 where something must be mended."""
    pins = read_pins(CONSTRAINTS.read_text())
    if arguments[:1] == ["pins"]:
        installed = [(package.metadata["Name"], package.version) for package in metadata.distributions()]
        faults = pin_faults(installed, pins)
        print(*faults, sep="\n", end="\n" if faults else "")
        return 1 if faults else 0
    return audit(arguments[1], pins, read_accepted(ACCEPTED.read_text()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

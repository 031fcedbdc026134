"""The container recipe, as far as it can be checked without a container engine: stages, paths, entrypoint, pins."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from sparselt_dist import cli

REPOSITORY = Path(__file__).parents[2]
DOCKER = REPOSITORY / "docker"


def instructions() -> list[list[str]]:
    """Words of each instruction of the Dockerfile, continuation lines joined."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (DOCKER / "Dockerfile").read_text())
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [line.split() for line in lines]


def test_every_stage_is_defined_before_it_is_used() -> None:
    defined: set[str] = set()
    for words in instructions():
        if words[0] == "FROM":
            assert words[1] == "${PYTHON_IMAGE}" or words[1] in defined
            defined.add(words[3])
        for word in words:
            if word.startswith("--from="):
                assert word.removeprefix("--from=") in defined
    assert {"cpu", "cuda"} <= defined


def test_copied_paths_exist_and_pass_the_dockerignore() -> None:
    ignore = (DOCKER / "Dockerfile.dockerignore").read_text().split()
    allowed = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    for words in instructions():
        if words[0] == "COPY" and not any(word.startswith("--from=") for word in words):
            sources = [word for word in words[1:-1] if not word.startswith("--")]
            for source in sources:
                # The changing text of the README is checked by its own test.
                assert (REPOSITORY / source).exists() or source == "README.md", source
                assert source in allowed, source
    assert all((REPOSITORY / path).exists() or path == "README.md" for path in allowed)


def test_the_image_runs_as_a_user_under_an_init_that_forwards_signals() -> None:
    words = instructions()
    assert ["USER", "1000:1000"] in words
    assert ["ENTRYPOINT", '["tini",', '"--",', '"entrypoint.sh"]'] in words
    assert any(line[0] == "HEALTHCHECK" for line in words)


def run_entrypoint(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it with commands that only say how they were called."""
    for name in ("deepspeed", "sparselt", "bash"):
        program = folder / name
        program.write_text(f'#!/bin/sh\necho {name} "$@"\n')
        program.chmod(0o755)
    env = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"} | environment
    command = ["sh", str(DOCKER / "entrypoint.sh"), *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=20)


@pytest.mark.parametrize(
    ("typed", "env", "executed"),
    [
        ("", {}, "deepspeed -m sparselt_dist.pretrain"),
        (
            "--config crammed a=b",
            {"RANKS": "4"},
            "deepspeed --num_gpus 4 -m sparselt_dist.pretrain --config crammed a=b",
        ),
        ("pretrain run.seed=1", {}, "deepspeed -m sparselt_dist.pretrain run.seed=1"),
        ("run.seed=1", {}, "deepspeed -m sparselt_dist.pretrain run.seed=1"),
        ("bash -c true", {}, "bash -c true"),
    ]
    + [(f"{name} --help", {}, f"sparselt {name} --help") for name in cli.COMMANDS if name != "pretrain"],
)
def test_entrypoint(tmp_path: Path, typed: str, env: dict[str, str], executed: str) -> None:
    result = run_entrypoint(tmp_path, *shlex.split(typed), **env)
    assert (result.returncode, result.stdout.strip()) == (0, executed)


def test_health_follows_the_journal(tmp_path: Path) -> None:
    assert run_entrypoint(tmp_path, "healthcheck").returncode == 0
    journal = tmp_path / "runs" / "first" / "metrics.jsonl"
    journal.parent.mkdir(parents=True)
    journal.touch()
    assert run_entrypoint(tmp_path, "healthcheck").returncode == 0
    os.utime(journal, (0, 0))
    assert run_entrypoint(tmp_path, "healthcheck").returncode == 1


def test_every_dependency_is_pinned_within_its_range() -> None:
    lines = (DOCKER / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    exact = {pin.name.lower().replace("_", "-"): str(pin.specifier) for pin in pins}
    assert all(re.fullmatch(r"==[^*+]+", specifier) for specifier in exact.values())
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    for text in project["dependencies"] + extras:
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        if name == "sparselt-dist":
            continue
        assert name in exact, f"{name} is missing in docker/constraints.txt"
        assert requirement.specifier.contains(exact[name].removeprefix("==")), text

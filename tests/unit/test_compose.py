"""docker/compose.yaml, as far as it can be checked without a container engine. (The image: test_docker.py.)"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
DOCKER = REPOSITORY / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
TEXT = (DOCKER / "compose.yaml").read_text()
CONTENT: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = CONTENT["services"]
BUILT = {name: service for name, service in SERVICES.items() if "build" in service}


def stages() -> dict[str, str]:
    """The stage that each stage of the Dockerfile begins from."""
    return {name: base for base, name in re.findall(r"(?m)^FROM (\S+) AS (\S+)$", DOCKERFILE)}


def has_health_check(name: str) -> bool:
    return "healthcheck" in SERVICES[name] or (name in BUILT and "\nHEALTHCHECK" in DOCKERFILE)


@pytest.mark.parametrize("name", sorted(SERVICES.keys() - BUILT.keys()))
def test_images_of_others_are_pinned(name: str) -> None:
    assert re.fullmatch(r"[a-z0-9./-]+:[\w.-]*\d+[.-]\d+[\w.-]*", SERVICES[name]["image"])


def test_the_base_image_is_pinned() -> None:
    assert re.search(r"(?m)^ARG PYTHON_IMAGE=python:\d+\.\d+\.\d+-\S+$", DOCKERFILE)


@pytest.mark.parametrize("name", BUILT)
def test_built_images_are_targets_of_the_dockerfile(name: str) -> None:
    build = BUILT[name]["build"]
    assert (DOCKER / build["context"]).resolve() == REPOSITORY
    assert (REPOSITORY / build["dockerfile"]).is_file()
    assert build["target"] in stages() and BUILT[name]["image"] == f"sparselt_dist:{build['target']}"


@pytest.mark.parametrize("target", ["cpu", "cuda", "crammed"])
def test_every_target_has_the_user_entry_point_and_health_check_of_the_runtime(target: str) -> None:
    passed, stage = [], target
    while stage in stages():
        passed.append(stage)
        stage = stages()[stage]
    assert "runtime" in passed
    after = DOCKERFILE[DOCKERFILE.index("AS runtime") :]
    assert [after.count(f"\n{word} ") for word in ("USER", "ENTRYPOINT", "HEALTHCHECK")] == [1, 1, 1]


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_waited_for_comes_true(name: str) -> None:
    for other, wanted in SERVICES[name].get("depends_on", {}).items():
        if wanted["condition"] == "service_healthy":
            assert has_health_check(other), other
        else:
            assert wanted["condition"] == "service_completed_successfully"
            assert "restart" not in SERVICES[other], f"{other} would never have completed"


@pytest.mark.parametrize("name", SERVICES)
def test_a_password_is_in_no_command_line(name: str) -> None:
    """A single `$` is filled in before the start; `$$` is left to the shell inside, which reads its environment."""
    service = SERVICES[name]
    for key in ("command", "entrypoint", "healthcheck"):
        assert not re.search(r"(?<!\$)\$(?!\$)", str(service.get(key, ""))), key


def test_every_password_is_asked_for_and_told_of() -> None:
    wanted = set(re.findall(r"\$\{(\w+)", TEXT))
    assert wanted == set(re.findall(r"\$\{(\w+):\?\}", TEXT)), "one that is missing must stop the start"
    example = (DOCKER / "compose.env.example").read_text()
    assert wanted == set(re.findall(r"(?m)^(\w+)=", example))
    assert {"/docker/.env", "/docker/work/"} <= set((REPOSITORY / ".gitignore").read_text().splitlines())


def test_the_store_of_artifacts_is_made_before_the_server_that_uses_it() -> None:
    bucket = re.search(r"--artifacts-destination s3://(\S+)", SERVICES["mlflow"]["command"])
    assert bucket and f"s3/{bucket[1]}" in str(SERVICES["bucket"]["entrypoint"])
    assert SERVICES["mlflow"]["depends_on"]["bucket"]["condition"] == "service_completed_successfully"
    store = SERVICES["s3"]["environment"]
    assert SERVICES["mlflow"]["environment"]["AWS_ACCESS_KEY_ID"] == store["MINIO_ROOT_USER"]
    assert SERVICES["mlflow"]["environment"]["AWS_SECRET_ACCESS_KEY"] == store["MINIO_ROOT_PASSWORD"]


def test_what_must_last_lies_in_volumes_that_are_declared() -> None:
    named = {
        volume.partition(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", [])
        if not volume.startswith(".")
    }
    assert named == CONTENT["volumes"].keys() == {"postgres", "s3"}


def test_the_nodes_are_one_run_and_have_time_to_save() -> None:
    nodes = [service["environment"] for service in BUILT.values()]
    assert [node["HOST_NUMBER"] for node in nodes] == [str(number) for number in range(len(nodes))]
    assert {node["HOSTS"] for node in nodes} == {",".join(BUILT)}
    for name, service in BUILT.items():
        assert service["hostname"] == name
        assert re.fullmatch(r"[5-9]m|\d\d+m", service["stop_grace_period"]), "a checkpoint, after the step under way"
        assert "shm_size" in service


def test_nothing_listens_beyond_this_machine() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)

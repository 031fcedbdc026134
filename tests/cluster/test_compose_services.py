"""What docker/compose.yaml describes, without containers: its commands and environments, word for word, on two hosts.

MLflow's server with a real Postgres and SeaweedFS in place of MinIO, and the entry point of the image as both nodes: stopped
as `docker compose stop` does, started again as `up` does. Hosts have the services' names.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import s3_server
import yaml
from main_job import journal_steps, main_job_arguments, summary
from two_hosts import TwoHosts, missing, two_hosts

REPOSITORY = Path(__file__).parents[2]
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((REPOSITORY / "docker" / "compose.yaml").read_text())["services"]
PASSWORDS = {"${POSTGRES_PASSWORD:?}": "pg-word", "${S3_PASSWORD:?}": "s3-word"}
POSTGRES = next((str(path.parent) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)
REASON = missing() or s3_server.missing_program() or ("" if POSTGRES else "needs Postgres below /usr/lib/postgresql")
pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]

IN_MLFLOW = """
import json, mlflow
client = mlflow.MlflowClient("http://mlflow:5000")
(run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
steps = sorted(point.step for point in client.get_metric_history(run.info.run_id, "train/loss"))
artifacts = [each.path for each in client.list_artifacts(run.info.run_id)]
print(json.dumps([run.info.status, steps, run.info.artifact_uri, artifacts]))
"""
MAKE_BUCKET = 'import boto3; boto3.client("s3", endpoint_url="http://s3:9000").create_bucket(Bucket="mlflow")'


def environment_of(service: str) -> dict[str, str]:
    """A service's, with the passwords that docker/.env would give."""
    return {name: PASSWORDS.get(value, value) for name, value in SERVICES[service]["environment"].items()}


@dataclass
class Composed:
    """Two hosts on which Postgres, object storage and MLflow's server run."""

    hosts: TwoHosts
    folder: Path

    def start(self, host: int, *command: str, cwd: Path, **environment: str) -> subprocess.Popen[bytes]:
        """A command on a host, that sees what its container would; `output` in `cwd` takes what it says."""
        variables = [f"{name}={value}" for name, value in environment.items()]
        return self.hosts.start(host, "env", *variables, *command, cwd=cwd, output=cwd / "output")

    def serve(self, service: str, *command: str, **environment: str) -> None:
        """Start a service, which ends with the hosts."""
        folder = self.folder / service
        folder.mkdir(exist_ok=True)
        self.hosts.daemons.append(self.start(0, *command, cwd=folder, **environment))

    def run(self, *command: str, **environment: str) -> str:
        """What a command on the first host says; it must end with 0."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            code = self.start(0, *command, cwd=Path(folder), **environment).wait(timeout=120)
            told = Path(folder, "output").read_text()
        assert code == 0, told
        return told

    def wait_for(self, service: str, *test: str, **environment: str) -> None:
        """Until a health check passes."""
        deadline = time.monotonic() + 120
        while self.start(0, *test, cwd=self.folder, **environment).wait(timeout=60) != 0:
            assert time.monotonic() < deadline, (self.folder / service / "output").read_text()[-3000:]
            time.sleep(0.5)


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composed]:
    folder = tmp_path_factory.mktemp("composed")
    with tempfile.TemporaryDirectory() as postgres, two_hosts(folder) as hosts, hosts_by_name(hosts):
        running = Composed(hosts, folder)
        start_postgres(running, Path(postgres))
        start_storage(running)
        running.serve("mlflow", *shlex.split(SERVICES["mlflow"]["command"]), **environment_of("mlflow"))
        running.wait_for("mlflow", *SERVICES["mlflow"]["healthcheck"]["test"][1:])
        yield running


@contextlib.contextmanager
def hosts_by_name(hosts: TwoHosts) -> Iterator[None]:
    """`ip netns exec` shows a host what lies in /etc/netns/HOST as if it lay in /etc."""
    first, second = hosts.addresses
    folders = [Path("/etc/netns", name) for name in hosts.names]
    try:
        for folder in folders:
            folder.mkdir(parents=True)
            names = f"127.0.0.1 localhost\n{first} node0 mlflow postgres s3\n{second} node1\n"
            (folder / "hosts").write_text(names)
        yield
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def start_postgres(running: Composed, folder: Path) -> None:
    """As its image does: a user and a data base of the given name, a password asked of all who come by network."""
    wanted, as_postgres = (
        environment_of("postgres"),
        ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"],
    )
    (folder / "password").write_text(wanted["POSTGRES_PASSWORD"])
    for path in (folder, folder / "password"):
        shutil.chown(path, "postgres")
    data, user = str(folder / "data"), wanted["POSTGRES_USER"]
    options = [f"--username={user}", f"--pwfile={folder / 'password'}", "--auth=scram-sha-256", "--encoding=UTF8"]
    running.run(*as_postgres, f"{POSTGRES}/initdb", "--no-locale", f"--pgdata={data}", *options)
    with (folder / "data" / "pg_hba.conf").open("a") as file:
        file.write("host all all all scram-sha-256\n")
    server = [f"{POSTGRES}/postgres", "-D", data, "-h", "*", "-k", str(folder)]
    running.serve("postgres", *as_postgres, *server)
    _, program, *arguments = SERVICES["postgres"]["healthcheck"]["test"]
    running.wait_for("postgres", f"{POSTGRES}/{program}", *arguments)
    make = [f"{POSTGRES}/createdb", "--host=postgres", f"--username={user}", wanted["POSTGRES_DB"]]
    running.run(*make, PGPASSWORD=wanted["POSTGRES_PASSWORD"])


def start_storage(running: Composed) -> None:
    """Where the server expects it, with the keys that it has, and its bucket."""
    folder = running.folder / "s3"
    folder.mkdir()
    wanted, ports = environment_of("s3"), {name: 9100 + number for number, name in enumerate(s3_server.PORTS)}
    command = s3_server.seaweedfs_command(
        folder,
        wanted["MINIO_ROOT_USER"],
        wanted["MINIO_ROOT_PASSWORD"],
        ports | {"s3.port": 9000},
        address=running.hosts.addresses[0],
    )
    running.serve("s3", *command)
    keys = {name: value for name, value in environment_of("mlflow").items() if name.startswith("AWS_")}
    running.wait_for("s3", sys.executable, "-c", MAKE_BUCKET, **keys)


def nested(overrides: list[str]) -> dict[str, Any]:
    """What `key.path=value` say, as a configuration."""
    tree: dict[str, Any] = {}
    for override in overrides:
        path, _, value = override.partition("=")
        *above, last = path.split(".")
        branch = tree
        for key in above:
            branch = branch.setdefault(key, {})
        branch[last] = yaml.safe_load(value)
    return tree


def start_nodes(composed: Composed, workspace: Path) -> list[subprocess.Popen[bytes]]:
    entry_point, nodes = str(REPOSITORY / "docker" / "entrypoint.sh"), []
    for number in range(2):
        node = SERVICES[f"node{number}"]
        environment = environment_of(f"node{number}") | {"CONFIG": str(workspace / "config.yaml")}
        nodes.append(composed.start(number, "sh", entry_point, *node["command"], cwd=workspace, **environment))
    return nodes


def wait_until(condition: Callable[[], bool], nodes: list[subprocess.Popen[bytes]], workspace: Path) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        ended = [node.poll() for node in nodes]
        assert ended == [None, None] and time.monotonic() < deadline, (workspace / "output").read_text()
        time.sleep(0.1)


def test_two_nodes_stop_continue_and_are_in_the_store(composed: Composed, tmp_path: Path) -> None:
    steps = 600
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(nested(main_job_arguments(tmp_path, steps))))
    nodes = start_nodes(composed, tmp_path)
    wait_until(lambda: len(journal_steps(tmp_path)) > 5, nodes, tmp_path)
    for node in nodes:
        node.send_signal(signal.SIGTERM)
    assert [node.wait(timeout=120) for node in nodes] == [75, 75], (tmp_path / "output").read_text()
    stopped = summary(tmp_path)
    assert (stopped["status"], stopped["world_size"]) == ("stopped", 2) and stopped["steps"] < steps

    nodes = start_nodes(composed, tmp_path)
    assert [node.wait(timeout=300) for node in nodes] == [0, 0], (tmp_path / "output").read_text()
    assert journal_steps(tmp_path) == list(range(1, steps + 1))
    health = [os.fspath(REPOSITORY / "docker" / "entrypoint.sh"), "healthcheck"]
    assert composed.start(0, "sh", *health, cwd=tmp_path).wait(timeout=30) == 0

    told = composed.run(sys.executable, "-c", IN_MLFLOW).strip().splitlines()[-1]
    status, shown, where, artifacts = yaml.safe_load(told)
    assert (status, shown) == ("FINISHED", list(range(1, steps + 1)))
    assert where.startswith("mlflow-artifacts:") and artifacts
    assert any((composed.folder / "s3").glob("*.dat")), "artifacts lie in the object storage"

"""An S3 server for the tests: SeaweedFS from the dev extra, or the one that the environment names.

SPARSELT_TEST_S3_ENDPOINT, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY name a server that runs already; buckets are made on
it and left there. SeaweedFS is started as a process of its own, on ports of the loopback interface alone, without
telemetry, and killed at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sysconfig
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PORTS = (
    "master.port master.port.grpc volume.port volume.port.grpc filer.port filer.port.grpc s3.port s3.port.grpc".split()
)


@dataclass(frozen=True)
class S3Server:
    """A server that runs, and buckets made on it: one that all may read, and one for the owner of the keys alone."""

    endpoint: str
    access_key: str
    secret_key: str
    public: str
    private: str

    def environment(self) -> dict[str, str]:
        """What a client reads to use it."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            **NO_OTHER_CREDENTIALS,
        }

    def client(self) -> Any:
        """A client that may write."""
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(retries={"mode": "standard", "total_max_attempts": 3}, connect_timeout=5, read_timeout=10),
        )


NO_OTHER_CREDENTIALS = {
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}


def missing_program() -> str:
    """Why there can be no server here; empty if there can."""
    if "SPARSELT_TEST_S3_ENDPOINT" in os.environ or _seaweedfs() is not None:
        return ""
    return "needs an S3 server: `weed` of the dev extra, or SPARSELT_TEST_S3_ENDPOINT with AWS_ACCESS_KEY_ID and the secret"


def _seaweedfs() -> str | None:
    return shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """The server, ready for requests; SeaweedFS keeps everything in the folder."""
    names = [f"sparselt-{kind}-{uuid.uuid4().hex[:12]}" for kind in ("public", "private")]
    if endpoint := os.environ.get("SPARSELT_TEST_S3_ENDPOINT"):
        server = S3Server(endpoint, os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"], *names)
        _make_buckets(server, time.monotonic() + 10)
        yield server
        return
    ports = _free_ports(len(PORTS))
    server = S3Server(f"http://127.0.0.1:{ports[PORTS.index('s3.port')]}", "key", "secret", *names)
    process = _start(folder, server, ports)
    try:
        _make_buckets(server, time.monotonic() + 60)
        yield server
    except BaseException as error:
        error.add_note((folder / "log").read_text()[-2000:])
        raise
    finally:
        process.kill()
        process.wait()
        for port in ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)


def _start(folder: Path, server: S3Server, ports: list[int]) -> subprocess.Popen[bytes]:
    readers = [f"Read:{server.public}", f"List:{server.public}"]
    command = seaweedfs_command(
        folder, server.access_key, server.secret_key, dict(zip(PORTS, ports, strict=True)), readers
    )
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)


def seaweedfs_command(
    folder: Path,
    access_key: str,
    secret_key: str,
    ports: dict[str, int],
    everybody: Sequence[str] = (),
    address: str = "127.0.0.1",
) -> list[str]:
    """The command of a server that keeps everything in the folder; `everybody` is what one without keys may do."""
    keys = [{"accessKey": access_key, "secretKey": secret_key}]
    owner = {"name": "owner", "credentials": keys, "actions": ["Admin", "Read", "Write", "List"]}
    identities = folder / "identities.json"
    identities.write_text(json.dumps({"identities": [owner, {"name": "anonymous", "actions": [*everybody]}]}))
    program = _seaweedfs()
    assert program is not None
    command = [program, "server", f"-dir={folder}", f"-ip={address}", f"-ip.bind={address}", "-filer", "-s3"]
    command += [f"-s3.config={identities}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    command += ["-volume.max=0", "-master.volumeSizeLimitMB=64"]
    return command + [f"-{name}={port}" for name, port in ports.items()]


def _make_buckets(server: S3Server, deadline: float) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    client = server.client()
    while True:
        try:
            for bucket, access in ((server.private, "private"), (server.public, "public-read")):
                with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
                    client.create_bucket(Bucket=bucket, ACL=access)
                client.put_object(Bucket=bucket, Key="ready", Body=b"ready")  # space is made at the first object
                client.delete_object(Bucket=bucket, Key="ready")
        except (BotoCoreError, ClientError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]

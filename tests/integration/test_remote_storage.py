"""Transfers from real servers: one that fails by plan, and one that speaks S3."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faulty_http import FaultyServer, Reply
from s3_server import NO_OTHER_CREDENTIALS, S3Server

from sparselt_dist import diagnosis
from sparselt_dist.config import CheckpointSection, Config
from sparselt_dist.data import transports
from sparselt_dist.data.cache import ShardCache
from sparselt_dist.data.storage import NotFoundError, RetryPolicy, download, expand, list_folder, read_bytes
from sparselt_dist.errors import DataError

RETRY = RetryPolicy(attempts=3, timeout_seconds=10.0, first_pause_seconds=0.01)
IMPATIENT = RetryPolicy(attempts=3, timeout_seconds=0.8, first_pause_seconds=0.01)  # where a stall is planned
CONTENT = os.urandom(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PATH = "/set/shard 0.tar"
URL_PATH = "/set/shard%200.tar"


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer(files={PATH: CONTENT}).running() as running:
        yield running


def bring(server: FaultyServer, target: Path, *, sha256: str | None = SHA256, retry: RetryPolicy = RETRY) -> str:
    return download(server.root + URL_PATH, target, retry, expected_bytes=None, expected_sha256=sha256)


def ranges(server: FaultyServer) -> list[str | None]:
    return [request.range for request in server.seen]


# --- one transfer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second_range"),
    [
        (Reply(status=500), None),
        (Reply(status=503, headers=(("Retry-After", "0"),)), None),
        (Reply(status=429), None),
        (Reply(status=408), None),
        (Reply(status=0), None),
        (Reply(close_after=0), None),
        (Reply(close_after=200_000), "bytes=200000-"),
        (Reply(stall_after=200_000), "bytes=196608-"),  # whole chunks are kept
        (Reply(corrupt=True), None),
    ],
    ids=["500", "503", "429", "408", "hang-up", "no-body", "broken-off", "stall", "corrupt"],
)
def test_a_transfer_outlives_a_fault(
    server: FaultyServer, tmp_path: Path, first: Reply, second_range: str | None
) -> None:
    server.plan(PATH, first)
    assert bring(server, tmp_path / "a", retry=RETRY if first.stall_after is None else IMPATIENT) == SHA256
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert ranges(server) == [None, second_range]


def test_a_server_without_ranges_sends_everything_again(server: FaultyServer, tmp_path: Path) -> None:
    server.plan(PATH, Reply(close_after=200_000), Reply(ignore_range=True))
    assert bring(server, tmp_path / "a") == SHA256
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_an_object_that_changes_meanwhile_is_never_mixed(server: FaultyServer, tmp_path: Path) -> None:
    other = CONTENT[::-1]

    def change() -> None:
        while not server.seen:
            time.sleep(0.005)
        server.files[PATH] = other

    server.plan(PATH, Reply(stall_after=200_000))
    changing = threading.Thread(target=change)
    changing.start()
    found = bring(server, tmp_path / "a", sha256=None, retry=IMPATIENT)
    changing.join()
    assert found == hashlib.sha256(other).hexdigest()
    assert (tmp_path / "a").read_bytes() == other


def test_an_object_that_shrinks_meanwhile_is_brought_anew(server: FaultyServer, tmp_path: Path) -> None:
    server.plan(PATH, Reply(close_after=200_000), Reply(status=416), Reply(corrupt=True))
    with pytest.raises(DataError, match="tried 3 times, at last its sha256 was"):
        bring(server, tmp_path / "a")
    assert ranges(server) == [None, "bytes=200000-", None]


def test_what_the_file_held_before_is_gone(server: FaultyServer, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * (len(CONTENT) + 1000))
    server.plan(PATH, Reply(untold_size=True))
    assert bring(server, tmp_path / "a") == SHA256
    assert (tmp_path / "a").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("always", "message"),
    [
        (
            Reply(status=500),
            "tried 3 times, at last the server answered HTTP 500 Internal Server Error; check the server",
        ),
        (Reply(corrupt=True), f"tried 3 times, at last its sha256 was .*, expected {SHA256[:12]}…; put the right file"),
        (Reply(stall_after=0), r"tried 3 times, at last nothing came for 0\.8 s; check the server and the network"),
        (Reply(close_after=100), "tried 3 times, at last the connection failed .*; check the server"),
        (Reply(status=0), "tried 3 times, at last the connection failed .*closed connection without response"),
    ],
    ids=["500", "corrupt", "stall", "broken-off", "hang-up"],
)
def test_a_fault_that_stays_is_named(server: FaultyServer, tmp_path: Path, always: Reply, message: str) -> None:
    if always.close_after is not None:
        always = Reply(close_after=always.close_after, ignore_range=True)
    server.plan(PATH, then=always)
    with pytest.raises(DataError, match=message) as raised:
        bring(server, tmp_path / "a", retry=RETRY if always.stall_after is None else IMPATIENT)
    assert str(raised.value).startswith(server.root + URL_PATH)
    assert len(server.seen) == 3


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tried 3 times, at last the connection failed .*Connection refused"):
        read_bytes("http://127.0.0.1:9/manifest.json?sig=secret", RETRY)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, r"not found \(HTTP 404 Not Found\); correct the address"),
        (403, r"access refused \(HTTP 403 Forbidden\); give credentials that may read it"),
        (401, r"access refused \(HTTP 401 Unauthorized\); give credentials"),
        (400, "the server answered HTTP 400 Bad Request, expected the file; correct the address"),
    ],
)
def test_refusals_are_not_tried_again(server: FaultyServer, status: int, message: str) -> None:
    server.plan(PATH, Reply(status=status))
    with pytest.raises(DataError, match=message) as raised:
        read_bytes(server.root + URL_PATH + "?sig=secret", RETRY)
    assert isinstance(raised.value, NotFoundError) == (status == 404)
    assert "secret" not in str(raised.value)
    assert len(server.seen) == 1


def test_credentials_of_the_address_are_used_and_not_shown(server: FaultyServer) -> None:
    url = server.plan("/none").replace("http://", "http://me:secret@")
    with pytest.raises(NotFoundError) as raised:
        read_bytes(url, RETRY)
    assert server.seen[0].authorization == "Basic bWU6c2VjcmV0"
    assert "secret" not in str(raised.value)


def test_sizes_that_are_wrong_cost_no_transfer(server: FaultyServer, tmp_path: Path) -> None:
    url = server.root + URL_PATH
    with pytest.raises(DataError, match="at last it had 300000 bytes, expected 7; put the right file there"):
        download(url, tmp_path / "a", RETRY, expected_bytes=7, expected_sha256=None)
    with pytest.raises(DataError, match="has 300000 bytes or more, room is for 1000; raise the limit of the cache"):
        download(url, tmp_path / "b", RETRY, expected_bytes=None, expected_sha256=None, most_bytes=1000)
    server.plan(PATH, Reply(untold_size=True))
    with pytest.raises(DataError, match="bytes or more, room is for 1000"):
        download(url, tmp_path / "b", RETRY, expected_bytes=None, expected_sha256=None, most_bytes=1000)
    assert (tmp_path / "b").stat().st_size < 100_000


# --- S3 --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3(s3_process: S3Server) -> S3Server:
    """A real S3 server with objects in both buckets."""
    running, client = s3_process, s3_process.client()
    for key in ("set/shard-00.tar", "set/shard-01.tar", "set/manifest.json", "other/shard 02 ?#+%20.tar", "top"):
        client.put_object(Bucket=running.private, Key=key, Body=CONTENT if "tar" in key else b"{}")
    client.put_object(Bucket=running.public, Key="open.json", Body=b"{}", ACL="public-read")
    return running


@pytest.fixture
def s3_environment(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Sets the environment that new clients are made from."""

    def set_environment(variables: dict[str, str]) -> None:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in (NO_OTHER_CREDENTIALS | variables).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(transports, "_s3_clients", transports._Clients(transports._make_s3_client))

    return set_environment


def test_objects_on_s3_are_read_listed_and_cached(
    s3: S3Server, s3_environment: Callable[[dict[str, str]], None], tmp_path: Path
) -> None:
    s3_environment(s3.environment())
    root = f"s3://{s3.private}"
    assert read_bytes(f"{root}/set/manifest.json", RETRY) == b"{}"
    assert list_folder(root, RETRY) == ["other", "set", "top"]
    assert list_folder(f"{root}/set/", RETRY) == ["manifest.json", "shard-00.tar", "shard-01.tar"]
    assert expand(f"{root}/*/shard*.tar", RETRY) == [
        f"{root}/other/shard 02 ?#+%20.tar",
        f"{root}/set/shard-00.tar",
        f"{root}/set/shard-01.tar",
    ]
    cache = ShardCache(tmp_path, 1_000_000, RETRY)
    for url in expand(f"{root}/*/*.tar", RETRY):
        copy = cache.fetch(url, expected_bytes=len(CONTENT), expected_sha256=SHA256)
        assert copy.read_bytes() == CONTENT
    with pytest.raises(DataError, match="matches nothing"):
        expand(f"{root}/none/*.tar", RETRY)


def test_a_transfer_from_s3_goes_on_where_it_broke_off(
    s3: S3Server, s3_environment: Callable[[dict[str, str]], None]
) -> None:
    s3_environment(s3.environment())
    url = f"s3://{s3.private}/set/shard-00.tar"
    with transports.open_body(url, 0, None, 5.0) as body:
        assert (body.start, body.size, next(body.chunks)) == (0, len(CONTENT), CONTENT[: transports.CHUNK_BYTES])
    with transports.open_body(url, 299_000, body.validator, 5.0) as rest:
        assert (rest.start, rest.size, b"".join(rest.chunks)) == (299_000, len(CONTENT), CONTENT[299_000:])
    later_version = transports.open_body(url, 299_000, '"0123456789abcdef0123456789abcdef"', 5.0)
    with pytest.raises(transports.TransferFault, match="changed meanwhile") as raised, later_version:
        pass
    assert raised.value.kind == "anew"


def test_listings_of_several_pages_are_whole(s3: S3Server, s3_environment: Callable[[dict[str, str]], None]) -> None:
    s3_environment(s3.environment())
    client = s3.client()
    names = [f"{number:04d}.tar" for number in range(1005)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: client.put_object(Bucket=s3.private, Key=f"many/{name}", Body=b""), names))
    assert list_folder(f"s3://{s3.private}/many", RETRY) == names


def test_missing_objects_and_refused_access_on_s3_are_told_apart(
    s3: S3Server, s3_environment: Callable[[dict[str, str]], None]
) -> None:
    s3_environment(s3.environment())
    with pytest.raises(NotFoundError, match=r"s3://.*/none: not found \(HTTP 404 NoSuchKey\)"):
        read_bytes(f"s3://{s3.private}/none", RETRY)
    with pytest.raises(NotFoundError, match=r"not found \(HTTP 404 NoSuchBucket\)"):
        read_bytes(f"s3://no-{s3.private}/none", RETRY)
    with pytest.raises(NotFoundError, match="NoSuchBucket"):
        list_folder(f"s3://no-{s3.private}", RETRY)
    with pytest.raises(DataError, match=r"bucket name.*correct the address"):
        read_bytes("s3://No Bucket/none", RETRY)
    s3_environment(s3.environment() | {"AWS_SECRET_ACCESS_KEY": "wrong"})
    with pytest.raises(DataError, match=r"access refused \(HTTP 403 SignatureDoesNotMatch\); give credentials"):
        read_bytes(f"s3://{s3.private}/top", RETRY)


def test_doctor_tries_the_store_of_checkpoints_and_leaves_nothing(
    s3: S3Server, s3_environment: Callable[[dict[str, str]], None]
) -> None:
    def finding(target: str) -> diagnosis.Finding:
        section = CheckpointSection(upload=target)
        return diagnosis.check_upload(Config(checkpoint=section))[0]

    s3_environment(s3.environment())
    assert finding(f"s3://{s3.private}/runs/a").level == "ok"
    assert "Contents" not in s3.client().list_objects_v2(Bucket=s3.private, Prefix="runs/a")
    s3_environment(s3.environment() | {"AWS_SECRET_ACCESS_KEY": "wrong"})
    refused = finding(f"s3://{s3.private}/runs")
    assert refused.level == "error" and "may write it" in refused.fix
    s3_environment(s3.environment() | {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"})
    down = finding(f"s3://{s3.private}/runs")
    assert down.level == "error" and "the connection failed" in down.found


def test_public_objects_need_no_credentials(s3: S3Server, s3_environment: Callable[[dict[str, str]], None]) -> None:
    s3_environment({"AWS_ENDPOINT_URL": s3.endpoint})
    assert read_bytes(f"s3://{s3.public}/open.json", RETRY) == b"{}"
    assert list_folder(f"s3://{s3.public}", RETRY) == ["open.json"]
    with pytest.raises(DataError, match=r"access refused \(HTTP 403 .*\); give credentials"):
        read_bytes(f"s3://{s3.private}/top", RETRY)


@pytest.mark.parametrize(
    "first",
    [
        Reply(status=503, headers=(("Retry-After", "0"),)),
        Reply(status=0),
        Reply(close_after=200_000),
        Reply(corrupt=True),
    ],
    ids=["503", "hang-up", "broken-off", "corrupt"],
)
def test_faults_of_s3_are_outlived(
    server: FaultyServer,
    s3_environment: Callable[[dict[str, str]], None],
    tmp_path: Path,
    first: Reply,
) -> None:
    s3_environment({"AWS_ENDPOINT_URL": server.root})
    server.plan(PATH, first)
    download("s3:/" + PATH, tmp_path / "a", RETRY, expected_bytes=None, expected_sha256=SHA256)
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert len(server.seen) == 2  # botocore tries once, and counting is ours
    if first.close_after:
        assert ranges(server) == [None, "bytes=200000-"]


def test_a_stall_of_s3_is_told(server: FaultyServer, s3_environment: Callable[[dict[str, str]], None]) -> None:
    s3_environment({"AWS_ENDPOINT_URL": server.root})
    server.plan("/set/a", then=Reply(stall_after=10))
    server.files["/set/a"] = CONTENT
    with pytest.raises(DataError, match=r"s3://set/a: tried 3 times, at last nothing came for 0\.8 s"):
        read_bytes("s3://set/a", IMPATIENT)

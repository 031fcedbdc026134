"""Transfers and the cache of shards against real servers: one that fails by plan, and one that speaks S3."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faulty_http import FaultyServer, Reply
from s3_server import NO_OTHER_CREDENTIALS, S3Server, missing_program, s3_server

from sparselt_dist.data import transports
from sparselt_dist.data.cache import ShardCache
from sparselt_dist.data.storage import NotFoundError, RetryPolicy, download, expand, list_folder, read_bytes
from sparselt_dist.errors import DataError

RETRY = RetryPolicy(attempts=3, timeout_seconds=0.4, first_pause_seconds=0.01)
CONTENT = os.urandom(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PATH = "/set/shard 0.tar"
URL_PATH = "/set/shard%200.tar"


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    faulty = FaultyServer()
    faulty.files[PATH] = CONTENT
    with faulty.running():
        yield faulty


def bring(server: FaultyServer, target: Path, *, sha256: str | None = SHA256) -> str:
    return download(server.root + URL_PATH, target, RETRY, expected_bytes=None, expected_sha256=sha256)


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
    assert bring(server, tmp_path / "a") == SHA256
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
    found = bring(server, tmp_path / "a", sha256=None)
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
        (Reply(stall_after=0), r"tried 3 times, at last nothing came for 0\.4 s; check the server and the network"),
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
        bring(server, tmp_path / "a")
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


# --- the cache -------------------------------------------------------------------------------------------------------

# Several threads fetch all objects, each in its own order, and read them; a line says what they found.
WORKER = """\
import hashlib, json, random, sys, threading
from pathlib import Path
from sparselt_dist.data.cache import ShardCache
from sparselt_dist.data.storage import RetryPolicy

folder, limit, seed, wanted = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
cache = ShardCache(Path(folder), limit, RetryPolicy(attempts=3, timeout_seconds=5.0, first_pause_seconds=0.05))
wrong = []

def read(url, size, sha256):
    while True:
        try:
            return cache.fetch(url, expected_bytes=size, expected_sha256=sha256).read_bytes()
        except FileNotFoundError:
            pass  # removed before it was opened

def work(number):
    order = list(wanted)
    random.Random(seed * 100 + number).shuffle(order)
    cache.prefetch(tuple(item) for item in order[:3])
    for url, size, sha256 in order:
        if hashlib.sha256(read(url, size, sha256)).hexdigest() != sha256:
            wrong.append(url)

threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print("wrong", wrong)
"""


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def many_objects(server: FaultyServer, number: int, size: int) -> list[tuple[str, int, str]]:
    """(address, size, sha256) of objects that the server has."""
    wanted = []
    for count in range(number):
        content = os.urandom(size)
        server.files[f"/many/{count}.tar"] = content
        wanted.append((f"{server.root}/many/{count}.tar", size, hashlib.sha256(content).hexdigest()))
    return wanted


def taken(folder: Path) -> int:
    """Bytes of copies and downloads, while neither can change."""
    with (folder / "space.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        total = 0
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # a download that gives up gives its room back without asking
                total += path.stat().st_size
        return total


def run_workers(folder: Path, limit: int, wanted: list[tuple[str, int, str]]) -> int:
    """Let four processes fetch everything; the most bytes ever taken."""
    folder.mkdir()
    workers = [start(WORKER, str(folder), str(limit), str(seed), json.dumps(wanted)) for seed in range(4)]
    most = 0
    while any(worker.poll() is None for worker in workers):
        most = max(most, taken(folder))
        time.sleep(0.001)
    assert [worker.communicate()[0] for worker in workers] == ["wrong []\n"] * 4
    return most


def test_processes_and_threads_bring_each_object_once(server: FaultyServer, tmp_path: Path) -> None:
    wanted = many_objects(server, 8, 200_000)
    for count in range(8):
        server.plan(f"/many/{count}.tar", Reply(stall_after=1000, stall_seconds=0.1))
    most = run_workers(tmp_path / "cache", 8 * 200_000, wanted)
    assert [server.times_asked(f"/many/{count}.tar") for count in range(8)] == [1] * 8
    assert most == 8 * 200_000
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith("partial-")]


def test_the_bound_holds_whatever_processes_do(server: FaultyServer, tmp_path: Path) -> None:
    wanted = many_objects(server, 8, 200_000)
    most = run_workers(tmp_path / "cache", 700_000, wanted)
    assert 600_000 <= most <= 700_000


def test_what_was_asked_for_the_longest_ago_goes_first(server: FaultyServer, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 300, RETRY)
    (tmp_path / "notes.txt").write_bytes(b"x" * 1000)  # not ours: neither counted nor removed
    a, b, c, d = (lambda item=item: fetch(cache, item) for item in many_objects(server, 4, 100))
    for each in (a, b, c):
        each()
    time.sleep(0.02)  # times of files are in ticks of the kernel's clock
    a()
    with b().open("rb") as held:
        time.sleep(0.02)
        a()
        c()
        d()
        assert len(held.read()) == 100  # removed, and still readable
    assert [server.times_asked(f"/many/{count}.tar") for count in range(4)] == [1, 1, 1, 1]
    b()
    assert server.times_asked("/many/1.tar") == 2
    assert (tmp_path / "notes.txt").exists()


def fetch(cache: ShardCache, wanted: tuple[str, int | None, str | None]) -> Path:
    url, size, sha256 = wanted
    return cache.fetch(url, expected_bytes=size, expected_sha256=sha256)


def test_a_copy_is_named_like_its_object_and_replaced_when_its_size_is_wrong(
    server: FaultyServer, tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path / "cache", 1_000_000, RETRY)
    copy = fetch(cache, (server.root + URL_PATH, len(CONTENT), SHA256))
    assert copy.name.endswith("-shard 0.tar")
    copy.write_bytes(b"short")
    assert fetch(cache, (server.root + URL_PATH, len(CONTENT), SHA256)).read_bytes() == CONTENT
    assert len(server.seen) == 2
    assert fetch(cache, (server.root + URL_PATH, None, None)) != copy  # not verified against the checksum


def test_objects_that_cannot_be_had_leave_nothing(server: FaultyServer, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 1_000_000, RETRY)
    with pytest.raises(DataError, match="has 2000000 bytes, the cache may hold 1000000; raise the limit"):
        cache.fetch("http://h/large.tar", expected_bytes=2_000_000, expected_sha256=None)
    with pytest.raises(NotFoundError, match="not found"):
        cache.fetch(server.root + "/none.tar", expected_bytes=None, expected_sha256=None)
    small = ShardCache(tmp_path / "cache", 1000, RETRY)
    with pytest.raises(DataError, match="has 300000 bytes or more, room is for 1000"):
        small.fetch(server.root + URL_PATH, expected_bytes=None, expected_sha256=None)
    assert taken(tmp_path / "cache") == 0


def test_a_folder_that_cannot_be_used_is_named(server: FaultyServer, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    cache = ShardCache(tmp_path / "cache", 1_000_000, RETRY)
    wanted = (server.root + URL_PATH, len(CONTENT), SHA256)
    cache.prefetch([wanted])
    with pytest.raises(DataError, match=r"cache: cannot keep copies of shards: .*; give the cache a folder"):
        fetch(cache, wanted)


def test_those_who_wait_for_a_failure_do_not_all_repeat_it(server: FaultyServer, tmp_path: Path) -> None:
    url = server.plan(PATH, then=Reply(status=500))

    def fails(_: int) -> str:
        cache = ShardCache(tmp_path, 1_000_000, RetryPolicy(attempts=4, first_pause_seconds=0.1))
        with pytest.raises(DataError) as raised:
            cache.fetch(url, expected_bytes=None, expected_sha256=None)
        return str(raised.value)

    with ThreadPoolExecutor(4) as pool:
        messages = list(pool.map(fails, range(4)))
    assert sum("tried 4 times" in message for message in messages) == 1
    assert len(server.seen) == 4 + 3


def test_prefetched_objects_are_there_and_do_not_displace_each_other(server: FaultyServer, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 250_000, RETRY)
    wanted = many_objects(server, 4, 100_000)
    fetch(cache, wanted[3])
    cache.prefetch(wanted[:3])
    wait_until(lambda: len(list(tmp_path.glob("*.tar"))) == 2 and not prefetching())  # the room there is
    assert not list(tmp_path.glob("*-3.tar"))  # not wanted now
    for item in wanted[:3]:
        fetch(cache, item)
    assert [server.times_asked(f"/many/{count}.tar") for count in range(3)] == [1, 1, 1]
    assert taken(tmp_path) <= 250_000


def test_a_failure_ahead_of_time_is_none(server: FaultyServer, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 1_000_000, RETRY)
    url = server.plan(PATH, *[Reply(status=500)] * 3).replace(PATH, URL_PATH)
    cache.prefetch([(url, None, None)])
    wait_until(lambda: len(server.seen) == 3 and not prefetching())
    assert fetch(cache, (url, None, None)).read_bytes() == CONTENT


def prefetching() -> bool:
    return any(thread.name == "prefetch" for thread in threading.enumerate())


def wait_until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


HOLDER = """\
import os, sys, time
from pathlib import Path
from sparselt_dist.data.cache import ShardCache
from sparselt_dist.data.storage import RetryPolicy

folder, url, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
cache = ShardCache(Path(folder), 400_000, RetryPolicy())
warm = cache.fetch(sys.argv[4], expected_bytes=None, expected_sha256=None)
cache.prefetch([(url, size, None)])
while not any(path.name.startswith("partial-") and path.stat().st_size for path in Path(folder).iterdir()):
    time.sleep(0.01)
if os.fork() == 0:
    warm.unlink()
    cache.fetch(sys.argv[4], expected_bytes=None, expected_sha256=None)
    cache.prefetch([(sys.argv[4] + "?again=1", None, None)])
    while not list(Path(folder).glob("*-warm.tar")) or len(list(Path(folder).glob("*.tar"))) < 2:
        time.sleep(0.01)
    print("child uses the cache", flush=True)
time.sleep(60)
"""


def test_a_dead_holder_frees_its_object_and_its_room(server: FaultyServer, tmp_path: Path) -> None:
    server.files["/warm.tar"] = b"warm"
    url = server.plan(PATH, Reply(stall_after=1000)).replace(PATH, URL_PATH)
    holder = start(HOLDER, str(tmp_path), url, str(len(CONTENT)), f"{server.root}/warm.tar")
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "child uses the cache\n"  # which lives on, with all that it inherited
        os.kill(holder.pid, signal.SIGKILL)
        begun = time.monotonic()
        cache = ShardCache(tmp_path, 400_000, RETRY)
        (other,) = many_objects(server, 1, 350_000)
        assert fetch(cache, other).stat().st_size == 350_000
        assert fetch(cache, (url, len(CONTENT), None)).read_bytes() == CONTENT
        assert time.monotonic() - begun < 5
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.communicate()
    assert taken(tmp_path) <= 400_000


# --- S3 --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server with objects in both buckets."""
    if missing_program():
        pytest.skip(missing_program())
    with s3_server(tmp_path_factory.mktemp("s3")) as running:
        client = running.client()
        for key in ("set/shard-00.tar", "set/shard-01.tar", "set/manifest.json", "other/shard 02 ?#+%20.tar", "top"):
            client.put_object(Bucket=running.private, Key=key, Body=CONTENT if "tar" in key else b"{}")
        client.put_object(Bucket=running.public, Key="open.json", Body=b"{}", ACL="public-read")
        yield running


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


PATIENT = RetryPolicy(attempts=3, timeout_seconds=5.0, first_pause_seconds=0.01)


def test_objects_on_s3_are_read_listed_and_cached(
    s3: S3Server, s3_environment: Callable[[dict[str, str]], None], tmp_path: Path
) -> None:
    s3_environment(s3.environment())
    root = f"s3://{s3.private}"
    assert read_bytes(f"{root}/set/manifest.json", PATIENT) == b"{}"
    assert list_folder(root, PATIENT) == ["other", "set", "top"]
    assert list_folder(f"{root}/set/", PATIENT) == ["manifest.json", "shard-00.tar", "shard-01.tar"]
    assert expand(f"{root}/*/shard*.tar", PATIENT) == [
        f"{root}/other/shard 02 ?#+%20.tar",
        f"{root}/set/shard-00.tar",
        f"{root}/set/shard-01.tar",
    ]
    cache = ShardCache(tmp_path, 1_000_000, PATIENT)
    for url in expand(f"{root}/*/*.tar", PATIENT):
        assert fetch(cache, (url, len(CONTENT), SHA256)).read_bytes() == CONTENT
    with pytest.raises(DataError, match="matches nothing"):
        expand(f"{root}/none/*.tar", PATIENT)


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
    assert list_folder(f"s3://{s3.private}/many", PATIENT) == names


def test_missing_objects_and_refused_access_on_s3_are_told_apart(
    s3: S3Server, s3_environment: Callable[[dict[str, str]], None]
) -> None:
    s3_environment(s3.environment())
    with pytest.raises(NotFoundError, match=r"s3://.*/none: not found \(HTTP 404 NoSuchKey\)"):
        read_bytes(f"s3://{s3.private}/none", PATIENT)
    with pytest.raises(NotFoundError, match=r"not found \(HTTP 404 NoSuchBucket\)"):
        read_bytes(f"s3://no-{s3.private}/none", PATIENT)
    with pytest.raises(NotFoundError, match="NoSuchBucket"):
        list_folder(f"s3://no-{s3.private}", PATIENT)
    with pytest.raises(DataError, match=r"bucket name.*correct the address"):
        read_bytes("s3://No Bucket/none", PATIENT)
    s3_environment(s3.environment() | {"AWS_SECRET_ACCESS_KEY": "wrong"})
    with pytest.raises(DataError, match=r"access refused \(HTTP 403 SignatureDoesNotMatch\); give credentials"):
        read_bytes(f"s3://{s3.private}/top", PATIENT)


def test_public_objects_need_no_credentials(s3: S3Server, s3_environment: Callable[[dict[str, str]], None]) -> None:
    s3_environment({"AWS_ENDPOINT_URL": s3.endpoint})
    assert read_bytes(f"s3://{s3.public}/open.json", PATIENT) == b"{}"
    assert list_folder(f"s3://{s3.public}", PATIENT) == ["open.json"]
    with pytest.raises(DataError, match=r"access refused \(HTTP 403 AccessDenied\); give credentials"):
        read_bytes(f"s3://{s3.private}/top", PATIENT)


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
    with pytest.raises(DataError, match=r"s3://set/a: tried 3 times, at last nothing came for 0\.4 s"):
        read_bytes("s3://set/a", RETRY)

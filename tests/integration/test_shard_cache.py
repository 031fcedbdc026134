"""The cache of shards under several threads and processes at once, fed by a real server that fails by plan."""

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

from sparselt_dist.data.cache import ShardCache
from sparselt_dist.data.storage import NotFoundError, RetryPolicy
from sparselt_dist.errors import DataError

RETRY = RetryPolicy(attempts=3, timeout_seconds=10.0, first_pause_seconds=0.01)
CONTENT = os.urandom(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PATH = "/set/shard 0.tar"
URL_PATH = "/set/shard%200.tar"


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer(files={PATH: CONTENT}).running() as running:
        yield running


# Several threads fetch all objects, each in its own order, and read them; a line says what they found.
WORKER = """\
import hashlib, json, random, sys, threading
from pathlib import Path
from sparselt_dist.data.cache import ShardCache
from sparselt_dist.data.storage import RetryPolicy

folder, limit, seed, wanted = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
cache = ShardCache(Path(folder), limit, RetryPolicy(attempts=3, timeout_seconds=10.0, first_pause_seconds=0.05))
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
    return max(most, taken(folder))


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
    assert copy.name.endswith("-shard_0.tar")  # what a file name should not hold is left out
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
    cache.prefetch(wanted[:2])
    wait_until(lambda: not prefetching())
    assert sorted(path.name[-5:] for path in tmp_path.glob("*.tar")) == [
        "0.tar",
        "1.tar",
    ]  # the other is not wanted now
    cache.prefetch(wanted[:3])
    wait_until(lambda: not prefetching())
    for item in wanted[:3]:
        fetch(cache, item)
    assert [server.times_asked(f"/many/{count}.tar") for count in range(3)] == [1, 1, 1]
    assert taken(tmp_path) <= 250_000


def test_a_look_for_dead_downloads_does_not_turn_a_prefetch_away(server: FaultyServer, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 250_000, RETRY)
    (wanted,) = many_objects(server, 1, 1000)
    name = fetch(cache, wanted).name
    (tmp_path / name).unlink()
    with contextlib.ExitStack() as looking:
        for path in (tmp_path / "space.lock", tmp_path / f"partial-{name}"):
            fcntl.flock(looking.enter_context(path.open("w")), fcntl.LOCK_EX)
        cache.prefetch([wanted])
        time.sleep(0.2)
    wait_until(lambda: not prefetching())
    assert (tmp_path / name).exists()


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


@pytest.mark.timeout(60)
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

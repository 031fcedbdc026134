"""Names, patterns and listings of local and remote locations, and the pauses between tries; no server."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sparselt_dist.data import storage
from sparselt_dist.data.cache import ShardCache
from sparselt_dist.data.storage import NotFoundError, RetryPolicy, basename, expand, is_remote, join, parent
from sparselt_dist.data.transports import Body, Kind, TransferFault
from sparselt_dist.errors import DataError

RETRY = RetryPolicy()


@pytest.mark.parametrize("location", ["http://h/x", "https://h/x", "s3://b/x"])
def test_addresses_are_remote(location: str) -> None:
    assert is_remote(location)


@pytest.mark.parametrize("location", ["/data/x", "x", "s3:/b", "data/http://x", "gs://b/x"])
def test_everything_else_is_not(location: str) -> None:
    assert not is_remote(location)


@pytest.mark.parametrize(
    ("folder", "name", "whole"),
    [
        ("/data/set", "a.tar", "/data/set/a.tar"),
        ("/data/set/", "a.tar", "/data/set/a.tar"),
        ("set", "tokenizer/vocab.txt", "set/tokenizer/vocab.txt"),
        ("s3://bucket", "a.tar", "s3://bucket/a.tar"),
        ("s3://bucket/set/", "a?b #1.tar", "s3://bucket/set/a?b #1.tar"),
        ("https://h:81/set", "a.tar", "https://h:81/set/a.tar"),
        ("https://h", "a.tar", "https://h/a.tar"),
        ("https://user:pw@h/set/?sig=a%2Fb&v=1", "a 1?.tar", "https://user:pw@h/set/a%201%3F.tar?sig=a%2Fb&v=1"),
    ],
)
def test_join_and_its_inverses(folder: str, name: str, whole: str) -> None:
    assert join(folder, name) == whole
    assert basename(whole) == name.rpartition("/")[2]
    if "/" not in name:
        assert parent(whole) == folder.replace("/?", "?").rstrip("/")


def test_parent_and_basename_of_folders() -> None:
    assert parent("s3://bucket") == "s3://bucket"
    assert basename("s3://bucket/set/") == "set"
    assert parent("s3://bucket/set/") == "s3://bucket"
    assert parent("a.tar") == "."
    assert parent("/data/set/") == "/data"


def test_messages_show_no_secrets() -> None:
    assert storage.shown("https://me:secret@h:1/a.tar?sig=secret") == "https://h:1/a.tar"
    assert storage.shown("s3://bucket/a?b") == "s3://bucket/a?b"


def test_what_is_no_pattern_stays_as_it_is(tmp_path: Path) -> None:
    odd = tmp_path / "set{1}[2]"
    odd.mkdir()
    for location in ("/no/such/folder", "s3://bucket/set/", "https://h/set?sig=a*[1]", "http://[::1]:80/x", str(odd)):
        assert expand(location, RETRY) == [location]


def test_braces_of_every_kind_of_location() -> None:
    assert expand("s3://b/shard-{008..010}.tar", RETRY) == [f"s3://b/shard-0{n}.tar" for n in ("08", "09", "10")]
    assert expand("https://h/{b,a,b}.tar?k=v", RETRY) == ["https://h/a.tar?k=v", "https://h/b.tar?k=v"]
    assert expand("/d/{x,y}/{0..1}", RETRY) == ["/d/x/0", "/d/x/1", "/d/y/0", "/d/y/1"]


def test_local_globs_are_sorted_and_without_doubles(tmp_path: Path) -> None:
    for name in ("b1.tar", "b0.tar", "c.tar", "b0.txt"):
        (tmp_path / name).touch()
    found = expand(f"{tmp_path}/{{b*,*0}}.tar", RETRY)
    assert [os.path.basename(path) for path in found] == ["b0.tar", "b1.tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("/no/such/*.tar", "/no/such/*.tar: matches nothing; correct the pattern"),
        ("https://h/set/*.tar", "https://h/set/*.tar: a web server lists no files.*name the files with braces"),
        ("https://h/a[01].tar", "name the files with braces"),
        ("https://h/a?.tar", "name the files with braces"),
        ("https://me:pw@h/{a.tar", "https://h/{a.tar: its braces do not match; write {000..127}"),
        ("s3://b*/a.tar", "buckets cannot be listed; name the bucket"),
        ("gs://b/a.tar", "gs://b/a.tar: cannot read gs://; expected a local path, http://, https:// or s3://"),
    ],
)
def test_patterns_that_name_nothing(pattern: str, message: str) -> None:
    with pytest.raises(DataError) as raised:
        expand(pattern, RETRY)
    assert all(part in str(raised.value) for part in message.split(".*"))


def test_a_missing_part_of_several_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch()
    with pytest.raises(DataError, match=r"b\*\.tar: matches nothing"):
        expand(f"{tmp_path}/{{a,b}}*.tar", RETRY)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A bucket of some keys in place of a server; gives the prefixes that are asked for."""
    keys = ["x/shard-00.tar", "x/shard-01.tar", "x/manifest.json", "x/", "y/shard-02.tar", "z/deep/shard-03.tar", "top"]
    asked: list[str] = []

    def list_s3(name: str, prefix: str, timeout_seconds: float) -> list[str]:
        assert (name, timeout_seconds) == ("b", RETRY.timeout_seconds)
        asked.append(prefix)
        rests = {key.removeprefix(prefix).partition("/")[:2] for key in keys if key.startswith(prefix)}
        return [prefix + "".join(rest) for rest in rests]

    monkeypatch.setattr(storage, "list_s3", list_s3)
    return asked


@pytest.mark.parametrize(
    ("pattern", "found", "asked"),
    [
        ("s3://b/x/shard-*.tar", ["x/shard-00.tar", "x/shard-01.tar"], ["x/shard-"]),
        ("s3://b/?/shard-0[12].tar", ["x/shard-01.tar", "y/shard-02.tar"], ["", "x/shard-0", "y/shard-0", "z/shard-0"]),
        ("s3://b/*/manifest.json", ["x/manifest.json"], ["", "x/manifest.json", "y/manifest.json", "z/manifest.json"]),
        ("s3://b/*", ["top", "x", "y", "z"], [""]),
        ("s3://b/{x,y}/*.tar", ["x/shard-00.tar", "x/shard-01.tar", "y/shard-02.tar"], ["x/", "y/"]),
    ],
)
def test_globs_on_s3_list_no_more_than_they_must(
    bucket: list[str], pattern: str, found: list[str], asked: list[str]
) -> None:
    assert expand(pattern, RETRY) == [f"s3://b/{key}" for key in found]
    assert sorted(bucket) == asked


def test_folders_are_listed(bucket: list[str], tmp_path: Path) -> None:
    assert storage.list_folder("s3://b/x", RETRY) == ["manifest.json", "shard-00.tar", "shard-01.tar"]
    assert storage.list_folder("s3://b", RETRY) == ["top", "x", "y", "z"]
    assert storage.list_folder("s3://b/z/", RETRY) == ["deep"]
    with pytest.raises(NotFoundError, match="s3://b/none: holds nothing"):
        storage.list_folder("s3://b/none", RETRY)
    (tmp_path / "b").touch()
    (tmp_path / "a").mkdir()
    assert storage.list_folder(str(tmp_path), RETRY) == ["a", "b"]
    with pytest.raises(NotFoundError, match="none: no such file or folder"):
        storage.list_folder(str(tmp_path / "none"), RETRY)
    with pytest.raises(
        DataError, match=r"lists no files; name the shards.*https://h/set/shard-\{000000\.\.000127\}\.tar"
    ):
        storage.list_folder("https://h/set?sig=secret", RETRY)


def test_local_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"{}")
    assert storage.read_bytes(str(tmp_path / "manifest.json"), RETRY) == b"{}"
    with pytest.raises(NotFoundError, match="no such file"):
        storage.read_bytes(str(tmp_path / "none"), RETRY)
    with pytest.raises(DataError, match="Is a directory"):
        storage.read_bytes(str(tmp_path), RETRY)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses taken, in seconds, instead of taking them."""
    taken: list[float] = []
    monkeypatch.setattr("time.sleep", taken.append)
    return taken


def answer_with(monkeypatch: pytest.MonkeyPatch, *faults: TransferFault) -> None:
    """Let tries end in these faults, one after the other, and then succeed."""
    left = list(faults)

    @contextmanager
    def open_body(url: str, start: int, validator: str | None, timeout_seconds: float) -> Iterator[Body]:
        if left:
            raise left.pop(0)
        yield Body(iter([b"content"]), 0, 7, None)

    monkeypatch.setattr(storage, "open_body", open_body)


def test_pauses_double_up_to_half_a_minute(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    answer_with(monkeypatch, *[TransferFault("broken", "again")] * 8)
    assert storage.read_bytes("http://h/a", RetryPolicy(attempts=9)) == b"content"
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30]


def test_a_server_that_says_when_to_come_back_is_obeyed(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    faults = [TransferFault("busy", "again", pause_seconds=seconds) for seconds in (7.0, 3600.0, 0.0)]
    answer_with(monkeypatch, *faults)
    assert storage.read_bytes("http://h/a", RETRY) == b"content"
    assert pauses == [7, 30, 0]


def test_the_last_fault_is_named_when_tries_are_spent(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    answer_with(monkeypatch, TransferFault("first", "again"), TransferFault("second", "again"))
    with pytest.raises(
        DataError, match=r"^http://h/a: tried 2 times, at last second; check the server and the network"
    ):
        storage.read_bytes("http://h/a?sig=secret", RetryPolicy(attempts=2))
    assert pauses == [0.5]


@pytest.mark.parametrize("kind", ["missing", "refused"])
def test_what_no_try_helps_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, pauses: list[float], kind: Kind) -> None:
    answer_with(monkeypatch, TransferFault("found so", kind))
    with pytest.raises(DataError, match=r"^http://h/a: found so; ") as raised:
        storage.read_bytes("http://h/a", RETRY)
    assert isinstance(raised.value, NotFoundError) == (kind == "missing")
    assert pauses == []


def test_a_full_disk_is_told_from_a_broken_connection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answer_with(monkeypatch)
    with pytest.raises(DataError, match=r"none/a: http://h/a cannot be written there: No such file or directory; free"):
        storage.download("http://h/a", tmp_path / "none" / "a", RETRY, expected_bytes=None, expected_sha256=None)


def test_short_writes_are_completed() -> None:
    class Reluctant(io.BytesIO):
        def write(self, data: object) -> int:
            return super().write(bytes(data)[:2])  # type: ignore[call-overload]

    file = Reluctant()
    arrived = storage._Arrived(file)
    arrived.append(b"content")
    assert file.getvalue() == b"content"
    assert arrived.size == 7


def test_a_cache_travels_to_workers(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 100, RETRY)
    cache.prefetch([])
    copied = pickle.loads(pickle.dumps(cache))
    assert (copied.folder, copied._limit_bytes, copied._retry) == (tmp_path, 100, RETRY)

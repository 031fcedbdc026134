"""Where shards lie: local paths, http(s):// and s3:// addresses; their names, patterns, and transfers that do not give up.

A transfer is tried several times with growing pauses, goes on where it broke off, and hashes what arrives: it ends with
the object that was expected or with a DataError. Over HTTP a name may be followed by a query (the token of a signed
address), which names of other files in the same folder inherit and messages leave out. On S3 every character
belongs to the key.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import io
import itertools
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

from sparselt_dist.data.transports import TransferFault, list_s3, open_body, probe_s3, put_s3, split_s3
from sparselt_dist.errors import DataError
from sparselt_dist.redaction import shown

LONGEST_PAUSE_SECONDS = 30.0
_PROBE = ".sparselt-doctor"
_REMOTE = ("http://", "https://", "s3://")

Result = TypeVar("Result")


class NotFoundError(DataError):
    """There is no such file or object."""


@dataclass(frozen=True)
class RetryPolicy:
    """How patient a transfer is.

    Args:
        attempts: tries in all, the first included.
        timeout_seconds: longest wait for a connection, and for the next byte.
        first_pause_seconds: pause after the first failure; doubled after each, at most 30 s. A server that says when
            to come back is obeyed up to 30 s instead.
    """

    attempts: int = 5
    timeout_seconds: float = 30.0
    first_pause_seconds: float = 0.5


# --- names -----------------------------------------------------------------------------------------------------------


def is_remote(location: str) -> bool:
    """Whether a location is an address that files must be fetched from."""
    return location.startswith(_REMOTE)


def _split_http(location: str) -> SplitResult | None:
    return urlsplit(location) if location.startswith(("http://", "https://")) else None


def join(folder: str, name: str) -> str:
    """The location of a file in a folder; an HTTP address keeps its query at its end."""
    parts = _split_http(folder)
    if parts is not None:
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def parent(location: str) -> str:
    """The folder that a file or folder lies in; an HTTP address keeps its query at its end."""
    parts = _split_http(location)
    if parts is not None:
        return urlunsplit(parts._replace(path=parts.path.rstrip("/").rpartition("/")[0]))
    if is_remote(location):
        bucket, key = split_s3(location)
        return f"s3://{bucket}/{key.rstrip('/').rpartition('/')[0]}".rstrip("/")
    return os.path.dirname(location.rstrip("/")) or "."


def basename(location: str) -> str:
    """The name of a file or folder without what it lies in."""
    parts = _split_http(location)
    if parts is not None:
        return unquote(parts.path.rstrip("/").rpartition("/")[2])
    path = split_s3(location)[1] if is_remote(location) else location
    return path.rstrip("/").rpartition("/")[2]


# --- patterns and listings -------------------------------------------------------------------------------------------


def expand(location: str, retry: RetryPolicy) -> list[str]:
    """The files or folders that a pattern names, sorted, without doubles; what is no pattern stays as it is.

    Braces ({000..127}, {a,b}) stand for all their alternatives, whether these exist or not. Then `*`, `?` and `[...]`
    match names that exist, each within one part of the path; over HTTP, where nothing can be listed, they are refused.

    Raises:
        DataError: a pattern is wrong, matches nothing, or cannot be resolved there.
    """
    if not is_remote(location):
        location = os.path.expanduser(location)
        if os.path.lexists(location):
            return [location]
    found = {match for each in _expand_braces(location) for match in _expand_glob(each, retry)}
    return sorted(found)


def _expand_braces(location: str) -> list[str]:
    if "{" not in location:
        return [location]
    import braceexpand

    try:
        return list(braceexpand.braceexpand(location))
    except ValueError as error:
        raise DataError(
            f"{shown(location)}: its braces do not match; write {{000..127}} for numbers and {{a,b}} for choices"
        ) from error


def _expand_glob(location: str, retry: RetryPolicy) -> list[str]:
    parts = _split_http(location)
    if parts is not None:
        # A question mark begins a query, but one that assigns nothing was meant as a pattern.
        if glob.has_magic(parts.path) or (parts.query and "=" not in parts.query):
            raise DataError(
                f"{shown(location)}: a web server lists no files, so *, ? and [...] cannot be resolved there; name the "
                "files with braces, as in shard-{000000..000127}.tar"
            )
        return [location]
    if not is_remote(location) and "://" in location:
        kind = location.partition("://")[0]
        raise DataError(f"{location}: cannot read {kind}://; expected a local path, http://, https:// or s3://")
    if not glob.has_magic(location) or (not is_remote(location) and os.path.lexists(location)):
        return [location]
    found = _glob_s3(location, retry) if is_remote(location) else glob.glob(location)
    if not found:
        raise DataError(f"{location}: matches nothing; correct the pattern, or put the shards there")
    return found


def _glob_s3(pattern: str, retry: RetryPolicy) -> list[str]:
    """Objects and folders, found by going down one part of the pattern at a time, as a shell does."""
    bucket, key = split_s3(pattern)
    if glob.has_magic(bucket):
        raise DataError(f"{pattern}: buckets cannot be listed; name the bucket, as in s3://bucket/shards/*.tar")
    parts = key.split("/")
    known = list(itertools.takewhile(lambda part: not glob.has_magic(part), parts))
    found = ["".join(f"{part}/" for part in known)]
    for part in parts[len(known) :]:
        folders = [name for name in found if name.endswith("/") or not name]
        found = [folder + name for folder in folders for name in _match_s3(bucket, folder, part, retry)]
    return [f"s3://{bucket}/{name.rstrip('/')}" for name in found]


def _match_s3(bucket: str, folder: str, pattern: str, retry: RetryPolicy) -> list[str]:
    """Names directly in a folder (a key that ends with "/", or "") that match; folders have "/" at their end."""
    literal = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    names = _list_s3(f"s3://{bucket}/{folder}{literal}", folder, retry)
    return [name for name in names if fnmatch.fnmatchcase(name.rstrip("/"), pattern)]


def _list_s3(prefix: str, folder: str, retry: RetryPolicy) -> list[str]:
    bucket, key = split_s3(prefix)
    keys = _with_retries(prefix, retry, lambda: list_s3(bucket, key, retry.timeout_seconds))
    return [name for name in (found.removeprefix(folder) for found in keys) if name.strip("/")]


def list_folder(location: str, retry: RetryPolicy) -> list[str]:
    """Names of the files and folders directly inside a folder, sorted.

    Raises:
        NotFoundError: there is no such folder.
        DataError: it cannot be listed, as nothing can over HTTP.
    """
    if _split_http(location) is not None:
        raise DataError(
            f"{shown(location)}: a web server lists no files; name the shards with braces, as in "
            f"{shown(join(location, 'shard-'))}{{000000..000127}}.tar"
        )
    if is_remote(location):
        folder = split_s3(location)[1].rstrip("/")
        folder = f"{folder}/" if folder else ""
        names = _list_s3(join(location, ""), folder, retry)
        if not names:
            raise NotFoundError(f"{location}: holds nothing; correct the address, or put the shards there")
        return sorted(name.rstrip("/") for name in names)
    return sorted(_local(location, lambda path: os.listdir(path)))


def _local(path: str, read: Callable[[str], Result]) -> Result:
    try:
        return read(path)
    except FileNotFoundError as cause:
        raise NotFoundError(f"{path}: no such file or folder; correct the path") from cause
    except OSError as cause:
        raise DataError(f"{path}: cannot be read: {cause.strerror or cause}; restore it, or name another") from cause


# --- transfers -------------------------------------------------------------------------------------------------------


def upload(path: Path, url: str, retry: RetryPolicy) -> None:
    """Store a local file at an s3:// address.

    Raises:
        DataError: it did not arrive, or access was refused.
        OSError: the file cannot be read.
    """
    _with_retries(url, retry, lambda: put_s3(path, url, retry.timeout_seconds))


def try_writing(folder: str, retry: RetryPolicy) -> None:
    """Store an empty object in an s3:// folder, look at it and remove it; where that is not allowed, it stays.

    Raises:
        DataError: there is no such bucket, it cannot be reached, or access was refused.
    """
    url = join(folder, _PROBE)
    _with_retries(url, retry, lambda: probe_s3(url, retry.timeout_seconds))


def read_bytes(url: str, retry: RetryPolicy) -> bytes:
    """The content of a small file, remote or local.

    Raises:
        NotFoundError: there is none.
        DataError: it cannot be had.
    """
    if not is_remote(url):
        return _local(url, lambda path: Path(path).read_bytes())
    content = io.BytesIO()
    _transfer(url, content, retry, _Expected(None, None, None))
    return content.getvalue()


def download(
    url: str,
    target: Path,
    retry: RetryPolicy,
    *,
    expected_bytes: int | None,
    expected_sha256: str | None,
    most_bytes: int | None = None,
) -> str:
    """Bring a remote object into a local file and return its sha256.

    What the file held is overwritten, and cut off beyond the object's end; after an error its content is undefined.

    Args:
        most_bytes: a larger object is refused as soon as it shows.

    Raises:
        NotFoundError: there is no such object.
        DataError: it cannot be had, stays different from what is expected, or cannot be written.
    """
    expected = _Expected(expected_bytes, expected_sha256, most_bytes)
    try:
        # Without buffer: a child forked meanwhile must not hold bytes that it could write a second time.
        with open(os.open(target, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=0) as file:
            return _transfer(url, file, retry, expected)
    except OSError as cause:
        raise DataError(
            f"{target}: {shown(url)} cannot be written there: {cause.strerror or cause}; free space, or choose another folder"
        ) from cause


@dataclass(frozen=True)
class _Expected:
    size: int | None
    sha256: str | None
    most_bytes: int | None


class _Arrived:
    """What has come of an object over all tries: in a file, and hashed."""

    def __init__(self, file: BinaryIO | io.RawIOBase) -> None:
        self._file = file
        self.start_anew()

    def start_anew(self) -> None:
        self._file.seek(0)
        self.hash = hashlib.sha256()
        self.size = 0
        self.validator: str | None = None

    def append(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) or 0 :]
        self.hash.update(data)
        self.size += len(data)

    def finish(self) -> str:
        self._file.truncate(self.size)
        return self.hash.hexdigest()


def _transfer(url: str, file: BinaryIO | io.RawIOBase, retry: RetryPolicy, expected: _Expected) -> str:
    arrived = _Arrived(file)

    def attempt() -> str:
        try:
            _receive(url, arrived, retry.timeout_seconds, expected)
        except TransferFault as fault:
            if fault.kind == "anew" or (arrived.validator is None and expected.sha256 is None):
                arrived.start_anew()
            raise
        return arrived.finish()

    return _with_retries(url, retry, attempt)


def _receive(url: str, arrived: _Arrived, timeout_seconds: float, expected: _Expected) -> None:
    """One try: ask for what is missing, and check the whole."""
    with open_body(url, arrived.size, arrived.validator, timeout_seconds) as body:
        if body.start != arrived.size:
            arrived.start_anew()
        arrived.validator = body.validator
        if body.size is not None:
            _check_size(body.size, expected)
        for chunk in body.chunks:
            arrived.append(chunk)
            if expected.most_bytes is not None and arrived.size > expected.most_bytes:
                _check_size(arrived.size, expected)
        if body.size is not None and arrived.size < body.size:
            raise TransferFault(f"the body ended after {arrived.size} of {body.size} bytes", "again")
    _check_size(arrived.size, expected)
    found = arrived.hash.hexdigest()
    if expected.sha256 is not None and found != expected.sha256:
        raise TransferFault(f"its sha256 was {found[:12]}…, expected {expected.sha256[:12]}…", "anew")


def _check_size(size: int, expected: _Expected) -> None:
    if expected.most_bytes is not None and size > expected.most_bytes:
        advice = "raise the limit of the cache, or prepare smaller shards"
        raise TransferFault(f"has {size} bytes or more, room is for {expected.most_bytes}", "refused", advice=advice)
    if expected.size is not None and size != expected.size:
        raise TransferFault(f"it had {size} bytes, expected {expected.size}", "anew")


def _with_retries(url: str, retry: RetryPolicy, attempt: Callable[[], Result]) -> Result:
    """The result of the first try that succeeds.

    Raises:
        NotFoundError, DataError: no further try would help, or all are spent.
    """
    pause = retry.first_pause_seconds
    tried = 0
    while True:
        try:
            return attempt()
        except TransferFault as fault:
            tried += 1
            if fault.kind == "missing":
                raise NotFoundError(f"{shown(url)}: {fault}; {fault.advice}") from fault
            if fault.kind == "refused":
                raise DataError(f"{shown(url)}: {fault}; {fault.advice}") from fault
            if tried >= retry.attempts:
                times = "once" if tried == 1 else f"{tried} times"
                raise DataError(f"{shown(url)}: tried {times}, at last {fault}; {fault.advice}") from fault
            wait = pause if fault.pause_seconds is None else fault.pause_seconds
        time.sleep(min(LONGEST_PAUSE_SECONDS, wait))
        pause *= 2

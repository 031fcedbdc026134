"""One try at a remote object: the body behind an address over HTTP(S) or S3, from an offset on; a listing on S3.

Nothing here tries twice: what goes wrong is a `TransferFault`, which says whether another try may help. Clients keep their
connections and are lent to one thread at a time; a forked child makes its own, for it must not share sockets.
`requests` and `boto3` are imported when first needed.

Sources: RFC 9110, sections 10.2.3 (Retry-After), 13.1.5 (If-Range) and 14 (ranges); the Amazon S3 API reference,
GetObject and ListObjectsV2.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

if TYPE_CHECKING:
    import requests

CHUNK_BYTES = 64 * 1024  # what a stall or a broken connection may lose of what has arrived

Client = TypeVar("Client")


Kind = Literal["again", "anew", "missing", "refused"]

_ADVICE: dict[Kind, str] = {
    "again": "check the server and the network, then start again",
    "anew": "put the right file there, then start again",
    "missing": "correct the address, or put the file there",
    "refused": "correct the address or the credentials",
}


class TransferFault(Exception):
    """What went wrong in one try.

    Args:
        reason: what was found.
        kind: "again": another try may help, from where this one ended; "anew": only from the start, for the object is
            not what the earlier tries saw; "missing": there is no such object; "refused": no try will help.
        advice: what the user can do; follows from the kind if not given.
        pause_seconds: how long the server asks to wait.
    """

    def __init__(self, reason: str, kind: Kind, *, advice: str = "", pause_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.kind: Kind = kind
        self.advice = advice or _ADVICE[kind]
        self.pause_seconds = pause_seconds


@dataclass(frozen=True)
class Body:
    """An object on its way.

    Args:
        chunks: its bytes from `start` on; raises TransferFault.
        start: the first byte sent; 0 where the server ignores ranges.
        size: bytes of the whole object, if the server says so.
        validator: names the object's version (a strong entity tag, or else the time of its last change); None where a
            later range could be of another version unnoticed.
    """

    chunks: Iterator[bytes]
    start: int
    size: int | None
    validator: str | None


class _Clients(Generic[Client]):
    """Clients by process and time limit, each lent to one thread at a time."""

    def __init__(self, make: Callable[[float], Client]) -> None:
        self._make = make
        self._idle: dict[tuple[int, float], list[Client]] = {}

    @contextmanager
    def lend(self, timeout_seconds: float) -> Iterator[Client]:
        idle = self._idle.setdefault((os.getpid(), timeout_seconds), [])
        try:
            client = idle.pop()
        except IndexError:
            client = self._make(timeout_seconds)
        try:
            yield client
        finally:
            idle.append(client)


@contextmanager
def open_body(url: str, start: int, validator: str | None, timeout_seconds: float) -> Iterator[Body]:
    """Ask for an object from byte `start` on, if it is still the version that the validator names.

    Raises:
        TransferFault: no answer, or one that holds no body.
    """
    opened = _open_s3 if url.startswith("s3://") else _open_http
    with opened(url, start, validator, timeout_seconds) as body:
        yield body


def _root(error: BaseException) -> BaseException:
    """The first cause; the errors of HTTP libraries wrap it several times over, and show the whole address."""
    from urllib3.exceptions import HTTPError

    cause = error.__cause__ or error.__context__
    # What the caller was handling is no cause: an error of another kind, or of a file, which has a name.
    related = isinstance(cause, (OSError, HTTPError, HTTPException)) and getattr(cause, "filename", None) is None
    return _root(cause) if cause is not None and related else error


def _failure(error: Exception, timeout_seconds: float) -> TransferFault:
    """A connection that could not be made, or broke."""
    root = _root(error)
    if isinstance(root, TimeoutError):
        return TransferFault(f"nothing came for {timeout_seconds:g} s", "again")
    return TransferFault(f"the connection failed ({str(root) or type(root).__name__})", "again")


def _chunks(read: Callable[[], bytes], timeout_seconds: float) -> Iterator[bytes]:
    """What `read` gives until it gives nothing."""
    from urllib3.exceptions import HTTPError

    try:
        while chunk := read():
            yield chunk
    except (HTTPError, OSError) as error:
        raise _failure(error, timeout_seconds) from error


def _status_fault(status: int, said: str, retry_after: str | None, action: str = "read") -> TransferFault:
    """The fault of an answer without body.

    Args:
        said: the answer in words.
        action: what was tried, "read" or "write".
        retry_after: the header of that name; a date instead of seconds is passed over.
    """
    pause = float(retry_after) if retry_after and retry_after.isdecimal() else None
    if status in (404, 410):
        return TransferFault(f"not found ({said})", "missing")
    if status in (401, 403):
        advice = f"give credentials that may {action} it: AWS's usual ones for s3://, a signed address or ~/.netrc for http(s)://"
        return TransferFault(f"access refused ({said})", "refused", advice=advice)
    if status in (412, 416):  # the version that earlier tries saw is gone, or shorter now
        return TransferFault(f"the object changed meanwhile ({said})", "anew")
    if status in (408, 429) or status >= 500:
        return TransferFault(f"the server answered {said}", "again", pause_seconds=pause)
    return TransferFault(f"the server answered {said}, expected the file", "refused")


def _sent_range(content_range: str, start: int) -> int | None:
    """Bytes of the whole object, from the header of a partial answer; None if it does not tell.

    Raises:
        TransferFault: it is not the range asked for.
    """
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range.strip())
    if match is None or int(match[1]) != start:
        raise TransferFault(f"the server sent the range {content_range!r}, asked for was byte {start} on", "anew")
    return None if match[2] == "*" else int(match[2])


# --- HTTP ------------------------------------------------------------------------------------------------------------


def _make_session(_timeout_seconds: float) -> requests.Session:
    import requests

    return requests.Session()


_sessions: _Clients[requests.Session] = _Clients(_make_session)


@contextmanager
def _open_http(url: str, start: int, validator: str | None, timeout_seconds: float) -> Iterator[Body]:
    import requests

    headers = {"Accept-Encoding": "identity"}  # checksums are of the file, not of a compressed form of it
    if start:
        headers["Range"] = f"bytes={start}-"
        if validator:
            headers["If-Range"] = validator
    with _sessions.lend(timeout_seconds) as session, contextlib.ExitStack() as stack:
        try:
            response = stack.enter_context(session.get(url, headers=headers, stream=True, timeout=timeout_seconds))
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            raise _failure(error, timeout_seconds) from error
        except requests.RequestException as error:  # not an address, endless redirects
            raise TransferFault(f"cannot be asked for ({type(error).__name__})", "refused") from error
        yield _http_body(response, start, timeout_seconds)


def _http_body(response: requests.Response, start: int, timeout_seconds: float) -> Body:
    told = response.headers
    etag = told.get("ETag")
    validator = etag if etag and not etag.startswith("W/") else told.get("Last-Modified")
    chunks = _chunks(lambda: bytes(response.raw.read(CHUNK_BYTES, decode_content=False)), timeout_seconds)
    if response.status_code == 206 and start:
        return Body(chunks, start, _sent_range(told.get("Content-Range", ""), start), validator)
    if response.status_code != 200:
        said = f"HTTP {response.status_code} {response.reason or ''}".rstrip()
        raise _status_fault(response.status_code, said, told.get("Retry-After"))
    length = told.get("Content-Length")
    return Body(chunks, 0, int(length) if length else None, validator)


# --- S3 --------------------------------------------------------------------------------------------------------------


def split_s3(url: str) -> tuple[str, str]:
    """Bucket and key of an s3:// address; the key is taken as it stands."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket, key


def _make_s3_client(timeout_seconds: float) -> Any:
    """A client of the endpoint and credentials that the environment names; of anonymous access where it has none."""
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    session = boto3.session.Session()  # the default one is shared between threads
    config = Config(
        connect_timeout=timeout_seconds,
        read_timeout=timeout_seconds,
        retries={"total_max_attempts": 1},  # tries are counted in one place, and that is not here
        signature_version=UNSIGNED if session.get_credentials() is None else None,
        response_checksum_validation="when_required",  # sha256 is checked; not every server knows S3's newer sums
    )
    return session.client("s3", config=config)


_s3_clients: _Clients[Any] = _Clients(_make_s3_client)


@contextmanager
def _lent_s3_client(timeout_seconds: float, action: str = "read") -> Iterator[Any]:
    """A client whose errors are faults."""
    from botocore import exceptions

    try:
        with _s3_clients.lend(timeout_seconds) as client:
            yield client
    except exceptions.ClientError as error:
        answer, told = error.response.get("ResponseMetadata", {}), error.response.get("Error", {})
        status, headers = answer.get("HTTPStatusCode", 0), answer.get("HTTPHeaders", {})
        code = told.get("Code", "")
        said = f"HTTP {status} {told.get('Message', '') if code == str(status) else code}".rstrip()
        raise _status_fault(status, said, headers.get("retry-after"), action) from error
    except (exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError) as error:
        raise _failure(error, timeout_seconds) from error
    except exceptions.BotoCoreError as error:  # half of a credential, a bucket that no bucket can be named like
        raise TransferFault(str(error), "refused") from error


@contextmanager
def _open_s3(url: str, start: int, validator: str | None, timeout_seconds: float) -> Iterator[Body]:
    bucket, key = split_s3(url)
    wanted = {"Bucket": bucket, "Key": key}
    if start:
        wanted["Range"] = f"bytes={start}-"
        if validator:
            wanted["IfMatch"] = validator
    with _lent_s3_client(timeout_seconds) as client:
        answer = client.get_object(**wanted)
        with contextlib.closing(answer["Body"]) as stream:
            chunks = _chunks(lambda: bytes(stream.read(CHUNK_BYTES)), timeout_seconds)
            if start and "ContentRange" in answer:
                yield Body(chunks, start, _sent_range(answer["ContentRange"], start), answer.get("ETag"))
            else:
                yield Body(chunks, 0, answer.get("ContentLength"), answer.get("ETag"))


def put_s3(path: Path, url: str, timeout_seconds: float) -> None:
    """Store a file as an object, in parts if it is large; its parts appear as one object, or not at all.

    Raises:
        TransferFault: it did not arrive.
        OSError: the file cannot be read.
    """
    from boto3.exceptions import S3UploadFailedError
    from botocore.exceptions import ClientError

    bucket, key = split_s3(url)
    with _lent_s3_client(timeout_seconds, "write") as client:
        try:
            client.upload_file(str(path), bucket, key)
        except S3UploadFailedError as error:  # what the server said is inside
            if isinstance(error.__context__, ClientError):
                raise error.__context__ from None
            raise TransferFault(str(error), "again") from error


def probe_s3(url: str, timeout_seconds: float) -> None:
    """Store an empty object, look at it, and remove it if that is allowed.

    Raises:
        TransferFault: it cannot be stored, or is not there afterwards.
    """
    bucket, key = split_s3(url)
    with _lent_s3_client(timeout_seconds, "write") as client:
        client.put_object(Bucket=bucket, Key=key, Body=b"")
        client.head_object(Bucket=bucket, Key=key)
    with contextlib.suppress(TransferFault), _lent_s3_client(timeout_seconds, "write") as client:
        client.delete_object(Bucket=bucket, Key=key)


def list_s3(bucket: str, prefix: str, timeout_seconds: float) -> list[str]:
    """Keys that begin with a prefix, down to the next "/": objects, and folders with "/" at their end.

    Raises:
        TransferFault: the bucket cannot be listed.
    """
    found: list[str] = []
    with _lent_s3_client(timeout_seconds) as client:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter="/"):
            found += [item["Key"] for item in page.get("Contents", [])]
            found += [item["Prefix"] for item in page.get("CommonPrefixes", [])]
    return found

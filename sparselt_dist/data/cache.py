"""Copies of remote shards on a local disk: bounded, brought once for all processes of a machine, ahead of their use.

In the folder a copy is `<hash>-<name>`, a download under way `partial-<hash>-<name>`; nothing else there is touched.
Invariants:

- Whoever brings an object holds an flock on its partial file, and commits by rename. The lock dies with its holder, and
  who waited for it finds the copy, or brings the object in turn.
- A partial file has the size of the object from its beginning, so the sizes of all files, which are only counted
  and changed under one lock of the folder, are the room taken. Where the size of an object is not known beforehand,
  room is made when it has arrived.
- A copy is removed when room is needed and it was asked for the longest ago. Who holds it open or mapped keeps it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparselt_dist.data.storage import RetryPolicy, basename, download
from sparselt_dist.errors import DataError
from sparselt_dist.redaction import shown

PREFETCH_THREADS = 4
_PARTIAL = "partial-"
_OURS = re.compile(rf"({_PARTIAL})?[0-9a-f]{{32}}-.*", re.DOTALL)
_FAILED = b"all tries failed"  # what a holder leaves to those who wait, so that they do not all try as often again
_POLL_SECONDS = 0.05

Wanted = tuple[str, int | None, str | None]
"""Address, size in bytes and sha256 of an object; None where they are not known."""

# Locks of this process. flock belongs to the open file, which a forked child shares: it would outlive its holder there.
_held_locks: set[int] = set()


def _drop_inherited_locks() -> None:
    for descriptor in list(_held_locks):
        os.close(descriptor)
    _held_locks.clear()


os.register_at_fork(after_in_child=_drop_inherited_locks)


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[int]:
    """Hold a lock file, made if need be, and give its descriptor.

    Raises:
        BlockingIOError: another holds it, and `wait` is off.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    _held_locks.add(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield descriptor
    finally:
        _held_locks.discard(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing leaves it to a child that is just being started
        os.close(descriptor)


class _NoRoom(Exception):
    """Only copies that are wanted soon, and downloads under way, could make room."""


class ShardCache:
    """A bounded folder of copies of remote objects, shared by all processes of a machine. Picklable.

    Args:
        limit_bytes: bound of all copies and downloads under way together.
        retry: how patient a download is.
    """

    def __init__(self, folder: Path, limit_bytes: int, retry: RetryPolicy) -> None:
        self.folder = folder
        self._limit_bytes = limit_bytes
        self._retry = retry
        self._prefetcher: _Prefetcher | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prefetcher": None}

    def fetch(self, url: str, *, expected_bytes: int | None, expected_sha256: str | None) -> Path:
        """The local copy of an object, brought now if it is not there; its checksum was verified when it was brought.

        Open it at once and hold it open: it may be removed when others need room.

        Raises:
            NotFoundError: there is no such object.
            DataError: it cannot be had, is larger than the cache may be, or the folder cannot be used.
        """
        copy = self._copy((url, expected_bytes, expected_sha256))
        try:
            if not _is_whole(copy, expected_bytes):
                self._bring((url, expected_bytes, expected_sha256), copy, keep=None)
        except OSError as cause:
            raise DataError(
                f"{self.folder}: cannot keep copies of shards: {cause.strerror or cause}; give the cache a folder on a "
                "local disk that can be written"
            ) from cause
        return copy

    def adopt(self, copy: Path, url: str, *, num_bytes: int, sha256: str) -> None:
        """Keep a copy that was fetched without a checksum as the one that will be asked for with it."""
        with suppress(OSError), _locked(self._space_lock()):  # gone: then it is fetched again
            copy.replace(self._copy((url, num_bytes, sha256)))

    def prefetch(self, wanted: Iterable[Wanted]) -> None:
        """Start to bring objects that will be fetched, without waiting.

        They are kept until then as far as there is room: none is removed in favour of another one. A failure is left to
        `fetch`, which meets it again.
        """
        wanted = list(wanted)
        missing = {copy: item for item in wanted if not _is_whole(copy := self._copy(item), item[1])}
        if self._prefetcher is None or self._prefetcher.pid != os.getpid():
            self._prefetcher = _Prefetcher(self._try_to_bring)
        self._prefetcher.want(missing, frozenset(map(self._copy, wanted)))

    def _copy(self, wanted: Wanted) -> Path:
        url, _, sha256 = wanted
        digest = hashlib.sha256(f"{url}\n{sha256 or ''}".encode()).hexdigest()[:32]
        # An address may spell any byte, a slash as %2F among them; file systems allow 255 bytes.
        name = re.sub(r"[^\w.=+-]", "_", basename(url)[-150:], flags=re.ASCII)
        return self.folder / f"{digest}-{name}"

    def _try_to_bring(self, wanted: Wanted, copy: Path, keep: frozenset[Path]) -> None:
        """Bring an object unless that takes room from others or another is at it."""
        with suppress(DataError, OSError, _NoRoom):
            if not _is_whole(copy, wanted[1]):
                self._bring(wanted, copy, keep)

    def _bring(self, wanted: Wanted, copy: Path, keep: frozenset[Path] | None) -> None:
        """Bring an object, or wait until another has brought it, or failed.

        Args:
            keep: copies that must stay; None: all may go, and the lock and room are waited for.
        """
        url, expected_bytes, _ = wanted
        if expected_bytes is not None and expected_bytes > self._limit_bytes:
            raise DataError(
                f"{shown(url)}: has {expected_bytes} bytes, the cache may hold {self._limit_bytes}; raise the limit of "
                "the cache, or prepare smaller shards"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(_PARTIAL + copy.name)
        retry = self._retry
        while not _is_whole(copy, expected_bytes):
            with self._claimed(partial, wait=keep is None) as lock:
                if not _is_at(lock, partial):  # another committed, gave up or failed
                    failed = os.fstat(lock).st_nlink == 0 and os.pread(lock, len(_FAILED) + 1, 0) == _FAILED
                    retry = replace(self._retry, attempts=1) if failed else self._retry
                elif _is_whole(copy, expected_bytes):
                    partial.unlink()
                else:
                    self._bring_locked(wanted, copy, partial, lock, retry, keep)

    @contextmanager
    def _claimed(self, partial: Path, *, wait: bool) -> Iterator[int]:
        """Hold the lock of a download; one that does not wait is not turned away by a look for dead downloads."""
        with ExitStack() as held:
            with nullcontext() if wait else _locked(self._space_lock()):  # held by whoever looks
                lock = held.enter_context(_locked(partial, wait=wait))
            yield lock

    def _bring_locked(
        self,
        wanted: Wanted,
        copy: Path,
        partial: Path,
        lock: int,
        retry: RetryPolicy,
        keep: frozenset[Path] | None,
    ) -> None:
        url, expected_bytes, sha256 = wanted
        left = b""
        try:
            self._reserve(copy, partial, lock, expected_bytes or 0, keep)
            try:
                download(
                    url,
                    partial,
                    retry,
                    expected_bytes=expected_bytes,
                    expected_sha256=sha256,
                    most_bytes=self._limit_bytes,
                )
            except DataError:
                left = _FAILED
                raise
            os.fsync(lock)
            self._commit(copy, partial, keep)
        except BaseException:
            os.ftruncate(lock, 0)
            os.pwrite(lock, left, 0)
            partial.unlink()
            raise

    # --- room --------------------------------------------------------------------------------------------------------

    def _space_lock(self) -> Path:
        return self.folder / "space.lock"

    def _reserve(self, copy: Path, partial: Path, lock: int, size: int, keep: frozenset[Path] | None) -> None:
        """Make room for a download and take it, waiting for others' downloads to end if `keep` is None.

        Raises:
            _NoRoom: the copies to keep and other downloads take the room.
        """
        while True:
            with _locked(self._space_lock()):
                copy.unlink(missing_ok=True)  # of the wrong size
                if self._make_room(size, partial, keep or frozenset()):
                    os.ftruncate(lock, size)
                    return
            if keep is not None:
                raise _NoRoom
            time.sleep(_POLL_SECONDS)

    def _commit(self, copy: Path, partial: Path, keep: frozenset[Path] | None) -> None:
        with _locked(self._space_lock()):
            size = partial.stat().st_size
            # Downloads of unknown size may have grown past the limit together; copies alone never stay above it.
            if not self._make_room(size, partial, keep or frozenset()):
                self._make_room(size, partial, frozenset(), count_downloads=False)
            partial.replace(copy)

    def _make_room(self, size: int, own: Path, keep: frozenset[Path], *, count_downloads: bool = True) -> bool:
        """Remove the copies asked for the longest ago until `size` more bytes fit; nothing if that cannot be."""
        copies, downloads = self._survey(own)
        removable = sorted((found for found in copies if found[1] not in keep), key=lambda found: found[2])
        taken = sum(found[0] for found in copies) + (downloads if count_downloads else 0)
        excess = taken + size - self._limit_bytes
        if excess > sum(found[0] for found in removable):
            return False
        for copy_bytes, path, _ in removable:
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= copy_bytes
        return True

    def _survey(self, own: Path) -> tuple[list[tuple[int, Path, int]], int]:
        """(size, path, time of last request) of every copy, and the bytes of others' downloads; dead ones are removed."""
        copies: list[tuple[int, Path, int]] = []
        downloads = 0
        for entry in os.scandir(self.folder):
            path = Path(entry.path)
            is_partial = entry.name.startswith(_PARTIAL)
            if path == own or not _OURS.fullmatch(entry.name) or (is_partial and _remove_if_dead(path)):
                continue
            with suppress(FileNotFoundError):
                state = path.stat()
                if is_partial:
                    downloads += state.st_size
                else:
                    copies.append((state.st_size, path, state.st_mtime_ns))
        return copies, downloads


def _is_whole(copy: Path, expected_bytes: int | None) -> bool:
    """Whether a copy is there and has its size; if so, it now is the one asked for last."""
    try:
        size = copy.stat().st_size
    except OSError:
        return False
    if expected_bytes is not None and size != expected_bytes:
        return False
    with suppress(OSError):  # removed meanwhile, or another user's
        os.utime(copy)
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether a path still names an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove_if_dead(partial: Path) -> bool:
    """Remove a download that nobody holds."""
    try:
        with _locked(partial, wait=False) as lock:
            if _is_at(lock, partial):
                partial.unlink()
    except BlockingIOError:
        return False
    return True


class _Prefetcher:
    """Threads of this process that bring objects in the order asked for; each ends when nothing is left to do.

    Args:
        bring: brings one object; gets it, the path of its copy, and the copies that must stay.
    """

    def __init__(self, bring: Callable[[Wanted, Path, frozenset[Path]], None]) -> None:
        self.pid = os.getpid()
        self._bring = bring
        self._lock = threading.Lock()
        self._waiting: dict[Path, Wanted] = {}
        self._running: set[Path] = set()
        self._keep: frozenset[Path] = frozenset()
        self._threads = 0

    def want(self, missing: dict[Path, Wanted], keep: frozenset[Path]) -> None:
        """Bring what is missing; `keep` are all that are wanted now."""
        with self._lock:
            self._keep = keep
            self._waiting |= {copy: item for copy, item in missing.items() if copy not in self._running}
            new = min(PREFETCH_THREADS, len(self._waiting)) - self._threads
            self._threads += max(0, new)
        for _ in range(new):
            # Daemons: a process that ends does not wait for what it will not use.
            threading.Thread(target=self._work, name="prefetch", daemon=True).start()

    def _next(self) -> tuple[Path, Wanted, frozenset[Path]] | None:
        with self._lock:
            if not self._waiting:
                self._threads -= 1
                return None
            copy = next(iter(self._waiting))
            self._running.add(copy)
            return copy, self._waiting.pop(copy), self._keep.union(self._waiting)

    def _work(self) -> None:
        while (task := self._next()) is not None:
            copy, item, keep = task
            try:
                self._bring(item, copy, keep)
            finally:
                with self._lock:
                    self._running.discard(copy)

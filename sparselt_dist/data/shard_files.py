"""The files of a shard folder, local or remote: fetched, checked and held open, or given up and counted.

A shard that stays unreadable or fails its checksum is an error, or, where `Access.skip_bad` says so, left out: its
samples become gaps that are counted. Nothing else moves, so the order of all other samples stays what it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from sparselt_dist.data.cache import ShardCache
from sparselt_dist.data.manifest import MANIFEST, ShardEntry, file_sha256
from sparselt_dist.data.storage import RetryPolicy, is_remote, join
from sparselt_dist.errors import DataError

_OPENINGS = 3  # of a copy that another process removes from the cache in the moment between bringing and opening it
OPEN_SHARDS = 256  # held open at once; the files of a window are all in use
HELD_BYTES = 256 * 2**20  # of open shards in memory, a process


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sparselt_dist"


@dataclass(frozen=True)
class Access:
    """How shards are reached.

    Args:
        cache_dir: where copies of remote shards, and indexes and tokenizers made for the shards of others, are kept.
        cache_bytes: bound of the copies.
        verify_checksums: hash each shard when it is opened; remote ones always are, when they are fetched.
        skip_bad: leave bad shards out, and count, instead of stopping.
        share: (part, parts): which local shards this process looks for before a start; other processes look for the rest.
    """

    cache_dir: Path = field(default_factory=_user_cache)
    cache_bytes: int = 50 * 2**30
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    verify_checksums: bool = False
    skip_bad: bool = False
    share: tuple[int, int] = (0, 1)

    def cache(self) -> ShardCache:
        """The bounded cache of remote shards."""
        return ShardCache(self.cache_dir / "shards", self.cache_bytes, self.retry)


class Closable(Protocol):
    """What an opened shard is held by."""

    held_bytes: int  # of memory
    close: Callable[[], None]


Opened = TypeVar("Opened", bound=Closable)


class ShardFiles(Generic[Opened]):
    """The shards of one folder, opened when first asked for; those opened longest ago are closed.

    Args:
        location: folder or URL prefix that the entries' names are relative to.
        open_shard: makes an opened shard of a local path, the shard's number and the bytes it may hold in memory;
            raises DataError.
    """

    def __init__(
        self,
        location: str,
        entries: Sequence[ShardEntry],
        access: Access,
        open_shard: Callable[[Path, int, int], Opened],
    ) -> None:
        self.location = location
        self.entries = tuple(entries)
        self._access = access
        self._open_shard = open_shard
        self._cache = access.cache() if is_remote(location) else None
        self._opened: dict[int, Opened] = {}
        self._held_bytes = 0
        self._bad: dict[int, str] = {}
        self._verified: set[int] = set()
        self._complaints: list[str] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}, "_held_bytes": 0}

    def url(self, shard: int) -> str:
        """Path or URL of a shard."""
        return join(self.location, self.entries[shard].name)

    def get(self, shard: int) -> Opened | None:
        """An open shard; None if it is bad and bad shards are skipped.

        Raises:
            DataError: the shard is bad; it is named.
        """
        opened = self._opened.get(shard)
        if opened is not None:
            return opened
        if shard in self._bad:
            return None
        try:
            opened = self._open(shard)
        except DataError as fault:
            if not self._access.skip_bad:
                raise
            self._bad[shard] = str(fault)
            self._complaints.append(f"skipping a shard of {self.entries[shard].samples} samples: {fault}")
            return None
        self._opened[shard] = opened
        self._held_bytes += opened.held_bytes
        if len(self._opened) > OPEN_SHARDS:
            # closed when nobody holds it: the read that asks for this one may have asked for that one before
            let_go = self._opened.pop(next(iter(self._opened)))
            self._held_bytes -= let_go.held_bytes
        return opened

    def prefetch(self, shards: Iterable[int]) -> None:
        """Start to fetch remote shards that will be asked for."""
        if self._cache is not None:
            entries = [(shard, self.entries[shard]) for shard in shards if shard not in self._opened]
            self._cache.prefetch(
                (self.url(shard), entry.bytes or None, entry.sha256 or None) for shard, entry in entries
            )

    def take_complaints(self) -> list[str]:
        """What there is to say of shards given up since the last call."""
        taken, self._complaints = self._complaints, []
        return taken

    def check_presence(self) -> None:
        """Before a start: every local file of this process's share is there and has its size; skipped shards are found when
        opened.

        Raises:
            DataError: one is missing or of another size, or the cache cannot hold the largest remote shard.
        """
        if self._cache is not None or self._access.skip_bad:
            return
        part, parts = self._access.share
        for shard in range(part, len(self.entries), parts):
            _check_size(Path(self.url(shard)), self.entries[shard])

    def _open(self, shard: int) -> Opened:
        for _ in range(_OPENINGS):
            path = self._fetched(shard)
            try:
                # A window larger than memory's share is read from its files: closing shards in use would read them again.
                return self._open_shard(path, shard, HELD_BYTES - self._held_bytes)
            except (DataError, FileNotFoundError):
                if self._cache is None or path.exists():
                    raise
        raise DataError(
            f"{self.url(shard)}: its copy {path} was removed {_OPENINGS} times to make room before it could be opened; "
            "raise data.cache_gib"
        )

    def _fetched(self, shard: int) -> Path:
        entry = self.entries[shard]
        if self._cache is not None:
            return self._cache.fetch(
                self.url(shard), expected_bytes=entry.bytes or None, expected_sha256=entry.sha256 or None
            )
        path = Path(self.url(shard))
        _check_size(path, entry)
        if shard in self._verified or not self._access.verify_checksums:
            return path
        if (found := _sha256(path)) != entry.sha256:
            raise DataError(
                f"{path}: changed: found sha256 {found[:12]}…, expected {entry.sha256[:12]}…, so its ids may lie outside "
                "the vocabulary; restore the file, prepare the folder again, or set data.on_bad_shard=skip"
            )
        self._verified.add(shard)
        return path


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as cause:
        raise DataError(f"{path}: cannot be read: {cause.strerror or cause}; restore the file") from cause


def _check_size(shard: Path, entry: ShardEntry) -> None:
    try:
        size = shard.stat().st_size
    except OSError as cause:
        raise DataError(
            f"{shard}: listed in {MANIFEST} but {cause.strerror}; restore the file or prepare the folder again"
        ) from cause
    if size != entry.bytes:
        state = "truncated" if size < entry.bytes else "longer than written"
        raise DataError(
            f"{shard}: {state}: found {size} bytes, expected {entry.bytes}; restore the file or prepare the folder again"
        )

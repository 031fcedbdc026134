"""The shard format, and random access to its samples.

A shard folder holds `shard-000000.tar ...`, an index beside each tar, `manifest.json` and `tokenizer/`. The tars are
plain WebDataset. Many samples share a tar member, for one member a document costs four times the bytes:

- kind `rows`: `shard000000-00000.ids.npy`, [n, sequence_length];
- kind `packed`: the same, rows of whole documents filled up with padding, and `shard000000-00000.documents.npy`,
  [n, most documents in a row]: the lengths of the documents in each row, filled up with zeros;
- kind `documents`: `.ids.npy`, the ids of n documents one after another, and `.lengths.npy`, [n].

Tars hold no time, owner or host, so equal samples give equal bytes. The manifest is written last, by rename: a folder
with a manifest is complete. Reading uses the offsets of the index; the index is a convenience (a missing or stale one
is replaced by a scan of the tar), the tar and the manifest are the record. `shard_writer.py` writes the format.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparselt_dist.data.manifest import MANIFEST, TOKENIZER, Manifest, parse_manifest, read_manifest
from sparselt_dist.data.open_file import OpenFile
from sparselt_dist.data.shard_files import Access, ShardFiles
from sparselt_dist.data.shard_index import Member, read_index
from sparselt_dist.data.storage import NotFoundError, is_remote, join, read_bytes
from sparselt_dist.errors import DataError

HELD_SHARD_BYTES = 16 * 2**20  # a shard up to this size is kept in memory while it is open
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json")


class Stored(NamedTuple):
    """One stored sample."""

    ids: np.ndarray
    """[n], padding left out."""
    documents: np.ndarray | None = None
    """Lengths of the documents in `ids`, in order; None: one document, or running text."""


class _OpenShard:
    """Where the samples of one shard lie in its file."""

    def __init__(self, path: Path, members: Sequence[Member], manifest: Manifest, keep_bytes: int) -> None:
        self._file = OpenFile(path, keep_bytes)
        self.held_bytes = self._file.held_bytes
        self.close = self._file.close
        itemsize = np.dtype(manifest.dtype).itemsize
        row_length = manifest.sequence_length or 0
        starts, lengths = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        documents, in_row = [], []
        for member in members:
            strides = np.full(member.samples, row_length, dtype=np.int64)
            counts = strides
            if member.lengths_offset is not None:
                counts = strides = self._numbers(member.lengths_offset, member.samples).astype(np.int64)
            elif member.documents_offset is not None:
                matrix = self._numbers(member.documents_offset, member.samples * member.documents_width)
                matrix = matrix.reshape(member.samples, member.documents_width)
                counts = matrix.sum(axis=1, dtype=np.int64)
                documents.append(matrix[matrix > 0])
                in_row.append((matrix > 0).sum(axis=1))
            starts.append(member.offset + (np.cumsum(strides) - strides) * itemsize)
            lengths.append(counts)
        self.starts, self.lengths = np.concatenate(starts), np.concatenate(lengths)
        self._first_bytes: list[int] = self.starts.tolist()  # faster to look up than arrays
        self._sizes: list[int] = (self.lengths * itemsize).tolist()
        self._documents = np.concatenate(documents) if documents else None
        self._documents_before = np.cumsum(np.concatenate([[0], *in_row]))

    def _numbers(self, offset: int, count: int) -> np.ndarray:
        return np.frombuffer(self._file.bytes_at(offset, 4 * count), dtype=np.uint32)

    def ids(self, inside: int) -> bytes:
        """The stored bytes of one sample's ids, padding left out."""
        return self._file.bytes_at(self._first_bytes[inside], self._sizes[inside])

    def documents(self, inside: int) -> np.ndarray | None:
        """Lengths of the documents in one packed row."""
        if self._documents is None:
            return None
        first, end = self._documents_before[inside : inside + 2]
        return self._documents[first:end]


class ShardFolder:
    """Random access to the samples of a shard folder, or of some of its shards.

    A sample's number is its position in manifest order. Picklable: files are opened anew where it is unpickled.

    Args:
        location: folder or URL.
        names: file names of the shards to use; None: all.

    Raises:
        DataError: no complete shard folder, or a local shard that is missing or of another size.
    """

    def __init__(
        self, location: Path | str, *, names: Iterable[str] | None = None, access: Access | None = None
    ) -> None:
        self.location = str(location)
        self._access = access or Access()
        self.manifest = self._read_manifest()
        chosen = None if names is None else set(names)
        self.shards = tuple(entry for entry in self.manifest.shards if chosen is None or entry.name in chosen)
        strangers = (chosen or set()) - {entry.name for entry in self.shards}
        if strangers:
            raise DataError(
                f"{join(self.location, min(strangers))}: not listed in {MANIFEST} beside it; correct the pattern"
            )
        self.files = ShardFiles(self.location, self.shards, self._access, self._open)
        self.files.check_presence()

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size

    @property
    def shard_samples(self) -> list[int]:
        """Samples of each shard, in order."""
        return [entry.samples for entry in self.shards]

    @functools.cached_property
    def tokenizer(self) -> Path:
        """Local folder of the tokenizer; a remote one is copied into the cache."""
        if not is_remote(self.location):
            return Path(self.location) / TOKENIZER
        sha256 = self.manifest.tokenizer_sha256
        if not re.fullmatch("[0-9a-f]{64}", sha256):  # it names a folder of the cache
            raise DataError(
                f"{join(self.location, MANIFEST)}: tokenizer_sha256 is {sha256!r}, expected a SHA-256; prepare the text again"
            )
        folder = self._access.cache_dir / "tokenizers" / sha256
        for name in reversed(TOKENIZER_FILES):  # the one that must be there comes last
            if not (folder / name).exists():
                expected = sha256 if name == TOKENIZER_FILE else None
                _copy(join(join(self.location, TOKENIZER), name), folder / name, self._access, expected)
        return folder

    def _read_manifest(self) -> Manifest:
        if not is_remote(self.location):
            return read_manifest(self.location)
        url = join(self.location, MANIFEST)
        return parse_manifest(read_bytes(url, self._access.retry), url)

    def _open(self, path: Path, shard: int, room: int) -> _OpenShard:
        members = read_index(path, self.manifest.kind)
        opened = _OpenShard(path, members, self.manifest, min(room, HELD_SHARD_BYTES))
        found, expected = len(opened.starts), self.shards[shard].samples
        if found != expected:
            opened.close()
            raise DataError(f"{path}: found {found} samples, {MANIFEST} says {expected}; run `sparselt shards verify`")
        return opened

    def read(self, shards: np.ndarray, insides: np.ndarray) -> list[Stored | None]:
        """Samples by shard and number in the shard, in the order asked; None for one of a shard that is skipped.

        Raises:
            DataError: a shard is bad and not to be skipped, or an id lies outside the vocabulary.
        """
        places = list(zip(map(self.files.get, shards.tolist()), insides.tolist(), strict=True))
        pieces = [b"" if opened is None else opened.ids(inside) for opened, inside in places]
        dtype = np.dtype(self.manifest.dtype)
        joined = np.frombuffer(b"".join(pieces), dtype=dtype)
        if joined.size and int(joined.max()) >= self.vocab_size:
            self._raise_outside(shards, insides, pieces)
        ends = np.cumsum([len(piece) // dtype.itemsize for piece in pieces]).tolist()
        return [
            None if opened is None else Stored(joined[start:end], opened.documents(inside))
            for (opened, inside), start, end in zip(places, [0, *ends[:-1]], ends, strict=True)
        ]

    def _raise_outside(self, shards: np.ndarray, insides: np.ndarray, pieces: list[bytes]) -> None:
        for shard, inside, piece in zip(shards.tolist(), insides.tolist(), pieces, strict=True):
            highest = int(np.frombuffer(piece, dtype=self.manifest.dtype).max(initial=0))
            if highest >= self.vocab_size:
                raise DataError(
                    f"{self.files.url(shard)}: sample {inside} holds token id {highest}, outside the vocabulary of "
                    f"{self.vocab_size}; run `sparselt shards verify {self.location}` and prepare again"
                )

    def lengths(self, shard: int) -> np.ndarray:
        """Tokens of each sample of one shard, int64; empty for a shard that is skipped."""
        opened = self.files.get(shard)
        return opened.lengths if opened is not None else np.zeros(0, np.int64)


def _copy(url: str, target: Path, access: Access, expected_sha256: str | None) -> None:
    """A small remote file into the cache; one that does not exist is no fault here.

    Raises:
        DataError: it cannot be had, or is another one: under this hash others' shards would find it.
    """
    try:
        content = read_bytes(url, access.retry)
    except NotFoundError:
        return
    found = hashlib.sha256(content).hexdigest()
    if expected_sha256 not in (None, found):
        raise DataError(
            f"{url}: found sha256 {found[:12]}…, expected {expected_sha256[:12]}… of the manifest; put the tokenizer "
            "there that the shards were made with"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(target)

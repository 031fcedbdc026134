"""Writes the shard format that `shards.py` describes: a member at a time, committed by rename, its index beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np

from sparselt_dist.data.manifest import Dtype, Kind, ShardEntry, write_atomically
from sparselt_dist.data.shard_index import Member, index_path

SAMPLES_PER_MEMBER = 256


def id_dtype(vocab_size: int) -> Dtype:
    """The smallest stored type that holds every id."""
    return "uint16" if vocab_size <= 65536 else "uint32"


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:06d}.tar"


class _HashingFile:
    """A write-only file that hashes what passes; tarfile needs no more than `write` and `tell`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.size += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.size

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class _Sample(NamedTuple):
    ids: np.ndarray
    documents: np.ndarray | None  # kind packed: the lengths of the documents in the row


class _TarWriter:
    """One shard file in the making: a member at a time, committed by rename."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        self._file = self._partial.open("wb")
        self._hashing = _HashingFile(self._file)
        self._tar = tarfile.TarFile(fileobj=cast(BinaryIO, self._hashing), mode="w", format=tarfile.USTAR_FORMAT)
        self.members: list[Member] = []

    def _add_array(self, name: str, array: np.ndarray) -> int:
        """Add one .npy file and return the offset of its first element."""
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        info = tarfile.TarInfo(name)
        info.size = buffer.tell()
        info.mode = 0o644
        buffer.seek(0)
        self._tar.addfile(info, buffer)
        padded = -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return self._hashing.size - padded + info.size - array.nbytes

    def add(self, key: str, samples: list[_Sample], kind: Kind, dtype: str) -> None:
        """Add one member: rows as a matrix, or documents end to end with their lengths."""
        name = f"{key}.ids.npy"
        arrays = [sample.ids for sample in samples]
        if kind == "documents":
            lengths = np.array([len(ids) for ids in arrays], dtype=np.uint32)
            offset = self._add_array(name, np.concatenate(arrays).astype(dtype, copy=False))
            lengths_offset = self._add_array(f"{key}.lengths.npy", lengths)
            self.members.append(Member(name, offset, len(arrays), int(lengths.sum()), lengths_offset=lengths_offset))
            return
        rows = np.stack(arrays)
        offset = self._add_array(name, rows.astype(dtype, copy=False))
        if kind == "rows":
            self.members.append(Member(name, offset, len(rows), rows.size))
            return
        documents = _joined([sample.documents for sample in samples if sample.documents is not None])
        documents_offset = self._add_array(f"{key}.documents.npy", documents)
        width, tokens = documents.shape[1], int(documents.sum())
        self.members.append(
            Member(name, offset, len(rows), tokens, documents_offset=documents_offset, documents_width=width)
        )

    def commit(self) -> ShardEntry:
        """Close the tar, write its index and give the tar its name."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = {"members": [dataclasses.asdict(member) for member in self.members]}
        write_atomically(index_path(self.path), json.dumps(index).encode())
        self._partial.replace(self.path)
        return ShardEntry(
            name=self.path.name,
            samples=sum(member.samples for member in self.members),
            tokens=sum(member.tokens for member in self.members),
            bytes=self._hashing.size,
            sha256=self._hashing.hexdigest(),
            members=len(self.members),
        )


def _joined(documents: list[np.ndarray]) -> np.ndarray:
    """Lists of document lengths as one uint32 matrix [rows, most documents in a row], filled up with zeros."""
    matrix = np.zeros((len(documents), max(len(lengths) for lengths in documents)), dtype=np.uint32)
    for row, lengths in enumerate(documents):
        matrix[row, : len(lengths)] = lengths
    return matrix


class ShardWriter:
    """Writes samples into shards of `samples_per_shard`, in the order given; memory is one tar member.

    `write_manifest` makes the folder complete afterwards.
    """

    def __init__(
        self, folder: Path | str, *, kind: Kind, dtype: str, samples_per_shard: int = 8192, first_shard: int = 0
    ) -> None:
        self.folder = Path(folder)
        self.entries: list[ShardEntry] = []
        self._kind: Kind = kind
        self._dtype = dtype
        self._samples_per_shard = samples_per_shard
        self._next_shard = first_shard
        self._tar: _TarWriter | None = None
        self._in_shard = 0
        self._pending: list[_Sample] = []
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, ids: np.ndarray, documents: np.ndarray | None = None) -> None:
        """Add one row or document: a 1-D array of ids.

        Args:
            documents: kind packed: the lengths of the documents in the row, in order; what is left of the row beyond
                their sum must hold the tokenizer's padding.
        """
        self._pending.append(_Sample(ids, documents))
        self._in_shard += 1
        if len(self._pending) == SAMPLES_PER_MEMBER or self._in_shard == self._samples_per_shard:
            self._write_member()
        if self._in_shard == self._samples_per_shard:
            self._commit_shard()

    def extend(self, samples: Iterable[np.ndarray]) -> None:
        """Add several rows or documents."""
        for ids in samples:
            self.add(ids)

    def close(self) -> list[ShardEntry]:
        """Write what is pending and return the entries of all shards written."""
        if self._in_shard:
            if self._pending:
                self._write_member()
            self._commit_shard()
        return self.entries

    def _write_member(self) -> None:
        if self._tar is None:
            self._tar = _TarWriter(self.folder / shard_name(self._next_shard))
        key = f"shard{self._next_shard:06d}-{len(self._tar.members):05d}"
        self._tar.add(key, self._pending, self._kind, self._dtype)
        self._pending = []

    def _commit_shard(self) -> None:
        assert self._tar is not None
        self.entries.append(self._tar.commit())
        self._tar = None
        self._in_shard = 0
        self._next_shard += 1

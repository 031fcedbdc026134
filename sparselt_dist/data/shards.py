"""The shard format: writer, index and random access; the manifest is in `manifest.py`.

A shard folder holds `shard-000000.tar ...`, an index beside each tar, `manifest.json` and `tokenizer/`. The tars are
plain WebDataset. Many samples share a tar member, for one member a document costs four times the bytes:

- kind `rows`: `shard000000-00000.ids.npy`, [n, sequence_length];
- kind `documents`: the same name, the ids of n documents one after another, and `shard000000-00000.lengths.npy`, [n].

Tars hold no time, owner or host, so equal samples give equal bytes. The manifest is written last, by rename: a folder
with a manifest is complete. Reading uses the offsets of the index and a memory map; the index is a convenience (a
missing or stale one is replaced by a scan of the tar), the tar and the manifest are the record.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from sparselt_dist.data.manifest import (
    MANIFEST,
    TOKENIZER,
    Dtype,
    Kind,
    Manifest,
    ShardEntry,
    SourceEntry,
    file_sha256,
    read_manifest,
    write_atomically,
    write_manifest,
)
from sparselt_dist.data.shard_index import Member, index_path, read_index
from sparselt_dist.errors import DataError

__all__ = [
    "MANIFEST",
    "TOKENIZER",
    "Dtype",
    "Kind",
    "Manifest",
    "ShardEntry",
    "ShardFolder",
    "ShardWriter",
    "SourceEntry",
    "file_sha256",
    "id_dtype",
    "read_manifest",
    "shard_name",
    "write_atomically",
    "write_manifest",
]

SAMPLES_PER_MEMBER = 256


def id_dtype(vocab_size: int) -> Dtype:
    """The smallest stored type that holds every id."""
    return "uint16" if vocab_size <= 65536 else "uint32"


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:06d}.tar"


# --- writing ---------------------------------------------------------------------------------------------------------


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

    def add(self, key: str, samples: list[np.ndarray], kind: Kind, dtype: str) -> None:
        """Add one member: the given rows as a matrix, or documents end to end with their lengths."""
        if kind == "rows":
            offset = self._add_array(f"{key}.ids.npy", np.stack(samples).astype(dtype, copy=False))
            lengths_offset = None
        else:
            lengths = np.array([len(ids) for ids in samples], dtype=np.uint32)
            offset = self._add_array(f"{key}.ids.npy", np.concatenate(samples).astype(dtype, copy=False))
            lengths_offset = self._add_array(f"{key}.lengths.npy", lengths)
        tokens = sum(len(ids) for ids in samples)
        self.members.append(Member(f"{key}.ids.npy", offset, len(samples), tokens, lengths_offset))

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
        self._pending: list[np.ndarray] = []
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, ids: np.ndarray) -> None:
        """Add one row or document: a 1-D array of ids."""
        self._pending.append(ids)
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


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _OpenShard:
    data: np.ndarray  # uint8 memory map of the tar
    starts: np.ndarray  # int64 [samples], byte offset of each sample's first id
    lengths: np.ndarray  # int64 [samples], ids


class ShardFolder:
    """Random access to the samples of a shard folder (or of some of its shards: a glob of tars).

    A sample's global number is its position in manifest order. Opening checks that every file has the size that the
    manifest says. Picklable: memory maps are opened anew where it is unpickled.
    """

    def __init__(self, path: Path | str) -> None:
        self.path, chosen = _resolve(str(path))
        self.manifest = read_manifest(self.path)
        self.shards = tuple(entry for entry in self.manifest.shards if chosen is None or entry.name in chosen)
        if not self.shards:
            raise DataError(f"{path}: matches no shard that {self.path / MANIFEST} lists; correct the pattern")
        self._ends = np.cumsum([entry.samples for entry in self.shards])
        self._open_shards: dict[int, _OpenShard] = {}
        for entry in self.shards:
            self._check_size(entry)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open_shards": {}}

    @property
    def num_samples(self) -> int:
        """Rows or documents in all."""
        return int(self._ends[-1])

    @property
    def shard_samples(self) -> list[int]:
        """Samples of each shard, in order."""
        return [entry.samples for entry in self.shards]

    def _check_size(self, entry: ShardEntry) -> None:
        shard = self.path / entry.name
        try:
            size = shard.stat().st_size
        except OSError as cause:
            raise DataError(
                f"{shard}: listed in {MANIFEST} but {cause.strerror}; restore the file or prepare the folder again"
            ) from cause
        if size != entry.bytes:
            state = "truncated" if size < entry.bytes else "longer than written"
            raise DataError(
                f"{shard}: {state}: found {size} bytes, expected {entry.bytes}; restore the file or "
                "prepare the folder again"
            )

    def _locate(self, sample: int) -> tuple[int, int]:
        """(shard number, number in the shard)."""
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"sample {sample} of {self.num_samples}")
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        return shard, sample - (int(self._ends[shard - 1]) if shard else 0)

    def key(self, sample: int) -> str:
        """`<shard file without .tar>/<number in the shard>`, unique in the folder."""
        shard, inside = self._locate(sample)
        return f"{self.shards[shard].name.removesuffix('.tar')}/{inside}"

    def _open(self, shard: int) -> _OpenShard:
        opened = self._open_shards.get(shard)
        if opened is not None:
            return opened
        path = self.path / self.shards[shard].name
        members = read_index(path, self.manifest.kind)
        data = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))  # a plain view slices faster
        itemsize = np.dtype(self.manifest.dtype).itemsize
        starts, lengths = [], []
        for member in members:
            if member.lengths_offset is None:
                counts = np.full(member.samples, member.tokens // max(1, member.samples), dtype=np.int64)
            else:
                stored = data[member.lengths_offset : member.lengths_offset + 4 * member.samples]
                counts = stored.view(np.uint32).astype(np.int64)
            starts.append(member.offset + (np.cumsum(counts) - counts) * itemsize)
            lengths.append(counts)
        opened = _OpenShard(data, np.concatenate(starts), np.concatenate(lengths))
        found, expected = len(opened.starts), self.shards[shard].samples
        if found != expected:
            raise DataError(f"{path}: found {found} samples, {MANIFEST} says {expected}; run `sparselt shards verify`")
        self._open_shards[shard] = opened
        return opened

    def ids(self, sample: int) -> np.ndarray:
        """The ids of one sample: a copy, uint16 or uint32 [n].

        Raises:
            DataError: an id lies outside the vocabulary; the shard file and the sample are named.
        """
        shard, inside = self._locate(sample)
        opened = self._open(shard)
        start, length = int(opened.starts[inside]), int(opened.lengths[inside])
        dtype = np.dtype(self.manifest.dtype)
        ids: np.ndarray = opened.data[start : start + length * dtype.itemsize].copy().view(dtype)
        if length and int(ids.max()) >= self.manifest.vocab_size:
            where = self.path / self.shards[shard].name
            raise DataError(
                f"{where}: sample {inside} holds token id {int(ids.max())}, outside the vocabulary of "
                f"{self.manifest.vocab_size}; run `sparselt shards verify {self.path}` and prepare again"
            )
        return ids

    def lengths(self, shard: int) -> np.ndarray:
        """Tokens of each sample of one shard, int64."""
        return self._open(shard).lengths

    def read(self, samples: np.ndarray) -> list[np.ndarray]:
        """The ids of several samples, in the order asked; located, copied and checked together.

        Raises:
            DataError: as `ids`.
        """
        shards, insides = self._locate_all(samples)
        dtype = np.dtype(self.manifest.dtype)
        pieces = []
        for shard, inside in zip(shards.tolist(), insides.tolist(), strict=True):
            opened = self._open(shard)
            start = int(opened.starts[inside])
            pieces.append(opened.data[start : start + int(opened.lengths[inside]) * dtype.itemsize])
        joined: np.ndarray = np.concatenate(pieces).view(dtype)
        if joined.size and int(joined.max()) >= self.manifest.vocab_size:
            return [self.ids(int(sample)) for sample in samples]  # raises, naming the sample
        ends = np.cumsum([len(piece) // dtype.itemsize for piece in pieces]).tolist()
        return [joined[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def keys(self, samples: np.ndarray) -> list[str]:
        """The keys of several samples."""
        shards, insides = self._locate_all(samples)
        return [
            f"{self.shards[shard].name.removesuffix('.tar')}/{inside}"
            for shard, inside in zip(shards.tolist(), insides.tolist(), strict=True)
        ]

    def _locate_all(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shards = np.searchsorted(self._ends, samples, side="right")
        return shards, samples - np.concatenate([[0], self._ends])[shards]


def _resolve(path: str) -> tuple[Path, frozenset[str] | None]:
    """A folder, or a glob of one folder or of tars in one folder, to (folder, chosen shard names or None for all)."""
    if "://" in path:
        raise DataError(f"{path}: remote shards cannot be read directly; copy the folder to a local disk and name that")
    if not glob.has_magic(path) or Path(path).exists():
        return Path(path), None
    matches = [Path(match) for match in sorted(glob.glob(path))]
    if len(matches) == 1 and matches[0].is_dir():
        return matches[0], None
    folders = {match.parent for match in matches if match.suffix == ".tar"}
    if len(folders) != 1 or any(match.suffix != ".tar" for match in matches):
        raise DataError(
            f"{path}: matches {len(matches)} paths, expected one shard folder or the .tar files of one folder"
        )
    return folders.pop(), frozenset(match.name for match in matches)

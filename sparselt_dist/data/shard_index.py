"""Where the arrays of a shard lie in its tar: the index beside it, or the scan that replaces a missing or stale one."""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparselt_dist.data.manifest import Kind
from sparselt_dist.errors import DataError


@dataclass(frozen=True)
class Member:
    """One tar member in a shard's index; offsets are of the first array element, in bytes from the start of the tar."""

    name: str
    offset: int
    samples: int
    tokens: int
    lengths_offset: int | None = None  # kind documents: uint32 [samples]
    documents_offset: int | None = None  # kind packed: uint32 [samples, documents_width]
    documents_width: int = 0


def index_path(shard: Path) -> Path:
    """The index that belongs to a shard file."""
    return shard.with_suffix(".index.json")


def scan_tar(path: Path, kind: Kind) -> list[Member]:
    """The index of a shard, from the tar itself.

    Raises:
        DataError: the tar or an array in it cannot be read; the file is named.
    """
    arrays: dict[str, _Array] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if not info.isfile() or not info.name.endswith(".npy"):  # a link is no shard's own array
                    continue
                file = tar.extractfile(info)
                assert file is not None
                arrays[info.name] = _npy_place(file, info, keep=not info.name.endswith(".ids.npy"))
    except (tarfile.TarError, OSError, ValueError, EOFError) as cause:
        raise DataError(
            f"{path}: not a readable shard: {cause}; restore the file or prepare the folder again"
        ) from cause
    names = [name for name in arrays if name.endswith(".ids.npy")]
    return [_scanned_member(path, name, kind, arrays) for name in names]


class _Array(NamedTuple):
    offset: int
    shape: tuple[int, ...]
    values: np.ndarray | None


def _scanned_member(path: Path, name: str, kind: Kind, arrays: dict[str, _Array]) -> Member:
    offset, shape, _ = arrays[name]
    if kind != "documents" and len(shape) != 2:
        raise DataError(f"{path}: member {name} has shape {list(shape)}, expected [rows, sequence_length]")
    if kind == "rows":
        return Member(name, offset, shape[0], shape[0] * shape[1])
    beside = "lengths" if kind == "documents" else "documents"
    other = arrays.get(f"{name.removesuffix('.ids.npy')}.{beside}.npy")
    if other is None or other.values is None or not _agree(kind, shape, other):
        raise DataError(f"{path}: member {name} does not agree with its {beside}; prepare the folder again")
    tokens = int(other.values.sum())
    if kind == "documents":
        return Member(name, offset, other.shape[0], tokens, lengths_offset=other.offset)
    return Member(name, offset, shape[0], tokens, documents_offset=other.offset, documents_width=other.shape[1])


def _agree(kind: Kind, shape: tuple[int, ...], lengths: _Array) -> bool:
    """Whether the ids of a member and the lengths beside them are of the same samples."""
    assert lengths.values is not None
    if kind == "documents":
        return len(shape) == 1 and int(lengths.values.sum()) == shape[0]
    return len(lengths.shape) == 2 and lengths.shape[0] == shape[0]


def _npy_place(file: Any, info: tarfile.TarInfo, keep: bool) -> _Array:
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    offset = info.offset_data + file.tell()
    values = np.frombuffer(file.read(), dtype=dtype) if keep else None
    return _Array(offset, shape, values)


def read_index_file(shard: Path) -> list[Member] | None:
    """The stored index of a shard; None if it is missing or corrupt."""
    try:
        return [Member(**entry) for entry in json.loads(index_path(shard).read_bytes())["members"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_index(shard: Path, kind: Kind) -> list[Member]:
    """The index of a shard, from its file if that is there and fits the tar, else from a scan of the tar."""
    members = read_index_file(shard)
    return members if members and _index_fits(shard, members) else scan_tar(shard, kind)


def _index_fits(shard: Path, members: list[Member]) -> bool:
    """Whether each member's header stands in front of its data, which a repacked tar would have moved."""
    with shard.open("rb") as file:
        for member in members:
            data_block = (member.offset - 1) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
            file.seek(max(0, data_block - tarfile.BLOCKSIZE))
            header = file.read(tarfile.BLOCKSIZE + 6)
            if not header.startswith(member.name.encode() + b"\0") or not header.endswith(b"\x93NUMPY"):
                return False
    return True

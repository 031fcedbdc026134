"""Every checksum, count and token id of a shard folder, read as any other tool would read it: through `webdataset`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sparselt_dist.data.manifest import MANIFEST, Manifest, ShardEntry, file_sha256, read_manifest
from sparselt_dist.data.shard_index import index_path, read_index_file, scan_tar
from sparselt_dist.data.tokenizer import tokenizer_faults
from sparselt_dist.errors import DataError

MAX_FAULTS_PER_SHARD = 5


def verify(folder: Path | str) -> list[str]:
    """All faults of a shard folder, each naming its file; empty if the folder is sound."""
    folder = Path(folder)
    try:
        manifest = read_manifest(folder)
        faults = tokenizer_faults(folder, manifest)
    except DataError as fault:
        return [str(fault)]
    faults += _listing_faults(folder, manifest)
    for entry in manifest.shards:
        found = list(_shard_faults(folder / entry.name, entry, manifest))
        faults += found[:MAX_FAULTS_PER_SHARD]
        if len(found) > MAX_FAULTS_PER_SHARD:
            faults.append(f"{folder / entry.name}: {len(found) - MAX_FAULTS_PER_SHARD} more faults")
    return faults


def _listing_faults(folder: Path, manifest: Manifest) -> list[str]:
    """Files that the manifest does not know, and totals that its own lines do not add up to."""
    listed = {entry.name for entry in manifest.shards}
    strangers = (path for path in sorted(folder.glob("*.tar")) if path.name not in listed)
    faults = [f"{path}: not listed in {MANIFEST}; remove it" for path in strangers]
    for key in ("samples", "tokens"):
        found, total = getattr(manifest, key), sum(getattr(entry, key) for entry in manifest.shards)
        if found != total:
            faults.append(f"{folder / MANIFEST}: {key} is {found}, its shards add up to {total}")
    return faults


def _shard_faults(path: Path, entry: ShardEntry, manifest: Manifest) -> Iterator[str]:
    if not path.exists():
        yield f"{path}: missing, listed in {MANIFEST}"
        return
    size = path.stat().st_size
    if size != entry.bytes:
        state = "truncated" if size < entry.bytes else "too long"
        yield f"{path}: {state}: found {size} bytes, expected {entry.bytes}"
    elif (found := file_sha256(path)) != entry.sha256:
        yield f"{path}: changed: found sha256 {found[:12]}…, expected {entry.sha256[:12]}…"
    try:
        yield from _content_faults(path, entry, manifest)
        yield from _index_faults(path, manifest)
    except DataError as fault:
        yield str(fault)


def _members(path: Path) -> Iterator[dict[str, Any]]:
    """The tar samples of a shard, decoded by webdataset's own stages over a file that we close, which it does not."""
    from webdataset import filters, tariterators

    try:
        with path.open("rb") as stream:
            files = tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
            yield from filters.decode()(tariterators.group_by_keys(files))
    except Exception as cause:  # whatever tarfile, numpy or the decoder make of damaged bytes
        reason = (str(cause).splitlines() or [repr(cause)])[0]
        raise DataError(f"{path}: cannot be read: {reason}; restore the file or prepare the folder again") from cause


def _content_faults(path: Path, entry: ShardEntry, manifest: Manifest) -> Iterator[str]:
    samples = tokens = members = 0
    for member in _members(path):
        members += 1
        key = member["__key__"]
        ids = member.get("ids.npy")
        if ids is None:
            yield f"{path}: member {key} has no ids.npy"
            continue
        expected_key = f"{path.stem.replace('-', '')}-{members - 1:05d}"
        if key != expected_key:
            yield f"{path}: found member {key}, expected {expected_key}: another shard's content, or another order"
        yield from _array_faults(path, key, ids, member.get("lengths.npy"), manifest, samples)
        samples += len(ids) if manifest.kind == "rows" else len(member.get("lengths.npy", ()))
        tokens += ids.size
    counts = {"samples": samples, "tokens": tokens, "members": members}
    for name, found in counts.items():
        if found != getattr(entry, name):
            yield f"{path}: found {found} {name}, expected {getattr(entry, name)}"


def _array_faults(
    path: Path, key: str, ids: np.ndarray, lengths: np.ndarray | None, manifest: Manifest, first_sample: int
) -> Iterator[str]:
    if ids.dtype != np.dtype(manifest.dtype):
        yield f"{path}: member {key} holds {ids.dtype}, expected {manifest.dtype}"
    if manifest.kind == "rows":
        if ids.ndim != 2 or ids.shape[1] != manifest.sequence_length:
            yield f"{path}: member {key} has shape {list(ids.shape)}, expected [rows, {manifest.sequence_length}]"
            return
    elif lengths is None or ids.ndim != 1 or int(lengths.sum()) != ids.size:
        yield f"{path}: member {key} has {ids.size} ids, its lengths do not add up to that"
        return
    outside = np.flatnonzero(ids.reshape(-1) >= manifest.vocab_size)
    if outside.size:
        place = int(outside[0])
        if manifest.kind == "rows":
            sample = place // ids.shape[1]
        else:
            assert lengths is not None
            sample = int(np.searchsorted(np.cumsum(lengths), place, side="right"))
        found = int(ids.reshape(-1)[place])
        yield (
            f"{path}: sample {first_sample + sample} holds token id {found}, outside the vocabulary of "
            f"{manifest.vocab_size} ({outside.size} such ids in member {key})"
        )


def _index_faults(path: Path, manifest: Manifest) -> Iterator[str]:
    index = index_path(path)
    stored = read_index_file(path)
    if stored is None:
        yield f"{index}: missing or corrupt; the shard can be read without it, slower at opening"
    elif stored != scan_tar(path, manifest.kind):
        yield f"{index}: does not fit {path.name}"

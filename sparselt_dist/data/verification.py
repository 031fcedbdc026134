"""Every checksum, count and token id of a shard folder, read as any other tool would read it: through `webdataset`."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sparselt_dist.data.manifest import MANIFEST, Manifest, ShardEntry, file_sha256
from sparselt_dist.data.pair_files import FOLDER, pair_faults
from sparselt_dist.data.shard_files import Access
from sparselt_dist.data.shard_index import index_path, read_index_file, scan_tar
from sparselt_dist.data.shards import ShardFolder
from sparselt_dist.data.storage import is_remote, join
from sparselt_dist.data.tokenization import SPLITS
from sparselt_dist.data.tokenizer import tokenizer_faults, tokenizer_info
from sparselt_dist.errors import DataError
from sparselt_dist.redaction import shown

MAX_FAULTS_PER_SHARD = 5


def verify(location: Path | str, access: Access | None = None) -> list[str]:
    """All faults of a shard folder, local or remote, each naming its file; empty if the folder is sound."""
    access = access or Access()
    try:
        folder = ShardFolder(location, access=dataclasses.replace(access, skip_bad=True))  # shards are looked at below
        manifest = folder.manifest
        faults = tokenizer_faults(folder.tokenizer, manifest)
        pad_id = tokenizer_info(folder.tokenizer).pad_id if not faults else None
    except DataError as fault:
        return [str(fault)]
    remote = is_remote(folder.location)
    faults += _total_faults(folder)
    if not remote:
        faults += _stranger_faults(Path(folder.location), manifest) + _pair_faults(Path(folder.location), manifest)
    cache = access.cache()
    for number, entry in enumerate(manifest.shards):
        url = folder.files.url(number)
        try:
            path = cache.fetch(url, expected_bytes=entry.bytes, expected_sha256=entry.sha256) if remote else Path(url)
        except DataError as fault:
            faults.append(str(fault))
            continue
        found = list(_shard_faults(path, entry, manifest, pad_id, has_index=not remote))
        faults += found[:MAX_FAULTS_PER_SHARD]
        if len(found) > MAX_FAULTS_PER_SHARD:
            faults.append(f"{shown(url)}: {len(found) - MAX_FAULTS_PER_SHARD} more faults")
    return faults


def _stranger_faults(folder: Path, manifest: Manifest) -> list[str]:
    """Tars that the manifest does not know."""
    listed = {entry.name for entry in manifest.shards}
    strangers = (path for path in sorted(folder.glob("*.tar")) if path.name not in listed)
    return [f"{path}: not listed in {MANIFEST}; remove it" for path in strangers]


def _pair_faults(folder: Path, manifest: Manifest) -> list[str]:
    """Of the agreement pairs, where there are any or should be; they are no part of a held-out split."""
    wanted = "agreements" in manifest.prepare and folder.name != SPLITS[1]
    return pair_faults(folder, manifest.tokenizer_sha256) if wanted or (folder / FOLDER).exists() else []


def _total_faults(folder: ShardFolder) -> list[str]:
    """Totals of the manifest that its own lines do not add up to."""
    faults = []
    for key in ("samples", "tokens"):
        found, total = getattr(folder.manifest, key), sum(getattr(entry, key) for entry in folder.manifest.shards)
        if found != total:
            faults.append(f"{shown(join(folder.location, MANIFEST))}: {key} is {found}, its shards add up to {total}")
    return faults


def _shard_faults(
    path: Path, entry: ShardEntry, manifest: Manifest, pad_id: int | None, has_index: bool
) -> Iterator[str]:
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
        yield from _content_faults(path, entry, manifest, pad_id)
        if has_index:
            yield from _index_faults(path, manifest)
    except DataError as fault:
        yield str(fault)


def _members(path: Path) -> Iterator[dict[str, Any]]:
    """The tar samples of a shard, by webdataset's own stages over a file that we close, which it does not.

    Arrays are decoded here: webdataset would also unpickle members that are called .pkl or .pth, and so run what they say.
    """
    from webdataset import tariterators

    try:
        with path.open("rb") as stream:
            files = tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
            for sample in tariterators.group_by_keys(files):
                yield {name: _array(value) if name.endswith(".npy") else value for name, value in sample.items()}
    except Exception as cause:  # whatever tarfile, numpy or the decoder make of damaged bytes
        reason = (str(cause).splitlines() or [repr(cause)])[0]
        raise DataError(f"{path}: cannot be read: {reason}; restore the file or prepare the folder again") from cause


def _array(content: bytes) -> np.ndarray:
    array: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
    return array


def _content_faults(path: Path, entry: ShardEntry, manifest: Manifest, pad_id: int | None) -> Iterator[str]:
    samples = tokens = members = 0
    stem = Path(entry.name).stem.replace("-", "")
    for member in _members(path):
        members += 1
        key = member["__key__"]
        if "ids.npy" not in member:
            yield f"{path}: member {key} has no ids.npy"
            continue
        expected_key = f"{stem}-{members - 1:05d}"
        if key != expected_key:
            yield f"{path}: found member {key}, expected {expected_key}: another shard's content, or another order"
        ids, lengths = member["ids.npy"], member.get("lengths.npy", member.get("documents.npy"))
        faults = list(_array_faults(f"{path}: member {key}", ids, lengths, manifest, pad_id))
        yield from faults or _id_faults(path, key, ids, lengths, manifest, samples)
        samples += len(ids) if manifest.kind != "documents" or lengths is None else len(lengths)
        tokens += int(ids.size if lengths is None else lengths.sum())
    counts = {"samples": samples, "tokens": tokens, "members": members}
    for name, found in counts.items():
        if found != getattr(entry, name):
            yield f"{path}: found {found} {name}, expected {getattr(entry, name)}"


def _array_faults(
    where: str, ids: np.ndarray, lengths: np.ndarray | None, manifest: Manifest, pad_id: int | None
) -> Iterator[str]:
    """Types, shapes and lengths of one member."""
    if ids.dtype != np.dtype(manifest.dtype):
        yield f"{where} holds {ids.dtype}, expected {manifest.dtype}"
    if manifest.kind == "documents":
        if lengths is None or ids.ndim != 1 or int(lengths.sum()) != ids.size:
            yield f"{where} has {ids.size} ids, its lengths do not add up to that"
        return
    if ids.ndim != 2 or ids.shape[1] != manifest.sequence_length:
        yield f"{where} has shape {list(ids.shape)}, expected [rows, {manifest.sequence_length}]"
    elif manifest.kind == "packed":
        if lengths is None or lengths.ndim != 2 or len(lengths) != len(ids):
            yield f"{where} has no lengths of the documents in its rows"
        elif int(lengths.sum(axis=1).max()) > ids.shape[1]:
            yield f"{where}: the documents of a row are longer than the row"
        elif pad_id is not None and (ids[np.arange(ids.shape[1]) >= lengths.sum(axis=1)[:, None]] != pad_id).any():
            yield f"{where}: found other ids than padding ({pad_id}) after the documents of a row"


def _id_faults(
    path: Path, key: str, ids: np.ndarray, lengths: np.ndarray | None, manifest: Manifest, first_sample: int
) -> Iterator[str]:
    """Ids outside the vocabulary; the first one's sample is named."""
    outside = np.flatnonzero(ids.reshape(-1) >= manifest.vocab_size)
    if outside.size == 0:
        return
    place = int(outside[0])
    if manifest.kind == "documents" and lengths is not None:
        sample = int(np.searchsorted(np.cumsum(lengths), place, side="right"))
    else:
        sample = place // ids.shape[1]
    yield (
        f"{path}: sample {first_sample + sample} holds token id {int(ids.reshape(-1)[place])}, outside the vocabulary of "
        f"{manifest.vocab_size} ({outside.size} such ids in member {key})"
    )


def _index_faults(path: Path, manifest: Manifest) -> Iterator[str]:
    index = index_path(path)
    stored = read_index_file(path)
    if stored is None:
        yield f"{index}: missing or corrupt; the shard can be read without it, slower at opening"
    elif stored != scan_tar(path, manifest.kind):
        yield f"{index}: does not fit {path.name}"

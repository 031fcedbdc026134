"""Agreement pairs on disk, in the folder `agreements` of a shard folder, with a manifest that ties them to the shards.

| file | holds |
|---|---|
| `A1.npz` ... | the pairs of a family, as `pair_columns.py` describes them |
| `A1.window.npz` ... | for each of them two neighbouring words of its sentence instead: the control without syntax |
| `text.npz` | some of the sentences with the role of each piece, see `labelled_text.py` |
| `manifest.json` | where the pairs come from, and the hash of each file |
| `cost.json` | the processor seconds of the extraction; apart, for all other bytes depend on text and configuration alone |
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from sparselt_dist.data.agreements import Family
from sparselt_dist.data.manifest import ShardEntry, file_sha256, read_manifest, write_atomically
from sparselt_dist.data.pair_columns import Columns
from sparselt_dist.errors import DataError

FOLDER = "agreements"
MANIFEST_FILE = "manifest.json"
COST_FILE = "cost.json"
TEXT = "text"
FORMAT = 2
Track = Literal["strict", "parser"]
PairKind = Literal["agreements", "window"]


class StoredFamily(NamedTuple):
    """What is stored of a family: its pairs, and as many of neighbouring words."""

    family: Family
    agreements: Columns
    window: Columns


@dataclass(frozen=True)
class PairOrigin:
    """Where pairs come from."""

    track: Track
    tokenizer_sha256: str
    shards_sha256: str  # of `shards_identity`
    vocab_size: int
    documents: int  # of the sample that was read
    unaligned: int  # of these, left out: normalising changed more than can be traced back
    words: int


@dataclass(frozen=True)
class PairManifest:
    """What stands beside the files."""

    format: int
    track: Track
    tokenizer_sha256: str
    shards_sha256: str
    vocab_size: int
    documents: int
    unaligned: int
    words: int  # of the sample that the pairs come from
    labels: dict[Family, list[str]]
    pairs: dict[Family, int]
    text_pieces: int
    sha256: dict[str, str]  # by name of the file, without its ending
    extraction_seconds: float  # of processors; stored apart


def shards_identity(shards: Iterable[ShardEntry]) -> str:
    """What tells the content of a shard folder from any other's: a hash of its shards' hashes."""
    return hashlib.sha256("\n".join(entry.sha256 for entry in shards).encode()).hexdigest()


# --- writing ---------------------------------------------------------------------------------------------------------


def write_pairs(
    folder: Path,
    families: Iterable[StoredFamily],
    text: dict[str, np.ndarray],
    origin: PairOrigin,
    *,
    extraction_seconds: float,
) -> dict[Family, int]:
    """Write pairs and labelled text under a folder; one family is held at a time, the manifest comes last.

    Returns:
        the number of pairs by family.
    """
    target = folder / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    labels: dict[Family, list[str]] = {}
    pairs: dict[Family, int] = {}
    hashes: dict[str, str] = {}
    for family, agreements, window in families:
        labels[family], pairs[family] = agreements.labels, len(agreements)
        hashes[family] = _write_arrays(target / f"{family}.npz", agreements.arrays)
        hashes[f"{family}.window"] = _write_arrays(target / f"{family}.window.npz", window.arrays)
    hashes[TEXT] = _write_arrays(target / f"{TEXT}.npz", text)
    manifest = {
        "format": FORMAT,
        **asdict(origin),
        "labels": labels,
        "pairs": pairs,
        "text_pieces": len(text["ids"]),
        "sha256": hashes,
    }
    write_atomically(target / COST_FILE, json.dumps({"extraction_seconds": round(extraction_seconds, 3)}).encode())
    write_atomically(target / MANIFEST_FILE, json.dumps(manifest, indent=1).encode())
    return pairs


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> str:
    """As `numpy.savez`, but without the time of writing, so that equal pairs give equal bytes; returns the hash."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in sorted(arrays):
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, arrays[name], allow_pickle=False)
    return file_sha256(path)


# --- reading ---------------------------------------------------------------------------------------------------------


def has_pairs(folder: Path) -> bool:
    """Whether a shard folder holds agreement pairs."""
    return (folder / FOLDER / MANIFEST_FILE).is_file()


def read_pair_manifest(folder: Path, tokenizer_sha256: str) -> PairManifest:
    """The manifest of a shard folder's pairs.

    Raises:
        DataError: there are none, they are unreadable, or they were made with another tokenizer or for other shards.
    """
    path = folder / FOLDER / MANIFEST_FILE
    remedy = "prepare the shards with prepare.agreements=strict"
    if not path.exists():
        raise DataError(f"{folder}: holds no agreement pairs, expected {FOLDER}/{MANIFEST_FILE}; {remedy}")
    try:
        stored: dict[str, Any] = json.loads(path.read_bytes())
        if stored.get("format") == FORMAT:
            stored |= json.loads(path.with_name(COST_FILE).read_bytes())
            manifest = PairManifest(**stored)
    except (OSError, ValueError, TypeError, AttributeError) as cause:
        raise DataError(f"{path}: cannot be read: {cause}; expected a manifest of agreement pairs; {remedy}") from cause
    if stored.get("format") != FORMAT:
        raise DataError(f"{path}: found format {stored.get('format')}, expected {FORMAT}; {remedy}")
    if manifest.tokenizer_sha256 != tokenizer_sha256:
        raise DataError(
            f"{path}: the pairs were made with tokenizer {manifest.tokenizer_sha256[:12]}…, expected that of the shards, "
            f"{tokenizer_sha256[:12]}…; {remedy}"
        )
    if manifest.shards_sha256 != (identity := shards_identity(read_manifest(folder).shards)):
        raise DataError(
            f"{path}: the pairs belong to shards {manifest.shards_sha256[:12]}…, expected those of the folder, "
            f"{identity[:12]}…; {remedy}"
        )
    return manifest


def read_pairs(
    folder: Path, manifest: PairManifest, family: Family, kind: PairKind = "agreements"
) -> dict[str, np.ndarray]:
    """The arrays of a family, or of as many pairs of neighbouring words in the same sentences.

    Raises:
        DataError: the family is not there, or its file is damaged.
    """
    if family not in manifest.pairs:
        there = ", ".join(sorted(manifest.pairs)) or "none"
        raise DataError(
            f"agreement pairs: found {family}, expected families of {folder / FOLDER}: {there}; choose among them"
        )
    return _read_arrays(folder, manifest, family if kind == "agreements" else f"{family}.window")


def read_labelled_text(folder: Path, manifest: PairManifest) -> dict[str, np.ndarray]:
    """The arrays of the labelled text, see `labelled_text.py`.

    Raises:
        DataError: its file is missing or damaged.
    """
    return _read_arrays(folder, manifest, TEXT)


def _read_arrays(folder: Path, manifest: PairManifest, name: str) -> dict[str, np.ndarray]:
    fault = _file_fault(folder, manifest, name)
    if fault:
        raise DataError(fault)
    with np.load(folder / FOLDER / f"{name}.npz", allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}


def _file_fault(folder: Path, manifest: PairManifest, name: str) -> str:
    path, expected = folder / FOLDER / f"{name}.npz", manifest.sha256.get(name, "none")
    if not path.exists():
        return f"{path}: missing, expected sha256 {expected[:12]}…; restore it or prepare the shards again"
    found = file_sha256(path)
    if found == expected:
        return ""
    return (
        f"{path}: found sha256 {found[:12]}…, expected {expected[:12]}… of its manifest; restore it or prepare the shards "
        "again"
    )


def pair_faults(folder: Path, tokenizer_sha256: str) -> list[str]:
    """What is wrong with a shard folder's pairs; empty if all files are as their manifest says."""
    try:
        manifest = read_pair_manifest(folder, tokenizer_sha256)
    except DataError as fault:
        return [str(fault)]
    faults = (_file_fault(folder, manifest, name) for name in manifest.sha256)
    return [fault for fault in faults if fault]


def describe_pairs(manifest: PairManifest) -> str:
    """Pairs by family, and where they come from, in a line."""
    pairs = ", ".join(f"{family} {count:,}" for family, count in manifest.pairs.items())
    left_out = f" ({manifest.unaligned:,} left out)" if manifest.unaligned else ""
    return (
        f"{pairs}; {manifest.track} track, {manifest.words:,} words of {manifest.documents:,} documents{left_out}, "
        f"{manifest.text_pieces:,} pieces of labelled text, {manifest.extraction_seconds:.1f} processor seconds"
    )

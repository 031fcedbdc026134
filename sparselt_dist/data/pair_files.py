"""Agreement pairs on disk: one `.npz` a family beside the shards, with a manifest that ties them to a tokenizer.

A file holds four ragged lists of sides (heads, dependents, and those of the wrong-number copies): `<name>_ids`, all ids end
to end, `<name>_ends`, where each side ends, `<name>_roots`, whether an id belongs to the root word; `labels`, a number
into the manifest's list, and `flipped`, the pairs that have a copy. The bytes depend on the pairs alone.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from sparselt_dist.data.agreements import Family
from sparselt_dist.data.piece_alignment import Side
from sparselt_dist.errors import DataError

FOLDER = "agreements"
MANIFEST_FILE = "manifest.json"
FORMAT = 1
FREE_REPEATS = 10
Track = Literal["strict", "parser"]


class Pair(NamedTuple):
    """A pair in pieces."""

    label: str
    head: Side
    dependent: Side
    flipped: tuple[Side, Side] | None  # (head, dependent) of the copy in the wrong number


@dataclass(frozen=True)
class PairManifest:
    """What stands beside the files."""

    format: int
    track: Track
    tokenizer_sha256: str
    vocab_size: int
    words: int  # of the sample that the pairs come from
    extraction_seconds: float
    labels: dict[Family, list[str]]
    pairs: dict[Family, int]
    sha256: dict[Family, str]


def thin_repeats(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """Keep each pair that is seen c > 10 times with probability sqrt(10/c): a function of the pairs and the seed."""
    keys = [(pair.head.ids, pair.dependent.ids) for pair in pairs]
    counts: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    draws = np.random.default_rng(seed).random(len(pairs))
    chances = np.sqrt(FREE_REPEATS / np.array([counts[key] for key in keys], dtype=np.float64))
    return [pair for pair, kept in zip(pairs, draws < chances, strict=True) if kept]


def write_pairs(
    folder: Path,
    pairs: dict[Family, list[Pair]],
    *,
    track: Track,
    tokenizer_sha256: str,
    vocab_size: int,
    words: int,
    extraction_seconds: float,
) -> PairManifest:
    """Write the pairs of all families under a shard folder; the manifest comes last."""
    target = folder / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    labels = {family: sorted({pair.label for pair in found}) for family, found in pairs.items()}
    hashes: dict[Family, str] = {}
    for family, found in pairs.items():
        path = target / f"{family}.npz"
        _write_arrays(path, _arrays(found, labels[family], vocab_size))
        hashes[family] = hashlib.sha256(path.read_bytes()).hexdigest()
    counts = {family: len(found) for family, found in pairs.items()}
    manifest = PairManifest(
        FORMAT, track, tokenizer_sha256, vocab_size, words, extraction_seconds, labels, counts, hashes
    )
    (target / MANIFEST_FILE).write_text(json.dumps(asdict(manifest), indent=1))
    return manifest


def _arrays(pairs: Sequence[Pair], labels: Sequence[str], vocab_size: int) -> dict[str, np.ndarray]:
    copies = [(number, pair.flipped) for number, pair in enumerate(pairs) if pair.flipped is not None]
    sides: dict[str, Iterable[Side]] = {
        "heads": (pair.head for pair in pairs),
        "dependents": (pair.dependent for pair in pairs),
        "flipped_heads": (head for _, (head, _) in copies),
        "flipped_dependents": (dependent for _, (_, dependent) in copies),
    }
    number = {label: place for place, label in enumerate(labels)}
    arrays: dict[str, np.ndarray] = {
        "labels": np.array([number[pair.label] for pair in pairs], dtype=np.uint16),
        "flipped": np.array([place for place, _ in copies], dtype=np.uint32),
    }
    for name, listed in sides.items():
        known = list(listed)
        arrays[f"{name}_ids"] = np.array(
            [piece for side in known for piece in side.ids], dtype=np.uint16 if vocab_size <= 2**16 else np.uint32
        )
        arrays[f"{name}_ends"] = np.cumsum([len(side.ids) for side in known], dtype=np.uint32)
        arrays[f"{name}_roots"] = np.array([root for side in known for root in side.of_root], dtype=bool)
    return arrays


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """As `numpy.savez`, but without the time of writing, so that equal pairs give equal bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in sorted(arrays):
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, arrays[name], allow_pickle=False)


def read_pair_manifest(folder: Path, tokenizer_sha256: str) -> PairManifest:
    """The manifest of a shard folder's pairs.

    Raises:
        DataError: there are none, they are unreadable, or they were made with another tokenizer.
    """
    path = folder / FOLDER / MANIFEST_FILE
    remedy = "prepare the shards with prepare.agreements=strict"
    if not path.exists():
        raise DataError(
            f"objective dac: {folder} holds no agreement pairs, expected {FOLDER}/{MANIFEST_FILE}; {remedy}"
        )
    try:
        stored: dict[str, Any] = json.loads(path.read_bytes())
        manifest = PairManifest(**stored)
    except (ValueError, TypeError) as cause:
        raise DataError(f"{path}: cannot be read: {cause}; expected a manifest of agreement pairs; {remedy}") from cause
    if manifest.format != FORMAT:
        raise DataError(f"{path}: found format {manifest.format}, expected {FORMAT}; {remedy}")
    if manifest.tokenizer_sha256 != tokenizer_sha256:
        raise DataError(
            f"{path}: the pairs were made with tokenizer {manifest.tokenizer_sha256[:12]}…, expected that of the shards, "
            f"{tokenizer_sha256[:12]}…; {remedy}"
        )
    return manifest


def read_pairs(folder: Path, manifest: PairManifest, family: Family) -> dict[str, np.ndarray]:
    """The arrays of a family.

    Raises:
        DataError: the family is not there, or its file is damaged.
    """
    path = folder / FOLDER / f"{family}.npz"
    if family not in manifest.sha256 or not path.exists():
        there = ", ".join(sorted(manifest.sha256)) or "none"
        raise DataError(
            f"objective.families: found {family}, expected families of {path.parent}: {there}; choose among them"
        )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != manifest.sha256[family]:
        raise DataError(
            f"{path}: found sha256 {found[:12]}…, expected {manifest.sha256[family][:12]}… of its manifest; prepare the "
            "shards again"
        )
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}

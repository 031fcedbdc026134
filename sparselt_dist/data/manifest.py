"""manifest.json: what a shard folder holds, and the mark that it is complete.

It is written last and by rename. Its hash stands for the data of a run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pydantic

from sparselt_dist.errors import DataError

FORMAT = "sparselt_dist.shards"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
RUN_COPY = "data_manifest.json"

_FILE_NAME = re.compile(r"(?!\.\.?$)[^/\\\0]+")

Kind = Literal["rows", "packed", "documents", "text"]  # text: raw text of others, tokenized on the fly
Dtype = Literal["uint16", "uint32"]


@dataclass(frozen=True)
class ShardEntry:
    """One line of the manifest: what a shard file must hold."""

    name: str
    samples: int  # rows, documents or pieces of text
    tokens: int  # ids stored, padding left out; 0: raw text, not counted
    bytes: int
    sha256: str
    members: int  # samples in the sense of WebDataset


@dataclass(frozen=True)
class SourceEntry:
    """Where text came from; documents and characters that were kept."""

    name: str
    license: str
    documents: int
    characters: int


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json; `sha256` is the hash of the file itself and is not stored in it."""

    format: str
    format_version: int
    kind: Kind
    sequence_length: int | None
    dtype: Dtype
    samples: int
    tokens: int
    vocab_size: int
    tokenizer_sha256: str
    shards: tuple[ShardEntry, ...]
    sources: tuple[SourceEntry, ...] = ()
    prepare: dict[str, Any] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""


_MANIFEST_ADAPTER = pydantic.TypeAdapter(Manifest)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is either absent, old or complete, also across a crash."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def file_sha256(path: Path) -> str:
    """The hash of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(
    folder: Path | str,
    entries: Iterable[ShardEntry],
    *,
    kind: Kind,
    sequence_length: int | None,
    dtype: Dtype,
    vocab_size: int,
    tokenizer_sha256: str,
    sources: Iterable[SourceEntry] = (),
    prepare: dict[str, Any] | None = None,
    statistics: dict[str, Any] | None = None,
) -> Manifest:
    """Complete a shard folder: write manifest.json, last and atomically."""
    shards = tuple(entries)
    manifest = Manifest(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        kind=kind,
        sequence_length=sequence_length,
        dtype=dtype,
        samples=sum(entry.samples for entry in shards),
        tokens=sum(entry.tokens for entry in shards),
        vocab_size=vocab_size,
        tokenizer_sha256=tokenizer_sha256,
        shards=shards,
        sources=tuple(sources),
        prepare=prepare or {},
        statistics=statistics or {},
    )
    content = dataclasses.asdict(manifest)
    del content["sha256"]
    write_atomically(Path(folder) / MANIFEST, json.dumps(content, indent=1).encode() + b"\n")
    return read_manifest(folder)


def read_manifest(folder: Path | str) -> Manifest:
    """The manifest of a shard folder.

    Raises:
        DataError: the folder or its manifest is missing, unreadable, of another format, or lists no shard.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError as cause:
        raise DataError(_missing_manifest(folder)) from cause
    except OSError as cause:
        raise DataError(f"{path}: cannot be read: {cause.strerror}; expected a shard folder's manifest") from cause
    return parse_manifest(content, str(path))


def parse_manifest(content: bytes, path: str) -> Manifest:
    """The manifest that a file holds; `path`, or a URL, stands in messages.

    Raises:
        DataError: as `read_manifest`.
    """
    try:
        manifest = _MANIFEST_ADAPTER.validate_json(content, strict=True)
    except pydantic.ValidationError as cause:
        first = cause.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"{path}: corrupt manifest: {where + ': ' if where else ''}{first['msg']}; restore it or "
            "run `sparselt prepare` anew"
        ) from cause
    if manifest.format != FORMAT or manifest.format_version != FORMAT_VERSION:
        raise DataError(
            f"{path}: found format {manifest.format!r} version {manifest.format_version}, expected {FORMAT!r} version "
            f"{FORMAT_VERSION}; prepare the text again with this version of sparselt_dist"
        )
    _check_names(manifest, path)
    if not manifest.shards or manifest.samples == 0:
        raise DataError(
            f"{path}: lists no sample; expected at least one shard; prepare the folder again with more text"
        )
    return dataclasses.replace(manifest, sha256=hashlib.sha256(content).hexdigest())


def _check_names(manifest: Manifest, path: str) -> None:
    """A shard lies beside its manifest: whoever wrote that must not choose what else is read, here or on the server."""
    outside = (entry.name for entry in manifest.shards if not _FILE_NAME.fullmatch(entry.name))
    if (name := next(outside, None)) is not None:
        raise DataError(
            f"{path}: lists the shard {name!r}, expected the name of a file beside it; do not use this folder, or "
            "prepare the text again"
        )


def write_copy(manifest: Manifest, folder: Path) -> None:
    """Keep a manifest, of several corpora joined into one, in the folder of a run."""
    write_atomically(folder / RUN_COPY, json.dumps(dataclasses.asdict(manifest)).encode())


def read_copy(folder: Path) -> Manifest | None:
    """The manifest kept in the folder of a run; None if there is none."""
    try:
        return _MANIFEST_ADAPTER.validate_json((folder / RUN_COPY).read_bytes(), strict=True)
    except (OSError, pydantic.ValidationError):
        return None


def _missing_manifest(folder: Path) -> str:
    fix = "run `sparselt prepare` first, or correct the path"
    if not folder.exists():
        return f"{folder}: no such shard folder; {fix}"
    if not folder.is_dir():
        return f"{folder}: is a file, expected a shard folder; {fix}"
    if (folder / "train" / MANIFEST).exists():
        return f"{folder}: holds the shard folders train/ and validation/; name one of them"
    if (folder / ".work").exists():
        return f"{folder}: holds an unfinished preparation and no {MANIFEST}; run the same `sparselt prepare` again"
    return f"{folder}: holds no {MANIFEST}, so it is no complete shard folder; {fix}"

"""Normalise, filter and number documents: pure functions of a batch, run in worker processes.

A cleaned document is stored as a record: source number (uint32), bytes of text (uint32), two 64-bit hashes of the
normalised text (one for exact duplicates, one for the held-out split), then the text in UTF-8.
"""

from __future__ import annotations

import hashlib
import re
import struct
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal, NamedTuple

import numpy as np

from sparselt_dist.data.embedded import tidy

Normalization = Literal["none", "nfc", "crammed"]

_HEADER = struct.Struct("<IIQQ")
_SURROGATES = re.compile(r"[\ud800-\udfff]")
_NOT_ON_KEYBOARD = re.compile(r"[^\t\n\r\x20-\x7e]+")
_SPACE_RUNS = re.compile(r" {2,}")


def normalize(text: str, how: Normalization) -> str:
    """The normalised text; every form is idempotent.

    `nfc`: Unicode NFC, line feeds, no control characters, single spaces, at most one blank line.
    `crammed`: as in cramming; the quote and space rules are applied once more after the deletion, which could
    otherwise bring two quotes or spaces together and make a second application differ.
    """
    if not text.isascii():
        text = _SURROGATES.sub("", text)  # JSON escapes can smuggle them in; they cannot be written
    if how == "none":
        return text
    if how == "nfc":
        return tidy(unicodedata.normalize("NFC", text))
    text = unicodedata.normalize("NFD", _double_quotes(text)).lower()
    return _SPACE_RUNS.sub(" ", _double_quotes(_NOT_ON_KEYBOARD.sub("", text)))


def _double_quotes(text: str) -> str:
    return text.replace("``", '"').replace("''", '"')


class StoredDocument(NamedTuple):
    """A record read back."""

    source: int
    exact_hash: int
    split_hash: int
    text: str


@dataclass(frozen=True)
class CleaningRules:
    """The part of the prepare configuration that acts on single documents."""

    normalization: Normalization
    min_characters: int
    max_characters: int | None


@dataclass(frozen=True)
class CleanBatch:
    """What is left of a batch of documents; arrays are aligned with `records`."""

    records: list[bytes]
    exact_hashes: np.ndarray  # uint64
    split_hashes: np.ndarray  # uint64
    characters: np.ndarray  # int64
    too_short: int
    too_long: int


def clean_batch(rules: CleaningRules, documents: list[tuple[int, str]]) -> CleanBatch:
    """Normalise (source number, text) pairs, drop those of the wrong length, and encode the rest."""
    records: list[bytes] = []
    exact_hashes, split_hashes, characters = [], [], []
    too_short = too_long = 0
    for source, raw in documents:
        text = normalize(raw, rules.normalization)
        if len(text) < rules.min_characters or not text:
            too_short += 1
            continue
        if rules.max_characters is not None and len(text) > rules.max_characters:
            too_long += 1
            continue
        data = text.encode()
        exact_hash, split_hash = struct.unpack("<QQ", hashlib.blake2b(data, digest_size=16).digest())
        records.append(_HEADER.pack(source, len(data), exact_hash, split_hash) + data)
        exact_hashes.append(exact_hash)
        split_hashes.append(split_hash)
        characters.append(len(text))
    return CleanBatch(
        records,
        np.array(exact_hashes, dtype=np.uint64),
        np.array(split_hashes, dtype=np.uint64),
        np.array(characters, dtype=np.int64),
        too_short,
        too_long,
    )


def parse_records(data: bytes) -> Iterator[StoredDocument]:
    """The documents of a stored chunk."""
    view, position = memoryview(data), 0
    while position < len(view):
        source, size, exact_hash, split_hash = _HEADER.unpack_from(view, position)
        position += _HEADER.size
        yield StoredDocument(source, exact_hash, split_hash, str(view[position : position + size], "utf-8"))
        position += size


def scan_exact_hashes(file: BinaryIO, end: int) -> Iterator[int]:
    """The exact hashes of all records up to a byte position, without reading the texts."""
    position = 0
    while position < end:
        file.seek(position)
        _, size, exact_hash, _ = _HEADER.unpack(file.read(_HEADER.size))
        yield exact_hash
        position += _HEADER.size + size


class HashSet:
    """64-bit hashes seen so far, 8 bytes each: sorted arrays whose sizes grow geometrically."""

    def __init__(self) -> None:
        self._levels: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Add hashes [n] and say which of them are new: bool [n]; of equal ones in the call the first is new."""
        unique, first = np.unique(hashes, return_index=True)
        new = np.zeros(len(hashes), dtype=bool)
        new[first] = True
        seen = np.zeros(len(unique), dtype=bool)
        for level in self._levels:
            places = np.minimum(np.searchsorted(level, unique), len(level) - 1)
            seen |= level[places] == unique
        new[first[seen]] = False
        added = unique[~seen]
        while self._levels and len(self._levels[-1]) <= 2 * len(added):
            added = np.union1d(self._levels.pop(), added)
        if len(added):
            self._levels.append(added)
        return new

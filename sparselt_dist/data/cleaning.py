"""Normalise, filter and hash documents: pure functions of a batch, run in worker processes."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from sparselt_dist.data import pair_sample
from sparselt_dist.data.embedded import tidy
from sparselt_dist.data.manifest import read_copy

Normalization = Literal["none", "nfc", "crammed"]

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


def text_normalization(run_dir: Path | None, fallback: Normalization) -> Normalization:
    """How the text of a run's shards was normalised, where their manifest tells."""
    manifest = None if run_dir is None else read_copy(run_dir)
    told = None if manifest is None else manifest.prepare.get("normalize")
    return as_normalization(told, fallback)


def as_normalization(told: object, fallback: Normalization) -> Normalization:
    """What a stored file tells of it, where it does."""
    return next((how for how in get_args(Normalization) if how == told), fallback)


@dataclass(frozen=True)
class CleaningRules:
    """The part of the prepare configuration that acts on single documents."""

    normalization: Normalization
    min_characters: int
    max_characters: int | None
    originals_share: float = 0.0  # of the documents, by `pair_sample.places`, whose text is kept as it was, too


@dataclass(frozen=True)
class CleanBatch:
    """What is left of a batch of documents; arrays are aligned with `texts`."""

    texts: list[bytes]  # UTF-8
    exact_hashes: np.ndarray  # uint64, of the normalised text
    split_hashes: np.ndarray  # uint64, of the same, for the held-out split
    characters: np.ndarray  # int64
    sources: np.ndarray  # int64, source numbers as given
    too_short: int
    too_long: int
    originals: dict[int, str]  # by number in `texts`: text that normalising changed, of documents to keep


def clean_batch(rules: CleaningRules, documents: list[tuple[int, str]]) -> CleanBatch:
    """Normalise (source number, text) pairs, drop those of the wrong length, and hash the rest."""
    texts: list[bytes] = []
    raws: list[str] = []
    characters, sources, digests = [], [], []
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
        texts.append(data)
        raws.append(raw)
        digests.append(hashlib.blake2b(data, digest_size=16).digest())
        characters.append(len(text))
        sources.append(source)
    hashes = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)
    return CleanBatch(
        texts,
        hashes[:, 0],
        hashes[:, 1],
        np.array(characters, dtype=np.int64),
        np.array(sources, dtype=np.int64),
        too_short,
        too_long,
        _originals(rules, hashes[:, 1], raws, texts),
    )


def _originals(rules: CleaningRules, split_hashes: np.ndarray, raws: list[str], texts: list[bytes]) -> dict[int, str]:
    if not rules.originals_share:
        return {}
    chosen = np.flatnonzero(pair_sample.places(split_hashes) < rules.originals_share).tolist()
    writable = ((number, normalize(raws[number], "none")) for number in chosen)
    return {number: raw for number, raw in writable if raw.encode() != texts[number]}

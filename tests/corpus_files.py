"""Small shard folders and tars of raw text, for tests of what reads them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from sparselt_dist.data.manifest import Kind, file_sha256, write_manifest
from sparselt_dist.data.shard_writer import ShardWriter
from sparselt_dist.data.tokenizer_training import save_trained, train_tokenizer

VOCAB_SIZE = 96
WORDS = "the quick brown fox jumps over a lazy dog while two old owls watch from some tall trees".split()


@cache
def tokenizer() -> Tokenizer:
    """A word-piece tokenizer of 96 entries."""
    trained = train_tokenizer(
        lambda: iter([" ".join(WORDS)] * 3), kind="wordpiece", vocab_size=VOCAB_SIZE, crammed=False
    )
    assert trained.get_vocab_size() == VOCAB_SIZE
    return trained


def save_tokenizer(folder: Path) -> Path:
    save_trained(tokenizer(), folder, crammed=False, model_max_length=32)
    return folder


def write_folder(
    folder: Path,
    samples: Sequence[np.ndarray],
    *,
    kind: Kind = "rows",
    documents: Sequence[np.ndarray] | None = None,
    samples_per_shard: int = 10,
) -> Path:
    """A complete shard folder; `documents`: lengths in each row, for kind packed."""
    save_tokenizer(folder / "tokenizer")
    writer = ShardWriter(folder, kind=kind, dtype="uint16", samples_per_shard=samples_per_shard)
    for number, sample in enumerate(samples):
        writer.add(sample, None if documents is None else documents[number])
    write_manifest(
        folder,
        writer.close(),
        kind=kind,
        sequence_length=None if kind == "documents" else len(samples[0]),
        dtype="uint16",
        vocab_size=VOCAB_SIZE,
        tokenizer_sha256=file_sha256(folder / "tokenizer/tokenizer.json"),
    )
    return folder


def numbered_rows(count: int, length: int = 16, first: int = 0) -> list[np.ndarray]:
    """Rows that tell their own number in their first two ids."""
    generator = np.random.default_rng(first)
    rows = [generator.integers(5, VOCAB_SIZE, length).astype(np.uint16) for _ in range(count)]
    for number, row in enumerate(rows, start=first):
        row[:2] = 5 + number // 90, 5 + number % 90
    return rows


def number_of(ids: np.ndarray) -> int:
    """The number that `numbered_rows` wrote."""
    return (int(ids[0]) - 5) * 90 + int(ids[1]) - 5


def texts(count: int, seed: int = 0, longest: int = 120) -> list[str]:
    """Documents of words, of very different lengths."""
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, int(generator.integers(1, longest)))) for _ in range(count)]


def write_text_tar(path: Path, documents: Sequence[str], *, suffix: str = "txt", text_key: str = "text") -> Path:
    """A WebDataset shard of raw text: one member a document, as .txt or .json, with a label beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, document in enumerate(documents):
            content = document if suffix == "txt" else json.dumps({text_key: document, "other": 1})
            for name, data in ((f"{number:06d}.cls", b"1"), (f"{number:06d}.{suffix}", content.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path

"""Blocks of cleaned documents on disk: the unit of work of every stage after reading.

A block is three files: `.text`, the documents end to end in UTF-8; `.hashes`, one uint64 a document, of its normalised
text; `.index`, one `ENTRY` a document. Later stages choose documents by the small files and read the text once. Where
agreement pairs are wanted there is a fourth, `.originals`: of some documents the text before it was normalised, where
that changed it, a line of JSON (number in the block, text) each.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, Self

import numpy as np

from sparselt_dist.data.cleaning import CleanBatch
from sparselt_dist.data.workspace import committed

ENTRY = np.dtype([("split_hash", "<u8"), ("bytes", "<u4"), ("characters", "<u4"), ("source", "<u4")])
READ_BYTES = 500_000  # text in memory at once; the tokenizer's working memory is some hundred times what it is handed


@dataclass(frozen=True)
class Block:
    """A block in the corpus."""

    number: int
    name: str
    first: int  # number of its first document in the corpus
    documents: int
    sources: tuple[int, ...]  # the corpus's number of each of the block's own source numbers

    def hashes(self, folder: Path) -> np.ndarray:
        """uint64 [documents]."""
        return np.fromfile(folder / f"{self.name}.hashes", dtype="<u8")

    def index(self, folder: Path) -> np.ndarray:
        """`ENTRY` [documents]."""
        return np.fromfile(folder / f"{self.name}.index", dtype=ENTRY)


class TextBatch(NamedTuple):
    """Some documents of a block."""

    numbers: np.ndarray  # in the block, ascending
    texts: list[str]


def read_texts(folder: Path, block: Block, index: np.ndarray, numbers: np.ndarray) -> Iterator[TextBatch]:
    """The documents of the given ascending numbers, in batches that begin within `READ_BYTES` of the file."""
    if not len(numbers):
        return
    ends = np.cumsum(index["bytes"], dtype=np.int64)
    starts = ends - index["bytes"]
    cuts = np.flatnonzero(np.diff(starts[numbers] // READ_BYTES)) + 1
    with (folder / f"{block.name}.text").open("rb") as file:
        for chosen in np.split(numbers, cuts):
            start = int(starts[chosen[0]])
            file.seek(start)
            data = file.read(int(ends[chosen[-1]]) - start)
            bounds = zip((starts[chosen] - start).tolist(), (ends[chosen] - start).tolist(), strict=True)
            yield TextBatch(chosen, [data[first:end].decode() for first, end in bounds])


def read_with_originals(
    folder: Path, block: Block, index: np.ndarray, numbers: np.ndarray
) -> Iterator[tuple[TextBatch, list[str]]]:
    """As `read_texts`, with the text of each document before it was normalised.

    The numbers must be of documents whose originals were kept: another's would seem to be equal to its text.
    """
    if not len(numbers):
        return
    with (folder / f"{block.name}.originals").open("rb") as file:
        stored: Iterator[tuple[int, str]] = map(json.loads, file)
        kept = next(stored, None)
        for batch in read_texts(folder, block, index, numbers):
            originals = list(batch.texts)
            for place, number in enumerate(batch.numbers.tolist()):
                while kept is not None and kept[0] < number:
                    kept = next(stored, None)
                if kept is not None and kept[0] == number:
                    originals[place] = kept[1]
            yield batch, originals


class BlockWriter:
    """Writes one block; its files are there when the context has ended well."""

    def __init__(self, folder: Path, name: str, *, keep_originals: bool = False) -> None:
        self.documents = self.text_bytes = self.characters = 0
        self.lowest_split_hash = 2**64
        self._paths = [folder / f"{name}.{ending}" for ending in ("text", "hashes", "index")]
        self._originals = folder / f"{name}.originals" if keep_originals else None
        self._stack = contextlib.ExitStack()
        self._files: list[IO[bytes]] = []

    def __enter__(self) -> Self:
        paths = [*self._paths, *([self._originals] if self._originals else [])]
        self._files = [self._stack.enter_context(committed(path)) for path in paths]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def add(self, batch: CleanBatch) -> None:
        index = np.empty(len(batch.texts), dtype=ENTRY)
        index["split_hash"] = batch.split_hashes
        index["bytes"] = [len(text) for text in batch.texts]
        index["characters"] = batch.characters
        index["source"] = batch.sources
        texts, hashes, entries, *originals = self._files
        texts.writelines(batch.texts)
        hashes.write(batch.exact_hashes.tobytes())
        entries.write(index.tobytes())
        for file in originals:
            lines = (json.dumps([self.documents + place, text]) for place, text in batch.originals.items())
            file.writelines(f"{line}\n".encode() for line in lines)
        self.documents += len(index)
        self.text_bytes += int(index["bytes"].sum(dtype=np.int64))
        self.characters += int(batch.characters.sum())
        if len(index):
            self.lowest_split_hash = min(self.lowest_split_hash, int(batch.split_hashes.min()))

"""Text in: the installed corpora, text and JSON-lines files (compressed or not), Parquet, Hugging Face data sets.

A source is a list of *items*, each a unit that is read from its start to its end in a fixed order (`reading.py`). For
work in parallel items are grouped and cut into *segments* of about equal size, by the sizes of the files alone, so the
segments are the same on every machine.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from sparselt_dist.data import embedded
from sparselt_dist.errors import ConfigError, DataError

MAX_TEXT_BYTES = 4_000_000  # a longer plain text file is cut at line ends into documents of at most this size
MIN_SEGMENT_BYTES, MAX_SEGMENT_BYTES = 2_000_000, 64_000_000
SEGMENTS = 256  # aimed at between these bounds
UNKNOWN_SEGMENT_BYTES = 16_000_000  # where the size of a source is not known before it is read
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
KINDS: dict[str, Literal["text", "jsonl", "parquet"]] = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".json": "jsonl",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
_SAVED_DATASET_MARKS = ("dataset_dict.json", "state.json")


class Document(NamedTuple):
    """A text and where it came from."""

    text: str
    source: str
    license: str


@dataclass(frozen=True)
class Item:
    """A file, an embedded corpus or a data set."""

    kind: Literal["text", "jsonl", "parquet", "embedded", "saved", "hub"]
    location: str
    source: str  # what the manifest calls it
    license: str
    text_key: str
    bytes: int  # on disk; 0 where unknown
    start: int = 0  # a piece of the file: the lines that begin at these bytes
    end: int | None = None

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.end is None


def fingerprint(items: Sequence[Item]) -> str:
    """A hash of all items' names and sizes: what must be unchanged for shards made of them to stay valid."""
    lines = (f"{item.kind}:{item.location}:{item.bytes}" for item in items)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# --- which items -----------------------------------------------------------------------------------------------------


def find_items(source: str | Sequence[str] | None, *, text_key: str, license: str) -> list[Item]:
    """The items of `prepare.source`, in order.

    Raises:
        ConfigError: no source is named.
        DataError: a path is missing or empty.
    """
    specs = [source] if isinstance(source, str) else list(source or ())
    if not specs:
        raise ConfigError(
            "prepare.source: found null, expected `embedded`, a file, folder, glob or Hugging Face data set; "
            "for example prepare.source=embedded or prepare.source=my_texts/"
        )
    return [item for spec in specs for item in _items_of(spec, text_key, license)]


def _items_of(spec: str, text_key: str, license: str) -> list[Item]:
    if spec == "embedded":
        return [_embedded_item(name) for name in embedded.CORPORA]
    path = Path(spec).expanduser()
    if path.is_dir():
        if any((path / mark).exists() for mark in _SAVED_DATASET_MARKS):
            return [Item("saved", str(path), spec, license, text_key, _folder_bytes(path))]
        files = _folder_files(path)
    elif path.is_file():
        files = [path]
    elif glob.has_magic(spec):
        matches = (Path(match) for match in sorted(glob.glob(str(path), recursive=True)))
        files = [match for match in matches if match.is_file()]
        if not files:
            raise DataError(f"prepare.source: {spec}: the pattern matches no file; correct it")
    elif _looks_like_a_path(spec):
        raise DataError(f"prepare.source: {spec}: no such file or folder; correct the path")
    else:
        return [Item("hub", spec, spec, license, text_key, 0)]
    return [_file_item(file, spec, text_key, license) for file in files]


def _embedded_item(name: str) -> Item:
    module = name.replace("-", "_")
    files = embedded.corpus_files(module, "data/*/*")
    size = sum(file.stat().st_size for file in files)
    return Item("embedded", name, name, embedded.LICENSE, "", size)


def _looks_like_a_path(spec: str) -> bool:
    return spec.startswith(("/", ".", "~")) or spec.count("/") > 1 or _plain_suffix(Path(spec)) in KINDS


def _plain_suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _folder_files(folder: Path) -> list[Path]:
    """The files of a known kind, recursively, in order of their paths; hidden ones left out."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(root) / name for name in sorted(names) if not name.startswith("."))
        found += [path for path in paths if _plain_suffix(path) in KINDS]
    if not found:
        raise DataError(
            f"prepare.source: {folder}: holds no text; expected files ending in {', '.join(KINDS)}, plain or "
            f"compressed ({', '.join(COMPRESSIONS)}); name single files of another ending by themselves"
        )
    return found


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _file_item(path: Path, spec: str, text_key: str, license: str) -> Item:
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"prepare.source: {path}: the file is empty; expected text; remove it or correct the path")
    return Item(KINDS.get(_plain_suffix(path), "text"), str(path), spec, license, text_key, size)


# --- segments --------------------------------------------------------------------------------------------------------


def segment_bytes(items: Sequence[Item]) -> int:
    """The size of a segment: the unit of work, and what a kill can cost each worker."""
    if any(item.bytes == 0 for item in items):
        return UNKNOWN_SEGMENT_BYTES
    share = sum(item.bytes for item in items) // SEGMENTS
    return min(max(share, MIN_SEGMENT_BYTES), MAX_SEGMENT_BYTES)


def cut_segments(items: Sequence[Item], size: int) -> list[tuple[Item, ...]]:
    """Items in order, in segments of about `size` bytes: small files together, large plain ones in pieces.

    Compressed files, Parquet and data sets cannot be entered in the middle: each is read by one worker.
    """
    segments: list[tuple[Item, ...]] = []
    group: list[Item] = []
    group_bytes = 0
    for piece in itertools.chain.from_iterable(_pieces(item, size) for item in items):
        if group and group_bytes + piece.bytes > size:
            segments.append(tuple(group))
            group, group_bytes = [], 0
        group.append(piece)
        group_bytes += piece.bytes
    return [*segments, tuple(group)] if group else segments


def _pieces(item: Item, size: int) -> Iterator[Item]:
    plain = item.kind in ("text", "jsonl") and Path(item.location).suffix.lower() not in COMPRESSIONS
    count = round(item.bytes / (max(size, MAX_TEXT_BYTES) if item.kind == "text" else size)) if plain else 1
    if count <= 1:
        yield item
        return
    bounds = [item.bytes * number // count for number in range(count + 1)]
    for start, end in itertools.pairwise(bounds):
        yield dataclasses.replace(item, start=start, end=end, bytes=end - start)

"""Text in: the installed corpora, text and JSON-lines files (compressed or not), Parquet, Hugging Face data sets.

A source is a list of *items*, each a unit that is read from its start to its end in a fixed order; a document is known
by (item, number in the item), which is how a preparation that was killed finds its place again. Nothing is held in
memory but the document being read.
"""

from __future__ import annotations

import bz2
import contextlib
import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

from sparselt_dist.data import embedded
from sparselt_dist.errors import ConfigError, DataError

MAX_TEXT_BYTES = 4_000_000  # a longer plain text file is cut at line ends into documents of at most this size
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


# --- reading ---------------------------------------------------------------------------------------------------------


class Reader:
    """Iterates the documents of items from a position; `fraction` is the share of all bytes read so far."""

    def __init__(self, items: Sequence[Item], item: int = 0, document: int = 0) -> None:
        self._items = items
        self.item = item  # the position after the document last given
        self.document = document
        self._total = sum(entry.bytes for entry in items)
        self._file: IO[bytes] | None = None

    @property
    def fraction(self) -> float | None:
        """None where sizes are unknown."""
        if not self._total or any(item.bytes == 0 for item in self._items):
            return None
        done = sum(item.bytes for item in self._items[: self.item])
        inside = self._file.tell() if self._file is not None and not self._file.closed else 0
        return min(1.0, (done + inside) / self._total)

    def __iter__(self) -> Iterator[Document]:
        while self.item < len(self._items):
            item = self._items[self.item]
            for document in self._read(item, self.document):
                self.document += 1
                yield document
            self.item += 1
            self.document = 0

    def _read(self, item: Item, skip: int) -> Iterator[Document]:
        if item.kind in ("saved", "hub", "parquet"):
            yield from _read_data_set(item, skip)
            return
        yield from itertools.islice(self._read_file(item), skip, None)

    def _read_file(self, item: Item) -> Iterator[Document]:
        if item.kind == "embedded":
            for text in embedded.CORPORA[item.location]():
                yield Document(text, item.source, item.license)
            return
        with contextlib.ExitStack() as stack, _reading(item):
            self._file = stack.enter_context(open(item.location, "rb"))
            stream = stack.enter_context(_decompressed(self._file, item.location))
            yield from _read_json_lines(stream, item) if item.kind == "jsonl" else _read_text(stream, item)


@contextlib.contextmanager
def _reading(item: Item) -> Iterator[None]:
    """Turns whatever goes wrong in reading a file into a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except Exception as cause:  # each decompressor and data-set reader has its own exceptions
        raise DataError(
            f"prepare.source: {item.location}: cannot be read: {cause}; expected a sound file; restore or remove it"
        ) from cause


def _decompressed(file: IO[bytes], location: str) -> IO[bytes]:
    suffix = Path(location).suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if suffix == ".bz2":
        return cast(IO[bytes], bz2.BZ2File(file))
    if suffix == ".xz":
        return cast(IO[bytes], lzma.LZMAFile(file))
    if suffix == ".zst":
        return io.BufferedReader(_ZstdStream(file))
    return file


class _ZstdStream(io.RawIOBase):
    """Decompressed zstd that knows a truncated file; the stream reader of `zstandard` takes that for the end."""

    def __init__(self, file: IO[bytes]) -> None:
        import zstandard

        self._file = file
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None  # the frame being read
        self._compressed = b""
        self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._compressed = self._compressed or self._file.read(1 << 17)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the compressed file ends before its end mark")
                return 0
            self._frame = self._frame or self._new_frame()
            self._output = self._frame.decompress(self._compressed)
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size


def _read_text(stream: IO[bytes], item: Item) -> Iterator[Document]:
    """A file as one document; a huge one in pieces cut at line ends."""
    pending, offset = b"", 0
    while True:
        block = stream.read(MAX_TEXT_BYTES - len(pending))
        data = pending + block
        if not data:
            return
        # a decompressor may give less than asked, so only an empty block means the end
        if block and len(data) < MAX_TEXT_BYTES:
            pending = data
            continue
        cut = len(data) if not block else data.rfind(b"\n") + 1 or _character_start(data)
        yield Document(_decode(data[:cut], item, offset), item.source, item.license)
        pending, offset = data[cut:], offset + cut
        if not block:
            return


def _character_start(data: bytes) -> int:
    """The start of the last UTF-8 character, where text without any line end may be cut."""
    cut = len(data) - 1
    while cut > 0 and data[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _decode(data: bytes, item: Item, offset: int) -> str:
    zero = data.find(b"\0")
    if zero >= 0:
        raise DataError(
            f"prepare.source: {item.location}: is a binary file (a zero byte at {offset + zero}); expected text in "
            "UTF-8; remove it from the source, or give a compressed file its ending"
        )
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as cause:
        raise DataError(
            f"prepare.source: {item.location}: is not UTF-8: byte 0x{data[cause.start]:02x} at {offset + cause.start}; "
            "expected text in UTF-8; convert it (iconv) or remove it"
        ) from cause


def _read_json_lines(stream: IO[bytes], item: Item) -> Iterator[Document]:
    empty = True
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        empty = False
        where = f"prepare.source: {item.location}:{number}"
        try:
            row = json.loads(line)
        except ValueError as cause:  # also not UTF-8
            raise DataError(
                f"{where}: not JSON: {cause}; expected one object a line; mend or remove the line"
            ) from cause
        yield _row_document(row, item, where)
    if empty:
        raise DataError(f"prepare.source: {item.location}: holds no line; expected one JSON object a line")


def _row_document(row: object, item: Item, where: str) -> Document:
    text = row.get(item.text_key) if isinstance(row, dict) else None
    if not isinstance(row, dict) or not isinstance(text, str):
        found = f"keys {', '.join(map(str, row))}" if isinstance(row, dict) else type(row).__name__
        if isinstance(row, dict) and item.text_key in row:
            found = f"{item.text_key!r} of type {type(text).__name__}"
        raise DataError(
            f"{where}: found {found}, expected a string under {item.text_key!r}; set prepare.text_key to the "
            "field with the text"
        )
    source, license = row.get("source"), row.get("license")
    return Document(
        text,
        source if isinstance(source, str) and source else item.source,
        license if isinstance(license, str) and license else item.license,
    )


def _read_data_set(item: Item, skip: int) -> Iterator[Document]:
    """The rows of a Parquet file, a folder of save_to_disk, or a Hugging Face data set, streamed."""
    data_set = _open_data_set(item)
    with _reading(item):
        rows = data_set.skip(skip) if skip else data_set
        for number, row in enumerate(rows, skip + 1):
            yield _row_document(row, item, f"prepare.source: {item.location}: row {number}")


def _open_data_set(item: Item) -> Any:
    """`NAME`, `NAME:CONFIG` and `NAME:CONFIG:SPLIT` name a data set of the hub; its split is `train` if not named."""
    import datasets

    if item.kind == "parquet":
        with _reading(item):
            return datasets.load_dataset("parquet", data_files=[item.location], split="train", streaming=True)
    if item.kind == "saved":
        with _reading(item):
            return _one_split(datasets.load_from_disk(item.location), item)
    name, _, rest = item.location.partition(":")
    config, _, split = rest.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as cause:  # the hub client fails in many ways: offline, unknown, gated, broken
        reason = (str(cause).splitlines() or [""])[0]
        raise DataError(
            f"prepare.source: {item.location}: no such file or folder, and not to be had as a Hugging Face data set "
            f"({type(cause).__name__}: {reason}); correct the path or name, or check the network"
        ) from cause


def _one_split(data_set: Any, item: Item) -> Any:
    if not isinstance(data_set, dict):
        return data_set
    if "train" not in data_set and len(data_set) > 1:
        raise DataError(
            f"prepare.source: {item.location}: found splits {', '.join(data_set)}, expected `train` or a single one; "
            f"name the folder of a split, such as {item.location}/{next(iter(data_set))}"
        )
    return data_set.get("train", next(iter(data_set.values())))

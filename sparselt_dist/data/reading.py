"""Reads the documents of a source's items: text, JSON lines, compressed or not, Parquet, Hugging Face data sets.

A document is known by (item, number in the item), which is how a preparation that was killed finds its place again.
Nothing is held in memory but the document being read. A piece of a file holds the lines that begin in it, so the pieces
of a file have each line once, wherever it was cut.
"""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import io
import itertools
import json
import lzma
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from sparselt_dist.data import embedded
from sparselt_dist.data.sources import MAX_TEXT_BYTES, Document, Item
from sparselt_dist.errors import DataError


class Reader:
    """Iterates the documents of items from a position."""

    def __init__(self, items: Sequence[Item], item: int = 0, document: int = 0) -> None:
        self._items = items
        self.item = item  # the position after the document last given
        self.document = document

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
            file = stack.enter_context(open(item.location, "rb"))
            stream = stack.enter_context(_decompressed(file, item.location) if item.whole else _piece(file, item))
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


def _piece(file: IO[bytes], item: Item) -> IO[bytes]:
    """The lines that begin in the item's piece of a file, as a file of their own."""
    start = _line_start(file, item.start)
    end = _line_start(file, item.end) if item.end is not None else os.fstat(file.fileno()).st_size
    file.seek(start)
    return io.BufferedReader(_Limited(file, end - start), 1 << 17)


def _line_start(file: IO[bytes], offset: int) -> int:
    """The first line start at or after a byte; the end of the file if there is none."""
    if offset == 0:
        return 0
    file.seek(offset - 1)
    while (line := file.readline(1 << 20)) and not line.endswith(b"\n"):
        pass
    return file.tell()


class _Limited(io.RawIOBase):
    """At most `left` bytes of a file, from where it stands."""

    def __init__(self, file: IO[bytes], left: int) -> None:
        self._file = file
        self._left = left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)


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
    pending, offset = b"", item.start
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
        if line.isspace():
            continue
        empty = False
        try:
            row = json.loads(line)
        except ValueError as cause:  # also not UTF-8
            raise DataError(
                f"{_line_name(item, number)}: not JSON: {cause}; expected one object a line; mend or remove the line"
            ) from cause
        yield _row_document(row, item, functools.partial(_line_name, item, number))
    if empty and item.whole:
        raise DataError(f"prepare.source: {item.location}: holds no line; expected one JSON object a line")


def _line_name(item: Item, number: int) -> str:
    """Where a line is, for a message; `number` counts in the item's piece of the file."""
    if item.start:
        with open(item.location, "rb") as file:
            file.seek(0)
            end = _line_start(file, item.start)
            file.seek(0)
            number += sum(1 for _ in io.BufferedReader(_Limited(file, end)))
    return f"prepare.source: {item.location}:{number}"


def _row_document(row: object, item: Item, where: Callable[[], str]) -> Document:
    text = row.get(item.text_key) if isinstance(row, dict) else None
    if not isinstance(row, dict) or not isinstance(text, str):
        found = f"keys {', '.join(map(str, row))}" if isinstance(row, dict) else type(row).__name__
        if isinstance(row, dict) and item.text_key in row:
            found = f"{item.text_key!r} of type {type(text).__name__}"
        raise DataError(
            f"{where()}: found {found}, expected a string under {item.text_key!r}; set prepare.text_key to the "
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
            where = functools.partial("prepare.source: {}: row {}".format, item.location, number)
            yield _row_document(row, item, where)


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

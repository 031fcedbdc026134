"""WebDataset shards of raw text made by others: read at random and tokenized when drawn, without preparation.

A sample is a piece of a document: about as much text as fills one row, cut at white space, so that no text is lost and
none comes twice. Every tar is read once, at the first start, to learn where its documents lie; that index is kept in
the cache. A text member is `<key>.txt`, or `<key>.json` with the text under a field.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparselt_dist.data.cleaning import Normalization, normalize
from sparselt_dist.data.manifest import (
    FORMAT,
    FORMAT_VERSION,
    Manifest,
    ShardEntry,
    SourceEntry,
    file_sha256,
    write_atomically,
)
from sparselt_dist.data.raw_tokenizer import TokenizerChoice, find_tokenizer
from sparselt_dist.data.shard_files import Access, ShardFiles
from sparselt_dist.data.shards import Stored
from sparselt_dist.data.storage import basename, is_remote, join
from sparselt_dist.data.tokenizer import TOKENIZER_FILE, end_of_document, load_for_text, tokenizer_info
from sparselt_dist.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from sparselt_dist.objectives.base import TokenizerInfo

BYTES_PER_TOKEN = 4  # a little under English's 4.3, so that a piece seldom overflows its row
_SUFFIXES = (".txt", ".json")


@dataclass(frozen=True)
class TextRules:
    """How raw text becomes ids."""

    text_key: str
    normalize: Normalization
    license: str
    tokenizer: TokenizerChoice
    sequence_length: int | None

    @property
    def piece_bytes(self) -> int:
        """UTF-8 bytes of a piece; 0: documents are not cut."""
        return BYTES_PER_TOKEN * (self.sequence_length or 0)


@dataclass(frozen=True)
class TextIndex:
    """Where the documents of one tar lie; D documents."""

    sha256: str
    bytes: int
    offsets: np.ndarray  # int64 [D], of the member's first byte
    sizes: np.ndarray  # int64 [D], bytes of the member
    texts: np.ndarray  # int64 [D], bytes of the text in it
    is_json: np.ndarray  # bool [D]

    def pieces(self, piece_bytes: int) -> np.ndarray:
        """Pieces of each document, int64 [D]; the last one is between 0.5 and 1.5 times the usual size."""
        if piece_bytes == 0:
            return (self.texts > 0).astype(np.int64)
        further = np.maximum(self.texts - piece_bytes // 2 - 4, 0) // piece_bytes
        return np.where(self.texts > 0, further + 1, 0)


# --- the index -------------------------------------------------------------------------------------------------------


def read_text_index(path: Path, text_key: str) -> TextIndex:
    """Read a tar once and note its documents.

    Raises:
        DataError: no readable tar, or a member that is no text; tar and member are named.
    """
    found: dict[str, tuple[int, int, int, bool]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                stem, suffix = os.path.splitext(info.name)
                if not info.isfile() or suffix not in _SUFFIXES or (suffix == ".json" and stem in found):
                    continue
                file = tar.extractfile(info)
                assert file is not None
                text = _text(file.read(), suffix == ".json", text_key, f"{path}: member {info.name}")
                found[stem] = (info.offset_data, info.size, len(text), suffix == ".json")
    except (tarfile.TarError, OSError, EOFError) as cause:
        raise DataError(
            f"{path}: not a readable tar: {cause}; expected an uncompressed WebDataset shard; restore or unpack it"
        ) from cause
    if not found:
        raise DataError(
            f"{path}: holds no member .txt or .json; expected a WebDataset shard of text, or a shard folder"
        )
    table = np.array(list(found.values()), dtype=np.int64)
    return TextIndex(
        file_sha256(path), path.stat().st_size, table[:, 0], table[:, 1], table[:, 2], table[:, 3].astype(bool)
    )


def _text(content: bytes, is_json: bool, text_key: str, where: str) -> bytes:
    """The text of a member as UTF-8."""
    if is_json:
        try:
            row = json.loads(content)
        except ValueError as cause:
            raise DataError(f"{where}: not JSON: {cause}; correct it or remove it") from cause
        text = row.get(text_key) if isinstance(row, dict) else None
        if not isinstance(text, str):
            keys = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
            raise DataError(f"{where}: found {keys}, expected text under {text_key!r}; set prepare.text_key")
        return text.encode("utf-8", "surrogatepass")
    try:
        content.decode()
    except UnicodeDecodeError as cause:
        raise DataError(f"{where}: byte {cause.start} is not UTF-8; convert it to UTF-8") from cause
    return content


def _stored_index(path: Path) -> TextIndex | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        sha256, size = str(arrays.pop("sha256")), int(arrays.pop("bytes"))
        return TextIndex(sha256, size, **arrays)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _store_index(path: Path, index: TextIndex) -> None:
    import io

    buffer = io.BytesIO()
    np.savez(buffer, **vars(index))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path.with_name(f"{path.name}.{os.getpid()}"), buffer.getvalue())
    path.with_name(f"{path.name}.{os.getpid()}").replace(path)


def _index(url: str, text_key: str, access: Access) -> TextIndex:
    """The index of a tar, from the cache, or from reading it; a local file that has changed is read again."""
    key = [url, text_key]
    if not is_remote(url):
        stat = Path(url).stat()
        key = [str(Path(url).resolve()), text_key, str(stat.st_size), str(stat.st_mtime_ns)]
    path = access.cache_dir / "indexes" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.npz"
    stored = _stored_index(path)
    if stored is not None:
        return stored
    local = access.cache().fetch(url, expected_bytes=None, expected_sha256=None) if is_remote(url) else Path(url)
    index = read_text_index(local, text_key)
    _store_index(path, index)
    return index


# --- pieces ----------------------------------------------------------------------------------------------------------


def boundary(text: bytes, nominal: int, reach: int) -> int:
    """Where the piece that should begin at `nominal` does begin: after white space within reach, or at a character."""
    if nominal <= 0:
        return 0
    if nominal >= len(text):
        return len(text)
    near = text[nominal - 1 : nominal + reach]
    for place, byte in enumerate(near):
        if byte in b" \n\t\r":
            return nominal + place
    while nominal < len(text) and text[nominal] & 0xC0 == 0x80:
        nominal += 1
    return nominal


def cut(text: bytes, piece: int, pieces: int, piece_bytes: int) -> bytes:
    """Piece number `piece` of a text: pieces joined give the text."""
    if piece_bytes == 0:
        return text
    reach = piece_bytes // 2
    first = boundary(text, piece * piece_bytes, reach)
    end = len(text) if piece == pieces - 1 else boundary(text, (piece + 1) * piece_bytes, reach)
    return text[first:end]


class _OpenText:
    """One tar, held open, and where its pieces lie."""

    def __init__(self, path: Path, index: TextIndex, rules: TextRules) -> None:
        self._path, self._index, self._rules = path, index, rules
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY)
        self._pieces = index.pieces(rules.piece_bytes)
        self._ends = np.cumsum(self._pieces)

    def piece(self, inside: int) -> tuple[str, bool, bool]:
        """(text, whether it begins its document, whether it ends it)."""
        document = int(np.searchsorted(self._ends, inside, side="right"))
        pieces = int(self._pieces[document])
        number = inside - int(self._ends[document]) + pieces
        size, offset = int(self._index.sizes[document]), int(self._index.offsets[document])
        content = os.pread(self._descriptor, size, offset)
        if len(content) != size:
            raise DataError(f"{self._path}: truncated while in use: found {len(content)} of {size} bytes at {offset}")
        where = f"{self._path}: document {document}"
        text = _text(content, bool(self._index.is_json[document]), self._rules.text_key, where)
        piece = cut(text, number, pieces, self._rules.piece_bytes)
        return piece.decode("utf-8", "replace"), number == 0, number == pieces - 1

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


# --- the corpus ------------------------------------------------------------------------------------------------------


class RawText:
    """Random access to the pieces of text in tars of one folder; ids are made when asked for.

    Args:
        location: folder or URL prefix.
        names: file names of the tars, in order.

    Raises:
        DataError: a tar cannot be read or holds no text, or there is no tokenizer to use.
    """

    def __init__(self, location: str, names: Sequence[str], rules: TextRules, access: Access) -> None:
        self.location = location
        self._rules = rules
        urls = [join(location, name) for name in names]
        self._indexes = [_index(url, rules.text_key, access) for url in urls]
        self.shards = tuple(
            ShardEntry(name, int(index.pieces(rules.piece_bytes).sum()), 0, index.bytes, index.sha256, len(index.sizes))
            for name, index in zip(names, self._indexes, strict=True)
        )
        self.files = ShardFiles(location, self.shards, access, self._open)
        self.files.check_presence()
        self.tokenizer = find_tokenizer(rules.tokenizer, location, self._content(), self._documents, access)
        self._info: TokenizerInfo = tokenizer_info(self.tokenizer)
        self._end = end_of_document(self._info, str(self.tokenizer))
        self._begin = self._info.cls_id if self._info.cls_id is not None else self._info.bos_id
        self._encoder: Tokenizer | None = None
        self.manifest = self._manifest()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoder": None}

    @property
    def vocab_size(self) -> int:
        return self._info.vocab_size

    @property
    def shard_samples(self) -> list[int]:
        """Pieces of each shard, in order."""
        return [entry.samples for entry in self.shards]

    def _open(self, path: Path, shard: int) -> _OpenText:
        return _OpenText(path, self._indexes[shard], self._rules)

    def read(self, shards: np.ndarray, insides: np.ndarray) -> list[Stored | None]:
        """Pieces by shard and number in the shard, tokenized; None for one of a shard that is skipped.

        Raises:
            DataError: a shard is bad and not to be skipped.
        """
        if self._encoder is None:
            self._encoder = load_for_text(self.tokenizer)
        opened = [self.files.get(shard) for shard in shards.tolist()]
        pieces = [
            None if shard is None else shard.piece(inside)
            for shard, inside in zip(opened, insides.tolist(), strict=True)
        ]
        texts = [normalize(piece[0], self._rules.normalize) for piece in pieces if piece is not None]
        encoded = iter(self._encoder.encode_batch_fast(texts, add_special_tokens=False))
        return [None if piece is None else self._framed(next(encoded).ids, piece[1], piece[2]) for piece in pieces]

    def _framed(self, ids: list[int], begins: bool, ends: bool) -> Stored:
        begin = [self._begin] if begins and self._begin is not None else []
        end = [self._end] if ends else []
        return Stored(np.array([*begin, *ids, *end], dtype=np.uint32))

    def lengths(self, shard: int) -> np.ndarray:
        """Tokens of each piece of one shard, int64: tokenizes all of it."""
        insides = np.arange(self.shards[shard].samples)
        found = self.read(np.full(len(insides), shard), insides)
        return np.array([len(sample.ids) for sample in found if sample is not None], dtype=np.int64)

    def _documents(self) -> Iterator[str]:
        """All documents, for the training of a tokenizer."""
        for shard, index in enumerate(self._indexes):
            opened = self.files.get(shard)
            if opened is None:
                continue
            for inside in range(int(index.pieces(self._rules.piece_bytes).sum())):
                yield normalize(opened.piece(inside)[0], self._rules.normalize)

    def _content(self) -> str:
        """A hash of what the samples are made of."""
        parts = [(entry.name, entry.sha256) for entry in self.shards]
        rules = (self._rules.text_key, self._rules.normalize, self._rules.piece_bytes)
        return hashlib.sha256(json.dumps([parts, rules]).encode()).hexdigest()

    def _manifest(self) -> Manifest:
        """A manifest as a preparation would have written; tokens are not counted."""
        tokenizer_sha256 = file_sha256(self.tokenizer / TOKENIZER_FILE)
        documents = sum(len(index.sizes) for index in self._indexes)
        size = sum(int(index.texts.sum()) for index in self._indexes)
        return Manifest(
            format=FORMAT,
            format_version=FORMAT_VERSION,
            kind="text",
            sequence_length=None,
            dtype="uint32",
            samples=sum(self.shard_samples),
            tokens=0,
            vocab_size=self.vocab_size,
            tokenizer_sha256=tokenizer_sha256,
            shards=self.shards,
            sources=(SourceEntry(basename(self.location), self._rules.license, documents, size),),
            sha256=hashlib.sha256((self._content() + tokenizer_sha256).encode()).hexdigest(),
        )

"""WebDataset shards of raw text made by others: read at random and tokenized when drawn, without preparation.

A sample is a piece of a document: about as much text as fills one row, cut at white space, so that no text is lost and
none comes twice. Every tar is read once, at the first start, to learn where its documents lie; that index is kept in
the cache. A text member is `<key>.txt`, or `<key>.json` with the text under a field.
"""

from __future__ import annotations

import hashlib
import json
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
)
from sparselt_dist.data.open_file import OpenFile
from sparselt_dist.data.raw_tokenizer import TokenizerChoice, find_tokenizer
from sparselt_dist.data.shard_files import Access, ShardFiles
from sparselt_dist.data.shards import Stored
from sparselt_dist.data.storage import basename, join
from sparselt_dist.data.text_index import TextIndex, around, cut, find_index, text_of
from sparselt_dist.data.tokenizer import TOKENIZER_FILE, end_of_document, load_for_text, tokenizer_info

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from sparselt_dist.objectives.base import TokenizerInfo

MEASURED_DOCUMENTS = 64  # by which the size of a piece is found
MEASURED_BYTES = 4096  # of each
FILLED = 0.9  # of a row by a piece of average text: a fuller one would often overflow into a row of its own
SHORTEST_PIECE = 32  # bytes


@dataclass(frozen=True)
class TextRules:
    """How raw text becomes ids."""

    text_key: str
    normalize: Normalization
    license: str
    tokenizer: TokenizerChoice
    sequence_length: int | None  # None: documents are not cut


class _OpenText:
    """One tar, held open, and where its pieces lie."""

    def __init__(self, path: Path, index: TextIndex, text_key: str, piece_bytes: int) -> None:
        self._index, self._text_key, self._piece_bytes = index, text_key, piece_bytes
        self._file = OpenFile(path)
        self.held_bytes = self._file.held_bytes
        self.close = self._file.close
        self._pieces = index.pieces(piece_bytes)
        self._ends = np.cumsum(self._pieces)

    def piece(self, inside: int) -> tuple[str, bool, bool]:
        """(text, whether it begins its document, whether it ends it)."""
        document = int(np.searchsorted(self._ends, inside, side="right"))
        pieces = int(self._pieces[document])
        number = inside - int(self._ends[document]) + pieces
        piece = self._cut(document, number, pieces)
        return piece.decode("utf-8", "replace"), number == 0, number == pieces - 1

    def document(self, number: int) -> bytes:
        """The text of one document, UTF-8."""
        content = self._file.bytes_at(int(self._index.offsets[number]), int(self._index.sizes[number]))
        is_json = bool(self._index.is_json[number])
        return text_of(content, is_json, self._text_key, f"{self._file.path}: document {number}")

    def _cut(self, document: int, number: int, pieces: int) -> bytes:
        """One piece; of plain text only the bytes around it are read, JSON must be read whole."""
        if self._index.is_json[document] or self._piece_bytes == 0:
            return cut(self.document(document), number, pieces, self._piece_bytes)
        first, end = around(number, self._piece_bytes, int(self._index.sizes[document]))
        text = self._file.bytes_at(int(self._index.offsets[document]) + first, end - first)
        return cut(text, number, pieces, self._piece_bytes, before=first)


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
        self._indexes = [find_index(url, rules.text_key, access) for url in urls]
        self._piece_bytes = 0
        self.shards = self._entries(names)
        self.files = ShardFiles(location, self.shards, access, self._open)
        self.files.check_presence()
        self.tokenizer = find_tokenizer(rules.tokenizer, location, self._content(), self._documents, access)
        self._info: TokenizerInfo = tokenizer_info(self.tokenizer)
        self._end = end_of_document(self._info, str(self.tokenizer))
        self._begin = self._info.cls_id if self._info.cls_id is not None else self._info.bos_id
        self._encoder: Tokenizer | None = None
        if rules.sequence_length is not None:
            row_bytes = FILLED * rules.sequence_length * self._bytes_per_token()
            self._piece_bytes = max(SHORTEST_PIECE, round(row_bytes))
            self.shards = self._entries(names)
            self.files = ShardFiles(location, self.shards, access, self._open)
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

    def _entries(self, names: Sequence[str]) -> tuple[ShardEntry, ...]:
        return tuple(
            ShardEntry(name, int(index.pieces(self._piece_bytes).sum()), 0, index.bytes, index.sha256, len(index.sizes))
            for name, index in zip(names, self._indexes, strict=True)
        )

    def _open(self, path: Path, shard: int, room: int) -> _OpenText:
        return _OpenText(path, self._indexes[shard], self._rules.text_key, self._piece_bytes)

    def _bytes_per_token(self) -> float:
        """UTF-8 bytes a token of some documents at even distances: the same for the same text and tokenizer."""
        numbers = np.cumsum([0, *(len(index.sizes) for index in self._indexes)])
        texts = []
        for number in np.unique(np.linspace(0, numbers[-1] - 1, MEASURED_DOCUMENTS).astype(np.int64)).tolist():
            shard = int(np.searchsorted(numbers, number, side="right")) - 1
            opened = self.files.get(shard)
            if opened is not None:
                text = opened.document(number - int(numbers[shard]))[:MEASURED_BYTES].decode("utf-8", "replace")
                texts.append(normalize(text, self._rules.normalize))
        tokens = sum(
            len(encoding.ids) for encoding in self._tokenizer().encode_batch_fast(texts, add_special_tokens=False)
        )
        return sum(len(text.encode()) for text in texts) / max(1, tokens) or 1.0

    def _tokenizer(self) -> Tokenizer:
        if self._encoder is None:
            self._encoder = load_for_text(self.tokenizer)
        return self._encoder

    def read(self, shards: np.ndarray, insides: np.ndarray) -> list[Stored | None]:
        """Pieces by shard and number in the shard, tokenized; None for one of a shard that is skipped.

        Raises:
            DataError: a shard is bad and not to be skipped.
        """
        opened = [self.files.get(shard) for shard in shards.tolist()]
        pieces = [
            None if shard is None else shard.piece(inside)
            for shard, inside in zip(opened, insides.tolist(), strict=True)
        ]
        texts = [normalize(piece[0], self._rules.normalize) for piece in pieces if piece is not None]
        encoded = iter(self._tokenizer().encode_batch_fast(texts, add_special_tokens=False))
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
            for number in range(len(index.sizes)):
                yield normalize(opened.document(number).decode("utf-8", "replace"), self._rules.normalize)

    def _content(self) -> str:
        """A hash of what the samples are made of."""
        parts = [(entry.name, entry.sha256) for entry in self.shards]
        rules = (self._rules.text_key, self._rules.normalize, self._piece_bytes)
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

"""Where the documents of a tar of raw text lie, learned by reading it once, and how documents are cut into pieces."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparselt_dist.data.exclusion import one_at_a_time
from sparselt_dist.data.manifest import file_sha256, write_atomically
from sparselt_dist.data.shard_files import Access
from sparselt_dist.data.storage import is_remote
from sparselt_dist.errors import DataError

_LONGEST_CHARACTER = 4  # bytes in UTF-8
_SUFFIXES = (".txt", ".json")


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


# --- reading it once -------------------------------------------------------------------------------------------------------


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
                text = text_of(file.read(), suffix == ".json", text_key, f"{path}: member {info.name}")
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


def text_of(content: bytes, is_json: bool, text_key: str, where: str) -> bytes:
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
    buffer = io.BytesIO()
    np.savez(buffer, **vars(index))
    write_atomically(path, buffer.getvalue())


def find_index(url: str, text_key: str, access: Access) -> TextIndex:
    """The index of a tar, from the cache, or from reading it; a local file that has changed is read again."""
    key = [url, text_key]
    if not is_remote(url):
        stat = Path(url).stat()
        key = [str(Path(url).resolve()), text_key, str(stat.st_size), str(stat.st_mtime_ns)]
    path = access.cache_dir / "indexes" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.npz"
    with one_at_a_time(path):
        index = _stored_index(path)
        if index is None:
            if is_remote(url):
                cache = access.cache()
                copy = cache.fetch(url, expected_bytes=None, expected_sha256=None)
                index = read_text_index(copy, text_key)
                cache.adopt(copy, url, num_bytes=index.bytes, sha256=index.sha256)
            else:
                index = read_text_index(Path(url), text_key)
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


def around(piece: int, piece_bytes: int, size: int) -> tuple[int, int]:
    """(first, end) of the bytes of a text that decide where one of its pieces begins and ends."""
    last = (piece + 1) * piece_bytes + piece_bytes // 2 + _LONGEST_CHARACTER
    return max(0, piece * piece_bytes - 1), min(size, last)


def cut(text: bytes, piece: int, pieces: int, piece_bytes: int, before: int = 0) -> bytes:
    """Piece number `piece` of a text, which may be given without its first `before` bytes: pieces joined give the text."""
    if piece_bytes == 0:
        return text
    reach = piece_bytes // 2
    first = boundary(text, piece * piece_bytes - before, reach)
    end = len(text) if piece == pieces - 1 else boundary(text, (piece + 1) * piece_bytes - before, reach)
    return text[first:end]

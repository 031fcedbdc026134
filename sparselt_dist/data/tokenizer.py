"""Tokenizers: take an existing one, describe one, and check that it is the one that shards were made with.

Reading needs `tokenizers` and no torch. Training is in `tokenizer_training.py`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sparselt_dist.data.manifest import TOKENIZER, Manifest, file_sha256
from sparselt_dist.errors import DataError
from sparselt_dist.objectives.base import TokenizerInfo

if TYPE_CHECKING:
    from tokenizers import Tokenizer


TokenizerKind = Literal["wordpiece", "bpe", "byte-bpe", "unigram"]
TRAINED_KINDS: tuple[TokenizerKind, ...] = ("wordpiece", "bpe", "byte-bpe", "unigram")
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
_WORD_START = "\u2581"  # unigram: the piece begins a word
_BYTE_SPACES = ("\u0120", "\u010a", "\u0109", "\u010d")  # byte-level: space, line feed, tab, return


# --- an existing tokenizer -------------------------------------------------------------------------------------------


def copy_tokenizer(source: str, folder: Path) -> None:
    """Copy an existing Hugging Face tokenizer, in its fast form.

    Raises:
        DataError: it is missing, cannot be loaded, has no fast form, or no token that can end a document.
    """
    if not Path(source).expanduser().exists():
        raise DataError(
            f"prepare.tokenizer: found {source!r}, expected a kind to train ({', '.join(TRAINED_KINDS)}) or a "
            "tokenizer folder"
        )
    import transformers

    path = str(Path(source).expanduser())
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as cause:  # transformers raises ValueError, OSError, KeyError and others for a bad folder
        raise DataError(
            f"prepare.tokenizer: {source}: cannot be loaded: {type(cause).__name__}: {cause}; "
            "expected a folder written by save_pretrained"
        ) from cause
    if not tokenizer.is_fast:
        raise DataError(f"prepare.tokenizer: {source}: has no {TOKENIZER_FILE} and no fast form; convert it")
    tokenizer.save_pretrained(folder)
    # `tokenizer.json` may come with truncation or padding switched on, which would cut documents
    plain = _load(folder)
    plain.no_truncation()
    plain.no_padding()
    plain.save(str(folder / TOKENIZER_FILE))
    end_of_document(tokenizer_info(folder), source)


def end_of_document(info: TokenizerInfo, where: str) -> int:
    """The id that ends a document: sep, else eos.

    Raises:
        DataError: the tokenizer has neither.
    """
    end = info.sep_id if info.sep_id is not None else info.eos_id
    if end is None:
        raise DataError(f"prepare.tokenizer: {where}: has no sep and no eos token; expected one, to end documents")
    return end


# --- description -----------------------------------------------------------------------------------------------------


def tokenizer_info(folder: Path | str) -> TokenizerInfo:
    """What objectives may know of the tokenizer in a tokenizer folder or a shard folder.

    Raises:
        DataError: the folder holds no readable fast tokenizer.
    """
    folder = Path(folder)
    if (folder / TOKENIZER / TOKENIZER_FILE).exists():
        folder = folder / TOKENIZER
    tokenizer = _load(folder)
    names = _special_names(folder)
    ids = {role: tokenizer.token_to_id(name) for role, name in names.items()}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    special |= {number for number in ids.values() if number is not None}
    pad = next((number for role in ("pad", "eos", "unk") if (number := ids.get(role)) is not None), 0)
    size = max(vocabulary.values()) + 1
    return TokenizerInfo(
        vocab_size=size,
        pad_id=pad,
        mask_id=ids.get("mask"),
        unk_id=ids.get("unk"),
        cls_id=ids.get("cls"),
        sep_id=ids.get("sep"),
        bos_id=ids.get("bos"),
        eos_id=ids.get("eos"),
        special_ids=tuple(sorted(special)),
        continues_word_V=_continues_word(tokenizer, vocabulary, size, special),
    )


def _load(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    path = folder / TOKENIZER_FILE
    if not path.exists():
        raise DataError(f"{folder}: holds no {TOKENIZER_FILE}; expected a fast tokenizer; prepare the shards again")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as cause:  # tokenizers raises bare Exception
        raise DataError(f"{path}: not a readable tokenizer: {cause}; restore it or prepare the shards again") from cause


def load_for_text(folder: Path) -> Tokenizer:
    """The tokenizer for encoding a corpus: a special token spelled out in the text is text, not that token."""
    tokenizer = _load(folder)
    tokenizer.encode_special_tokens = True
    return tokenizer


def _special_names(folder: Path) -> dict[str, str]:
    """Role -> token, from the folder's configuration files."""
    stored: dict[str, Any] = {}
    for name in ("special_tokens_map.json", CONFIG_FILE):
        path = folder / name
        if path.exists():
            try:
                stored |= json.loads(path.read_bytes())
            except ValueError as cause:
                raise DataError(f"{path}: not JSON: {cause}; restore it or prepare the shards again") from cause
    names = {}
    for role in ("pad", "unk", "cls", "sep", "mask", "bos", "eos"):
        token = stored.get(f"{role}_token")
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            names[role] = content
    return names


def _continues_word(tokenizer: Tokenizer, vocabulary: dict[str, int], size: int, special: set[int]) -> np.ndarray:
    """bool [V]: by the mark of the tokenizer's family; without a mark, word-like pieces continue."""
    continues = np.zeros(size, dtype=bool)
    prefix = _continuing_prefix(tokenizer)
    members: Iterator[int] = iter(())
    if prefix:
        members = (number for token, number in vocabulary.items() if token.startswith(prefix) and token != prefix)
    elif any(token.startswith((_WORD_START, *_BYTE_SPACES)) for token in vocabulary):
        # neither a word start nor punctuation; bytes above ASCII are letters of other scripts
        members = (
            number
            for token, number in vocabulary.items()
            if not token.startswith((_WORD_START, *_BYTE_SPACES)) and token[:1].isalnum()
        )
    continues[np.fromiter(itertools.filterfalse(special.__contains__, members), dtype=np.int64)] = True
    return continues


def _continuing_prefix(tokenizer: Tokenizer) -> str | None:
    model = json.loads(tokenizer.to_str())["model"]
    prefix = model.get("continuing_subword_prefix")
    return prefix if isinstance(prefix, str) and prefix else None


# --- does it fit the shards ------------------------------------------------------------------------------------------


def tokenizer_faults(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong with a tokenizer folder; empty if it is the one that the shards of `manifest` were made with."""
    path = folder / TOKENIZER_FILE
    if not path.exists():
        return [f"{path}: missing; expected the tokenizer that the shards were made with; restore it or prepare again"]
    found = file_sha256(path)
    if found != manifest.tokenizer_sha256:
        return [
            f"{path}: does not match the shards: found sha256 {found[:12]}…, the manifest says "
            f"{manifest.tokenizer_sha256[:12]}…; restore the tokenizer or prepare again"
        ]
    size = tokenizer_info(folder).vocab_size
    if size != manifest.vocab_size:
        return [f"{path}: has {size} entries, the manifest says {manifest.vocab_size}; restore it or prepare again"]
    return []


def check_tokenizer(folder: Path, manifest: Manifest) -> TokenizerInfo:
    """The tokenizer of a folder, after a check that the shards of `manifest` were made with it.

    Raises:
        DataError: it is missing, another one, or of another size.
    """
    faults = tokenizer_faults(folder, manifest)
    if faults:
        raise DataError(faults[0])
    return tokenizer_info(folder)

"""The tokenizer for raw text of others: the one beside it, the one named, or one trained on it and kept in the cache."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sparselt_dist.data.exclusion import one_at_a_time
from sparselt_dist.data.manifest import TOKENIZER, file_sha256
from sparselt_dist.data.shard_files import Access
from sparselt_dist.data.storage import is_remote
from sparselt_dist.data.tokenizer import TOKENIZER_FILE, TRAINED_KINDS, copy_tokenizer
from sparselt_dist.data.tokenizer_training import save_trained, train_tokenizer


@dataclass(frozen=True)
class TokenizerChoice:
    """`prepare.tokenizer` and what its training needs."""

    name: str  # a kind to train, or a tokenizer folder
    vocab_size: int
    characters: int  # of text to train on
    crammed: bool
    sequence_length: int | None


def find_tokenizer(
    choice: TokenizerChoice, location: str, content: str, documents: Callable[[], Iterator[str]], access: Access
) -> Path:
    """The local folder of the tokenizer to use.

    Args:
        content: a hash of the text; a trained tokenizer is kept under it.
        documents: gives the text to train on, the same at each call.

    Raises:
        DataError, ConfigError: the named folder is no tokenizer, or the text cannot train one.
    """
    beside = Path(location) / TOKENIZER
    if not is_remote(location) and (beside / TOKENIZER_FILE).is_file():
        return beside
    if choice.name not in TRAINED_KINDS:
        file = Path(choice.name).expanduser() / TOKENIZER_FILE
        if _is_plain(file) and not file.is_symlink():  # links, as in a hub's cache, are not followed from elsewhere
            return file.parent
        identity = f"{file.resolve()} {file_sha256(file) if file.is_file() else ''}"
        return _made_once(access, identity, lambda folder: copy_tokenizer(choice.name, folder))
    identity = json.dumps([content, choice.name, choice.vocab_size, choice.characters, choice.crammed])
    return _made_once(access, identity, lambda folder: _train(choice, documents, folder))


def _is_plain(file: Path) -> bool:
    """Whether a tokenizer can be used where it is: it cuts and pads nothing. So it is the very one that shards have."""
    try:
        stored = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(stored, dict) and stored.get("truncation") is None and stored.get("padding") is None


def _train(choice: TokenizerChoice, documents: Callable[[], Iterator[str]], folder: Path) -> None:
    def texts() -> Iterator[str]:
        left = choice.characters
        for text in documents():
            yield text
            left -= len(text)
            if left <= 0:
                return

    assert choice.name in TRAINED_KINDS
    kind = next(kind for kind in TRAINED_KINDS if kind == choice.name)
    tokenizer = train_tokenizer(texts, kind=kind, vocab_size=choice.vocab_size, crammed=choice.crammed)
    save_trained(tokenizer, folder, crammed=choice.crammed, model_max_length=choice.sequence_length)


def _made_once(access: Access, identity: str, make: Callable[[Path], None]) -> Path:
    """A folder of the cache, made by the first of all processes that need it."""
    folder = access.cache_dir / "tokenizers" / hashlib.sha256(identity.encode()).hexdigest()
    with one_at_a_time(folder):
        if not (folder / TOKENIZER_FILE).is_file():
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            make(partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.replace(folder)
    return folder

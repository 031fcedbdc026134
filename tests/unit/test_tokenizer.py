"""Tokenizers: fixed special ids, the same file from the same text, loadable by transformers, described truly."""

from __future__ import annotations

import functools
import json
import pydoc_data.topics
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from sparselt_dist.data.corpora import open_folder
from sparselt_dist.data.manifest import file_sha256, write_manifest
from sparselt_dist.data.shard_writer import ShardWriter
from sparselt_dist.data.tokenizer import (
    TRAINED_KINDS,
    TokenizerKind,
    copy_tokenizer,
    load_for_text,
    tokenizer_info,
)
from sparselt_dist.data.tokenizer_training import CRAMMED_SPECIAL_TOKENS, SPECIAL_TOKENS, save_trained, train_tokenizer
from sparselt_dist.errors import ConfigError, DataError

TEXTS = [text for _, text in sorted(pydoc_data.topics.topics.items())][:12]
SENTENCE = "The function's arguments are evaluated, unexpectedly, from left to right."


@functools.cache
def _trained(kind: TokenizerKind, crammed: bool = False, vocab_size: int = 600) -> Tokenizer:
    return train_tokenizer(lambda: iter(TEXTS), kind=kind, vocab_size=vocab_size, crammed=crammed)


def _saved(folder: Path, kind: TokenizerKind, crammed: bool = False) -> Path:
    save_trained(_trained(kind, crammed), folder, crammed=crammed, model_max_length=128)
    return folder


@pytest.mark.parametrize("kind", TRAINED_KINDS)
@pytest.mark.parametrize("crammed", [False, True])
def test_special_ids_are_fixed_and_the_size_is_kept(kind: TokenizerKind, crammed: bool, tmp_path: Path) -> None:
    info = tokenizer_info(_saved(tmp_path, kind, crammed))
    assert info.pad_id == 0 and info.vocab_size == 600
    expected = (0, 3, 4, 5, 6, 1, 2) if crammed else (0, 1, 2, 3, 4, 2, 3)
    found = (info.pad_id, info.unk_id, info.cls_id, info.sep_id, info.mask_id, info.bos_id, info.eos_id)
    assert found == expected
    assert info.special_ids == tuple(range(len(CRAMMED_SPECIAL_TOKENS if crammed else SPECIAL_TOKENS)))


@pytest.mark.parametrize("kind", TRAINED_KINDS)
def test_two_builds_on_the_same_text_are_the_same(kind: TokenizerKind) -> None:
    again = train_tokenizer(lambda: iter(TEXTS), kind=kind, vocab_size=600, crammed=True)
    assert again.to_str() == _trained(kind, True).to_str()


@pytest.mark.parametrize("kind", TRAINED_KINDS)
def test_transformers_loads_the_folder(kind: TokenizerKind, tmp_path: Path) -> None:
    import transformers

    loaded = transformers.AutoTokenizer.from_pretrained(_saved(tmp_path, kind))
    ids = loaded(SENTENCE)["input_ids"]
    assert ids[0] == loaded.cls_token_id == 2 and ids[-1] == loaded.sep_token_id == 3
    assert ids[1:-1] == load_for_text(tmp_path).encode(SENTENCE, add_special_tokens=False).ids
    assert loaded.mask_token_id == 4 and loaded.pad_token_id == 0 and loaded.model_max_length == 128
    assert loaded.unk_token_id not in ids
    squeezed = loaded.decode(ids, skip_special_tokens=True).replace(" ", "")
    assert squeezed == SENTENCE.replace(" ", "")
    pair = loaded("one", "two")
    assert pair["input_ids"].count(3) == 2


@pytest.mark.parametrize("kind", TRAINED_KINDS)
def test_a_special_token_spelled_out_in_a_text_stays_text(kind: TokenizerKind, tmp_path: Path) -> None:
    tokenizer = load_for_text(_saved(tmp_path, kind))
    ids = tokenizer.encode("see [SEP] and [PAD] and [MASK] here", add_special_tokens=False).ids
    assert not {0, 2, 3, 4} & set(ids)


@pytest.mark.parametrize(
    ("kind", "crammed"),
    [("wordpiece", False), ("wordpiece", True), ("bpe", False), ("byte-bpe", False), ("unigram", False)],
)
def test_pieces_know_whether_they_continue_a_word(kind: TokenizerKind, crammed: bool, tmp_path: Path) -> None:
    info = tokenizer_info(_saved(tmp_path, kind, crammed))
    assert info.continues_word_V is not None and not info.continues_word_V[list(info.special_ids)].any()
    text = " Reinitialization, of unsubscriptable containers."
    encoding = load_for_text(tmp_path).encode(text, add_special_tokens=False)
    words: list[str] = []
    for number, token in zip(encoding.ids, encoding.tokens, strict=True):
        piece = token.removeprefix("##").lstrip("\u2581\u0120")
        if info.continues_word_V[number]:
            words[-1] += piece
        else:
            words.append(piece)
    expected = ["Reinitialization", ",", "of", "unsubscriptable", "containers", "."]
    assert words == [word.lower() for word in expected] if crammed else words == expected


def test_an_alphabet_larger_than_the_vocabulary_is_refused() -> None:
    for kind in ("wordpiece", "bpe", "unigram"):
        with pytest.raises(ConfigError, match=r"prepare\.vocab_size: found 64"):
            train_tokenizer(lambda: iter(TEXTS), kind=kind, vocab_size=64, crammed=False)
    with pytest.raises(ConfigError, match=r"prepare\.vocab_size: found 200"):
        train_tokenizer(lambda: iter(TEXTS), kind="byte-bpe", vocab_size=200, crammed=False)


def test_a_text_with_few_words_gives_fewer_entries() -> None:
    tokenizer = train_tokenizer(lambda: iter(["to be or not to be"]), kind="wordpiece", vocab_size=1000, crammed=False)
    assert 8 < tokenizer.get_vocab_size() < 40


@pytest.mark.parametrize("kind", TRAINED_KINDS)
def test_an_existing_tokenizer_is_copied(kind: TokenizerKind, tmp_path: Path) -> None:
    import transformers

    source = _saved(tmp_path / "own", kind)
    foreign = transformers.AutoTokenizer.from_pretrained(source)
    foreign.backend_tokenizer.enable_truncation(8)
    foreign.backend_tokenizer.enable_padding(length=8)
    foreign.save_pretrained(tmp_path / "foreign")
    copy_tokenizer(str(tmp_path / "foreign"), tmp_path / "copy")
    ours, theirs = load_for_text(tmp_path / "copy"), load_for_text(source)
    assert ours.encode(SENTENCE).ids == theirs.encode(SENTENCE).ids
    assert tokenizer_info(tmp_path / "copy") == tokenizer_info(source)


def test_a_tokenizer_without_pad_and_sep_uses_its_end_token(tmp_path: Path) -> None:
    import transformers

    _saved(tmp_path / "own", "byte-bpe")
    plain = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "own/tokenizer.json"), eos_token="[SEP]")
    plain.save_pretrained(tmp_path / "gpt")
    copy_tokenizer(str(tmp_path / "gpt"), tmp_path / "copy")
    info = tokenizer_info(tmp_path / "copy")
    assert (info.pad_id, info.eos_id, info.sep_id, info.mask_id) == (3, 3, None, None)
    nothing = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "own/tokenizer.json"))
    nothing.save_pretrained(tmp_path / "nothing")
    with pytest.raises(DataError, match="has no sep and no eos token"):
        copy_tokenizer(str(tmp_path / "nothing"), tmp_path / "other")


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prepare\.tokenizer: found 'wordpice', expected a kind to train"):
        copy_tokenizer("wordpice", tmp_path / "copy")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: cannot be loaded"):
        copy_tokenizer(str(tmp_path / "empty"), tmp_path / "copy")
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        tokenizer_info(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="not a readable tokenizer"):
        tokenizer_info(tmp_path)


def test_shards_are_checked_against_their_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    path = _saved(folder / "tokenizer", "wordpiece") / "tokenizer.json"

    def complete(vocab_size: int) -> None:
        single = ShardWriter(folder, kind="documents", dtype="uint16")
        single.add(np.arange(5, dtype="uint16"))
        write_manifest(
            folder,
            single.close(),
            kind="documents",
            sequence_length=None,
            dtype="uint16",
            vocab_size=vocab_size,
            tokenizer_sha256=file_sha256(path),
        )

    complete(600)
    assert open_folder(folder).check_tokenizer() == tokenizer_info(folder) == tokenizer_info(folder / "tokenizer")
    complete(601)
    with pytest.raises(DataError, match="has 600 entries, the manifest says 601"):
        open_folder(folder).check_tokenizer()
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"tokenizer\.json: does not match the shards"):
        open_folder(folder).check_tokenizer()
    path.unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: missing"):
        open_folder(folder).check_tokenizer()

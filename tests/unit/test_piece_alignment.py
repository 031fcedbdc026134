"""From words of the original text to pieces of the normalised one."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from sparselt_dist.data.cleaning import Normalization, normalize
from sparselt_dist.data.piece_alignment import Side, align, pieces_by_word, side_pieces, words_of_pieces
from sparselt_dist.data.sentences import Word, split_sentences
from sparselt_dist.errors import DataError

TEXTS = [
    "Dogs bark.",
    "The  naïve  café's owner — Élan — isn't “here”,\u00a0they'd  say…",
    "İstanbul’da ΟΔΟΣ straße 한국 日本 ok",
    "``Quoted'' and '—' and ''' marks\r\n\r\n\r\nnext   line \n end\x07.",
    "e\u0301a\u0323\u0301 a\u0301\u0323 \u0301 marks",
    "   leading and trailing   ",
    "é",
    "日本",
]


@pytest.mark.parametrize("how", ["none", "nfc", "crammed"])
@pytest.mark.parametrize("text", TEXTS)
def test_places_ascend_and_hold_the_same_letters(text: str, how: Normalization) -> None:
    normalised = normalize(text, how)
    places = align(text, normalised)
    assert len(places) == len(normalised)
    assert (np.diff(places) >= 0).all()
    for character, place in zip(normalised, places, strict=True):
        if character.isascii() and character.isalnum():
            assert normalize(text[place], "crammed").startswith(character.lower())


def test_deleted_words_have_no_place() -> None:
    text = "a 日本 b ''c''"
    assert align(text, normalize(text, "crammed")).tolist() == [0, 1, 5, 6, 7, 9, 10]
    assert normalize(text, "crammed") == 'a b "c"'


def test_another_text_is_refused() -> None:
    with pytest.raises(DataError, match=r"found 'x' as character 2.*prepare\.normalize"):
        align("abc", "abx")


def pieces_of(text: str, how: Normalization, tokenizer: Tokenizer) -> tuple[list[str], list[int], list[Word]]:
    """Pieces, the word of each, and the words."""
    words = [word for sentence in split_sentences(text) for word in sentence]
    normalised = normalize(text, how)
    encoding = tokenizer.encode(normalised, add_special_tokens=False)
    return encoding.tokens, words_of_pieces(words, align(text, normalised), normalised, encoding.offsets), words


def short_pieces(kind: str) -> Tokenizer:
    """Pieces of one or two letters; letters outside the vocabulary are unknown."""
    letters = "abcdefghijklmnopqrstuvwxyz'.,\"`"
    if kind == "wordpiece":
        pieces = ["[UNK]", *letters, *(f"##{letter}" for letter in letters), "th", "##er"]
        tokenizer = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


@pytest.mark.parametrize("kind", ["wordpiece", "byte-bpe"])
@pytest.mark.parametrize("how", ["nfc", "crammed"])
@pytest.mark.parametrize("text", TEXTS[:4])
def test_every_piece_has_its_word_in_order(text: str, how: Normalization, kind: str) -> None:
    pieces, found, words = pieces_of(text, how, short_pieces(kind))
    spaces = {"Ġ", "Ċ", "č"}
    solid = [word for piece, word in zip(pieces, found, strict=True) if piece not in spaces]
    assert pieces
    assert -1 not in solid
    assert solid == sorted(solid)
    if how == "nfc":
        assert set(solid) == {number for number, word in enumerate(words) if word.text != "\x07"}


def test_unknown_piece_keeps_its_word() -> None:
    pieces, found, words = pieces_of("they 日本 isn't", "nfc", short_pieces("wordpiece"))
    assert [words[number].text for piece, number in zip(pieces, found, strict=True) if piece == "[UNK]"] == ["日本"]
    assert [words[number].text for number in found[-5:]] == ["is", "is", "n't", "n't", "n't"]


def test_root_pieces_come_first_then_the_nearest() -> None:
    pieces = pieces_by_word([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3])
    ids = list(range(100, 111))
    nearest = (102, 103, 104, 105, 106, 107, 108, 109)
    assert side_pieces([0, 1, 2], 2, ids, pieces) == Side(nearest, (False,) * 5 + (True,) * 3)
    assert side_pieces([3], 3, ids, pieces) == Side((110,), (True,))
    assert side_pieces([0, 2], 2, ids, pieces).ids == (100, 101, 102, 107, 108, 109)


def test_long_root_is_cut_and_vanished_words_leave_their_side() -> None:
    assert side_pieces([0], 0, list(range(12)), {0: list(range(12))}) == Side(tuple(range(8)), (True,) * 8)
    assert side_pieces([5], 5, [7, 8], pieces_by_word([0, 6])) == Side((), ())
    assert side_pieces([0, 5], 5, [7, 8], pieces_by_word([0, 6])) == Side((7,), (False,))

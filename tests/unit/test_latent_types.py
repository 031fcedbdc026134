"""Text to rows, typed rows to figures and keywords, and the reports of both, on types that are given by hand."""

from __future__ import annotations

import html
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from sparselt_dist.data.cleaning import Normalization
from sparselt_dist.data.shards import Stored
from sparselt_dist.errors import ConfigError
from sparselt_dist.evaluation.latent_types import (
    NO_WORD,
    Reconstruction,
    Row,
    TypedText,
    TypeReader,
    _documents,
    _stored_row,
    rows_of_lines,
)
from sparselt_dist.evaluation.parts_of_speech import load_tagger
from sparselt_dist.evaluation.type_census import TypeCensus, TypeReport
from sparselt_dist.objectives.base import TokenizerInfo
from sparselt_dist.typing_report import Findings, Shown, page, print_findings

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "the", "cat", ".", "##s"]
CLS, SEP, PLAY, ING, THE, CAT, STOP, S = 2, 3, 5, 6, 7, 8, 9, 10


def make_reader(row_length: int = 16, normalization: Normalization = "nfc", *, marked: bool = True) -> TypeReader:
    """A reader of text, without a model."""
    tokenizer = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    continues_V = np.array([piece.startswith("##") for piece in PIECES]) if marked else None
    info = TokenizerInfo(
        len(PIECES), 0, 4, 1, cls_id=CLS, sep_id=SEP, special_ids=(0, 1, 2, 3, 4), continues_word_V=continues_V
    )
    loaded: Any = SimpleNamespace(tokenizer=info)
    slt: Any = None
    return TypeReader(loaded, slt, tokenizer, normalization, row_length, torch.device("cpu"))


def typed(text: str, words: list[tuple[str, list[int]]], p_null: dict[int, float] | None = None) -> TypedText:
    """Words of one piece for each of their types, in four types; a null piece has p_0 = 0.7, another one 0.1."""
    pieces, spans, numbers, types = ["[CLS]"], [(0, 0)], [NO_WORD], [0]
    at = 0
    for number, (word, kinds) in enumerate(words):
        at = text.index(word, at)
        for place, kind in enumerate(kinds):
            end = at + len(word) if place == len(kinds) - 1 else at + place + 1
            spans.append((at + place, end))
            pieces.append(text[at + place : end])
            numbers.append(number)
            types.append(kind)
        at += len(word)
    null = np.array([0.7 if kind == 0 else 0.1 for kind in types])
    for place, value in (p_null or {}).items():
        null[place] = value
    distribution_TK = np.empty((len(types), 4))
    for place, kind in enumerate(types):
        shares = [0.9 if other == kind else 0.05 for other in (1, 2, 3)] if kind else [1 / 3] * 3
        distribution_TK[place] = [null[place], *((1 - null[place]) * share for share in shares)]
    row = Row(text, list(range(len(types))), spans, numbers)
    best_T = distribution_TK[np.arange(len(types)), types]
    return TypedText(row, pieces, np.array(types), best_T, null, distribution_TK.sum(axis=0))


# ---------------------------------------------------------------- text to rows


def test_a_line_is_framed_and_its_pieces_point_into_the_original() -> None:
    (row,) = rows_of_lines(make_reader(), ["The cats playing."])
    assert row.ids == [CLS, THE, CAT, S, PLAY, ING, STOP, SEP]
    assert row.words == [NO_WORD, 0, 1, 1, 2, 2, 3, NO_WORD]
    assert [row.text[start:end] for start, end in row.spans] == ["", "The", "cat", "s", "play", "ing", ".", ""]


def test_normalised_text_points_into_the_original_and_blank_lines_are_no_rows() -> None:
    """`crammed` deletes the accents and the dash, and shortens the spaces."""
    rows = list(rows_of_lines(make_reader(normalization="crammed"), ["", "   ", "  Thé — cat   PLAY"]))
    assert [row.ids for row in rows] == [[CLS, THE, CAT, PLAY, SEP]]
    assert [rows[0].text[start:end] for start, end in rows[0].spans[1:-1]] == ["Thé", "cat", "PLAY"]


def test_a_long_line_is_cut_in_front_of_a_word_and_nothing_is_lost() -> None:
    line = "the cats playing the cat " * 5
    rows = list(rows_of_lines(make_reader(row_length=6), [line]))
    whole = next(iter(rows_of_lines(make_reader(row_length=99), [line]))).ids[1:-1]
    assert [number for row in rows for number in row.ids[1:-1]] == whole
    assert max(len(row.ids) for row in rows) <= 6
    assert all(row.ids[1] not in (ING, S) and row.words[1] == 0 for row in rows)
    for row in rows:
        assert [row.text[a:b] for a, b in row.spans[1:-1]] == [PIECES[n].removeprefix("##") for n in row.ids[1:-1]]
    (word,) = rows_of_lines(make_reader(row_length=7), ["cats" + "s" * 3])
    assert word.ids == [CLS, CAT, S, S, S, S, SEP]
    assert [len(row.ids) for row in rows_of_lines(make_reader(row_length=4), ["cats" + "s" * 3])] == [4, 4, 3]


def test_without_marks_each_piece_is_a_word() -> None:
    (row,) = rows_of_lines(make_reader(marked=False), ["cats"])
    assert row.words == [NO_WORD, 0, 1, NO_WORD]


def test_a_stored_row_gets_a_text_of_its_words() -> None:
    row = _stored_row(make_reader(), [ING, THE, CAT, S, SEP, PLAY, ING, SEP])
    assert row.words == [0, 1, 2, 2, NO_WORD, 3, 3, NO_WORD]
    assert row.text == "##ing the cats playing"
    assert [row.text[a:b] for a, b in row.spans] == ["##ing", "the", "cat", "s", "", "play", "ing", ""]


def test_bytes_of_one_letter_share_it() -> None:
    tokenizer = Tokenizer(models.BPE({"[UNK]": 0, "Ã": 1, "©": 2, "Ġ": 3}, []))
    tokenizer.decoder = decoders.ByteLevel()
    info = TokenizerInfo(4, 0, None, continues_word_V=np.array([False, False, True, False]))
    loaded: Any = SimpleNamespace(tokenizer=info)
    slt: Any = None
    row = _stored_row(TypeReader(loaded, slt, tokenizer, "none", 16, torch.device("cpu")), [1, 2, 1, 2])
    assert (row.text, row.words) == ("é é", [0, 0, 1, 1])


def test_documents_of_a_stored_row_are_rows_of_their_own() -> None:
    packed = Stored(np.arange(9, dtype=np.uint16), np.array([2, 6, 1]))
    assert list(_documents(packed, 4)) == [[0, 1], [2, 3, 4, 5], [6, 7], [8]]
    assert list(_documents(Stored(np.arange(5, dtype=np.uint16)), 4)) == [[0, 1, 2, 3], [4]]


# ---------------------------------------------------------------- figures and keywords


def census_report(keywords: int = 10) -> TypeReport:
    census = TypeCensus(4)
    census.add(typed("Cats eat fish .", [("Cats", [2, 1]), ("eat", [0]), ("fish", [3]), (".", [3])], {4: 0.2}))
    census.add(typed("cats or fish", [("cats", [2, 0]), ("or", [0]), ("fish", [0])], {4: 0.6}))
    return census.report(keywords)


def test_shares_count_every_token_and_words_once_for_each_type() -> None:
    report = census_report()
    assert (report.texts, report.tokens, report.types_used) == (2, 11, 3)
    assert [(one.type, one.tokens) for one in report.types] == [(0, 6), (2, 2), (3, 2), (1, 1)]
    assert report.null_share == pytest.approx(6 / 11) and sum(one.share for one in report.types) == pytest.approx(1)
    words = {one.type: one.words for one in report.types}
    assert words[0] == (("[CLS]", 2), ("Cats", 1), ("eat", 1), ("fish", 1), ("or", 1))
    assert words[2] == (("Cats", 2),)


def test_perplexities_are_those_of_the_mean_distribution_and_of_the_types_in_use() -> None:
    texts = [typed("a b", [("a", [1]), ("b", [2])]), typed("c", [("c", [1])])]
    census = TypeCensus(4)
    for text in texts:
        census.add(text)
    report = census.report(0)
    mean_K = sum(text.probability_sums for text in texts) / 5
    assert report.null_probability == pytest.approx(mean_K[0])
    assert report.perplexity == pytest.approx(math.exp(-(mean_K * np.log(mean_K)).sum()), rel=1e-5)
    assert report.used_perplexity == pytest.approx(math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))))
    assert report.keywords == ()


def test_all_null_has_no_type_in_use() -> None:
    census = TypeCensus(4)
    census.add(typed("a", [("a", [0])]))
    report = census.report(5)
    assert (report.types_used, report.used_perplexity, report.null_share, report.keywords) == (0, 0.0, 1.0, ())


def test_keywords_are_ranked_by_their_mean_probability_not_to_be_null() -> None:
    """cats: pieces at p_0 0.1 both times; fish: 0.2 and 0.6; marks and words that are always null are none."""
    keywords = census_report().keywords
    assert [(one.word, one.selected, one.occurrences, one.types) for one in keywords] == [
        ("Cats", 2, 2, (2, 1)),
        ("fish", 1, 2, (3,)),
    ]
    assert [one.score for one in keywords] == pytest.approx([0.9, 1 - (0.2 + 0.6) / 2])
    assert [one.word for one in census_report(1).keywords] == ["Cats"]


def test_typical_words_need_occurrences() -> None:
    census = TypeCensus(4)
    for kinds in ([1], [1], [2]):
        census.add(typed("often", [("often", kinds)]))
        census.add(typed("once", [("once", [1])]) if kinds == [2] else typed("x", [("x", [3])]))
    assert {one.type: one.typical for one in census.report(0).types} == {
        0: (("[CLS]", 1.0),),
        1: (("often", 2 / 3),),
        2: (("often", 1 / 3),),
        3: (),
    }


def test_parts_of_speech_are_shares_of_tagged_tokens() -> None:
    census = TypeCensus(4)
    census.add(typed("a b c d", [(name, [1]) for name in "abcd"]), [None, "NOUN", "NOUN", "VERB", None])
    parts = {one.type: one.parts for one in census.report(0).types}
    assert parts == {0: (), 1: (("NOUN", 2 / 3), ("VERB", 1 / 3))}


# ---------------------------------------------------------------- parts of speech


def test_without_spacy_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ConfigError, match=r"spaCy, which is not installed.*sparselt_dist\[parser\]"):
        load_tagger()


def test_pieces_get_the_part_of_speech_of_their_word(tmp_path: Path) -> None:
    spacy = pytest.importorskip("spacy")
    pipeline = spacy.blank("en")
    rules = pipeline.add_pipe("attribute_ruler")
    rules.add([[{"LOWER": "cats"}]], {"POS": "NOUN"})
    rules.add([[{"LOWER": "play"}]], {"POS": "VERB"})
    pipeline.to_disk(tmp_path / "rules")
    tag = load_tagger(str(tmp_path / "rules"))
    assert tag("cats  play", [(0, 0), (0, 3), (3, 4), (6, 10)]) == [None, "NOUN", "NOUN", "VERB"]
    spacy.blank("en").to_disk(tmp_path / "bare")
    with pytest.raises(ConfigError, match="a tagger, found"):
        load_tagger(str(tmp_path / "bare"))
    with pytest.raises(ConfigError, match="'no_such_model', which is not installed"):
        load_tagger("no_such_model")


# ---------------------------------------------------------------- reports


def findings(text: TypedText, rebuilt: Reconstruction | None = None) -> Findings:
    census = TypeCensus(4)
    census.add(text)
    return Findings("run on <TEXT>", census.report(10), [Shown(text, rebuilt)], ["a note & more"])


def visible(fragment: str) -> str:
    """What a browser shows of a text, without type numbers and special tokens."""
    bare = re.sub(r"<sub>\d+</sub>|<span class=\"special[^>]*>[^<]*</span>", "", fragment)
    return html.unescape(re.sub(r"<[^>]+>", "", bare))


def test_the_page_shows_the_text_itself_escaped_and_loads_nothing() -> None:
    text = 'if a<b  then "x" &amp; y'
    words = [("if", [0]), ("a", [1]), ("<", [0]), ("b", [2]), ("then", [1, 2, 3]), ('"', [0]), ("x", [3]), ('"', [0])]
    words += [("&", [0]), ("amp", [1]), (";", [0]), ("y", [3])]
    content = page(findings(typed(text, words), Reconstruction("<i>", 0.5)))
    body = re.search(r'<p class="text">(.*?)</p>', content, flags=re.DOTALL)
    assert body is not None and visible(body[1]) == text
    assert body[1].count('<span class="w">') == len(words)
    assert "&lt;i&gt;" in content and "<i>" not in content and "run on &lt;TEXT&gt;" in content
    assert not re.search(r"<script|https?:|src=|@import|url\(", content)
    assert 'title="t: type 1, probability 0.810, null 0.100"' in content
    colors = dict(re.findall(r'background:(hsl[^"]+)" title="[^"]*type (\d)', content))
    assert len(colors) == 3 and all(f'style="background:{color}"' in content for color in colors)  # legend and table


def test_a_letter_of_several_pieces_is_shown_once() -> None:
    row = Row("é", [1, 2], [(0, 1), (0, 1)], [0, 0])
    text = TypedText(row, ["Ã", "©"], np.array([1, 2]), np.ones(2), np.zeros(2), np.array([0, 1.0, 1, 0]))
    body = re.search(r'<p class="text">(.*?)</p>', page(findings(text)))
    assert body is not None and visible(body[1]) == "é·"


def test_the_terminal_has_words_pieces_types_and_probabilities(capsys: pytest.CaptureFixture[str]) -> None:
    print_findings(findings(typed("cats eat", [("cats", [2, 0]), ("eat", [0])]), Reconstruction("cats cats", 0.5)))
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines()]
    assert (
        ["cats", "c", "2", "0.810"] in rows
        and ["ats", "null", "0.700"] in rows
        and ["eat", "eat", "null", "0.700"] in rows
    )
    assert "rebuilt (50% of the tokens): cats cats" in shown and "a note & more" in shown
    assert "4 tokens in 1 text; null share 75.0%" in shown
    assert max(map(len, shown.splitlines())) < 200

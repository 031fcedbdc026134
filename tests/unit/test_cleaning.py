"""Normalisation, length filters, and the set of hashes."""

from __future__ import annotations

import random
import re

import pytest

from sparselt_dist.data.cleaning import CleaningRules, Normalization, clean_batch, normalize
from sparselt_dist.data.embedded import tidy
from sparselt_dist.data.tokenizer_training import _normalizer

TRAPS = [
    "Plain text, nothing to do.",
    "``Quoted'' and ''quoted``",
    "'\u2019' deletion brings quotes together",
    "a \u2014 b deletion brings spaces together",
    "`\u00a0` \u0300''\u0301'",
    "Caf\u00e9 na\u00efve \u00c5ngstr\u00f6m \u0130stanbul \u212a \u1fef\u1fef",
    "\u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2 \u03a3",
    "line one\r\nline two\r\n\r\n\r\n\r\nline three\t tab",
    "bell \x07 escape \x1b zero width \u200b soft\u00adhyphen",
    "\u4e2d\u6587 \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
    "'''' ````  ' '  ` `",
]


@pytest.mark.parametrize("how", ["none", "nfc", "crammed"])
@pytest.mark.parametrize("text", TRAPS)
def test_normalisation_is_idempotent(how: Normalization, text: str) -> None:
    once = normalize(text, how)
    assert normalize(once, how) == once


@pytest.mark.parametrize("text", TRAPS)
def test_crammed_is_lower_case_ascii_without_double_spaces(text: str) -> None:
    result = normalize(text, "crammed")
    assert result.isascii() and result == result.lower() and "  " not in result
    assert "''" not in result and "``" not in result


def test_crammed_follows_the_order_of_the_specification() -> None:
    assert normalize("``Caf\u00e9''  \u2014  A", "crammed") == '"cafe" a'


@pytest.mark.parametrize("text", TRAPS)
def test_the_tokenizer_normalises_like_prepare(text: str) -> None:
    assert _normalizer(crammed=True).normalize_str(text) == normalize(text, "crammed")


def test_nfc_composes_and_tidies() -> None:
    assert normalize("e\u0301  x \r\n\r\n\r\n\r\ny\x00 ", "nfc") == "\u00e9 x\n\ny"


def _tidied_by_patterns(text: str) -> str:
    """The definition of `tidy`, one pattern a rule."""
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = re.sub(r" ?\n ?", "\n", re.sub(r"[ \t\u00a0]+", " ", text))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def test_tidying_follows_its_definition() -> None:
    draw = random.Random(0)
    characters = "ab \t\n\r\x00\x07\x7f\x85\x9f\u00a0\u00c2\u00e9\u0301\u4e2d\x0b\u2028\u3000"
    for _ in range(5000):
        text = "".join(draw.choices(characters, k=draw.randrange(14)))
        assert tidy(text) == _tidied_by_patterns(text), repr(text)


def test_lone_surrogates_can_be_written() -> None:
    assert normalize("a\ud800b", "none") == "ab"


def test_documents_outside_the_limits_are_counted_and_dropped() -> None:
    rules = CleaningRules("nfc", min_characters=3, max_characters=5)
    batch = clean_batch(rules, [(0, "ab"), (1, "abc"), (0, "abcde"), (0, "abcdef"), (0, "  a  ")])
    assert (batch.too_short, batch.too_long, batch.characters.tolist()) == (2, 1, [3, 5])
    assert (batch.sources.tolist(), batch.texts) == ([1, 0], [b"abc", b"abcde"])
    assert batch.exact_hashes.tolist() == clean_batch(rules, [(7, "abc"), (7, "abcde")]).exact_hashes.tolist()
    assert len({*batch.exact_hashes.tolist(), *batch.split_hashes.tolist()}) == 4


def test_an_empty_document_is_too_short_whatever_the_limit() -> None:
    assert clean_batch(CleaningRules("nfc", 0, None), [(0, "\n")]).too_short == 1

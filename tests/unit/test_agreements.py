"""Chunks and agreement pairs of parsed sentences, in both label schemes; number flips; the optional parser."""

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sparselt_dist.data.agreements import AgreementPair, extract_pairs, find_agreements, find_chunks
from sparselt_dist.data.dependency_labels import ParsedSentence
from sparselt_dist.data.number_agreement import flip_number
from sparselt_dist.data.parsing import load_parser
from sparselt_dist.errors import ConfigError, DataError


def parsed(text: str) -> ParsedSentence:
    """`word label head` for each word, separated by ` | `; the head is an index from 0."""
    rows = [row.split() for row in text.split(" | ")]
    return [(word, int(head), label) for word, label, head in rows]


def pairs(text: str, family: str | None = None) -> list[tuple[str, str, str]]:
    found = extract_pairs(parsed(text))
    return [
        (pair.family, " ".join(pair.head_words), " ".join(pair.dependent_words))
        for pair in found
        if family in (None, pair.family)
    ]


# --- what a sentence gives -------------------------------------------------------------------------------------------

BOTH_SCHEMES = {
    "passive with agent": (
        "The det 1 | cat nsubjpass 4 | has aux 4 | been auxpass 4 | chased ROOT -1 | by agent 4 | dogs pobj 5",
        "The det 1 | cat nsubj:pass 4 | has aux 4 | been aux:pass 4 | chased root -1 | by case 6 | dogs obl:agent 4",
        [
            ("A1", "has been chased", "The cat"),
            ("A3", "cat", "The"),
            ("A4", "has been chased", "by dogs"),
        ],
    ),
    "a noun as predicate": (
        "She nsubj 1 | is ROOT -1 | not neg 1 | a det 4 | doctor attr 1",
        "She nsubj 4 | is cop 4 | not advmod 4 | a det 4 | doctor root -1",
        [("A1", "is not", "She"), ("A2", "is not", "a doctor"), ("A3", "doctor", "a")],
    ),
    "a place as predicate": (
        "He nsubj 2 | may aux 2 | be ROOT -1 | in prep 2 | town pobj 3",
        "He nsubj 4 | may aux 4 | be cop 4 | in case 4 | town root -1",
        [("A1", "may be", "He"), ("A4", "may be", "in town")],
    ),
    "an adjective with its adverb": (
        "They nsubj 1 | are ROOT -1 | very advmod 3 | happy acomp 1",
        "They nsubj 3 | are cop 3 | very advmod 3 | happy root -1",
        [("A1", "are", "They"), ("A2", "are", "very happy")],
    ),
    "two prepositions": (
        "He nsubj 1 | ran ROOT -1 | out prep 1 | of prep 2 | the det 5 | house pobj 3",
        "He nsubj 1 | ran root -1 | out case 5 | of case 5 | the det 5 | house obl 1",
        [("A1", "ran", "He"), ("A3", "house", "the"), ("A4", "ran", "out of the house")],
    ),
    "an infinitive": (
        "Cats nsubj 1 | want ROOT -1 | to aux 3 | sleep xcomp 1",
        "Cats nsubj 1 | want root -1 | to mark 3 | sleep xcomp 1",
        [("A1", "want", "Cats"), ("A2", "want", "to sleep")],
    ),
    "a possessor and a number": (
        "my poss 1 | sister poss 4 | 's case 1 | two nummod 4 | cars nsubj 5 | broke ROOT -1 | down prt 5",
        "my nmod:poss 1 | sister nmod:poss 4 | 's case 1 | two nummod 4 | cars nsubj 5 | broke root -1 | down compound:prt 5",
        [
            ("A1", "broke down", "my sister 's two cars"),
            ("A3", "sister", "my"),
            ("A3", "cars", "sister"),
            ("A3", "cars", "two"),
        ],
    ),
    "conjuncts": (
        "Old amod 1 | dogs nsubj 4 | and cc 1 | cats conj 1 | eat ROOT -1 | meat dobj 4 | and cc 5 | fish conj 5",
        "Old amod 1 | dogs nsubj 4 | and cc 3 | cats conj 1 | eat root -1 | meat obj 4 | and cc 7 | fish conj 5",
        [("A1", "eat", "Old dogs"), ("A2", "eat", "meat"), ("A3", "dogs", "Old")],
    ),
    "a conjunct with its preposition": (
        "sat ROOT -1 | in prep 0 | boats pobj 1 | and cc 1 | on conj 1 | ships pobj 4",
        "sat root -1 | in case 2 | boats obl 0 | and cc 5 | on case 5 | ships conj 2",
        [("A4", "sat", "in boats")],
    ),
    "a time without preposition": (
        "He nsubj 1 | left ROOT -1 | last amod 3 | week npadvmod 1",
        "He nsubj 1 | left root -1 | last amod 3 | week obl:tmod 1",
        [("A1", "left", "He"), ("A3", "week", "last"), ("A4", "left", "last week")],
    ),
}


@pytest.mark.parametrize("scheme", ["ClearNLP", "UD"])
@pytest.mark.parametrize("case", BOTH_SCHEMES)
def test_both_schemes_give_the_same_pairs(case: str, scheme: str) -> None:
    clear, universal, expected = BOTH_SCHEMES[case]
    assert pairs(clear if scheme == "ClearNLP" else universal) == expected


def test_verb_group_may_have_a_gap() -> None:
    assert pairs("Does aux 2 | he nsubj 2 | know ROOT -1") == [("A1", "Does know", "he")]


def test_stranded_object_stands_after_its_preposition() -> None:
    text = "What pobj 4 | are aux 3 | you nsubj 3 | eyeing ROOT -1 | at prep 3"
    assert ("A4", "are eyeing", "at What") in pairs(text)


def test_dative_preposition_is_a_prepositional_pair() -> None:
    assert pairs("Give ROOT -1 | it dobj 0 | to dative 0 | him pobj 2") == [
        ("A2", "Give", "it"),
        ("A4", "Give", "to him"),
    ]


def test_clause_as_complement_of_a_preposition() -> None:
    assert pairs("won ROOT -1 | by prep 0 | chasing pcomp 1 | cats dobj 2", "A4") == [("A4", "won", "by chasing")]


def test_pairs_stand_once_in_order_of_families() -> None:
    text = "the det 1 | dog nsubj 2 | saw ROOT -1 | the det 4 | dog dobj 2"
    assert pairs(text) == [("A1", "saw", "the dog"), ("A2", "saw", "the dog"), ("A3", "dog", "the")]


def test_pair_fields() -> None:
    assert extract_pairs([("Dogs", 1, "nsubj"), ("bark", -1, "ROOT")]) == [AgreementPair("A1", ("bark",), ("Dogs",))]


def test_root_may_be_its_own_head() -> None:
    assert extract_pairs([("Dogs", 1, "nsubj"), ("bark", 1, "ROOT")]) == [AgreementPair("A1", ("bark",), ("Dogs",))]


# --- chunks ----------------------------------------------------------------------------------------------------------


def test_every_word_is_in_one_chunk_and_noun_phrases_do_not_nest() -> None:
    text = "What nsubj 3 | he nsubj 2 | said csubj 5 | was aux 5 | not neg 5 | heard ROOT -1 | . punct 5"
    sentence = parsed(text)
    chunks = find_chunks(sentence)
    assert sorted(word for chunk in chunks for word in chunk.words) == list(range(len(sentence)))


def test_quotation_mark_does_not_open_a_noun_phrase() -> None:
    chunks = find_chunks(parsed('" punct 2 | old amod 2 | dogs nsubj 3 | bark ROOT -1'))
    assert [(chunk.type, chunk.words) for chunk in chunks] == [("O", (0,)), ("NP", (1, 2)), ("VG", (3,))]


def test_sentence_whose_parse_tears_a_chunk_apart_is_dropped() -> None:
    # "small" depends on the verb, amid the noun phrase
    torn = "the det 2 | small advcl 3 | dog nsubj 3 | barks ROOT -1"
    assert find_chunks(parsed(torn))[0].words == (0, 1, 2)
    assert pairs(torn) == []
    assert pairs("the det 2 | small amod 2 | dog nsubj 3 | barks ROOT -1") != []


def test_empty_sentence() -> None:
    assert extract_pairs([]) == []


@pytest.mark.parametrize(
    ("sentence", "message"),
    [
        ([("Dogs", 7, "nsubj"), ("bark", -1, "ROOT")], r"word 0 \('Dogs'\) has head 7.*0 to 1"),
        ([("Dogs", 1, "nsubj"), ("bark", 0, "ccomp")], r"words \[0, 1\] run in a circle"),
    ],
)
def test_heads_that_form_no_tree_are_refused(sentence: ParsedSentence, message: str) -> None:
    with pytest.raises(DataError, match=message):
        extract_pairs(sentence)


# --- number ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dogs nsubj 2 | were aux 2 | chasing ROOT -1", (1, "was")),
        ("Is aux 2 | he nsubj 2 | coming ROOT -1", (0, "Are")),
        ("dogs nsubj 1 | bark ROOT -1", (1, "barks")),
        ("She nsubj 1 | tries ROOT -1", (1, "try")),
        ("They nsubj 1 | go ROOT -1", (1, "goes")),
        ("dogs nsubj 1 | barked ROOT -1", None),  # the past marks no number
        ("dogs nsubj 2 | can aux 2 | bark ROOT -1", None),
        ("sheep nsubj 1 | bleat ROOT -1", None),  # no list says what it is
    ],
)
def test_flipped_verbs(text: str, expected: tuple[int, str] | None) -> None:
    (agreement,) = (a for a in find_agreements(parsed(text)) if a.family == "A1")
    assert flip_number(agreement, [word for word, _, _ in parsed(text)]) == expected


@pytest.mark.parametrize(
    ("modifier", "noun", "expected"),
    [
        ("these", "dogs", (0, "this")),
        ("That", "dog", (0, "Those")),
        ("a", "city", (1, "cities")),
        ("an", "ox", (1, "oxes")),  # by the rule; the list of irregular nouns is short
        ("a", "child", (1, "children")),
        ("the", "dog", None),
        ("old", "dog", None),
    ],
)
def test_flipped_nouns(modifier: str, noun: str, expected: tuple[int, str] | None) -> None:
    text = f"{modifier} det 1 | {noun} nsubj 2 | slept ROOT -1"
    (agreement,) = (a for a in find_agreements(parsed(text)) if a.family == "A3")
    assert flip_number(agreement, [modifier, noun, "slept"]) == expected


# --- the optional parser ---------------------------------------------------------------------------------------------


class FakeToken(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.text)


def fake_spacy(load: Callable[..., Any]) -> ModuleType:
    module = ModuleType("spacy")
    module.load = load  # type: ignore[attr-defined]
    return module


def test_parser_missing_is_an_error_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ConfigError, match=r"pip install 'sparselt_dist\[parser\]'"):
        load_parser()


def test_model_missing_is_an_error_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, **_: Any) -> None:
        raise OSError(f"[E050] Can't find model '{name}'.")

    monkeypatch.setitem(sys.modules, "spacy", fake_spacy(load))
    with pytest.raises(ConfigError, match=r"'en_nothing'.*python -m spacy download en_core_web_sm"):
        load_parser("en_nothing")


def test_model_without_parser_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = SimpleNamespace(pipe_names=["sentencizer"])
    monkeypatch.setitem(sys.modules, "spacy", fake_spacy(lambda name, **_: pipeline))
    with pytest.raises(ConfigError, match="with sentencizer"):
        load_parser()


def test_parses_pass_over_white_space(monkeypatch: pytest.MonkeyPatch) -> None:
    def token(i: int, text: str, idx: int, dep: str, is_space: bool = False) -> FakeToken:
        return FakeToken(i=i, text=text, idx=idx, dep_=dep, is_space=is_space)

    dogs, gap, bark = token(0, "Dogs", 0, "nsubj"), token(1, "  ", 4, "dep", True), token(2, "bark", 6, "ROOT")
    dogs.head, gap.head, bark.head = bark, dogs, bark
    document = SimpleNamespace(sents=[[dogs, gap, bark]])
    pipeline = SimpleNamespace(pipe_names=["parser"], pipe=lambda texts: (document for _ in texts))
    monkeypatch.setitem(sys.modules, "spacy", fake_spacy(lambda name, **_: pipeline))
    ((parse,),) = load_parser()(["Dogs  bark"])
    assert [tuple(word) for word in parse.words] == [("Dogs", 0, 4), ("bark", 6, 10)]
    assert extract_pairs(parse.tree) == [AgreementPair("A1", ("bark",), ("Dogs",))]

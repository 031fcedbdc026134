"""From a document to its pairs in pieces: which pieces, which copies in the wrong number, which neighbours."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

import pytest

from sparselt_dist.data.agreement_sentences import PARSED_CHARACTERS, parsing_reader, read_strictly
from sparselt_dist.data.agreements import FAMILIES
from sparselt_dist.data.cleaning import Normalization, normalize
from sparselt_dist.data.pair_columns import Pair
from sparselt_dist.data.pair_drawing import Document, Drawer, Drawn
from sparselt_dist.data.piece_alignment import Side, align
from sparselt_dist.data.tokenization import Encoder
from sparselt_dist.data.tokenizer import TokenizerKind, load_for_text
from sparselt_dist.data.tokenizer_training import save_trained, train_tokenizer

E1 = "The two old dogs were chasing a small cat in the garden."
WORDS = f"{E1} was cats dog does this these don't bark"


@cache
def tokenizer_folder(folder: Path, kind: TokenizerKind, how: Normalization) -> Path:
    crammed = how == "crammed"
    size = 400 if kind == "byte-bpe" else 150  # enough for whole words
    trained = train_tokenizer(lambda: iter([normalize(WORDS, how)] * 30), kind=kind, vocab_size=size, crammed=crammed)
    save_trained(trained, folder / f"{kind}-{how}", crammed=crammed, model_max_length=None)
    return folder / f"{kind}-{how}"


def draw(folder: Path, original: str, how: Normalization, *, seed: int = 0, with_text: bool = False) -> Drawn:
    encoder, text = Encoder(folder, how), normalize(original, how)
    document = Document(
        text, encoder.encode_with_spans([text])[0], align(original, text), next(read_strictly([original]))
    )
    drawn = Drawn()
    Drawer(encoder, how, 500).draw(document, drawn, seed=seed, with_text=with_text)
    return drawn


def spelled(folder: Path, side: Side) -> str:
    """Pieces with a star at those of the root word."""
    tokenizer = load_for_text(folder)
    return " ".join(f"{tokenizer.id_to_token(n)}{'*' * root}" for n, root in zip(*side, strict=True))


def listed(folder: Path, pairs: list[Pair]) -> list[tuple[str, str, str]]:
    return [(pair.label, spelled(folder, pair.head), spelled(folder, pair.dependent)) for pair in pairs]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_the_first_example_in_pieces(place: Path, kind: TokenizerKind) -> None:
    folder = tokenizer_folder(place, kind, "crammed")
    drawn = draw(folder, E1.replace("cat ", "cát   "), "crammed", with_text=True)
    expected = {
        "A1": [("nsubj", "were chasing*", "the two old dogs*")],
        "A2": [("dobj", "were chasing*", "a small cat*")],
        "A3": [
            *(("det", "dogs*", "the*"), ("nummod", "dogs*", "two*"), ("amod", "dogs*", "old*")),
            *(("det", "cat*", "a*"), ("amod", "cat*", "small*"), ("det", "garden*", "the*")),
        ],
        "A4": [("prep:in", "were chasing*", "in the garden*")],
    }
    for family in FAMILIES:
        assert listed(folder, drawn.pairs[family]) == expected[family]
    assert drawn.words == 13
    assert len(drawn.text) == 1 and len(drawn.text[0]["ids"]) >= 13


def flips(folder: Path, text: str, how: Normalization) -> list[tuple[str, str]]:
    pairs = [pair for pairs in draw(folder, text, how).pairs.values() for pair in pairs]
    return [(spelled(folder, pair.flipped[0]), spelled(folder, pair.flipped[1])) for pair in pairs if pair.flipped]


def test_copies_in_the_wrong_number_change_one_word(place: Path) -> None:
    folder = tokenizer_folder(place, "wordpiece", "nfc")
    assert flips(folder, E1, "nfc") == [("was chasing*", "The two old dogs*"), ("cats*", "a*")]
    folder = tokenizer_folder(place, "byte-bpe", "nfc")
    assert flips(folder, E1, "nfc") == [("Ġwas Ġchasing*", "The Ġtwo Ġold Ġdogs*"), ("Ġcats*", "Ġa*")]
    # the word before "n't" is tokenized with it
    head, dependent = flips(folder, "old dogs don't bark in the garden", "nfc")[0]
    assert head.replace(" ", "").startswith("Ġdoes")
    assert head.endswith("Ġbark*") and dependent == "old Ġdogs*"
    assert flips(folder, "Two were chasing small cats", "nfc")[0][0] == "Ġwas Ġchasing*"


def test_unknown_words_leave_their_sides(place: Path) -> None:
    folder = tokenizer_folder(place, "wordpiece", "nfc")
    drawn = draw(folder, "The two old dogs were chasing a 日本 cat in the 日本.", "nfc", with_text=True)
    found = [listed(folder, drawn.pairs[family]) for family in FAMILIES]
    assert ("dobj", "were chasing*", "a cat*") in found[1]
    assert not any("日" in word for pairs in found for pair in pairs for word in pair)
    special = Encoder(folder, "nfc").special_ids
    for pairs in (*drawn.pairs.values(), *drawn.windows.values()):
        for pair in pairs:
            assert pair.head.ids and pair.dependent.ids
            assert special.isdisjoint((*pair.head.ids, *pair.dependent.ids))
    assert not special.isdisjoint(drawn.text[0]["ids"].tolist())  # text is as the model reads it


def test_neighbours_are_drawn_for_each_pair(place: Path) -> None:
    folder = tokenizer_folder(place, "wordpiece", "nfc")
    words = E1.removesuffix(".").split()
    neighbours = {("window", f"{first}*", f"{second}*") for first, second in itertools.pairwise(words)}
    seen = set()
    for seed in range(20):
        drawn = draw(folder, E1, "nfc", seed=seed)
        for family in FAMILIES:
            assert len(drawn.windows[family]) == len(drawn.pairs[family])
            seen |= set(listed(folder, drawn.windows[family]))
    assert seen == neighbours
    assert draw(folder, E1, "nfc", seed=3) == draw(folder, E1, "nfc", seed=3)


def test_a_parsed_text_keeps_the_places_of_its_words() -> None:
    spacy = pytest.importorskip("spacy", reason="the parser track needs spaCy: pip install 'sparselt_dist[parser]'")
    model = next((name for name in spacy.util.get_installed_models() if name.startswith("en_")), None)
    if model is None:
        pytest.skip("the parser track needs an English model: python -m spacy download en_core_web_sm")
    read = parsing_reader(model)
    long = f"{E1}\n\n" * (2 * PARSED_CHARACTERS // len(E1))
    short, cut = read([E1, long])
    assert {pair.family for sentence in short for pair in sentence.agreements} == set(FAMILIES)
    assert all(long[word.start : word.end] == word.text for sentence in cut for word in sentence.words)
    assert len(cut) == long.count("garden")

"""Documents to agreement pairs in pieces, to pairs of neighbouring words, and to labelled text.

Agreements are found in the original text, pieces in the normalised one, by `piece_alignment.py`. No pair holds a special
token: a word that the tokenizer does not know leaves its side, and a pair whose side is empty is none.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from sparselt_dist.data.agreement_sentences import Sentence
from sparselt_dist.data.agreements import FAMILIES, Agreement, Family
from sparselt_dist.data.cleaning import Normalization, normalize
from sparselt_dist.data.labelled_text import label_sentence
from sparselt_dist.data.number_agreement import Flip, flip_number
from sparselt_dist.data.pair_columns import Pair
from sparselt_dist.data.piece_alignment import MAX_SIDE_PIECES, Side, pieces_by_word, side_pieces, words_of_pieces
from sparselt_dist.data.randomness import combine, purpose_key
from sparselt_dist.data.sentences import Word
from sparselt_dist.data.tokenization import Encoded, Encoder

WINDOW_LABEL = "window"


class Document(NamedTuple):
    """A normalised text in pieces, with the sentences of its original."""

    text: str
    encoded: Encoded
    places: np.ndarray  # in the original, of `align`
    sentences: list[Sentence]


@dataclass(frozen=True)
class InPieces:
    """A sentence of a document in pieces."""

    sentence: Sentence
    spelled: list[str]
    ids: list[int]
    words: list[int]  # number in the sentence of each piece's word, -1: in none
    by_word: dict[int, list[int]]  # places of each word's pieces, special tokens left out


@dataclass
class Drawn:
    """What comes of documents."""

    pairs: dict[Family, list[Pair]] = field(default_factory=lambda: {family: [] for family in FAMILIES})
    windows: dict[Family, list[Pair]] = field(default_factory=lambda: {family: [] for family in FAMILIES})
    text: list[dict[str, np.ndarray]] = field(default_factory=list)
    words: int = 0


class Drawer:
    """Draws pairs from documents."""

    def __init__(self, encoder: Encoder, normalization: Normalization, vocab_size: int) -> None:
        self._encoder = encoder
        self._normalization = normalization
        self._vocab_size = vocab_size
        # what stands between two spaces recurs
        self._encode = functools.lru_cache(maxsize=2**16)(lambda text: encoder.encode_with_spans([text])[0])

    def draw(self, document: Document, drawn: Drawn, *, seed: int, with_text: bool) -> None:
        """Add a document's pairs and neighbours and, if wanted, its labelled text; `seed` draws the neighbours."""
        key, number = combine(purpose_key("window pairs"), seed), 0
        for found in self._in_pieces(document):
            sentence, neighbours = found.sentence, _neighbours(found)
            drawn.words += len(sentence.words)
            for agreement in sentence.agreements:
                pair = self._pair(document, found, agreement)
                if pair is not None:
                    drawn.pairs[agreement.family].append(pair)
                    first = combine(key, number) % (len(neighbours) - 1)
                    drawn.windows[agreement.family].append(_window(found, *neighbours[first : first + 2]))
                    number += 1
            if with_text and found.ids:
                labelled = label_sentence(
                    found.ids, found.words, sentence.chunks, sentence.agreements, self._vocab_size
                )
                drawn.text.append(labelled)

    def _in_pieces(self, document: Document) -> Iterator[InPieces]:
        ids = document.encoded.ids
        words = [word for sentence in document.sentences for word in sentence.words]
        of_pieces = words_of_pieces(words, document.places, document.text, document.encoded.spans)
        by_word = pieces_by_word(of_pieces)
        first = 0
        for sentence in document.sentences:
            numbers = range(first, first + len(sentence.words))
            placed = [place for number in numbers for place in by_word.get(number, ())]
            cut = slice(placed[0], placed[-1] + 1) if placed else slice(0, 0)
            yield self._placed(sentence, ids[cut], [max(word - first, -1) for word in of_pieces[cut]])
            first += len(sentence.words)

    def _placed(self, sentence: Sentence, ids: list[int], words: list[int]) -> InPieces:
        special = self._encoder.special_ids
        by_word = pieces_by_word([-1 if number in special else word for number, word in zip(ids, words, strict=True)])
        by_word.pop(-1, None)
        return InPieces(sentence, [word.text for word in sentence.words], ids, words, by_word)

    def _pair(self, document: Document, found: InPieces, agreement: Agreement) -> Pair | None:
        head, dependent = _sides(found, agreement)
        if not head.ids or not dependent.ids:
            return None
        flipped = None
        flip = flip_number(agreement, found.spelled)
        if flip is not None and flip.position in found.by_word:
            flipped = _sides(self._with_word(document, found, flip), agreement)
            if flipped == (head, dependent) or not all(side.ids for side in flipped):
                flipped = None
        return Pair(agreement.label, head, dependent, flipped)

    def _with_word(self, document: Document, found: InPieces, flip: Flip) -> InPieces:
        """The sentence with another word in one place; what stands there between two spaces is tokenized anew."""
        new = normalize(flip.word, self._normalization)
        context = _replaced(document, found.sentence.words, flip.position, new)
        encoded = self._encode(context.text)
        of_pieces = words_of_pieces(context.words, np.arange(len(context.text)), context.text, encoded.spans)
        numbers = [word + context.first if word >= 0 else -1 for word in of_pieces]
        inside = range(context.first, context.first + len(context.words))
        old = [place for place, word in enumerate(found.words) if word in inside]
        before, after = slice(None, old[0]), slice(old[-1] + 1, None)
        ids = [*found.ids[before], *encoded.ids, *found.ids[after]]
        return self._placed(found.sentence, ids, [*found.words[before], *numbers, *found.words[after]])


class _Context(NamedTuple):
    """What stands between two spaces, and the space before it."""

    text: str
    words: list[Word]  # with their places in it
    first: int  # the first word's number in the sentence


def _replaced(document: Document, words: list[Word], position: int, new: str) -> _Context:
    """The surroundings of a word in the normalised text, with another in its place."""
    starts = np.searchsorted(document.places, [word.start for word in words]).tolist()
    ends = np.searchsorted(document.places, [word.end for word in words]).tolist()
    first = last = position
    while first > 0 and ends[first - 1] == starts[first]:
        first -= 1
    while last + 1 < len(words) and starts[last + 1] == ends[last]:
        last += 1
    space = document.text[max(0, starts[first] - 1) : starts[first]]
    text, moved = space if space.isspace() else "", []
    for number in range(first, last + 1):
        spelled = new if number == position else document.text[starts[number] : ends[number]]
        moved.append(Word(spelled, len(text), len(text) + len(spelled)))
        text += spelled
    return _Context(text, moved, first)


def _sides(found: InPieces, agreement: Agreement) -> tuple[Side, Side]:
    return (
        side_pieces(agreement.head, agreement.head_root, found.ids, found.by_word),
        side_pieces(agreement.dependent, agreement.dependent_root, found.ids, found.by_word),
    )


def _neighbours(found: InPieces) -> list[int]:
    """The words that two neighbours are drawn from: marks are passed over, if words enough are left."""
    known = sorted(found.by_word)
    spelled = [word for word in known if any(map(str.isalnum, found.spelled[word]))]
    return spelled if len(spelled) > 1 else known


def _window(found: InPieces, first: int, second: int) -> Pair:
    ids = [tuple(found.ids[place] for place in found.by_word[word][:MAX_SIDE_PIECES]) for word in (first, second)]
    head, dependent = (Side(pieces, (True,) * len(pieces)) for pieces in ids)
    return Pair(WINDOW_LABEL, head, dependent, None)

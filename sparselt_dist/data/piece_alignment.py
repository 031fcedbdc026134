"""From words of the original text to pieces of the normalised one.

Agreements are found in the original text, whose case and punctuation say more; the tokenizer sees the normalised text.
`align` gives each normalised character its place in the original; a piece belongs to the word that holds its first character
that is no space. Pieces of deleted characters do not exist, and words that lose all of theirs leave their side.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from sparselt_dist.data.sentences import Word
from sparselt_dist.errors import DataError

MAX_SIDE_PIECES = 8


class Side(NamedTuple):
    """The pieces of one side of a pair, in the order of the text."""

    ids: tuple[int, ...]
    of_root: tuple[bool, ...]


def align(original: str, normalised: str) -> np.ndarray:
    """The place in the original of each character of its normalised form: int64 [characters], ascending.

    Holds for every form of `data/cleaning.py`: characters are deleted, put in lower case, decomposed or composed, runs of
    spaces shortened, two single quotes made one double quote.

    Raises:
        DataError: the second text is no such form of the first.
    """
    if original == normalised:
        return np.arange(len(normalised))
    places = np.empty(len(normalised), dtype=np.int64)
    at = 0
    for number, character in enumerate(normalised):
        if unicodedata.combining(character) and number:  # marks may have changed places; they stay with their letter
            places[number] = places[number - 1]
            continue
        end = _match(original, at, character)
        while at < len(original) and not end:
            at += 1
            end = _match(original, at, character)
        if at == len(original):
            raise DataError(
                f"alignment: found {character!r} as character {number} of the normalised text, expected a character of the "
                "original in the same order; normalise the text with prepare.normalize of these shards"
            )
        places[number], at = at, end
    return places


def _match(original: str, at: int, character: str) -> int:
    """Behind the characters from `at` on that become the given one; 0 if they do not."""
    if at == len(original):
        return 0
    found = original[at]
    if found == character or _letter(found) == _letter(character) or (found.isspace() and character.isspace()):
        return at + 1
    if character != '"' or found not in "`'":
        return 0
    second = at + 1
    while second < len(original) and not original[second].isascii():  # was deleted from between the quotes
        second += 1
    return second + 1 if original[second : second + 1] == found else 0


@lru_cache(maxsize=4096)
def _letter(character: str) -> str:
    """What identifies a character whatever its case and marks."""
    return unicodedata.normalize("NFD", character)[0].lower()[0]


def words_of_pieces(
    words: Sequence[Word], places: np.ndarray, normalised: str, spans: Sequence[tuple[int, int]]
) -> list[int]:
    """The number of the word that each piece belongs to; -1 where it is in none, as spaces are.

    Args:
        words: in the order of the original text.
        places: of `align`.
        normalised: the text that was tokenized.
        spans: where each piece stands in it.
    """
    starts = [word.start for word in words]
    found = []
    for start, end in spans:
        while start < end and normalised[start].isspace():
            start += 1
        number = bisect_right(starts, places[start]) - 1 if start < end else -1
        inside = number >= 0 and places[start] < words[number].end
        found.append(number if inside else -1)
    return found


def pieces_by_word(words: Sequence[int]) -> dict[int, list[int]]:
    """The places of each word's pieces, ascending, from the word of each piece."""
    found: dict[int, list[int]] = {}
    for place, word in enumerate(words):
        found.setdefault(word, []).append(place)
    return found


def side_pieces(side: Sequence[int], root: int, ids: Sequence[int], pieces: Mapping[int, Sequence[int]]) -> Side:
    """The pieces of the given words, at most 8: those of the root word first, then the nearest to it.

    Args:
        side: numbers of the side's words; `root` is one of them.
        ids: ids of the pieces, in order; none may be a special token.
        pieces: of `pieces_by_word`.
    """
    roots = list(pieces.get(root, ()))
    others = [place for word in side if word != root for place in pieces.get(word, ())]
    if len(roots) + len(others) > MAX_SIDE_PIECES:
        others.sort(key=lambda place: min((abs(place - of_root) for of_root in roots), default=place))
    kept = sorted([*roots, *others][:MAX_SIDE_PIECES])
    return Side(tuple(ids[place] for place in kept), tuple(place in roots for place in kept))

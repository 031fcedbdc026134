"""Text to sentences with their chunks and agreements, by either track; the places of words are those in the text."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from sparselt_dist.data.agreements import Agreement, Chunk, find_agreements, find_chunks
from sparselt_dist.data.chunk_agreements import agree
from sparselt_dist.data.chunking import chunk_tags
from sparselt_dist.data.parsing import Parse, load_parser
from sparselt_dist.data.sentences import Word, split_sentences
from sparselt_dist.data.strict_tagging import tag_words

PARSED_CHARACTERS = 50_000  # at once; a parser's memory grows with it


class Sentence(NamedTuple):
    """Words of the original text; chunks and agreements count them."""

    words: list[Word]
    chunks: list[Chunk]
    agreements: list[Agreement]


Reader = Callable[[Sequence[str]], Iterator[list[Sentence]]]
"""Texts to their sentences, one list a text."""


def read_strictly(texts: Sequence[str]) -> Iterator[list[Sentence]]:
    """The sentences of texts by the rules of the strict track."""
    for text in texts:
        yield [_read_words(words) for words in split_sentences(text)]


def _read_words(words: list[Word]) -> Sentence:
    spelled = [word.text for word in words]
    lower = [word.lower().replace("’", "'") for word in spelled]
    tags = tag_words(spelled)
    chunks = chunk_tags(lower, tags)
    return Sentence(words, chunks, agree(lower, tags, chunks))


@functools.lru_cache(maxsize=1)
def parsing_reader(model: str) -> Reader:
    """Reads sentences by a parser, which is loaded once a process.

    Raises:
        ConfigError: of `load_parser`.
    """
    parser = load_parser(model)

    def read(texts: Sequence[str]) -> Iterator[list[Sentence]]:
        found: list[list[Sentence]] = [[] for _ in texts]
        for pieces in _at_once(texts):
            parsed = parser([piece.text for piece in pieces])
            for piece, parses in zip(pieces, parsed, strict=True):
                found[piece.number] += [_moved(parse, piece.start) for parse in parses if parse.words]
        yield from found

    return read


class _Piece(NamedTuple):
    """Some of a text."""

    number: int
    start: int
    text: str


def _at_once(texts: Sequence[str]) -> Iterator[list[_Piece]]:
    """All pieces of all texts, some at a time."""
    pieces: list[_Piece] = []
    characters = 0
    for piece in (_Piece(number, *cut) for number, text in enumerate(texts) for cut in _cut(text)):
        if pieces and characters + len(piece.text) > PARSED_CHARACTERS:
            yield pieces
            pieces, characters = [], 0
        pieces.append(piece)
        characters += len(piece.text)
    if pieces:
        yield pieces


def _moved(parse: Parse, start: int) -> Sentence:
    words = [Word(word.text, word.start + start, word.end + start) for word in parse.words]
    return Sentence(words, find_chunks(parse.tree), find_agreements(parse.tree))


def _cut(text: str) -> list[tuple[int, str]]:
    """A long text in pieces, with their places: cut after a blank line, else a line, a word, anywhere."""
    pieces, start = [], 0
    while len(text) - start > PARSED_CHARACTERS:
        end = start + PARSED_CHARACTERS
        ends = (text.rfind(mark, start, end) + len(mark) for mark in ("\n\n", "\n", " "))
        cut = next((found for found in ends if found > start + PARSED_CHARACTERS // 2), end)
        pieces.append((start, text[start:cut]))
        start = cut
    return [*pieces, (start, text[start:])]

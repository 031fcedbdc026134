"""Text to sentences of words by rules, with the place of every word in the text.

Sentences end at . ! ? and at blank lines; a full stop after a known abbreviation, an initial or before a small letter ends
none. Clitics are words of their own ("do n't", "Mary 's"), as in treebanks of English.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

MAX_WORDS = 128  # what is longer is a list or a table


class Word(NamedTuple):
    """A word or mark with its place: `text[start:end]` of the text it was found in."""

    text: str
    start: int
    end: int


_WORD = re.compile(
    r"""(?x)
    (?:https?://|www\.)\S+ | [\w.+-]+@[\w-]+(?:\.[\w-]+)+  # addresses
    | (?:[^\W\d_]\.){2,}                                   # U.S.
    | [$£€]?\d+(?:[.,:/]\d+)*(?:st|nd|rd|th|s|%)?\b%?      # 1,000.5  10:30  3rd
    | [^\W_]+(?:[-'’][^\W_]+)*['’]?                        # words, with hyphens and apostrophes inside
    | \.{2,} | [-–—]+ | [!?]+ | \S                         # marks
    """
)
_CLITIC = re.compile(r"(?i)(n['’]t|['’](?:s|re|ve|ll|d|m)|['’])$")
_BLANK_LINE = re.compile(r"\n\s*\n")
_ENDS = re.compile(r"\.|\.{2,}|…|[!?]+")
_CLOSES = frozenset("\"'”’)]}»")
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st sr jr gen col capt lt sgt rev hon sen rep gov pres vs no vol fig inc ltd co corp jan feb mar apr "
    "jun jul aug sep sept oct nov dec e.g i.e etc approx dept est".split()
)


def split_sentences(text: str) -> Iterator[list[Word]]:
    """The sentences of a text, each a list of its words; those of more than 128 words are left out."""
    for start, end in _paragraphs(text):
        words = list(_words(text, start, end))
        first = 0
        for last in _last_words(words):
            if last + 1 - first <= MAX_WORDS:
                yield words[first : last + 1]
            first = last + 1


def _paragraphs(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    for gap in _BLANK_LINE.finditer(text):
        yield start, gap.start()
        start = gap.end()
    yield start, len(text)


def _words(text: str, start: int, end: int) -> Iterator[Word]:
    for found in _WORD.finditer(text, start, end):
        word, at = found[0], found.start()
        clitic = _CLITIC.search(word) if word[0].isalpha() else None
        if clitic and clitic.start() > 0:
            yield Word(word[: clitic.start()], at, at + clitic.start())
            yield Word(clitic[0], at + clitic.start(), found.end())
        else:
            yield Word(word, at, found.end())


def _last_words(words: list[Word]) -> Iterator[int]:
    """The index of each sentence's last word."""
    at = 0
    while at < len(words):
        if _ENDS.fullmatch(words[at].text) and not _goes_on(words, at):
            while at + 1 < len(words) and words[at + 1].text in _CLOSES and words[at + 1].start == words[at].end:
                at += 1
            yield at
        elif at == len(words) - 1:
            yield at
        at += 1


def _goes_on(words: list[Word], at: int) -> bool:
    """Whether a full stop belongs to an abbreviation or initial, or the next word begins small."""
    if words[at].text[0] not in ".…" or at + 1 == len(words):
        return False
    before = words[at - 1].text if at and words[at - 1].end == words[at].start else ""
    after = words[at + 1].text
    initial = len(before) == 1 and before.isupper() and before != "I"
    return before.lower() in _ABBREVIATIONS or initial or (after[:1].islower() and words[at + 1].start > words[at].end)

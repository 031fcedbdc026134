"""What the types of many texts are: shares, perplexity, the words and parts of speech of each type, and keywords.

Tokens are all pieces that a row has, special ones too, as in the objective's own metrics. A word counts once for each type
that one of its pieces has. A keyword is a word with a piece that is not null; keywords are ranked by the probability not to
be null, 1 - p_0 of the word's likeliest piece, averaged over all occurrences of the word, those typed null included.

K types, type 0 the null type.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from sparselt_dist.evaluation.latent_types import NO_WORD, NULL_TYPE, TypedText
from sparselt_dist.objectives.latent_typing import perplexity_of

TOP_WORDS = 10
TOP_PARTS = 3
MIN_OCCURRENCES = 3  # of a word, before its share in a type says something


class Keyword(NamedTuple):
    """A word that is worth keeping."""

    word: str
    score: float
    """Mean probability not to be null, of its likeliest piece."""
    selected: int
    """Occurrences with a piece that is not null."""
    occurrences: int
    types: tuple[int, ...]
    """Its types, the most frequent first."""


@dataclass(frozen=True)
class TypeFigures:
    """One type over all texts."""

    type: int
    tokens: int
    share: float
    mean_probability: float
    words: tuple[tuple[str, int], ...]
    """Its most frequent words, with their occurrences."""
    typical: tuple[tuple[str, float], ...]
    """Words of three occurrences and more, by the share of these that have the type."""
    parts: tuple[tuple[str, float], ...]
    """Its most frequent parts of speech, with their share in its tagged tokens; empty without a tagger."""


@dataclass(frozen=True)
class TypeReport:
    """All types over all texts."""

    texts: int
    tokens: int
    num_types: int
    null_share: float
    """Tokens whose type is null."""
    null_probability: float
    """Mean p_0."""
    perplexity: float
    """exp of the entropy of the mean distribution over all K types, the null type included."""
    used_perplexity: float
    """exp of the entropy of the shares of the types other than null; 0 where all tokens are null."""
    types: tuple[TypeFigures, ...]
    """The types that some token has: null first, the others by share."""
    keywords: tuple[Keyword, ...]

    @property
    def types_used(self) -> int:
        """Types other than null that some token has."""
        return sum(figures.type != NULL_TYPE for figures in self.types)


@dataclass
class _Word:
    """What is counted of a word, whatever its case."""

    shown: str
    occurrences: int = 0
    selected: int = 0
    not_null: float = 0.0  # sum over occurrences
    types: Counter[int] = field(default_factory=Counter)


class TypeCensus:
    """Counts texts one after the other and keeps none of them."""

    def __init__(self, num_types: int) -> None:
        self._texts = 0
        self._tokens_K = np.zeros(num_types, dtype=np.int64)
        self._sums_K = np.zeros(num_types)
        self._words: dict[str, _Word] = {}
        self._parts: defaultdict[int, Counter[str]] = defaultdict(Counter)

    def add(self, text: TypedText, parts: Sequence[str | None] | None = None) -> None:
        """Count a text; `parts` are the parts of speech of its pieces, None where one has none."""
        self._texts += 1
        self._tokens_K += np.bincount(text.types, minlength=len(self._tokens_K))
        self._sums_K += text.probability_sums
        members: defaultdict[int, list[int]] = defaultdict(list)
        for place, word in enumerate(text.row.words):
            if word == NO_WORD:
                self._count(text.pieces[place], text, [place])
            else:
                members[word].append(place)
        for shown, places in zip(text.word_texts, members.values(), strict=True):
            self._count(shown or text.pieces[places[0]], text, places)
        for kind, part in zip(text.types.tolist(), parts or (), strict=False):
            if part is not None:
                self._parts[kind][part] += 1

    def _count(self, shown: str, text: TypedText, places: list[int]) -> None:
        word = self._words.setdefault(shown.casefold(), _Word(shown))
        kinds = text.types[places]
        word.occurrences += 1
        word.types.update(np.unique(kinds).tolist())
        if text.row.words[places[0]] != NO_WORD:
            word.selected += bool((kinds != NULL_TYPE).any())
            word.not_null += 1.0 - float(text.null_probabilities[places].min())

    def report(self, keywords: int) -> TypeReport:
        """What was counted so far, with at most that many keywords; of at least one text."""
        tokens = int(self._tokens_K.sum())
        mean_K = self._sums_K / tokens
        others_K = self._tokens_K[1:] / max(1, self._tokens_K[1:].sum())
        used = [kind for kind in np.argsort(-self._tokens_K, kind="stable").tolist() if self._tokens_K[kind]]
        return TypeReport(
            texts=self._texts,
            tokens=tokens,
            num_types=len(mean_K),
            null_share=float(self._tokens_K[NULL_TYPE] / tokens),
            null_probability=float(mean_K[NULL_TYPE]),
            perplexity=float(perplexity_of(torch.from_numpy(mean_K))),
            used_perplexity=math.exp(-sum(share * math.log(share) for share in others_K if share))
            * bool(others_K.any()),
            types=tuple(self._figures(kind, tokens) for kind in sorted(used, key=lambda kind: kind != NULL_TYPE)),
            keywords=tuple(self._keywords()[:keywords]),
        )

    def _figures(self, kind: int, tokens: int) -> TypeFigures:
        words = [word for word in self._words.values() if word.types[kind]]
        frequent = sorted(words, key=lambda word: -word.types[kind])[:TOP_WORDS]
        known = [word for word in words if word.occurrences >= MIN_OCCURRENCES]
        typical = sorted(known, key=lambda word: (-word.types[kind] / word.occurrences, -word.types[kind]))[:TOP_WORDS]
        parts = self._parts[kind]
        return TypeFigures(
            type=kind,
            tokens=int(self._tokens_K[kind]),
            share=float(self._tokens_K[kind] / tokens),
            mean_probability=float(self._sums_K[kind] / tokens),
            words=tuple((word.shown, word.types[kind]) for word in frequent),
            typical=tuple((word.shown, word.types[kind] / word.occurrences) for word in typical),
            parts=tuple((part, count / parts.total()) for part, count in parts.most_common(TOP_PARTS)),
        )

    def _keywords(self) -> list[Keyword]:
        """All keywords, the best first; equal ones in the order of their first occurrence. Marks alone are none."""
        found = [
            Keyword(
                word=word.shown,
                score=word.not_null / word.occurrences,
                selected=word.selected,
                occurrences=word.occurrences,
                types=tuple(kind for kind, _ in word.types.most_common() if kind != NULL_TYPE),
            )
            for word in self._words.values()
            if word.selected and any(map(str.isalnum, word.shown))
        ]
        return sorted(found, key=lambda keyword: -keyword.score)

"""The other number of an agreement: what makes "the dogs bark" into "the dogs barks".

Where a pair marks number, one word is changed so that the pair no longer agrees. Such pairs are the hard negatives that
teach agreement rather than co-occurrence; no negative is made where English does not mark number, or the rules doubt it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sparselt_dist.data import english_words as english
from sparselt_dist.data.agreements import Agreement

_PLURAL_SUBJECTS = frozenset("i we they you these those".split())


class Flip(NamedTuple):
    """The word to change and what it becomes."""

    position: int
    word: str


def flip_number(agreement: Agreement, words: Sequence[str]) -> Flip | None:
    """The change that breaks a pair's agreement in number; None where there is none."""
    if agreement.family == "A1":
        found = _flip_verb(agreement, words)
    elif agreement.family == "A3":
        found = _flip_noun(agreement, words)
    else:
        return None
    return None if found is None else Flip(found.position, _like(words[found.position], found.word))


def _flip_verb(agreement: Agreement, words: Sequence[str]) -> Flip | None:
    """The finite word of the verb group: an auxiliary by the table, else a lexical verb by its final -s."""
    first = agreement.head[0]
    lower = words[first].lower()
    other = english.other_number(lower)
    if other is not None:
        return Flip(first, other)
    forms = english.forms_of(lower)
    if first != agreement.head_root or "past" in forms:
        return None
    if "s" in forms:
        base = sorted(base for base in english.bases_of(lower) if english.verb_with_s(base) == lower)
        return Flip(first, base[0]) if base else None
    if "base" in forms and _is_plural(words[agreement.dependent_root].lower()):
        return Flip(first, english.verb_with_s(lower))
    return None


def _is_plural(noun: str) -> bool:
    if noun in _PLURAL_SUBJECTS or noun in english.IRREGULAR_PLURALS.values():
        return True
    return len(noun) > 3 and noun.endswith("s") and not noun.endswith(("ss", "us", "is"))


def _flip_noun(agreement: Agreement, words: Sequence[str]) -> Flip | None:
    """A demonstrative by the table; after "a", the noun becomes plural."""
    noun, modifier = words[agreement.head_root].lower(), words[agreement.dependent_root].lower()
    if modifier in english.DEMONSTRATIVES:
        other = english.other_number(modifier)
        return None if other is None else Flip(agreement.dependent_root, other)
    if modifier in ("a", "an") and noun.isalpha() and not _is_plural(noun):
        return Flip(agreement.head_root, english.plural_of(noun))
    return None


def _like(original: str, word: str) -> str:
    """The new word in the capitals of the old one."""
    if original.isupper() and len(original) > 1:
        return word.upper()
    return word.capitalize() if original[:1].isupper() else word

"""Word classes from words alone: closed-class lists, endings and the words around, no learned model.

One pass from left to right. An open word is classed by the forms it may be of a verb, by its ending, and by what
stands before it: after a determiner, preposition, number or adjective it is nominal, after a modal, "to" or a subject
pronoun verbal, and elsewhere it is a verb if the clause still lacks one. Tags are single letters:

D determiner, G possessive, J adjective, # number, N noun, Q pronoun, R adverb, T infinitive "to", P preposition, M modal,
X auxiliary, V finite or base verb, I -ing form, E past form or participle, C coordinator, S subordinator, W wh-word or
relative, ! negation, ' possessive mark, . punctuation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sparselt_dist.data import english_words as english

_PUNCTUATION = re.compile(r"[^\w&$%#@'’]+|['’]{1,2}|[-–—]+")
_NUMBER = re.compile(r"[$£€#]?\d[\d.,:/]*(st|nd|rd|th|s|%)?|[$£€#%]")
_APOSTROPHE = str.maketrans("’", "'")
_QUANTIFIERS_ALONE = english.QUANTIFIERS - {"every", "no", "other", "what", "whatever", "which", "whichever"}
_CLAUSE_ENDS = frozenset(";:.!?-–—()…")
_OPEN_CONTEXT = frozenset("DGJ#'")
_AUXILIARIES = english.BE | english.HAVE | english.DO
_OBJECT_STARTS = english.ARTICLES | english.POSSESSIVES | english.OBJECT_PRONOUNS | {"it", "this", "that"}
_PREPOSITION_OR_CLAUSE = frozenset("after as before since than till until for like though".split())


@dataclass
class _Clause:
    """What the clause under way has had so far."""

    subject: bool = False
    verb: bool = False
    inverted: bool = False
    """An auxiliary stands before the subject; the lexical verb is still to come."""


def tag_words(words: Sequence[str]) -> str:
    """One tag a word."""
    lower = [word.lower().translate(_APOSTROPHE) for word in words]
    return _Tagger(words, lower).run()


class _Tagger:
    def __init__(self, words: Sequence[str], lower: list[str]) -> None:
        self.words = words
        self.lower = [*lower, "", ""]  # so that looking two words ahead needs no check
        self.tags: list[str] = []
        self.clause = _Clause()
        self.shouted = sum(word.isupper() for word in words if len(word) > 1) * 2 > len(words)

    def run(self) -> str:
        for index in range(len(self.words)):
            tag = self._tag(index)
            self.tags.append(tag)
            self._follow_clause(index, tag)
        return "".join(self.tags)

    def _follow_clause(self, index: int, tag: str) -> None:
        word = self.lower[index]
        if tag in "SWC" or (tag == "." and (word[:1] in _CLAUSE_ENDS or word == ",")):
            self.clause = _Clause(subject=tag == "W" and word in english.RELATIVES)
        elif tag in "NQ":
            self.clause.subject = True
        elif tag in "MX" and not self.clause.subject:
            self.clause.inverted = tag == "M" or word in english.DO
        elif tag in "VMX" or (tag == "E" and self.clause.subject):
            # "I think dogs bark": what follows may be a clause with a verb of its own
            self.clause.verb = not english.bases_of(word) & english.TAKE_CLAUSE
            self.clause.subject = self.clause.verb

    # --- context -----------------------------------------------------------------------------------------------------

    def _before(self) -> str:
        """The last tag, "" at the start."""
        return self.tags[-1] if self.tags else ""

    def _before_adverbs(self) -> tuple[str, str]:
        """Tag and word before any adverbs and negations."""
        at = len(self.tags) - 1
        while at >= 0 and self.tags[at] in "R!":
            at -= 1
        return (self.tags[at], self.lower[at]) if at >= 0 else ("", "")

    def _opens_noun_phrase(self, index: int) -> bool:
        """Whether a word can only begin a noun phrase."""
        word = self.lower[index]
        return word in english.DETERMINERS | english.POSSESSIVES | english.PRONOUNS or bool(_NUMBER.fullmatch(word))

    def _is_open(self, index: int) -> bool:
        """Whether a word is in no closed class."""
        word = self.lower[index]
        return bool(word) and _closed_tag(word) is None and word not in _SPECIAL and not _PUNCTUATION.fullmatch(word)

    def _may_be_nominal(self, index: int) -> bool:
        """Whether a noun phrase may go on with the word."""
        word = self.lower[index]
        if word in english.ADVERBS and word not in english.ADJECTIVES:
            return word in english.DEGREE_ADVERBS and self._is_open(index + 1)
        return self._is_open(index) or bool(_NUMBER.fullmatch(word)) or word in ("other", "own", "one", "ones")

    def _verbal_after(self, index: int) -> bool:
        """Whether the word begins a verb group that follows its subject."""
        word = self.lower[index]
        return word in english.MODALS | _AUXILIARIES or bool(english.forms_of(word) & {"s", "past"})

    # --- one word ----------------------------------------------------------------------------------------------------

    def _tag(self, index: int) -> str:
        word = self.lower[index]
        if self.words[index] == "US" and not self.shouted:
            return "N"
        if word in _SPECIAL:
            return _SPECIAL[word](self, index)
        if _NUMBER.fullmatch(word) or word in english.NUMBERS:
            return "#"
        if _PUNCTUATION.fullmatch(word):
            return "."
        return _closed_tag(word) or self._open_word(index)

    def _open_word(self, index: int) -> str:
        word, before = self.lower[index], self._before()
        if word in english.ADVERBS and (word not in english.ADJECTIVES or not self._may_be_nominal(index + 1)):
            return "R"
        if word.endswith(english.ADVERB_ENDING) and word not in english.NOT_ADVERBS_IN_LY and len(word) > 4:
            return "R"
        if self.words[index][:1].isupper() and index and before != "." and not self.shouted:
            return "N"
        if before in _OPEN_CONTEXT or before == "P":
            return self._nominal_context(index)
        return self._verbal_context(index) or self._by_form(index)

    def _nominal_context(self, index: int) -> str:
        """After a determiner, adjective, number or preposition."""
        word, forms = self.lower[index], english.forms_of(self.lower[index])
        goes_on = self._may_be_nominal(index + 1) and not self._starts_verb(index + 1)
        if self._before() == "P" and "ing" in forms:
            return "J" if goes_on and not english.bases_of(word) else "I"
        if goes_on and ("participle" in forms or "ing" in forms or _looks_adjective(word)):
            return "J"
        if "participle" in forms and not forms & {"base", "ing"} and self._before() == "#":
            return "E"
        return "J" if word in english.ADJECTIVES and self._before() != "D" else "N"

    def _starts_verb(self, index: int) -> bool:
        """Whether the word after a possible noun is more likely a verb."""
        forms = english.forms_of(self.lower[index])
        return "past" in forms and "base" not in forms and not self._may_be_nominal(index + 1)

    def _verbal_context(self, index: int) -> str | None:
        """The class that a preceding subject or auxiliary forces, if any."""
        word, forms = self.lower[index], english.forms_of(self.lower[index])
        tag, previous = self._before_adverbs()
        if tag in ("T", "M") or (tag == "X" and previous in english.DO):
            return "V" if "base" in forms or not _looks_adjective(word) else None
        if tag == "X" and previous in english.BE and word in english.ADJECTIVES:
            return "J"
        if tag == "Q" and "base" in forms and self._after_causative():
            return "V"
        if tag == "Q" and previous in english.SUBJECT_PRONOUNS and not self.clause.verb and not forms:
            return None if _looks_adjective(word) or self.clause.inverted else "V"
        if tag == "X" and "ing" in forms:
            return "I"
        if tag == "X" and "participle" in forms:
            return "E"
        if tag == "X" and previous in english.BE:
            return "J" if _looks_adjective(word) else "N"
        if tag == "Q" and forms & {"base", "s", "past"} and not self.clause.verb:
            return "V" if not forms & {"past"} else "E"
        if tag == "W" and forms & {"base", "s", "past"} and previous in english.RELATIVES:
            return "V" if not forms & {"past"} else "E"
        return None

    def _after_causative(self) -> bool:
        """Whether the last word is the object of "let", "make" or "help"."""
        verb = self.lower[len(self.tags) - 2] if len(self.tags) > 1 and self.tags[-2] == "V" else ""
        return bool(english.bases_of(verb) & english.CAUSATIVES)

    def _by_form(self, index: int) -> str:
        """Neither side decides: the word's own forms, and whether the clause lacks its verb."""
        word, forms, before = self.lower[index], english.forms_of(self.lower[index]), self._before_adverbs()[0]
        lacks_verb = self.clause.subject and not self.clause.verb
        follows = self._opens_noun_phrase(index + 1) or _closed_tag(self.lower[index + 1]) in ("P", "G", "D")
        if forms & {"past", "participle"} and not _looks_adjective(word):
            return "E"
        if "ing" in forms:
            return "I"
        if "base" in forms and self.clause.inverted and lacks_verb and before in "NQ":
            return "V"
        if "s" in forms and before == "N" and lacks_verb and not self._plural_before():
            return "V"
        if "base" in forms and before == "N" and lacks_verb and self._plural_before():
            return "V"
        if "base" in forms and before in ("", ".", "C") and not self._verbal_after(index + 1):
            starts_clause = follows or self.lower[index + 1] in _SPECIAL or self.lower[index + 1] in english.ADVERBS
            return "V" if starts_clause or not before else self._plain(word)
        return self._plain(word)

    def _plural_before(self) -> bool:
        at = len(self.tags) - 1
        while at >= 0 and self.tags[at] in "R!":
            at -= 1
        return self.lower[at].endswith("s") and not self.lower[at].endswith("ss")

    def _plain(self, word: str) -> str:
        return "J" if _looks_adjective(word) else "N"

    # --- words of several classes ------------------------------------------------------------------------------------

    def _to(self, index: int) -> str:
        after = self.lower[index + 1]
        if after in english.ADVERBS or after.endswith("ly"):
            after = self.lower[index + 2]
        if "base" in english.forms_of(after) or after in ("be", "have", "do"):
            return "T"
        return "T" if self._is_open(index + 1) and self.lower[index + 2] in _OBJECT_STARTS else "P"

    def _that(self, index: int) -> str:
        before, after = self._before(), index + 1
        if before in ("N", "#") and self.lower[index - 1] not in english.TELLING_NOUNS:
            return "W"
        if self._verbal_after(after):
            return "Q"
        if before in ("V", "E", "X") and english.bases_of(self.lower[index - 1]) & english.TAKE_CLAUSE:
            return "S"
        if before in ("N", "V", "E", "J", "Q", "I") or self._opens_noun_phrase(after):
            return "S" if self._opens_noun_phrase(after) or before != "V" else "D"
        return "D" if self._may_be_nominal(after) else "Q"

    def _demonstrative(self, index: int) -> str:
        return "D" if self._may_be_nominal(index + 1) and not self._only_verb(index + 1) else "Q"

    def _only_verb(self, index: int) -> bool:
        word = self.lower[index]
        return (
            word in english.MODALS | _AUXILIARIES or english.forms_of(word) == {"s"} or "past" in english.forms_of(word)
        )

    def _her(self, index: int) -> str:
        return "G" if self._may_be_nominal(index + 1) and self.lower[index + 1] not in english.ADVERBS else "Q"

    def _wh_pronoun(self, index: int) -> str:
        return "D" if self._before() == "" and self._is_open(index + 1) and not self._only_verb(index + 1) else "W"

    def _quantifier(self, index: int) -> str:
        word, after = self.lower[index], self.lower[index + 1]
        degree = self._before() in ("D", "G") or _looks_adjective(after) or after in english.ADVERBS
        if degree and word in ("more", "most", "less", "much"):
            return "R"
        if self._may_be_nominal(index + 1) or after in english.DETERMINERS | english.POSSESSIVES:
            return "D" if not self._only_verb(index + 1) else "Q"
        return (
            "R"
            if word in ("more", "much", "enough", "less", "most") and self._before() in ("V", "E", "N", "Q")
            else "Q"
        )

    def _ambiguous_preposition(self, index: int) -> str:
        """Prepositions that also join clauses: a subject pronoun or a noun phrase with a verb tells."""
        after = self.lower[index + 1]
        subject = self._before() == "Q" and not self.clause.verb
        if self.lower[index] == "like" and (subject or self._before_adverbs()[0] in ("T", "M")):
            return "V"
        clause = after in english.SUBJECT_PRONOUNS | {"it", "you", "there"} and self._verbal_after(index + 2)
        clause |= after in english.SUBJECT_PRONOUNS
        return "S" if clause else "P"

    def _there(self, index: int) -> str:
        after = self.lower[index + 1]
        return "Q" if after in english.BE | english.MODALS | {"has", "have"} else "R"

    def _apostrophe_s(self, index: int) -> str:
        before, after = self._before(), self.lower[index + 1]
        if before in ("Q", "W", "R") or not before:
            return "X"
        if _looks_adjective(after) and not self._may_be_nominal(index + 2):
            return "X"
        if (self._may_be_nominal(index + 1) and not english.forms_of(after) & {"ing"}) or after in english.NUMBERS:
            return "'"
        return "X" if after else "'"

    def _auxiliary(self, index: int) -> str:
        return "X" if self._before() not in ("D", "G") else "N"

    def _modal(self, index: int) -> str:
        return "M" if self._before() not in ("D", "G", "J", "P") else "N"

    def _so(self, index: int) -> str:
        after = self.lower[index + 1]
        return "R" if _looks_adjective(after) or after in english.ADVERBS | {"much", "many", "few"} else "S"

    def _near(self, index: int) -> str:
        return "P" if self._opens_noun_phrase(index + 1) or self._is_open(index + 1) else "R"

    def _particle(self, index: int) -> str:
        """A preposition that ends a verb: an adverb, if nothing nominal follows."""
        after = index + 1
        nominal = self._opens_noun_phrase(after) or self._may_be_nominal(after) or self.lower[after] in ("of",)
        return "P" if nominal or self._before() not in ("V", "E", "I", "N", "Q") else "R"


_SPECIAL = {
    "to": _Tagger._to,
    "that": _Tagger._that,
    "her": _Tagger._her,
    "there": _Tagger._there,
    "'s": _Tagger._apostrophe_s,
    "so": _Tagger._so,
    "near": _Tagger._near,
    **dict.fromkeys(("this", "these", "those"), _Tagger._demonstrative),
    **dict.fromkeys(("what", "which", "whatever", "whichever"), _Tagger._wh_pronoun),
    **dict.fromkeys(_QUANTIFIERS_ALONE, _Tagger._quantifier),
    **dict.fromkeys(_PREPOSITION_OR_CLAUSE, _Tagger._ambiguous_preposition),
    **dict.fromkeys(_AUXILIARIES - {"'s", "'d"}, _Tagger._auxiliary),
    **dict.fromkeys(english.MODALS, _Tagger._modal),
    **dict.fromkeys(english.PARTICLES - {"back", "away", "apart", "aside", "forth", "together"}, _Tagger._particle),
}


def _closed_tag(word: str) -> str | None:
    """The tag of a word that has but one."""
    return _CLOSED.get(word)


_CLOSED = {
    **dict.fromkeys(english.WH_ADVERBS | {"who", "whom", "whoever"}, "W"),
    **dict.fromkeys(english.SUBORDINATORS | {"whether", "if"}, "S"),
    **dict.fromkeys(english.COORDINATORS, "C"),
    **dict.fromkeys(english.PREPOSITIONS - {"worth", "past", "near", "round"}, "P"),
    **dict.fromkeys(english.PRONOUNS - english.DEMONSTRATIVES - {"what", "who", "whom", "whoever", "one"}, "Q"),
    **dict.fromkeys(english.POSSESSIVES, "G"),
    **dict.fromkeys(english.ARTICLES | {"every", "no", "other"}, "D"),
    **dict.fromkeys(english.NEGATIONS, "!"),
    "'d": "M",
    "'": "'",
}


def _looks_adjective(word: str) -> bool:
    if word in english.ADJECTIVES:
        return True
    return len(word) > 5 and word.endswith(tuple(english.ADJECTIVE_ENDINGS)) and word not in english.VERBS

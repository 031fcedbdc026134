"""Dependency trees in one label scheme: ClearNLP's, as English spaCy models have it, also from Universal Dependencies.

Universal Dependencies make content words heads; ClearNLP lets a copula head its predicate and a preposition its object.
`read_tree` renames the labels and turns these edges around, so that one set of rules serves both. Labels that
are ClearNLP's already pass unchanged, so the scheme need not be declared. Parts of speech are not given; `word_class`
infers them from labels and word lists.

Sources: Universal Dependencies v2 relations; the ClearNLP dependency labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sparselt_dist.data import english_words as english
from sparselt_dist.errors import DataError

ParsedSentence = Sequence[tuple[str, int, str]]
"""(word, index of the head from 0 or -1 for the root, label) for each word."""

WordClass = Literal["nominal", "verb", "auxiliary", "adjective", "adverb", "adposition", "other"]

_RENAMED = {
    "obj": "dobj",
    "iobj": "dative",
    "nsubj:pass": "nsubjpass",
    "csubj:pass": "csubjpass",
    "aux:pass": "auxpass",
    "obl:npmod": "npadvmod",
    "obl:tmod": "npadvmod",
    "obl:unmarked": "npadvmod",
    "nmod:poss": "poss",
    "det:predet": "predet",
    "compound:prt": "prt",
    "acl:relcl": "relcl",
    "cc:preconj": "preconj",
    "discourse": "intj",
}
_KEPT_SUBTYPES = {"nsubj:outer", "csubj:outer", "obl:agent"}  # needed below, renamed after
_POSSESSIVE_MARKS = frozenset(("'s", "’s", "'", "’"))
_WITH_PREPOSITION = frozenset(("obl", "obl:agent", "nmod", "acl", "advcl", "advmod", "npadvmod", "xcomp", "dative"))
# What belongs to the clause and not to its predicate; goes with the copula.
_OF_THE_CLAUSE = frozenset(
    "nsubj nsubjpass csubj csubjpass expl aux auxpass neg mark punct cc advcl parataxis intj vocative dislocated".split()
)
_NOMINAL_CHILDREN = frozenset("det predet poss nummod amod compound nmod case".split())
_VERBAL_CHILDREN = frozenset(
    "nsubj nsubjpass csubj csubjpass expl aux auxpass dobj dative attr acomp oprd prt agent ccomp".split()
)
_CLASS_OF_LABEL: dict[str, WordClass] = {
    **dict.fromkeys("nsubj nsubjpass dobj pobj appos poss compound nmod npadvmod expl dative".split(), "nominal"),
    **dict.fromkeys("det predet nummod cc preconj mark punct intj".split(), "other"),
    **dict.fromkeys(("aux", "auxpass"), "auxiliary"),
    **dict.fromkeys("prep agent prt case".split(), "adposition"),
    **dict.fromkeys("advmod neg quantmod".split(), "adverb"),
    "amod": "adjective",
}


@dataclass(frozen=True)
class Tree:
    """A sentence whose labels and heads are ClearNLP's; indices from 0, head -1 for the root."""

    words: tuple[str, ...]
    heads: tuple[int, ...]
    labels: tuple[str, ...]
    children: tuple[tuple[int, ...], ...]
    """Of each word, ascending."""

    def lower(self, index: int) -> str:
        return self.words[index].lower().replace("’", "'")

    def child_labels(self, index: int) -> set[str]:
        return {self.labels[child] for child in self.children[index]}


def read_tree(sentence: ParsedSentence) -> Tree:
    """The tree of a parsed sentence.

    Raises:
        DataError: a head that is no word of the sentence, or heads in a circle.
    """
    draft = _Draft(sentence)
    for predicate in draft.heads_of("cop"):
        draft.lift_copulas(predicate)
    for word in draft.heads_of("case"):
        draft.lift_prepositions(word)
    for word in draft.heads_of("cc", "punct"):
        draft.hand_up_separators(word)
    labels = ["agent" if label == "obl:agent" else label.partition(":")[0] for label in draft.labels]
    labels = ["aux" if label == "cop" else label for label in labels]
    return Tree(draft.words, tuple(draft.heads), tuple(labels), tuple(map(tuple, draft.all_children())))


class _Draft:
    """A tree while its edges are being turned."""

    def __init__(self, sentence: ParsedSentence) -> None:
        self.words = tuple(word for word, _, _ in sentence)
        # spaCy makes the root its own head
        self.heads = [-1 if head == index else head for index, (_, head, _) in enumerate(sentence)]
        self._check(sentence)
        self.labels = [self._rename(index, label.lower()) for index, (_, _, label) in enumerate(sentence)]

    def _check(self, sentence: ParsedSentence) -> None:
        for index, head in enumerate(self.heads):
            if not -1 <= head < len(sentence):
                raise DataError(
                    f"parsed sentence: word {index} ({self.words[index]!r}) has head {head}, expected -1 for the root or "
                    f"an index from 0 to {len(sentence) - 1}; number heads from 0"
                )
        sound: set[int] = {-1}
        for index in range(len(self.heads)):
            path: list[int] = []
            at = index
            while at not in sound:
                if at in path:
                    raise DataError(
                        f"parsed sentence: the heads of words {sorted(path)} run in a circle, expected a tree whose root "
                        "has head -1; leave the sentence out or mend the parser"
                    )
                path.append(at)
                at = self.heads[at]
            sound.update(path)

    def _rename(self, index: int, label: str) -> str:
        word = self.words[index].lower().replace("’", "'")
        if label == "mark" and word == "to":
            return "aux"  # of an infinitive
        if label == "advmod" and word in english.NEGATIONS:
            return "neg"
        if label in _KEPT_SUBTYPES:
            return label
        return _RENAMED.get(label) or _RENAMED.get(label.partition(":")[0]) or label.partition(":")[0]

    def heads_of(self, *labels: str) -> list[int]:
        """The words that have dependents of these labels, ascending."""
        found = {head for head, label in zip(self.heads, self.labels, strict=True) if label in labels}
        return sorted(found - {-1})

    def children(self, word: int) -> list[int]:
        return [index for index, head in enumerate(self.heads) if head == word]

    def all_children(self) -> list[list[int]]:
        children: list[list[int]] = [[] for _ in self.words]
        for index, head in enumerate(self.heads):
            if head >= 0:
                children[head].append(index)
        return children

    def lift_copulas(self, predicate: int) -> None:
        """Put each copula of a predicate above it, with what belongs to the clause."""
        copulas = [child for child in self.children(predicate) if self.labels[child] == "cop"]
        for number, copula in enumerate(copulas):
            outer = [c for c in self.children(predicate) if self.labels[c].endswith(":outer")]
            clause_within = bool(outer) and (number < len(copulas) - 1 or "nsubj" in self._labels_below(predicate))
            moved = outer if clause_within else self._clause_words(predicate, copula)
            self.heads[copula], self.labels[copula] = self.heads[predicate], self.labels[predicate]
            self.heads[predicate] = copula
            self.labels[predicate] = "ccomp" if clause_within else self._predicate_label(predicate)
            for word in moved:
                self.heads[word] = copula
                self.labels[word] = self.labels[word].removesuffix(":outer")

    def _labels_below(self, word: int) -> set[str]:
        return {self.labels[child] for child in self.children(word)}

    def _clause_words(self, predicate: int, copula: int) -> list[int]:
        nominal = bool(self._labels_below(predicate) & _NOMINAL_CHILDREN)
        moved = []
        for child in self.children(predicate):
            label = self.labels[child].removesuffix(":outer")
            # "is very happy" keeps its adverb; "is really a doctor" and "always is happy" do not
            own_adverb = copula < child < predicate and not nominal
            if child != copula and (label in _OF_THE_CLAUSE or (label == "advmod" and not own_adverb)):
                moved.append(child)
        return moved

    def _predicate_label(self, predicate: int) -> str:
        below = self._labels_below(predicate)
        if "case" in below:
            return "obl"
        word = self.words[predicate].lower()
        if below & _NOMINAL_CHILDREN or word in english.PRONOUNS or (predicate and self.words[predicate][:1].isupper()):
            return "attr"
        return "advmod" if word in english.ADVERBS and word not in english.ADJECTIVES else "acomp"

    def lift_prepositions(self, word: int) -> None:
        """Put the prepositions of a word above it, the first one topmost."""
        if self.labels[word] == "poss":
            return
        prepositions = [
            child
            for child in self.children(word)
            if self.labels[child] == "case" and self.words[child] not in _POSSESSIVE_MARKS
        ]
        for number, preposition in enumerate(prepositions):
            label = self.labels[word]
            if number:
                label = "prep"
            elif label in _WITH_PREPOSITION:
                label = "agent" if label == "obl:agent" else "prep"
            self.heads[preposition], self.labels[preposition] = self.heads[word], label
            self.heads[word], self.labels[word] = preposition, "pobj"

    def hand_up_separators(self, word: int) -> None:
        """Give the comma or conjunction before a conjunct or apposition to its head, as ClearNLP does."""
        if self.labels[word] not in ("conj", "appos"):
            return
        for child in self.children(word):
            if child < word and self.labels[child] in ("cc", "punct"):
                self.heads[child] = self.heads[word]


def word_class(tree: Tree, index: int) -> WordClass:
    """The part of speech that a word's label, its dependents and the word lists suggest; a bare conjunct has its head's."""
    found = _evident_class(tree, index)
    while found is None and tree.labels[index] == "conj" and tree.heads[index] >= 0:
        index = tree.heads[index]
        found = _evident_class(tree, index)
    return found or _class_of_word(tree.labels[index], tree.lower(index))


def _evident_class(tree: Tree, index: int) -> WordClass | None:
    label, word, below = tree.labels[index], tree.lower(index), tree.child_labels(index)
    if label == "dative" and word in english.PREPOSITIONS and below & {"pobj", "pcomp"}:
        return "adposition"
    if label in _CLASS_OF_LABEL:
        return _CLASS_OF_LABEL[label]
    if "pobj" in below or "pcomp" in below:
        return "adposition"
    if below & _VERBAL_CHILDREN:
        return "verb"
    if below & _NOMINAL_CHILDREN or (word in english.PRONOUNS and word not in english.BE):
        return "nominal"
    return None


def _class_of_word(label: str, word: str) -> WordClass:
    if label == "attr":
        return "nominal"
    if word in english.MODALS | english.BE | english.HAVE | english.DO:
        return "verb"
    if label == "acomp" or word in english.ADJECTIVES:
        return "adjective"
    if word in english.ADVERBS:
        return "adverb"
    if english.forms_of(word) or label in ("relcl", "ccomp", "csubj", "csubjpass"):
        return "verb"
    if label in ("oprd", "xcomp") and word.endswith(tuple(english.ADJECTIVE_ENDINGS)):
        return "adjective"
    return "nominal"

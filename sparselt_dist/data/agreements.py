"""Chunks of a parsed sentence, and the dependency agreements between them: the parser track of the DAC objective.

A chunk is a flat phrase; every word is in exactly one. An agreement is a typed, directed dependency between two
chunks, or between two words of a noun chunk, whose forms and meanings have to fit:

| family | relation | labels (ClearNLP) |
|---|---|---|
| A1 | subject and verb | nsubj nsubjpass csubj csubjpass expl |
| A2 | verb and object or complement | dobj dative attr oprd acomp xcomp ccomp |
| A3 | noun and modifier | det predet poss nummod amod compound nmod quantmod |
| A4 | verb or noun and prepositional phrase | prep or agent with pobj or pcomp; npadvmod |

The families and chunks are a reconstruction: the paper (Kuo, Zhang, Chen 2023, arXiv 2311.04799) is known here by its
abstract, which speaks of four submodels for dependency agreements at the chunk level. Pure functions, no parser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from sparselt_dist.data.dependency_labels import ParsedSentence, Tree, read_tree, word_class

Family = Literal["A1", "A2", "A3", "A4"]
ChunkType = Literal["NP", "VG", "AP", "P", "O"]

FAMILY_LABELS: dict[Family, frozenset[str]] = {
    "A1": frozenset("nsubj nsubjpass csubj csubjpass expl".split()),
    "A2": frozenset("dobj dative attr oprd acomp xcomp ccomp".split()),
    "A3": frozenset("det predet poss nummod amod compound nmod quantmod".split()),
    "A4": frozenset("prep agent npadvmod".split()),
}
FAMILIES: tuple[Family, ...] = ("A1", "A2", "A3", "A4")

_NOUN_PHRASE_LABELS = frozenset(
    "nsubj nsubjpass dobj pobj pcomp dative appos attr oprd root npadvmod".split()  # npadvmod: "last week"
)
_VERB_GROUP_LABELS = frozenset("aux auxpass neg prt".split())
_ADJECTIVE_PHRASE_LABELS = frozenset("acomp advmod oprd xcomp".split())


@dataclass(frozen=True)
class AgreementPair:
    """An agreement in words, in sentence order but for the preposition that begins A4's dependent side."""

    family: Family
    head_words: tuple[str, ...]
    dependent_words: tuple[str, ...]


@dataclass(frozen=True)
class Agreement:
    """An agreement in positions of the sentence; the roots are the words that the dependency joins."""

    family: Family
    label: str
    head: tuple[int, ...]
    head_root: int
    dependent: tuple[int, ...]
    dependent_root: int


@dataclass(frozen=True)
class Chunk:
    """Words of one phrase, ascending; a verb group may have gaps ("does he know")."""

    type: ChunkType
    words: tuple[int, ...]
    root: int


def extract_pairs(parsed_sentence: ParsedSentence) -> list[AgreementPair]:
    """The agreements of a sentence, by family and position, each once.

    Args:
        parsed_sentence: (word, head index, label) for each word; indices from 0, -1 for the root; labels of ClearNLP
            (as spaCy's) or of Universal Dependencies.

    A sentence whose parse tears a chunk apart (only a non-projective one can) gives none.

    Raises:
        DataError: the heads form no tree.
    """
    words = [word for word, _, _ in parsed_sentence]
    return in_words(words, find_agreements(parsed_sentence))


def in_words(words: list[str], agreements: Iterable[Agreement]) -> list[AgreementPair]:
    """Positions to words; of equal pairs the first stays."""
    pairs = (
        AgreementPair(a.family, tuple(words[i] for i in a.head), tuple(words[i] for i in a.dependent))
        for a in agreements
    )
    return list(dict.fromkeys(pairs))


def find_chunks(parsed_sentence: ParsedSentence) -> list[Chunk]:
    """The chunks of a sentence in order of their first words; each word is in exactly one."""
    return _chunks(read_tree(parsed_sentence))[0]


def find_agreements(parsed_sentence: ParsedSentence) -> list[Agreement]:
    """The agreements of a sentence by family, then by the dependent's position."""
    tree = read_tree(parsed_sentence)
    chunks, torn = _chunks(tree)
    if torn:
        return []
    chunk_of = {word: chunk for chunk in chunks for word in chunk.words}
    found = [*_between_chunks(tree, chunks, chunk_of), *_inside_chunks(tree, chunk_of)]
    return sorted(found, key=lambda a: (a.family, a.dependent_root, a.head_root))


# --- chunks ----------------------------------------------------------------------------------------------------------


def _chunks(tree: Tree) -> tuple[list[Chunk], bool]:
    """All chunks, and whether one of them has more than one root."""
    taken: set[int] = set()
    groups: list[tuple[ChunkType, list[int]]] = []
    classes = [word_class(tree, index) for index in range(len(tree.words))]

    def take(kind: ChunkType, words: list[int]) -> None:
        taken.update(words)
        groups.append((kind, words))

    spans = [_noun_span(tree, i) for i, c in enumerate(classes) if c == "nominal" and _heads_noun_phrase(tree, i)]
    for span in sorted(spans, key=lambda span: (-len(span), span.start)):
        if taken.isdisjoint(span):
            take("NP", list(span))
    # main verbs before auxiliaries, which are left over only where their verb is missing
    for wanted in ("verb", "auxiliary"):
        for index, found in enumerate(classes):
            if found == wanted and index not in taken:
                take("VG", _verb_group(tree, index, taken))
    for index in sorted(range(len(classes)), key=lambda i: _depth(tree, i)):
        is_root = tree.labels[index] in _ADJECTIVE_PHRASE_LABELS and classes[index] in ("adjective", "adverb")
        if is_root and index not in taken:
            adverbs = [c for c in tree.children[index] if tree.labels[c] == "advmod" and c not in taken]
            take("AP", [index, *adverbs])
    for index, found in enumerate(classes):
        if index not in taken:
            take("P" if found == "adposition" else "O", [index])
    return _with_roots(tree, groups)


def _with_roots(tree: Tree, groups: list[tuple[ChunkType, list[int]]]) -> tuple[list[Chunk], bool]:
    chunks, torn = [], False
    for kind, words in groups:
        roots = sorted(index for index in words if tree.heads[index] not in words)
        torn |= len(roots) > 1
        chunks.append(Chunk(kind, tuple(sorted(words)), roots[0]))
    return sorted(chunks, key=lambda chunk: chunk.words[0]), torn


def _heads_noun_phrase(tree: Tree, index: int) -> bool:
    while tree.labels[index] == "conj" and tree.heads[index] >= 0:
        index = tree.heads[index]
    return tree.labels[index] in _NOUN_PHRASE_LABELS


def _noun_span(tree: Tree, index: int) -> range:
    """From the leftmost descendant to the noun itself; punctuation that opens it is left outside."""
    start, pending = index, [index]
    while pending:
        word = pending.pop()
        start = min(start, word)
        pending.extend(tree.children[word])
    while tree.labels[start] == "punct" and start < index:
        start += 1
    return range(start, index + 1)


def _verb_group(tree: Tree, verb: int, taken: set[int]) -> list[int]:
    free = [child for child in tree.children[verb] if child not in taken]
    group = [verb, *(child for child in free if tree.labels[child] in _VERB_GROUP_LABELS)]
    first, last = min(group), max(group)
    return group + [child for child in free if tree.labels[child] == "advmod" and first < child < last]


def _depth(tree: Tree, index: int) -> int:
    depth = 0
    while tree.heads[index] >= 0:
        index, depth = tree.heads[index], depth + 1
    return depth


# --- agreements ------------------------------------------------------------------------------------------------------


def _between_chunks(tree: Tree, chunks: list[Chunk], chunk_of: dict[int, Chunk]) -> Iterator[Agreement]:
    """A1, A2 and A4: the edges from a chunk's root to the chunk of its head."""
    for chunk in chunks:
        root, label = chunk.root, tree.labels[chunk.root]
        head = tree.heads[root]
        if head < 0:
            continue
        if label in ("pobj", "pcomp"):
            yield from _prepositional(tree, chunk, chunk_of)
        elif chunk.type == "P":  # its object speaks for it
            continue
        elif label == "npadvmod":
            yield Agreement("A4", label, chunk_of[head].words, head, chunk.words, root)
        for family in ("A1", "A2"):
            if label in FAMILY_LABELS[family]:
                yield Agreement(family, label, chunk_of[head].words, head, chunk.words, root)


def _prepositional(tree: Tree, chunk: Chunk, chunk_of: dict[int, Chunk]) -> Iterator[Agreement]:
    """The governor above a preposition, or a chain of them ("out of"), and the preposition with its object."""
    below = tree.child_labels(chunk.root)
    if chunk.type == "P" and below & {"pobj", "pcomp", "prep"}:
        return  # a link of a chain, not its end
    top = tree.heads[chunk.root]
    chain = [top, *_fixed(tree, top)]
    is_link: Callable[[int], bool] = lambda i: i >= 0 and chunk_of[i].type == "P"  # noqa: E731
    while tree.labels[top] in ("prep", "pcomp") and is_link(tree.heads[top]):
        top = tree.heads[top]
        chain = [top, *_fixed(tree, top), *chain]
    governor = tree.heads[top]
    is_dative = tree.labels[top] == "dative" and is_link(top)
    if governor < 0 or not (tree.labels[top] in ("prep", "agent") or is_dative):
        return
    label = "prep:" + "_".join(tree.lower(index) for index in chain)
    yield Agreement("A4", label, chunk_of[governor].words, governor, (*chain, *chunk.words), chunk.root)


def _fixed(tree: Tree, preposition: int) -> list[int]:
    """The further words of a preposition of several words ("because of")."""
    return [child for child in tree.children[preposition] if tree.labels[child] == "fixed"]


def _inside_chunks(tree: Tree, chunk_of: dict[int, Chunk]) -> Iterator[Agreement]:
    """A3: the edges between words of one noun chunk."""
    for word, (head, label) in enumerate(zip(tree.heads, tree.labels, strict=True)):
        if label in FAMILY_LABELS["A3"] and head >= 0 and chunk_of[word] is chunk_of[head]:
            yield Agreement("A3", label, (head,), head, (word,), word)

"""Comparing sets of agreements: reading a treebank, precision and recall by family. Used by a test and a report."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparselt_dist.data.agreements import FAMILIES, Agreement
from sparselt_dist.data.dependency_labels import ParsedSentence

TREEBANK_VARIABLE = "SPARSELT_TREEBANK"  # a CoNLL-U file with gold trees, such as en_ewt-ud-dev.conllu


def treebank() -> Path | None:
    """The treebank that the environment names; none is part of the project, for they are share-alike."""
    named = os.environ.get(TREEBANK_VARIABLE)
    return Path(named) if named else None


def read_conllu(path: Path) -> Iterator[ParsedSentence]:
    """The trees of a CoNLL-U file; lines of contractions and of empty nodes are left out."""
    rows: list[tuple[str, int, str]] = []
    for line in [*path.read_text("utf-8").splitlines(), ""]:
        if not line and rows:
            yield rows
            rows = []
        elif line and line[0] != "#":
            number, word, *_, head, label, _deps, _misc = line.split("\t")
            if number.isdigit():
                rows.append((word, int(head) - 1, label))


def joined(agreements: Iterable[Agreement], tree: ParsedSentence) -> set[tuple[str, int, int]]:
    """(family, head root, dependent root) of each; the words of a flat name count as its first one.

    Universal Dependencies put the head of "Jane Smith" first, other schemes last; neither is an error.
    """
    first = [head if label.startswith("flat") else index for index, (_, head, label) in enumerate(tree)]
    keys = {(a.family, first[a.head_root], first[a.dependent_root]) for a in agreements}
    return {key for key in keys if key[1] != key[2]}


@dataclass
class Scores:
    """Counts by family."""

    right: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    expected: Counter[str] = field(default_factory=Counter)

    def add(self, found: set[tuple[str, int, int]], expected: set[tuple[str, int, int]]) -> None:
        for counter, keys in ((self.right, found & expected), (self.found, found), (self.expected, expected)):
            counter.update(family for family, _, _ in keys)

    def precision(self, family: str) -> float:
        return self.right[family] / max(1, self.found[family])

    def recall(self, family: str) -> float:
        return self.right[family] / max(1, self.expected[family])

    def table(self, title: str) -> str:
        """A Markdown table."""
        lines: Sequence[str] = [
            f"| {family} | {self.precision(family):.3f} | {self.recall(family):.3f} | {self.expected[family]:,} |"
            for family in FAMILIES
        ]
        return "\n".join([f"| {title} | precision | recall | pairs |", "|---|---|---|---|", *lines])

"""Precision, recall and speed of the agreement extraction, as the tables of docs/objectives/dac.md.

    SPARSELT_TREEBANK=en_ewt-ud-dev.conllu python tests/benchmarks/agreements_report.py
    ... --parser en_core_web_sm --sentences 1000        # with the parser track, in an environment that has spaCy

A pair is right if family, head word and dependent word are. The rules were written with the sentences of even number in
sight; `held out` are the odd ones. The speed is that of raw text of the embedded corpus, in processor time.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from agreement_scores import TREEBANK_VARIABLE, Scores, joined, read_conllu, treebank

from sparselt_dist.data.agreements import find_agreements
from sparselt_dist.data.chunking import find_agreements_strictly
from sparselt_dist.data.dependency_labels import ParsedSentence
from sparselt_dist.data.embedded import read_speeches
from sparselt_dist.data.parsing import DEFAULT_MODEL
from sparselt_dist.data.sentences import split_sentences


def strict_against(trees: list[ParsedSentence], title: str) -> str:
    scores = Scores()
    for tree in trees:
        found = find_agreements_strictly([word for word, _, _ in tree])
        scores.add(joined(found, tree), joined(find_agreements(tree), tree))
    return scores.table(title)


def parse_words(model: str, trees: list[ParsedSentence]) -> list[ParsedSentence]:
    """The parser's trees over the treebank's own words."""
    import spacy
    from spacy.tokens import Doc

    pipeline = spacy.load(model)
    words = [[word for word, _, _ in tree] for tree in trees]
    starts = [[True] + [False] * (len(row) - 1) for row in words]
    documents = [Doc(pipeline.vocab, words=row, sent_starts=start) for row, start in zip(words, starts, strict=True)]
    return [
        [(token.text, -1 if token.head.i == token.i else token.head.i, token.dep_) for token in document]
        for document in pipeline.pipe(documents)
    ]


def with_parser(model: str, trees: list[ParsedSentence]) -> str:
    strict, parser = Scores(), Scores()
    for parse, tree in zip(parse_words(model, trees), trees, strict=True):
        parsed = joined(find_agreements(parse), tree)
        strict.add(joined(find_agreements_strictly([word for word, _, _ in tree]), tree), parsed)
        parser.add(parsed, joined(find_agreements(tree), tree))
    return f"{strict.table(f'strict against {model}')}\n\n{parser.table(f'{model} against gold')}"


def speed(words: int) -> str:
    """Words a second from raw text to agreements."""
    sentences = itertools.chain.from_iterable(split_sentences(text) for text in read_speeches())
    count = pairs = 0
    started = time.process_time()
    for sentence in sentences:
        pairs += len(find_agreements_strictly([word.text for word in sentence]))
        count += len(sentence)
        if count >= words:
            break
    seconds = time.process_time() - started
    return f"strict track: {count / seconds:,.0f} words a processor second, {pairs:,} pairs of {count:,} words"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--parser", help=f"a spaCy model, such as {DEFAULT_MODEL}")
    arguments.add_argument("--sentences", type=int, default=1000, help="sentences for the comparison with the parser")
    arguments.add_argument("--words", type=int, default=300_000, help="words to time")
    given = arguments.parse_args()
    path = treebank()
    if path is not None:
        trees = list(read_conllu(path))
        print(strict_against(trees, f"strict against gold, {len(trees):,} sentences"), end="\n\n")
        print(strict_against(trees[1::2], "the same, held out"), end="\n\n")
        if given.parser:
            print(with_parser(given.parser, trees[: given.sentences]), end="\n\n")
    else:
        print(f"{TREEBANK_VARIABLE} names no CoNLL-U file; precision and recall are left out", file=sys.stderr)
    print(speed(given.words))


if __name__ == "__main__":
    main()

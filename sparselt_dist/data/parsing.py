"""A trained dependency parser for the parser track of the DAC objective: spaCy, an optional extra.

The parser is a pretrained model, which cramming's rules exclude (Geiping & Goldstein 2022, arXiv 2212.14034, section 3); results
made with it have to say so. Nothing but the extraction of pairs imports this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sparselt_dist.data.dependency_labels import ParsedSentence
from sparselt_dist.data.sentences import MAX_WORDS, Word
from sparselt_dist.errors import ConfigError

DEFAULT_MODEL = "en_core_web_sm"
_NOT_NEEDED = ["ner", "lemmatizer", "attribute_ruler", "tagger"]


@dataclass(frozen=True)
class Parse:
    """A parsed sentence with the places of its words in the text."""

    words: list[Word]
    tree: ParsedSentence


Parser = Callable[[Iterable[str]], Iterator[list[Parse]]]
"""Texts to their sentences, one list a text; sentences of more than 128 words are left out."""


def load_parser(model: str = DEFAULT_MODEL) -> Parser:
    """The parser of an installed English spaCy model, or of a folder that holds one.

    Raises:
        ConfigError: spaCy or the model is not installed, or the model parses no dependencies.
    """
    try:
        import spacy
    except ImportError as cause:
        raise ConfigError(
            "the parser track needs spaCy, which is not installed; run `pip install 'sparselt_dist[parser]'`, or use the "
            "strict track, which needs no parser"
        ) from cause
    try:
        pipeline = spacy.load(model, exclude=_NOT_NEEDED)
    except OSError as cause:
        raise ConfigError(
            f"the parser track needs the spaCy model {model!r}, which is not installed; expected a model package or "
            f"folder; run `python -m spacy download {DEFAULT_MODEL}`, or use the strict track, which needs no parser"
        ) from cause
    if "parser" not in pipeline.pipe_names:
        raise ConfigError(
            f"the parser track needs a spaCy model with a dependency parser, found {model!r} with "
            f"{', '.join(pipeline.pipe_names) or 'no component'}; use {DEFAULT_MODEL}"
        )

    def parse(texts: Iterable[str]) -> Iterator[list[Parse]]:
        for document in pipeline.pipe(texts):
            yield [_read(sentence) for sentence in document.sents if 0 < len(sentence) <= MAX_WORDS]

    return parse


def _read(sentence: Any) -> Parse:
    tokens = [token for token in sentence if not token.is_space]
    place = {token.i: number for number, token in enumerate(tokens)}
    words = [Word(token.text, token.idx, token.idx + len(token.text)) for token in tokens]
    tree = [(token.text, _head(token, place), token.dep_ or "dep") for token in tokens]
    return Parse(words, tree)


def _head(token: Any, place: dict[int, int]) -> int:
    """The head's number among the words; white space, which spaCy counts as a token, is passed over."""
    head = token.head
    while head.is_space and head.i != head.head.i:
        head = head.head
    return -1 if head.i == token.i or head.is_space else place[head.i]

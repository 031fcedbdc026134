"""Parts of speech of the pieces of a text, by a spaCy model: an optional extra, used to describe types and never to train."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

from sparselt_dist.data.parsing import DEFAULT_MODEL
from sparselt_dist.errors import ConfigError

Span = tuple[int, int]
Tagger = Callable[[str, Sequence[Span]], list[str | None]]
"""A text and the places of its pieces to the universal part of speech of the word that each piece begins in."""

_NOT_NEEDED = ["ner", "lemmatizer", "parser"]
_TAGGING = {"tagger", "morphologizer", "attribute_ruler"}


def load_tagger(model: str = DEFAULT_MODEL) -> Tagger:
    """The tagger of an installed spaCy model, or of a folder that holds one.

    Raises:
        ConfigError: spaCy or the model is not installed, or the model tags nothing.
    """
    try:
        import spacy
    except ImportError as cause:
        raise ConfigError(
            "parts of speech need spaCy, which is not installed; run `pip install 'sparselt_dist[parser]'`"
        ) from cause
    try:
        pipeline = spacy.load(model, exclude=_NOT_NEEDED)
    except OSError as cause:
        raise ConfigError(
            f"parts of speech need the spaCy model {model!r}, which is not installed; expected a model package or folder; "
            f"run `python -m spacy download {DEFAULT_MODEL}`"
        ) from cause
    if not _TAGGING & set(pipeline.pipe_names):
        raise ConfigError(
            f"parts of speech need a spaCy model with a tagger, found {model!r} with "
            f"{', '.join(pipeline.pipe_names) or 'no component'}; use {DEFAULT_MODEL}"
        )

    def tag(text: str, spans: Sequence[Span]) -> list[str | None]:
        tokens = list(pipeline(text))
        starts = [token.idx for token in tokens]
        parts = [None if token.is_space else token.pos_ or None for token in tokens]
        return [parts[bisect_right(starts, start) - 1] if end > start else None for start, end in spans]

    return tag

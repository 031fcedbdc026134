"""Rows to measure on, and the frozen hidden states of a backbone at chosen places of them.

B rows, L positions, N chosen places, D hidden size, V vocabulary. Which rows are read and how they are corrupted is a
pure function of the shards, so every run on the same shards is measured on the same places.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sparselt_dist.data.batch import Batch, Example
from sparselt_dist.data.collation import add_documents
from sparselt_dist.data.corpora import Corpora
from sparselt_dist.data.randomness import mix64, purpose_key
from sparselt_dist.errors import ConfigError

MAX_LENGTH = 512
"""Longer rows and documents are cropped to this many positions, so that one long document is not the whole sample."""

_POSITIONS_PER_FORWARD = 4096
_LOG = logging.getLogger(__name__)


class Corrupted(NamedTuple):
    """Corrupted rows, the places to look at and what is to be said of each."""

    input_ids_BL: Tensor  # int64
    attention_BL: Tensor  # int64
    places_N: Tensor  # int64, in the flattened [B * L]
    answers_N: Tensor  # int64
    documents: dict[str, Tensor]  # of packed rows: segment_ids and position_ids, int64 [B, L]


def read_examples(corpora: Corpora, purpose: str, *, max_tokens: int, max_length: int) -> list[Example]:
    """About `max_tokens` ids: samples at even distances, cropped, with seeds that only `purpose` changes."""
    samples = _spread(corpora, max_tokens / min(corpora.mean_length, max_length))
    seeds = mix64(samples.astype(np.uint64) ^ np.uint64(purpose_key(f"yardstick {purpose}")))
    examples: list[Example] = []
    for key, stored, seed in zip(corpora.keys(samples), corpora.read(samples), seeds.tolist(), strict=True):
        if stored is not None:
            example: Example = {"key": key, "ids": stored.ids[:max_length], "seed": seed}
            if stored.documents is not None:
                ends = np.cumsum(stored.documents, dtype=np.int64)
                within = np.diff(np.minimum(ends, max_length), prepend=0)
                example["documents"] = within[within > 0]
            examples.append(example)
    return examples


def _spread(corpora: Corpora, wanted: float) -> np.ndarray:
    """About that many sample numbers, or all there are, at even distances."""
    count = min(corpora.num_samples, max(1, int(wanted)))
    return np.unique(np.linspace(0, corpora.num_samples - 1, count).astype(np.int64))


def count_unigrams(corpora: Corpora, vocab_size: int, special_ids: Iterable[int], *, max_tokens: int) -> np.ndarray:
    """How often each id occurs, int64 [V], in about `max_tokens` ids or all; 0 for special ones, never targets."""
    samples = _spread(corpora, max_tokens / corpora.mean_length)
    counts_V = np.zeros(vocab_size, dtype=np.int64)
    for chunk in np.array_split(samples, -(-len(samples) // 1024)):
        counts_V += np.bincount(np.concatenate(corpora.ids(chunk)), minlength=vocab_size)
    counts_V[list(special_ids)] = 0
    return counts_V


def documents_of(input_ids_BL: Tensor, examples: list[Example]) -> dict[str, Tensor]:
    """What keeps the documents of packed rows apart, as in training; nothing of other rows."""
    if not any("documents" in example for example in examples):
        return {}
    rows: Batch = {"input_ids": input_ids_BL}
    add_documents(rows, examples)
    return {name: rows[name] for name in ("segment_ids", "position_ids")}


def chunks(examples: list[Example]) -> Iterator[list[Example]]:
    """The examples in the groups of one forward pass."""
    longest = max(len(example["ids"]) for example in examples)
    size = max(1, _POSITIONS_PER_FORWARD // longest)
    for first in range(0, len(examples), size):
        yield examples[first : first + size]


@torch.no_grad()
def hidden_at(backbone: nn.Module, corrupted: Iterable[Corrupted], device: torch.device) -> tuple[Tensor, Tensor]:
    """Final hidden states fp32 [N, D] at the places, and the answers [N], both on `device`."""
    hidden: list[Tensor] = []
    answers: list[Tensor] = []
    with evaluation_mode(backbone):
        for rows in corrupted:
            hidden_BLD = _states(backbone, rows, device)
            hidden.append(hidden_BLD.flatten(0, 1).index_select(0, rows.places_N.to(device)).float())
            answers.append(rows.answers_N.to(device))
    return torch.cat(hidden), torch.cat(answers)


def _states(backbone: nn.Module, rows: Corrupted, device: torch.device) -> Tensor:
    ids_BL, mask_BL = rows.input_ids_BL.to(device), rows.attention_BL.to(device)
    apart = {name: ids_BL.to(device) for name, ids_BL in rows.documents.items()}
    try:
        hidden_BLD: Tensor = backbone(ids_BL, attention_mask=mask_BL, **apart)
    except ConfigError as cause:  # a model from elsewhere, whose attention cannot be cut
        if not apart:
            raise
        _LOG.warning("yardsticks: the documents of a packed row are read as one text (%s)", cause)
        hidden_BLD = backbone(ids_BL, attention_mask=mask_BL)
    return hidden_BLD


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Dropout off inside; every submodule's own mode is as before afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training

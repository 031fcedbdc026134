"""What a token of training costs in FLOPs, from the sizes of model and step alone; no torch.

A pass over the body, forward and backward, costs 6 N + 12 L d (sum len^2 / sum len) a token, N its parameters without
embeddings; a vocabulary head 6 p (d V + d^2) for p targets a token (Kaplan et al. 2020, arXiv 2001.08361, section 2.1, with
attention and head added). An objective whose step is more or less than one pass and one head says so by a method
`flops_per_token(cfg, work)`. Model FLOPs: what a saving of memory computes twice counts once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Workload:
    """The sizes that FLOPs follow from."""

    body_parameters: int
    """Of the backbone, without embeddings and vocabulary head."""
    num_layers: int
    hidden_size: int
    inner_size: int
    """Of the feed-forward part."""
    vocab_size: int
    has_head: bool
    is_causal: bool
    mean_length: float
    """sum len^2 / sum len over what attention spans."""
    targets_per_token: float
    micro_batch_tokens: float
    """Of one rank."""
    world_size: int
    micro_batches: int
    """Of a step, over all ranks."""

    @property
    def encoding(self) -> float:
        """One pass over the body, forward and backward."""
        return 6.0 * self.body_parameters + 12.0 * self.num_layers * self.hidden_size * self.mean_length

    def scores(self, columns: float) -> float:
        """The product of every token's state with `columns` rows, forward and backward."""
        return 6.0 * self.hidden_size * columns

    @property
    def head(self) -> float:
        """The backbone's vocabulary head and the transform in front of it, on the targets."""
        return self.targets_per_token * (self.scores(self.vocab_size) + self.scores(self.hidden_size))

    @property
    def usual(self) -> float:
        """One pass and, where there is one, the vocabulary head on the targets."""
        return self.encoding + (self.head if self.has_head else 0.0)


def flops_per_token(objective: Any, cfg: Any, work: Workload) -> float:
    """FLOPs of forward and backward a real token, as the objective states them, else `work.usual`."""
    stated = getattr(objective, "flops_per_token", None)
    return work.usual if stated is None else float(stated(cfg, work))


def declared_targets(cfg: Any, *, is_causal: bool) -> float:
    """Targets a token that an objective's settings imply."""
    if is_causal:
        return 1.0
    mean = getattr(cfg, "mean_probability", None)
    return float(getattr(cfg, "mlm_probability", 1.0) if mean is None else mean())


def expected_distinct(draws: float, num_ids: int) -> float:
    """How many ids occur among so many draws from a Zipf distribution (exponent 1) over `num_ids`."""
    chances = 1.0 / np.arange(1, num_ids + 1)
    return float(-np.expm1(draws * np.log1p(-chances / chances.sum() * (1 - 1e-12))).sum())

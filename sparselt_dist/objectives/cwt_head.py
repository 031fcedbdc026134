"""A vocabulary head for a model that was pretrained without one, recovered inside the same run.

V vocabulary, D hidden size, N targets. The head starts as logits = h T^T (+ u) with T the input embedding table, and is
trained by cross-entropy for the rest of the budget. Godey et al. 2024 do so in a separate run with an
untied copy of the table and no bias. Two decisions are therefore settings:

- tied or copy: T stays the input table, or becomes a tensor of its own. A copy is kept as the table of the moment plus
  a learned change from zero, so that no optimizer state has to be rewritten in the middle of a run, whatever the ZeRO
  stage; weight decay then pulls it towards the copied table.
- u: contrast with in-batch targets learns log p(v|c) - log p(v), since tokens enter the denominator as often as they
  occur. What raw tied logits lack is the log unigram, u = log((n_v + 1) / (n + V)), from the targets seen in training.

Nothing is kept but named parameters and buffers, so a checkpoint holds the whole state. Before its start the head costs
its parameters' memory, and its gradients are zero.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselt_dist.objectives.linear_cross_entropy import (
    CrossEntropy,
    chunked_cross_entropy,
    is_half_autocast,
    rows_at_once,
)


@runtime_checkable
class HoldsHead(Protocol):
    """What an objective module adds that predicts words by a head of its own, of the body's hidden states h."""

    def exported_head(self, backbone: nn.Module) -> tuple[Tensor, Tensor | None] | None:
        """Matrix T [V, D] and bias b [V] of logits h T^T + b, for an export; None where there is none (yet)."""


class LearnedChange(nn.Module):
    """A parameter that starts at zero. It is called, not read, so that ZeRO-3 has it whole at that moment."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))

    def forward(self, to: Tensor) -> Tensor:
        """`to` plus the change."""
        return to + self.weight


class RecoveredHead(nn.Module):
    """Table, bias and token counts; `started` once the run has changed over to cross-entropy."""

    started: Tensor
    token_counts: Tensor
    copied_table: Tensor

    def __init__(self, vocab_size: int, hidden_size: int, *, is_copy: bool, has_bias: bool) -> None:
        super().__init__()
        self.vocab_size, self.is_copy, self.has_bias = vocab_size, is_copy, has_bias
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        if has_bias:
            self.register_buffer("token_counts", torch.zeros(vocab_size, dtype=torch.int64))
            self.bias_change = LearnedChange(vocab_size)
        if is_copy:
            self.register_buffer("copied_table", torch.zeros(vocab_size, hidden_size))
            self.table_change = LearnedChange(vocab_size, hidden_size)

    @torch.no_grad()
    def count(self, ids_N: Tensor) -> None:
        """Note the targets of a micro-batch of all ranks; ids int64."""
        if self.has_bias:
            self.token_counts.index_add_(0, ids_N, torch.ones_like(ids_N))

    @torch.no_grad()
    def start(self, embedding: nn.Module) -> None:
        """Take the table as it is now; only the first call does anything."""
        if not bool(self.started):
            if self.is_copy:
                self.copied_table.copy_(whole_table(embedding, self.vocab_size, self.started.device))
            self.started.fill_(True)

    def log_unigram(self) -> Tensor:
        """Log probabilities [V] float32 of the counted targets, one added to each count."""
        counts_V = self.token_counts.double() + 1
        return (counts_V / counts_V.sum()).log().float()

    def table_and_bias(self, embedding: nn.Module) -> tuple[Tensor, Tensor | None]:
        """The head's matrix [V, D] and bias [V], attached to what is trained."""
        bias_V = self.bias_change(self.log_unigram()) if self.has_bias else None
        if self.is_copy:
            return self.table_change(self.copied_table), bias_V
        return whole_table(embedding, self.vocab_size, self.started.device), bias_V

    def forward(self, embedding: nn.Module, hidden_ND: Tensor, labels_N: Tensor) -> CrossEntropy:
        """Cross-entropy of the targets, a piece at a time; N may be 0."""
        table_VD, bias_V = self.table_and_bias(embedding)
        return chunked_cross_entropy(
            lambda piece_ND: head_logits(piece_ND, table_VD, bias_V),
            hidden_ND,
            labels_N,
            shared=[table_VD] if bias_V is None else [table_VD, bias_V],
            rows=rows_at_once(len(table_VD)),
            recompute=is_half_autocast(hidden_ND),
        )

    def idle(self) -> Tensor:
        """A zero attached to every parameter, for steps in which the head plays no part."""
        zero = torch.zeros((), device=self.started.device)
        for change in (part for part in self.children() if isinstance(part, LearnedChange)):
            zero = zero + change(zero).sum() * 0
        return zero


def whole_table(embedding: nn.Module, num_rows: int, device: torch.device) -> Tensor:
    """All rows [V, D] of an embedding through its module, which under ZeRO-3 alone can gather them."""
    table_VD: Tensor = embedding(torch.arange(num_rows, device=device))
    return table_VD


def head_logits(hidden_ND: Tensor, table_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """Scores [N, V] of a head: the product in autocast's precision, the bias added in float32 or wider."""
    logits_NV = F.linear(hidden_ND, table_VD)
    if bias_V is None:
        return logits_NV
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) + bias_V

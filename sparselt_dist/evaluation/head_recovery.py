"""A vocabulary head recovered for a frozen backbone, whatever objective trained it.

N targets, D hidden size, E embedding size, V vocabulary. The head is

    logits_NV = exp(s) (W h + b) T^T + beta u + delta

with T [V, E] the model's own input embedding table, frozen, and u the log unigram probabilities of the training shards.
W starts as the identity. A contrastive objective with in-batch targets (Godey et al. 2024, headless language models)
learns pointwise mutual information, log p(v|c) - log p(v), so its raw tied logits lack u; one trained by cross-entropy
has u in its logits already. Hence exp(s) and beta start at the best of a small grid on the training targets, and are
trained on. Every tensor is fp32; nothing random is drawn but the order of the targets, from a generator of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TARGETS_PER_STEP = 256
_SCALES = (1.0, 0.5, 0.25, 0.0625, 0.015625)
_GRID_TARGETS = 512
_RATE_MATRIX, _RATE_SCALARS, _RATE_BIAS = 1e-3, 1e-2, 1e-3
_WARMUP_SHARE = 0.05


class Score(NamedTuple):
    """How well targets are predicted."""

    cross_entropy: float  # nats a target
    accuracy: float


@dataclass
class RecoveredHead:
    """The parameters of the equation above."""

    matrix_ED: nn.Parameter
    shift_E: nn.Parameter
    log_scale: nn.Parameter
    unigram_weight: nn.Parameter
    bias_V: nn.Parameter
    table_VE: Tensor
    log_unigram_V: Tensor

    @classmethod
    def start(cls, hidden_size: int, table_VE: Tensor, log_unigram_V: Tensor) -> RecoveredHead:
        """W the identity (cut or filled with zeros where E differs from D), scale 1, bias log unigram."""
        device = table_VE.device
        return cls(
            matrix_ED=nn.Parameter(torch.eye(table_VE.shape[1], hidden_size, device=device)),
            shift_E=nn.Parameter(torch.zeros(table_VE.shape[1], device=device)),
            log_scale=nn.Parameter(torch.zeros((), device=device)),
            unigram_weight=nn.Parameter(torch.ones((), device=device)),
            bias_V=nn.Parameter(torch.zeros(len(table_VE), device=device)),
            table_VE=table_VE,
            log_unigram_V=log_unigram_V,
        )

    def logits(self, hidden_ND: Tensor) -> Tensor:
        projected_NE = F.linear(hidden_ND, self.matrix_ED, self.shift_E) * self.log_scale.exp()
        return torch.addmm(self.unigram_weight * self.log_unigram_V + self.bias_V, projected_NE, self.table_VE.T)

    @torch.no_grad()
    def score(self, hidden_ND: Tensor, targets_N: Tensor) -> Score:
        """Mean cross-entropy and share of first guesses that are right."""
        total = correct = 0.0
        for hidden, targets in zip(hidden_ND.split(TARGETS_PER_STEP), targets_N.split(TARGETS_PER_STEP), strict=True):
            logits = self.logits(hidden)
            total += F.cross_entropy(logits, targets, reduction="sum").item()
            correct += (logits.argmax(dim=1) == targets).sum().item()
        return Score(total / len(targets_N), correct / len(targets_N))


def recover_head(
    hidden_ND: Tensor, targets_N: Tensor, table_VE: Tensor, log_unigram_V: Tensor, *, steps: int, seed: int
) -> RecoveredHead:
    """Train a head on frozen hidden states for a few hundred AdamW steps of `TARGETS_PER_STEP` targets."""
    head = RecoveredHead.start(hidden_ND.shape[1], table_VE, log_unigram_V)
    _choose_start(head, hidden_ND[:_GRID_TARGETS], targets_N[:_GRID_TARGETS])
    optimizer = torch.optim.AdamW(
        [
            {"params": [head.matrix_ED, head.shift_E], "lr": _RATE_MATRIX},
            {"params": [head.log_scale, head.unigram_weight], "lr": _RATE_SCALARS},
            {"params": [head.bias_V], "lr": _RATE_BIAS},
        ],
        betas=(0.9, 0.98),
        weight_decay=0.0,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate((step + 0.5) / steps))
    order = torch.Generator().manual_seed(seed)
    batch = min(TARGETS_PER_STEP, len(targets_N))
    queue = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(queue) < batch:
            queue = torch.randperm(len(targets_N), generator=order)
        chosen, queue = queue[:batch].to(hidden_ND.device), queue[batch:]
        loss = F.cross_entropy(head.logits(hidden_ND[chosen]), targets_N[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head


def _rate(progress: float) -> float:
    """Share of the peak rate: a short rise, then linearly to 0."""
    return min(progress / _WARMUP_SHARE, (1 - progress) / (1 - _WARMUP_SHARE))


@torch.no_grad()
def _choose_start(head: RecoveredHead, hidden_ND: Tensor, targets_N: Tensor) -> None:
    """Set scale and unigram weight to the best pair of the grid; the first of equals."""
    scores: dict[tuple[float, float], float] = {}
    for scale in _SCALES:
        for weight in (1.0, 0.0):
            head.log_scale.copy_(torch.tensor(scale).log())
            head.unigram_weight.fill_(weight)
            scores[scale, weight] = head.score(hidden_ND, targets_N).cross_entropy
    scale, weight = min(scores, key=lambda pair: scores[pair])
    head.log_scale.copy_(torch.tensor(scale).log())
    head.unigram_weight.fill_(weight)

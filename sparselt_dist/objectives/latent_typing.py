"""The latent typer and its regularisers (Ren et al. 2022, "Language Model Pre-Training with Sparse Latent Typing").

Each token gets a distribution over K types; type 0, the null type, means "not selected": its score is always 0 and its
vector always zero. In training a soft Gumbel draw mixes the type vectors, in evaluation the best type is taken. Where
paper and code (github.com/renll/SparseLT) may differ, this follows the code, whose numbers the published model has.

Invariants: row 0 of both tables has no effect and exactly zero gradient; scores of padding are 0; a token is null in
evaluation if and only if no other type scores above 0; everything is computed in float32 at least, outside autocast.

B rows, T positions, D hidden size, K types.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PERPLEXITY_EPSILON = 1e-7  # inside the logarithm, as in the official code

SparsityForm = Literal["log-mean", "mean-log"]
DiversityForm = Literal["perplexity-gap", "kl"]


class TyperOutput(NamedTuple):
    """What the typer says of each token."""

    type_vectors: Tensor
    """z [B, T, D], in the dtype of the hidden states: the mixture of type vectors."""
    weights: Tensor
    """[B, T, K]: the draw; in evaluation mode the one-hot best type."""
    probabilities: Tensor
    """[B, T, K]: the distribution without noise, at temperature 1."""
    types: Tensor
    """[B, T] int64: the best type without noise, in both modes; null on a tie with it."""


class LatentTyper(nn.Module):
    """Scores every token against the types and mixes their vectors.

    Initial values: classifier U(-sqrt(3/D), sqrt(3/D)), type vectors U(-0.5, 0.5).
    """

    def __init__(self, hidden_size: int, num_types: int = 64) -> None:
        super().__init__()
        self.num_types = num_types
        self.classifier = nn.Linear(hidden_size, num_types, bias=False)
        self.type_vectors = nn.Parameter(torch.empty(num_types, hidden_size))
        nn.init.kaiming_uniform_(self.classifier.weight, nonlinearity="linear")
        nn.init.uniform_(self.type_vectors, -0.5, 0.5)

    def forward(
        self,
        hidden_BTD: Tensor,
        attention_mask_BT: Tensor,
        *,
        temperature: float,
        gumbel_noise: Tensor | None = None,
        hard: bool = False,
    ) -> TyperOutput:
        """Types of hidden states; the mask is 1 (token) and 0 (padding).

        Args:
            temperature: above 0; of the draw alone.
            gumbel_noise: [B, T, K]; None: drawn from torch's global generator. Not used in evaluation mode.
            hard: the draw is one-hot forwards and soft backwards (straight-through).

        Raises:
            ValueError: the temperature is not above 0.
        """
        if temperature <= 0:
            raise ValueError(f"LatentTyper: found temperature {temperature}, expected a number above 0")
        scores_BTK, probabilities_BTK = self.distribution(hidden_BTD, attention_mask_BT)
        types_BT = best_types(scores_BTK)
        if self.training:
            noise_BTK = _standard_gumbel(scores_BTK) if gumbel_noise is None else gumbel_noise.to(scores_BTK.dtype)
            weights_BTK = draw_types(scores_BTK, noise_BTK, temperature, hard)
        else:
            weights_BTK = F.one_hot(types_BT, self.num_types).to(scores_BTK.dtype)
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            vectors_BTD = weights_BTK[..., 1:].to(hidden_BTD.dtype) @ self.type_vectors[1:].to(hidden_BTD.dtype)
        return TyperOutput(vectors_BTD, weights_BTK, probabilities_BTK, types_BT)

    def distribution(self, hidden_BTD: Tensor, attention_mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and noise-free probabilities, each [B, T, K]; padding has zero scores, so the uniform distribution."""
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            raw_BTK = at_least_float32(self.classifier(hidden_BTD.to(self.classifier.weight.dtype)))
            scores_BTK = F.pad(raw_BTK[..., 1:], (1, 0)).masked_fill(attention_mask_BT[..., None] == 0, 0.0)
            return scores_BTK, scores_BTK.softmax(dim=-1)


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision widened; float64 as it is."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def best_types(scores_BTK: Tensor) -> Tensor:
    """[B, T] int64: the best type; null exactly where no other scores above 0, whatever an arg-max does with ties."""
    best_BT, place_BT = scores_BTK[..., 1:].max(dim=-1)
    return torch.where(best_BT > 0, place_BT + 1, 0)


def draw_types(scores_BTK: Tensor, noise_BTK: Tensor, temperature: float, hard: bool) -> Tensor:
    """A relaxed draw [B, T, K] (Jang et al. 2017; Maddison et al. 2017): softmax((scores + noise) / temperature)."""
    soft_BTK = ((scores_BTK + noise_BTK) / temperature).softmax(dim=-1)
    if not hard:
        return soft_BTK
    chosen_BTK = F.one_hot(soft_BTK.argmax(dim=-1), soft_BTK.shape[-1]).to(soft_BTK.dtype)
    return chosen_BTK + (soft_BTK - soft_BTK.detach())


def _standard_gumbel(like: Tensor) -> Tensor:
    return -torch.empty_like(like).exponential_().log()


# ---------------------------------------------------------------- regularisers


def token_count(attention_mask_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Tokens of the batch, a scalar of at least 1."""
    return attention_mask_BT.sum().to(dtype).clamp(min=1)


def mean_probabilities(probabilities_BTK: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """[K]: the mean distribution over tokens, padding left out; zeros where there is no token."""
    probabilities_BTK = at_least_float32(probabilities_BTK)
    mask_BT1 = attention_mask_BT[..., None].to(probabilities_BTK.dtype)
    return (probabilities_BTK * mask_BT1).sum(dim=(0, 1)) / token_count(attention_mask_BT, probabilities_BTK.dtype)


def sparsity_of(mean_K: Tensor) -> Tensor:
    """-log of the mean null probability; at most 87.3366 in float32, where its gradient is zero."""
    return -torch.log(mean_K[0] + torch.finfo(mean_K.dtype).tiny)


def perplexity_of(mean_K: Tensor) -> Tensor:
    """exp of the entropy of a distribution over all K types, the null type included."""
    return torch.exp(-(mean_K * torch.log(mean_K + PERPLEXITY_EPSILON)).sum())


def diversity_of(mean_K: Tensor, form: DiversityForm = "perplexity-gap") -> Tensor:
    """Distance of a distribution from the uniform one: (K - PPL) / K, or KL = log K - log PPL in nats."""
    num_types = len(mean_K)
    if form == "kl":
        return math.log(num_types) - torch.log(perplexity_of(mean_K))
    return (num_types - perplexity_of(mean_K)) / num_types


def sparsity_loss(probabilities_BTK: Tensor, attention_mask_BT: Tensor, *, form: SparsityForm = "log-mean") -> Tensor:
    """Scalar, in nats: small where the null type is probable; zero, and attached, where there is no token."""
    if form == "log-mean":
        loss = sparsity_of(mean_probabilities(probabilities_BTK, attention_mask_BT))
    else:
        null_BT = at_least_float32(probabilities_BTK)[..., 0]
        surprise_BT = -torch.log(null_BT + torch.finfo(null_BT.dtype).tiny) * attention_mask_BT
        loss = surprise_BT.sum() / token_count(attention_mask_BT, null_BT.dtype)
    return torch.where(attention_mask_BT.any(), loss, 0.0 * loss)


def diversity_loss(
    probabilities_BTK: Tensor, attention_mask_BT: Tensor, *, form: DiversityForm = "perplexity-gap"
) -> Tensor:
    """Scalar: small where the types are used alike over the batch; zero, and attached, where there is no token."""
    loss = diversity_of(mean_probabilities(probabilities_BTK, attention_mask_BT), form)
    return torch.where(attention_mask_BT.any(), loss, 0.0 * loss)


def linearised(form: Callable[[Tensor], Tensor], whole_K: Tensor, own_K: Tensor) -> Tensor:
    """`form` at the mean over the whole step, to first order in this micro-batch's own mean.

    The mean of this over the micro-batches, weighted by their tokens, is `form(whole)`, and its gradient that of
    `form(whole)`: what a single pass over the whole step would give.
    """
    with torch.enable_grad():
        point_K = whole_K.detach().requires_grad_()
        value = form(point_K)
        (slope_K,) = torch.autograd.grad(value, point_K)
    return value.detach() + slope_K @ (own_K - point_K.detach())


# ---------------------------------------------------------------- temperature


def temperature_at(
    step: int,
    *,
    start: float = 5.0,
    floor: float = 0.5,
    decay: float = 0.99997,
    first_at_floor: bool = True,
) -> float:
    """Temperature of optimizer step `step` (from 0): max(start * decay^(step-1), floor), and `floor` at step 0.

    The official trainer updates the temperature after a forward pass and begins at the floor: hence the first step.
    Without `first_at_floor` the decay begins at step 0.
    """
    if first_at_floor and step == 0:
        return floor
    return float(max(start * decay ** (step - first_at_floor), floor))


def temperature_of_budget(progress: float, *, start: float = 5.0, floor: float = 0.5, share: float = 0.76753) -> float:
    """The same geometric decay stretched over a budget: the floor is reached at `progress` = `share` (of [0, 1])."""
    return float(max(start * (floor / start) ** (progress / share), floor))

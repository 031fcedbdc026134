"""The submodels of DAC's contextual variant: a small convolutional tagger for each family of agreements.

A submodel reads the corrupted pieces as the encoder will: a table [V, M], then twice x + conv(GELU(norm(x))) over 9 pieces,
the norm without parameters, the convolution full and without bias. From its last state it tells for each piece whether a
chunk begins here, which role the piece has in the family, and how many chunks away the partner stands; the cross-entropies
are summed. That state, centred and scaled, is what stage 2 gets in place of a row of a table (`dac_contextual_embedding.py`).

Padding and special tokens other than the mask are absent: their states are 0 in every layer, so nothing comes from them
and nothing reaches them. A masked piece has the mask's row, and a state that comes of its context.

A reconstruction from the abstract of Kuo, Zhang, Chen 2023 (arXiv 2311.04799), which says no more of its submodels than
that there are four; that they might see context is our reading.

Shapes: B rows, L positions, R families, M table width, V vocabulary, K layers, T taps,
C = R * M.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselt_dist.data.batch import IGNORE_INDEX
from sparselt_dist.objectives.base import TokenizerInfo

LAYERS, TAPS = 2, 9
CLASSES = (2, 3, 10)
"""Of a piece: inside a chunk or at its begin; no role, head, dependent; distance none, -4..-1, 1..4, far."""
_INITIAL_STD = 0.02


def contextual_states(
    rows_BLRM: Tensor, filters_KTRMM: Tensor, present_BL: Tensor, positions_BL: Tensor | None = None
) -> Tensor:
    """Last states [B, L, R, M] of R submodels side by side, 0 where nothing is present.

    Args:
        rows_BLRM: rows of the tables.
        filters_KTRMM: layer, tap, submodel, input, output.
        present_BL: bool.
        positions_BL: int64, in packed rows: where in its document each piece stands. Documents do not see each other.
    """
    present_BL11 = present_BL[..., None, None]
    states_BLRM = rows_BLRM * present_BL11
    for filters_TRMM in filters_KTRMM:
        # without parameters, both leave 0 where it is: what is absent is like the border of a row
        inputs_BLRM = F.gelu(F.layer_norm(states_BLRM, states_BLRM.shape[-1:]))
        states_BLRM = states_BLRM + _convolved(inputs_BLRM, filters_TRMM, positions_BL) * present_BL11
    return states_BLRM


def _convolved(inputs_BLRM: Tensor, filters_TRMM: Tensor, positions_BL: Tensor | None) -> Tensor:
    taps, families = filters_TRMM.shape[:2]
    reach = taps // 2
    if positions_BL is None:
        weight = filters_TRMM.permute(1, 3, 2, 0).flatten(0, 1)  # [R * M out, M in, T]
        sums_BCL = F.conv1d(inputs_BLRM.flatten(2).transpose(1, 2), weight, padding=reach, groups=families)
        return sums_BCL.transpose(1, 2).reshape(inputs_BLRM.shape)
    # Positions count up by one within a document and begin anew in the next, so a neighbour at a distance in the row has
    # that distance in positions only if it is of the same document.
    length = positions_BL.shape[1]
    padded = F.pad(inputs_BLRM, (0, 0, 0, 0, reach, reach))
    places = F.pad(positions_BL, (reach, reach), value=-taps)
    sums_BLRM = torch.zeros_like(inputs_BLRM)
    for tap, filters_RMM in enumerate(filters_TRMM):
        same_BL = places[:, tap : tap + length] - positions_BL == tap - reach
        neighbours = padded[:, tap : tap + length] * same_BL[..., None, None]
        sums_BLRM = sums_BLRM + torch.einsum("blrm,rmn->blrn", neighbours, filters_RMM)
    return sums_BLRM


def present_pieces(tokenizer: TokenizerInfo) -> Tensor:
    """bool [V]: all but padding and the special tokens; the mask is present."""
    present_V = torch.ones(tokenizer.vocab_size, dtype=torch.bool)
    present_V[sorted({tokenizer.pad_id, *tokenizer.special_ids} - {tokenizer.mask_id})] = False
    return present_V


class Annotated(NamedTuple):
    """Corrupted ids [B, L] int64 and the classes [B, L, 3] int64, -100 where there is nothing to tell."""

    ids_BL: Tensor
    classes_BL3: Tensor


class ContextualLoss(NamedTuple):
    """Terms of a batch, nats, fp32 scalars; `total` is their sum."""

    total: Tensor
    boundary: Tensor
    role: Tensor
    distance: Tensor


class ContextualSubmodel(nn.Module):
    """The tagger of one family."""

    def __init__(self, present_V: Tensor, width: int = 64) -> None:
        super().__init__()
        self.table = nn.Embedding(len(present_V), width)
        self.filters_KTMM = nn.Parameter(torch.empty(LAYERS, TAPS, width, width))
        self.classifier = nn.Linear(width, sum(CLASSES))
        self.present_V: Tensor
        self.register_buffer("present_V", present_V, persistent=False)
        nn.init.normal_(self.table.weight, std=_INITIAL_STD)
        nn.init.normal_(self.filters_KTMM, std=_INITIAL_STD)

    def states(self, ids_BL: Tensor) -> Tensor:
        """Last states [B, L, M]."""
        rows_BL1M = self.table(ids_BL).unsqueeze(2)
        return contextual_states(rows_BL1M, self.filters_KTMM.unsqueeze(2), self.present_V[ids_BL]).squeeze(2)

    def scores(self, ids_BL: Tensor) -> tuple[Tensor, ...]:
        """Scores of boundary [B, L, 2], role [B, L, 3] and distance [B, L, 10]."""
        scores: tuple[Tensor, ...] = self.classifier(self.states(ids_BL)).split(CLASSES, dim=-1)
        return scores

    def forward(self, batch: Annotated) -> ContextualLoss:
        absent_BL1 = ~self.present_V[batch.ids_BL].unsqueeze(-1)
        wanted_BL3 = batch.classes_BL3.masked_fill(absent_BL1, IGNORE_INDEX)
        terms = [
            F.cross_entropy(scores.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORE_INDEX)
            for scores, wanted in zip(self.scores(batch.ids_BL), wanted_BL3.unbind(-1), strict=True)
        ]
        return ContextualLoss(terms[0] + terms[1] + terms[2], *terms)


@dataclass(frozen=True)
class FrozenSubmodel:
    """What stage 2 takes of a submodel: (last state - mean) * scale has mean 0 and root mean square 0.02 over text."""

    table_VM: Tensor
    """float16; 0 for pieces seen fewer than 5 times, which are known by their context alone"""
    filters_KTMM: Tensor
    mean_M: Tensor
    scale: float

    @property
    def sha256(self) -> str:
        """Of the bytes of all parts."""
        digest = hashlib.sha256()
        for part in (self.table_VM, self.filters_KTMM, self.mean_M, torch.tensor(self.scale)):
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()

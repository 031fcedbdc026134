"""Stage 2 of DAC's contextual variant: the frozen submodels run over the corrupted ids, their states join the embeddings.

    e_t = E[x_t] + W concat_r(gamma_r S_r(x)_t)        r over the families of agreements

S_r(x)_t is the centred and scaled last state of submodel r at place t (`objectives/dac_contextual.py`): it depends on the ids
of 8 pieces on either side, as the encoder sees them, masks included; no original id enters. It is 0 at padding and at
special tokens but the mask, whose term comes of its context. Frozen parts are buffers: every rank has them whole, and a
checkpoint holds them. The term is no look-up, so it cannot be folded into the word embeddings.

Shapes: B rows, L positions, D width of the word embeddings, V vocabulary, R families, M table width, C = R * M, K layers,
T taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparselt_dist.errors import ConfigError
from sparselt_dist.objectives.base import InputChange
from sparselt_dist.objectives.dac_contextual import LAYERS, TAPS, FrozenSubmodel, contextual_states
from sparselt_dist.objectives.dac_embedding import PROJECTION_STD


class ContextualAgreement(nn.Module):
    """W concat_r(gamma_r S_r(x)): what joins the word embeddings. New submodels give 0."""

    undecayed = ("gains_R",)
    input_change: InputChange = "context"

    tables_VRM: Tensor
    filters_KTRMM: Tensor
    means_RM: Tensor
    scales_R: Tensor
    present_V: Tensor

    def __init__(self, vocab_size: int, hidden_size: int, families: int, width: int, *, combination: nn.Module) -> None:
        """`combination` joins words [..., D] and term [..., D] to what the encoder gets, [..., D]."""
        super().__init__()
        self.register_buffer("tables_VRM", torch.zeros(vocab_size, families, width, dtype=torch.float16))
        self.register_buffer("filters_KTRMM", torch.zeros(LAYERS, TAPS, families, width, width))
        self.register_buffer("means_RM", torch.zeros(families, width))
        self.register_buffer("scales_R", torch.zeros(families))
        self.register_buffer("present_V", torch.zeros(vocab_size, dtype=torch.bool))
        self.gains_R = nn.Parameter(torch.ones(families))
        self.weight_DC = nn.Parameter(torch.empty(hidden_size, families * width).normal_(std=PROJECTION_STD))
        self.combination = combination
        self._positions_BL: Tensor | None = None

    @torch.no_grad()
    def load(self, submodels: Sequence[FrozenSubmodel], present_V: Tensor) -> None:
        """Take the submodels of stage 1, one a family, in the order of the families.

        Raises:
            ConfigError: other submodels than this model is made for.
        """
        found = [tuple(submodel.table_VM.shape) for submodel in submodels]
        vocab_size, families, width = self.tables_VRM.shape
        known = min(len(present_V), vocab_size)
        expected = [(known, width)] * families
        if found != expected:
            raise ConfigError(
                f"objective dac: found agreement submodels of sizes {found}, expected {expected} (families x vocabulary x "
                "width); make them from these shards, with objective.families and objective.table_width of this run"
            )
        # rows of the model beyond the tokenizer's vocabulary stand for nothing
        self.tables_VRM[:known].copy_(torch.stack([submodel.table_VM for submodel in submodels], dim=1))
        self.filters_KTRMM.copy_(torch.stack([submodel.filters_KTMM for submodel in submodels], dim=2))
        self.means_RM.copy_(torch.stack([submodel.mean_M for submodel in submodels]))
        self.scales_R.copy_(torch.tensor([submodel.scale for submodel in submodels]))
        self.present_V[:known].copy_(present_V)

    def states(self, ids_BL: Tensor, positions_BL: Tensor | None = None) -> Tensor:
        """Centred and scaled states [B, L, R, M] in the dtype of W; 0 where nothing is present."""
        dtype = self.weight_DC.dtype
        present_BL = self.present_V[ids_BL]
        filters_KTRMM = self.filters_KTRMM.to(dtype)
        states = contextual_states(self.tables_VRM[ids_BL].to(dtype), filters_KTRMM, present_BL, positions_BL)
        scaled = (states - self.means_RM) * self.scales_R[:, None]
        return scaled * present_BL[..., None, None]

    def forward(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """ids [..., L] int64, corrupted, to the term [..., L, D].

        `positions` [..., L] int64, of packed rows alone: the place of each piece in its document. Documents do not see
        each other.
        """
        ids_BL = input_ids.reshape(-1, input_ids.shape[-1])
        positions_BL = None if positions is None else positions.expand(input_ids.shape).reshape(ids_BL.shape)
        states_BLC = self.states(ids_BL, positions_BL).flatten(2)
        scaled_DC = self.weight_DC * self.gains_R.repeat_interleave(self.means_RM.shape[-1])
        return F.linear(states_BLC, scaled_DC).reshape(*input_ids.shape, -1)

    def attach(self, embedding: nn.Module) -> RemovableHandle:
        """Join the term to what a table of word embeddings returns; a head tied to its weight is not touched."""
        return embedding.register_forward_hook(self._join)

    def follow_positions(self, body: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
        """Keep the documents of packed rows apart wherever `body` is called with `position_ids`.

        `body` is the model around the embedding. Rows have positions if they are packed, by `prepare` or by
        `train.unpad`; without this the term of a piece would depend on 8 pieces of its neighbours in the row.
        """
        return (
            body.register_forward_pre_hook(self._note_positions, with_kwargs=True),
            body.register_forward_hook(self._forget_positions),
        )

    def _note_positions(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._positions_BL = kwargs.get("position_ids")

    def _forget_positions(self, body: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._positions_BL = None

    def _join(self, embedding: nn.Module, inputs: tuple[Tensor, ...], words: Tensor) -> Tensor:
        term = self(inputs[0], self._positions_BL).to(words.dtype)
        return cast(Tensor, self.combination(words, term))

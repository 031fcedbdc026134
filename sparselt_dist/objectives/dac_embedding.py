"""The agreement term of DAC's stage 2, as a module that joins it to any table of word embeddings.

    W concat_r(gamma_r Z_r[x])        r over the families of agreements

Z is frozen unless asked for otherwise, W starts at N(0, 1/32^2) and gamma at 1. A reconstruction; see `objectives/dac.py`.

Shapes: D width of the word embeddings, V vocabulary, R families, M table width, C = R * M.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparselt_dist.errors import ConfigError
from sparselt_dist.objectives.base import InputChange
from sparselt_dist.objectives.dac_tables import AgreementTable
from sparselt_dist.objectives.settings import DACConfig

PROJECTION_STD = 1 / 32


# --- how the term joins the words ------------------------------------------------------------------------------------


class Added(nn.Module):
    """e + term."""

    def forward(self, words: Tensor, term: Tensor) -> Tensor:
        """[..., D] each."""
        return words + term


class Gated(nn.Module):
    """e + 2 sigmoid(g . e) term; g starts at 0, where it is the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight_D = nn.Parameter(torch.zeros(width))

    def forward(self, words: Tensor, term: Tensor) -> Tensor:
        """[..., D] each."""
        gate: Tensor = 2 * torch.sigmoid(words @ self.weight_D).unsqueeze(-1)
        return words + gate * term


class Concatenated(nn.Module):
    """[A W] (e; gamma Z) = A e + term; A starts at the identity, where it is the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight_DD = nn.Parameter(torch.eye(width))

    def forward(self, words: Tensor, term: Tensor) -> Tensor:
        """[..., D] each."""
        return F.linear(words, self.weight_DD).to(words.dtype) + term


def make_combination(cfg: DACConfig, width: int) -> nn.Module:
    """The module (words [..., D], term [..., D]) -> [..., D] of `objective.combination`."""
    if cfg.combination == "gated":
        return Gated(width)
    return Concatenated(width) if cfg.combination == "concatenate" else Added()


# --- the term --------------------------------------------------------------------------------------------------------


class AgreementEmbedding(nn.Module):
    """W concat_r(gamma_r Z_r[x]): what joins the word embeddings. New tables are zero."""

    undecayed = ("gains_R",)
    input_change: InputChange = "table"

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        families: int,
        width: int,
        *,
        trainable: bool = False,
        combination: nn.Module | None = None,
    ) -> None:
        super().__init__()
        # a token's rows of all families lie side by side: one gather of 512 bytes
        tables_VRM = torch.zeros(vocab_size, families, width, dtype=torch.float32 if trainable else torch.float16)
        self.tables_VRM: Tensor
        if trainable:
            self.tables_VRM = nn.Parameter(tables_VRM)
        else:
            self.register_buffer("tables_VRM", tables_VRM)
        self.gains_R = nn.Parameter(torch.ones(families))
        self.weight_DC = nn.Parameter(torch.empty(hidden_size, families * width).normal_(std=PROJECTION_STD))
        self.combination = Added() if combination is None else combination

    @torch.no_grad()
    def load(self, tables: Sequence[AgreementTable]) -> None:
        """Take the tables of stage 1, one a family, in the order of the families.

        Raises:
            ConfigError: other tables than this model is made for.
        """
        found = [tuple(table.table_VM.shape) for table in tables]
        vocab_size, families, width = self.tables_VRM.shape
        expected = [(vocab_size, width)] * families
        if found != expected:
            raise ConfigError(
                f"objective dac: found agreement tables of sizes {found}, expected {expected} (families x vocabulary x width); "
                "make them from these shards, with objective.families and objective.table_width of this run"
            )
        self.tables_VRM.copy_(torch.stack([table.table_VM for table in tables], dim=1))

    def forward(self, input_ids: Tensor) -> Tensor:
        """ids [...] int64 to the term [..., D]."""
        # With the gains in the weights, as few operations as can be have a token's size, in both directions.
        scaled_DC = self.weight_DC * self.gains_R.repeat_interleave(self.tables_VRM.shape[-1])
        rows = F.embedding(input_ids, self.tables_VRM.flatten(1))
        return F.linear(rows.to(_dtype_inside(scaled_DC)), scaled_DC)

    def attach(self, embedding: nn.Module) -> RemovableHandle:
        """Join the term to what a table of word embeddings returns; a head tied to its weight is not touched.

        The look-up is hooked rather than replaced, so every architecture, its tying and its checkpoints stay as they are.
        """
        return embedding.register_forward_hook(self._join)

    def _join(self, embedding: nn.Module, inputs: tuple[Tensor, ...], words: Tensor) -> Tensor:
        term = self(inputs[0]).to(words.dtype)
        return cast(Tensor, self.combination(words, term))


def _dtype_inside(weight: Tensor) -> torch.dtype:
    """The dtype that a product with `weight` is computed in."""
    kind = weight.device.type
    inside = torch.is_autocast_enabled(kind) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if inside else weight.dtype

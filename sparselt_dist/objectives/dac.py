"""Dependency-agreement pretraining (DAC), stage 2: masked language modelling with agreement embeddings at the input.

    e_t = E[x_t] + W concat_r(gamma_r Z_r[x_t])        r over the families of agreements

x_t are the ids that the encoder sees, masks included, whose rows of Z are 0: no parse and no original id enters. Z is frozen;
W starts at N(0, 1/32^2), so the new term starts at half the size of a word embedding, and gamma at 1. The head stays tied
to E alone. As the term is a table look-up, it folds into the word embeddings after training (`folded_embedding`): a model
without DAC's parts whose input and output tables differ by a matrix of low rank.

A reconstruction from the abstract of Kuo, Zhang, Chen 2023 (arXiv 2311.04799), which states that embeddings of dependency
agreements are used in tandem with the conventional ones; how they are combined is not known.

Shapes: B rows, L positions, D hidden, V vocabulary, R families, M table width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparselt_dist.data.batch import Batch, Example
from sparselt_dist.errors import ConfigError
from sparselt_dist.objectives.base import API_VERSION, Collator, LossOutput, TokenizerInfo
from sparselt_dist.objectives.dac_tables import AgreementTable
from sparselt_dist.objectives.mlm import POSITIONS_KEY as MLM_POSITIONS_KEY
from sparselt_dist.objectives.mlm import MLMCollator, MLMModule
from sparselt_dist.objectives.settings import DACConfig

POSITIONS_KEY = "dac/positions"  # [N] int64: places of the targets in the flattened [B * L] batch, ascending
PROJECTION_STD = 1 / 32


class AgreementEmbedding(nn.Module):
    """W concat_r(gamma_r Z_r[x]): what is added to the word embeddings. New tables are zero."""

    def __init__(
        self, vocab_size: int, hidden_size: int, families: int, width: int, *, trainable: bool = False
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
        self.projection = nn.Linear(families * width, hidden_size, bias=False)
        nn.init.normal_(self.projection.weight, std=PROJECTION_STD)

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
        """ids [...] int64 to the term [..., D], in the dtype of W."""
        rows = self.tables_VRM[input_ids].to(self.projection.weight.dtype)  # [..., R, M]
        term: Tensor = self.projection((rows * self.gains_R[:, None]).flatten(-2))
        return term

    def attach(self, embedding: nn.Module) -> RemovableHandle:
        """Add the term to what a table of word embeddings returns; a head tied to its weight is not touched.

        The look-up is hooked rather than replaced, so every architecture, its tying and its checkpoints stay as they are.
        """
        return embedding.register_forward_hook(self._add)

    def _add(self, embedding: nn.Module, inputs: tuple[Tensor, ...], words: Tensor) -> Tensor:
        sum_BLD: Tensor = words + self(inputs[0]).to(words.dtype)
        return sum_BLD


@torch.no_grad()
def folded_embedding(words_VD: Tensor, agreement: AgreementEmbedding) -> Tensor:
    """E' = E + concat_r(gamma_r Z_r) W^T [V, D]: the input table of a model without the agreement's parts.

    The head goes on to use E, so such a model must be untied. A vocabulary padded beyond the tables keeps its other rows.
    """
    known = len(agreement.tables_VRM)
    folded_VD = words_VD.clone()
    folded_VD[:known] += agreement(torch.arange(known, device=words_VD.device)).to(words_VD.dtype)
    return folded_VD


class DACCollator:
    """Masked rows, as in masked language modelling."""

    def __init__(self, cfg: DACConfig, tokenizer: TokenizerInfo) -> None:
        """Raises ConfigError: the tokenizer cannot serve this masking."""
        self._mask = MLMCollator(cfg, tokenizer)

    def __call__(self, examples: list[Example]) -> Batch:
        batch = self._mask(examples)
        batch[POSITIONS_KEY] = batch.pop(MLM_POSITIONS_KEY)
        return batch


class DACModule(MLMModule):
    """Masked language modelling on a backbone whose embeddings carry the agreement term."""

    def __init__(self, cfg: DACConfig, backbone: nn.Module) -> None:
        super().__init__(chunked=cfg.cross_entropy == "chunked")
        sizes = int(backbone.vocab_size), int(backbone.hidden_size)  # type: ignore[arg-type]
        self.agreement = AgreementEmbedding(*sizes, len(cfg.families), cfg.table_width, trainable=cfg.trainable_tables)
        self.agreement.attach(backbone.get_input_embeddings())  # type: ignore[operator]

    def forward(self, backbone: nn.Module, batch: Batch) -> LossOutput:
        if POSITIONS_KEY in batch:
            batch = {**batch, MLM_POSITIONS_KEY: batch[POSITIONS_KEY]}
        return super().forward(backbone, batch)


class DAC:
    """The plug-in."""

    name = "dac"
    api_version = API_VERSION
    config_cls = DACConfig

    def needs_lm_head(self, cfg: DACConfig) -> bool:
        return True

    def build_collator(self, cfg: DACConfig, tokenizer: TokenizerInfo) -> Collator:
        return DACCollator(cfg, tokenizer)

    def build_module(self, cfg: DACConfig, backbone: nn.Module) -> nn.Module:
        """Raises ConfigError: the backbone sees only what comes before a position."""
        if getattr(backbone, "is_causal", False):
            raise ConfigError(
                "objective.name: found 'dac' with a causal model, whose predictions cannot use what follows a mask; "
                "expected an encoder: set model.architecture to crammed-bert, bert, roberta or modernbert"
            )
        return DACModule(cfg, backbone)

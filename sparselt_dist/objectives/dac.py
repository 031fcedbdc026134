"""Dependency-agreement pretraining (DAC), stage 2: masked language modelling with agreement embeddings at the input.

    e_t = E[x_t] + W concat_r(gamma_r Z_r[x_t])        r over the families of agreements

x_t are the ids that the encoder sees, masks included, whose rows of Z are 0: no parse and no original id enters. Z is frozen;
W starts at N(0, 1/32^2), so the new term starts at half the size of a word embedding, and gamma at 1. The head stays tied
to E alone. As the term is a table look-up, it folds into the word embeddings after training: a model without DAC's parts
whose input and output tables differ by a matrix of low rank. Z is made in stage 1, which a new run begins with
(`dac_prelude.py`). With `variant: contextual` the state of a frozen tagger stands where the row of Z does, and nothing folds.

A reconstruction from the abstract of Kuo, Zhang, Chen 2023 (arXiv 2311.04799), which states that embeddings of dependency
agreements are used in tandem with the conventional ones; how they are combined is not known.

Shapes: B rows, L positions, N targets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import nn
from torch.utils.hooks import RemovableHandle

from sparselt_dist.data.batch import Batch, Example
from sparselt_dist.errors import ConfigError
from sparselt_dist.objectives.base import API_VERSION, Collator, InputChange, LossOutput, TokenizerInfo, register
from sparselt_dist.objectives.dac_contextual import LAYERS, TAPS
from sparselt_dist.objectives.dac_contextual_embedding import ContextualAgreement
from sparselt_dist.objectives.dac_embedding import AgreementEmbedding, make_combination
from sparselt_dist.objectives.mlm import POSITIONS_KEY as MLM_POSITIONS_KEY
from sparselt_dist.objectives.mlm import MLMCollator, MLMModule
from sparselt_dist.objectives.settings import DACConfig

if TYPE_CHECKING:
    from sparselt_dist.objectives.base import PreludeReport, PreludeSetting
    from sparselt_dist.objectives.cost import Workload

POSITIONS_KEY = "dac/positions"  # [N] int64: places of the targets in the flattened [B * L] batch, ascending


Term = AgreementEmbedding | ContextualAgreement


def attached_term(cfg: DACConfig, backbone: nn.Module) -> tuple[Term, list[RemovableHandle]]:
    """The module of the configured term, attached to a backbone, and what holds it there."""
    words = cast(nn.Module, backbone.get_input_embeddings())  # type: ignore[operator]
    width = int(getattr(words, "embedding_dim", backbone.hidden_size))  # type: ignore[arg-type]
    sizes = int(backbone.vocab_size), width, len(cfg.families), cfg.table_width  # type: ignore[arg-type]
    combination = make_combination(cfg, width)
    if cfg.variant == "static":
        term = AgreementEmbedding(*sizes, trainable=cfg.trainable_tables, combination=combination)
        return term, [term.attach(words)]
    reader = ContextualAgreement(*sizes, combination=combination)
    body = cast(nn.Module, getattr(backbone, "body", backbone))
    return reader, [reader.attach(words), *reader.follow_positions(body)]


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
    """Masked language modelling on a backbone whose word embeddings are joined by the agreement term."""

    has_prelude = True

    def __init__(self, cfg: DACConfig, backbone: nn.Module) -> None:
        super().__init__(chunked=cfg.cross_entropy == "chunked")
        self._cfg = cfg
        self.agreement, self._holds = attached_term(cfg, backbone)

    def forward(self, backbone: nn.Module, batch: Batch) -> LossOutput:
        if POSITIONS_KEY in batch:
            batch = {**batch, MLM_POSITIONS_KEY: batch[POSITIONS_KEY]}
        return super().forward(backbone, batch)

    def check_prelude(self, setting: PreludeSetting) -> None:
        """Raises ConfigError or DataError: stage 1 has no agreements that fit."""
        from sparselt_dist.objectives.dac_prelude import check_agreements

        check_agreements(self._cfg, setting)

    def run_prelude(self, setting: PreludeSetting) -> PreludeReport:
        """Stage 1: the tables, from the agreements of the training shards."""
        from sparselt_dist.objectives.dac_prelude import run_stage1

        return run_stage1(self._cfg, self.agreement, setting)

    @property
    def input_change(self) -> InputChange:
        """What the term does to the input embeddings; none once they are released."""
        return self.agreement.input_change if hasattr(self, "agreement") else "none"

    def release_inputs(self) -> None:
        """Take the term away, with its tables and weights."""
        if hasattr(self, "agreement"):
            for hold in self._holds:
                hold.remove()
            del self.agreement


class DAC:
    """The plug-in."""

    name = "dac"
    api_version = API_VERSION
    config_cls = DACConfig

    def needs_lm_head(self, cfg: DACConfig) -> bool:
        return True

    def flops_per_token(self, cfg: DACConfig, work: Workload) -> float:
        """As masked language modelling, and the term: a product that gives gradients to W alone, and what stands around it."""
        columns, width = len(cfg.families) * cfg.table_width, work.hidden_size
        extra = (6.0 if cfg.trainable_tables else 4.0) * columns * width
        if cfg.variant == "contextual":
            extra += 2.0 * LAYERS * TAPS * columns * cfg.table_width
        if cfg.combination == "concatenate":
            extra += 6.0 * width * width
        return work.usual + extra

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


register(DAC())

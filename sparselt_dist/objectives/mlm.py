"""Masked language modelling: predict the corrupted positions (Devlin et al. 2019, 3.1; Geiping & Goldstein 2022).

B rows, L positions, N targets, D hidden size, V vocabulary. The loss is the fp32 cross-entropy of the model's own
vocabulary head, computed on the hidden states of the targets only, at once or chunked. The collator lists their places,
so that gathering them needs no wait for the accelerator, and with exact counts every shape is static.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from sparselt_dist.data.batch import IGNORE_INDEX, Batch, Example, pad_examples
from sparselt_dist.errors import ConfigError
from sparselt_dist.objectives.base import API_VERSION, Collator, LossOutput, TokenizerInfo, register
from sparselt_dist.objectives.linear_cross_entropy import head_cross_entropy
from sparselt_dist.objectives.masking import MaskingRule, Vocabulary, mask_tokens
from sparselt_dist.objectives.settings import MLMConfig

POSITIONS_KEY = "mlm/positions"  # [N] int64: places of the targets in the flattened [B * L] batch, ascending

_PACKED_KEYS = ("segment_ids", "position_ids")


class MLMCollator:
    """Pads rows and draws targets anew for each (epoch, sample)."""

    def __init__(self, cfg: MLMConfig, tokenizer: TokenizerInfo) -> None:
        """Raises ConfigError: the tokenizer cannot serve this masking."""
        self._pad_id = tokenizer.pad_id
        self._rule = MaskingRule(
            probability=cfg.mlm_probability,
            exact=cfg.masking == "exact",
            mask_share=cfg.mask_share,
            random_share=cfg.random_share,
            whole_word=cfg.whole_word,
            exempt_special=cfg.exempt_special,
        )
        self._vocabulary = Vocabulary(tokenizer, self._rule)

    def __call__(self, examples: list[Example]) -> Batch:
        ids_BL, attention_BL, seeds_B = pad_examples(examples, self._pad_id)
        masked = mask_tokens(ids_BL, attention_BL, seeds_B, self._vocabulary, self._rule)
        positions_N = np.flatnonzero(masked.targets_BL)
        labels_BL = np.full_like(ids_BL, IGNORE_INDEX)
        labels_BL.reshape(-1)[positions_N] = ids_BL.reshape(-1)[positions_N]
        return {
            "input_ids": torch.from_numpy(masked.input_ids_BL),
            "attention_mask": torch.from_numpy(attention_BL),
            "labels": torch.from_numpy(labels_BL),
            "num_targets": torch.tensor(len(positions_N)),
            "num_tokens": torch.tensor(int(attention_BL.sum())),
            POSITIONS_KEY: torch.from_numpy(positions_N),
        }


class MLMModule(nn.Module):
    """The loss; the vocabulary head belongs to the backbone."""

    def __init__(self, *, chunked: bool = False) -> None:
        """`chunked`: the scores of the head are never all in memory at once."""
        super().__init__()
        self._chunked = chunked

    def forward(self, backbone: nn.Module, batch: Batch) -> LossOutput:
        packed = {key: batch[key] for key in _PACKED_KEYS if key in batch}
        hidden_BLD = backbone(batch["input_ids"], attention_mask=batch["attention_mask"], **packed)
        positions_N = _target_positions(batch)
        labels_N = batch["labels"].flatten().index_select(0, positions_N)
        hidden_ND = hidden_BLD.flatten(0, 1).index_select(0, positions_N)
        # With N = 0 this is a zero attached to every parameter, which ZeRO and DDP rely on.
        found = head_cross_entropy(backbone, hidden_ND, labels_N, chunked=self._chunked)
        count = (labels_N != IGNORE_INDEX).sum()
        return LossOutput(
            loss=found.total / count.clamp(min=1),
            metrics={"loss": (found.total.detach(), count), "accuracy": (found.correct, count)},
        )

    def set_progress(self, step: int, progress: float) -> None:
        """Nothing here follows the step."""


def _target_positions(batch: Batch) -> Tensor:
    """The collator's list, or, in a batch made elsewhere, the places that have a label."""
    if POSITIONS_KEY in batch:
        return batch[POSITIONS_KEY]
    return torch.nonzero(batch["labels"].flatten() != IGNORE_INDEX).squeeze(1)


class MLM:
    """The plug-in."""

    name = "mlm"
    api_version = API_VERSION
    config_cls = MLMConfig

    def needs_lm_head(self, cfg: MLMConfig) -> bool:
        return True

    def build_collator(self, cfg: MLMConfig, tokenizer: TokenizerInfo) -> Collator:
        return MLMCollator(cfg, tokenizer)

    def build_module(self, cfg: MLMConfig, backbone: nn.Module) -> nn.Module:
        """Raises ConfigError: the backbone sees only what comes before a position."""
        if getattr(backbone, "is_causal", False):
            raise ConfigError(
                "objective.name: found 'mlm' with a causal model, whose predictions cannot use what follows a mask; "
                "expected an encoder: set model.architecture to crammed-bert, bert, roberta or modernbert"
            )
        return MLMModule(chunked=cfg.cross_entropy == "chunked")


register(MLM())

"""Masked language modelling: predict the corrupted positions (Devlin et al. 2019, 3.1; Geiping & Goldstein 2022).

B rows, L positions, N targets, D hidden size, V vocabulary. The loss is the fp32 cross-entropy of the model's own
vocabulary head, computed on the hidden states of the targets only, at once or chunked. The collator lists their places,
so that gathering them needs no wait for the accelerator, and with exact counts every shape is static.

The share of targets and the length of rows may follow the spent budget. Workers make the batch as at its end; the training
process masks it anew, from the ids that labels and corrupted rows give back and the seeds of the rows, and cuts it. So both
are functions of sample and spent share alone.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from sparselt_dist.data.batch import IGNORE_INDEX, Batch, Example, cut_rows, pad_examples
from sparselt_dist.errors import ConfigError
from sparselt_dist.objectives.base import API_VERSION, Collator, LossOutput, TokenizerInfo, register
from sparselt_dist.objectives.linear_cross_entropy import head_cross_entropy
from sparselt_dist.objectives.masking import MaskingRule, Vocabulary, mask_tokens
from sparselt_dist.objectives.settings import MLMConfig

POSITIONS_KEY = "mlm/positions"  # [N] int64: places of the targets in the flattened [B * L] batch, ascending
SEEDS_KEY = "mlm/seeds"  # [B] int64: of the rows, where the share of targets follows the budget

_PACKED_KEYS = ("segment_ids", "position_ids")


class MLMCollator:
    """Pads rows and draws targets anew for each (epoch, sample)."""

    def __init__(self, cfg: MLMConfig, tokenizer: TokenizerInfo) -> None:
        """Raises ConfigError: the tokenizer cannot serve this masking."""
        self._cfg = cfg
        self._pad_id = tokenizer.pad_id
        self._keeps_seeds = len({rate for _, rate in cfg.probability_points()}) > 1
        self.follows_progress = self._keeps_seeds or cfg.row_lengths is not None
        self._rule = MaskingRule(
            probability=cfg.probability_at(1.0),
            exact=cfg.masking == "exact",
            mask_share=cfg.mask_share,
            random_share=cfg.random_share,
            whole_word=cfg.whole_word,
            exempt_special=cfg.exempt_special,
        )
        self._vocabulary = Vocabulary(tokenizer, self._rule)

    def __call__(self, examples: list[Example]) -> Batch:
        ids_BL, attention_BL, seeds_B = pad_examples(examples, self._pad_id)
        batch = self._masked(ids_BL, attention_BL, seeds_B, self._rule)
        if self._keeps_seeds:
            batch[SEEDS_KEY] = torch.from_numpy(seeds_B.view(np.int64))
        return batch

    def at_progress(self, batch: Batch, progress: float) -> Batch:
        """The batch with the share of targets and the row length of a spent share of the budget."""
        probability = self._cfg.probability_at(progress)
        if batch["num_tokens"] > 0 and probability != self._rule.probability:
            ids_BL = torch.where(batch["labels"] == IGNORE_INDEX, batch["input_ids"], batch["labels"]).numpy()
            seeds_B = batch[SEEDS_KEY].numpy().view(np.uint64)
            rule = replace(self._rule, probability=probability)
            batch = {**batch, **self._masked(ids_BL, batch["attention_mask"].numpy(), seeds_B, rule)}
        length = self._cfg.row_length_at(progress)
        if length is not None and length < batch["input_ids"].shape[1]:
            batch = cut_rows(batch, length, self._pad_id)
            batch[POSITIONS_KEY] = torch.nonzero(batch["labels"].flatten() != IGNORE_INDEX).squeeze(1)
        return {key: value for key, value in batch.items() if key != SEEDS_KEY}

    def _masked(self, ids_BL: np.ndarray, attention_BL: np.ndarray, seeds_B: np.ndarray, rule: MaskingRule) -> Batch:
        masked = mask_tokens(ids_BL, attention_BL, seeds_B, self._vocabulary, rule)
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

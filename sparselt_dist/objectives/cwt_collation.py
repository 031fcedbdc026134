"""Batches for contrastive weight tying: masked rows, or rows that predict the next token.

B rows, L positions. Targets are original ids: the mask token is never a target and so never a negative.

The corruption `headless` is that of the published code (Godey et al. 2024, NathanGodey/headless-lm, which takes it from
a common PyTorch package for masked models). It differs from BERT's in four ways: random ids fall on any position, target
or not; a target keeps what this step left there unless it is masked; targets are an exact share, rounded up; and only
[CLS], [SEP] and padding are spared, as they stand after the random step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from sparselt_dist.data.batch import IGNORE_INDEX, Batch, Example, pad_examples
from sparselt_dist.data.randomness import random_bits, random_uniform
from sparselt_dist.errors import ConfigError
from sparselt_dist.objectives.base import Collator, TokenizerInfo
from sparselt_dist.objectives.masking import random_ids
from sparselt_dist.objectives.mlm import POSITIONS_KEY, MLMCollator
from sparselt_dist.objectives.settings import CWTConfig


def make_collator(cfg: CWTConfig, tokenizer: TokenizerInfo) -> Collator:
    """The collator that a configuration asks for.

    Raises:
        ConfigError: the tokenizer cannot serve this masking.
    """
    if cfg.prediction == "causal":
        return NextTokenCollator(tokenizer)
    return HeadlessCollator(cfg, tokenizer) if cfg.corruption == "headless" else BertCollator(cfg, tokenizer)


class BertCollator:
    """Masked rows with the same choice of targets and the same corruption as objective `mlm`."""

    def __init__(self, cfg: CWTConfig, tokenizer: TokenizerInfo) -> None:
        self._collator = MLMCollator(cfg, tokenizer)

    def __call__(self, examples: list[Example]) -> Batch:
        return {key: value for key, value in self._collator(examples).items() if key != POSITIONS_KEY}


class NextTokenCollator:
    """Whole rows; the target of position t is id t + 1, whatever it is; the last position has none."""

    def __init__(self, tokenizer: TokenizerInfo) -> None:
        self._pad_id = tokenizer.pad_id

    def __call__(self, examples: list[Example]) -> Batch:
        ids_BL, attention_BL, _ = pad_examples(examples, self._pad_id)
        labels_BL = np.full_like(ids_BL, IGNORE_INDEX)
        labels_BL[:, :-1] = np.where(attention_BL[:, 1:] == 1, ids_BL[:, 1:], IGNORE_INDEX)
        return _batch(ids_BL, attention_BL, labels_BL)


@dataclass(frozen=True)
class HeadlessRule:
    """Shares and special ids of the published corruption."""

    target_share: float
    """Of a row's tokens, rounded up."""
    mask_share: float
    """Of targets."""
    random_share: float
    """Of all positions."""
    mask_id: int
    never_drawn: np.ndarray
    """int64: ids that the random step does not write."""
    never_targets: np.ndarray
    """int64: ids that are no targets."""


class HeadlessDraws(NamedTuple):
    """What decides, each [B, L]: uniform numbers in [0, 1), and uniform ids int64."""

    random_step_BL: np.ndarray
    random_ids_BL: np.ndarray
    target_BL: np.ndarray
    mask_BL: np.ndarray


class HeadlessMasked(NamedTuple):
    """Each [B, L]."""

    input_ids_BL: np.ndarray
    """int64: what the model sees."""
    copy_BL: np.ndarray
    """int64: the ids after the random step, before the mask token."""
    targets_BL: np.ndarray
    """bool."""


def headless_corruption(
    ids_BL: np.ndarray, attention_BL: np.ndarray, draws: HeadlessDraws, rule: HeadlessRule
) -> HeadlessMasked:
    """The published corruption as a pure function of its draws; padding is never touched.

    Targets of a row with n tokens of which e are eligible: rank the eligible positions by `draws.target_BL`, largest
    first; of the first M = ceil(p n) ranks keep those r for which at most ceil(p e) of the row's first r + 1 positions
    are eligible. Without special tokens these are exactly M targets; every special token at the row's beginning lets one
    more in, up to M.
    """
    attended_BL = attention_BL.astype(bool)
    replaced_BL = attended_BL & (draws.random_step_BL < rule.random_share)
    replaced_BL &= ~np.isin(draws.random_ids_BL, rule.never_drawn)
    copy_BL = np.where(replaced_BL, draws.random_ids_BL, ids_BL)
    eligible_BL = attended_BL & ~np.isin(copy_BL, rule.never_targets)
    most_B1 = np.ceil(rule.target_share * attended_BL.sum(axis=1, keepdims=True))
    wanted_B1 = np.ceil(rule.target_share * eligible_BL.sum(axis=1, keepdims=True))
    used_BL = (eligible_BL.cumsum(axis=1) <= wanted_B1) & (np.arange(ids_BL.shape[1]) < most_B1)
    order_BL = np.argsort(np.where(eligible_BL, -draws.target_BL, 1.0), axis=1, kind="stable")
    targets_BL = np.zeros(ids_BL.shape, dtype=bool)
    np.put_along_axis(targets_BL, order_BL, used_BL, axis=1)
    targets_BL &= eligible_BL
    masked_BL = targets_BL & (draws.mask_BL < rule.mask_share)
    return HeadlessMasked(np.where(masked_BL, rule.mask_id, copy_BL), copy_BL, targets_BL)


class HeadlessCollator:
    """Masked rows with the corruption of the published code."""

    def __init__(self, cfg: CWTConfig, tokenizer: TokenizerInfo) -> None:
        """Raises ConfigError: the tokenizer has no mask token."""
        if tokenizer.mask_id is None:
            raise ConfigError(
                "objective: the tokenizer has no mask token, expected one ([MASK] or <mask>); prepare the shards with a "
                "tokenizer that has it, or set objective.prediction=causal"
            )
        spared = [tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id]
        self._pad_id = tokenizer.pad_id
        self._vocab_size = tokenizer.vocab_size
        self._labels_after_random_step = cfg.labels_after_random_step
        self._rule = HeadlessRule(
            target_share=cfg.mlm_probability,
            mask_share=cfg.mask_share,
            random_share=cfg.random_share,
            mask_id=tokenizer.mask_id,
            never_drawn=np.array(tokenizer.special_ids, dtype=np.int64),
            never_targets=np.array([number for number in spared if number is not None], dtype=np.int64),
        )

    def __call__(self, examples: list[Example]) -> Batch:
        ids_BL, attention_BL, seeds_B = pad_examples(examples, self._pad_id)
        length = ids_BL.shape[1]
        draws = HeadlessDraws(
            random_step_BL=random_uniform(seeds_B, length, "headless random step"),
            random_ids_BL=random_ids(random_bits(seeds_B, length, "headless random id"), self._vocab_size),
            target_BL=random_uniform(seeds_B, length, "headless target"),
            mask_BL=random_uniform(seeds_B, length, "headless mask"),
        )
        masked = headless_corruption(ids_BL, attention_BL, draws, self._rule)
        predicted_BL = masked.copy_BL if self._labels_after_random_step else ids_BL
        batch = _batch(masked.input_ids_BL, attention_BL, np.where(masked.targets_BL, predicted_BL, IGNORE_INDEX))
        if self._labels_after_random_step:
            batch["original_ids"] = torch.from_numpy(ids_BL)
        return batch


def _batch(input_ids_BL: np.ndarray, attention_BL: np.ndarray, labels_BL: np.ndarray) -> Batch:
    return {
        "input_ids": torch.from_numpy(input_ids_BL),
        "attention_mask": torch.from_numpy(attention_BL),
        "labels": torch.from_numpy(labels_BL),
        "num_targets": torch.tensor(int((labels_BL != IGNORE_INDEX).sum())),
        "num_tokens": torch.tensor(int(attention_BL.sum())),
    }

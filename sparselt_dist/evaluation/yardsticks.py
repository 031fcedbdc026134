"""Measures that compare runs whatever they were trained on, for losses of different objectives cannot be compared.

- `yardstick/masked_ce` (nats) and `yardstick/masked_accuracy`: masked tokens of held-out rows, predicted through a head
  recovered for the purpose on the frozen backbone (`head_recovery.py`);
- `yardstick/unigram_ce`: the floor of the first, the same targets under the unigram distribution of the training shards;
- `yardstick/probe_accuracy`: telling replaced from original tokens by the frozen hidden states (`probe.py`), and
  `yardstick/majority_accuracy`, its floor.

Rows, masks, replacements and the order of training are fixed by constants and the shards: neither the objective nor the
run's seed plays a part, so two runs on the same shards answer the same questions. Measured on samples (`Size`), not
on all of the held-out text; compare only figures of one size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sparselt_dist.data.batch import IGNORE_INDEX, Example
from sparselt_dist.evaluation.features import MAX_LENGTH, Corrupted, chunks, count_unigrams, hidden_at, read_examples
from sparselt_dist.evaluation.head_recovery import recover_head
from sparselt_dist.evaluation.probe import probe_accuracy, replaced_rows
from sparselt_dist.objectives.base import Collator, TokenizerInfo, get_objective
from sparselt_dist.objectives.settings import MLMConfig

if TYPE_CHECKING:
    from sparselt_dist.data.shards import ShardFolder
    from sparselt_dist.models.backbone import Backbone

_SEED = 20230905  # of the order in which the recovered head sees its targets
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Size:
    """How much is read and trained. The defaults are those of every run's closing report."""

    heldout_tokens: int = 32_768  # each for masked tokens and for the probe
    training_tokens: int = 65_536  # for the recovered head
    probe_tokens: int = 16_384  # for the probe's training
    counted_tokens: int = 4_194_304  # for the unigram distribution
    head_steps: int = 160


def run_yardsticks(
    backbone: Backbone,
    folder_train: ShardFolder,
    folder_validation: ShardFolder,
    tokenizer: TokenizerInfo,
    *,
    device: torch.device,
    size: Size | None = None,
) -> dict[str, float]:
    """All yardsticks by name. Without a mask token the three masked ones are left out and the log says so.

    The backbone keeps its weights, its train or evaluation mode and the global random state.
    """
    size = size or Size()
    counts_V = count_unigrams(
        folder_train, tokenizer.vocab_size, tokenizer.special_ids, max_tokens=size.counted_tokens
    )
    samples = _Samples(folder_train, folder_validation, _longest(backbone))
    results = _probe(backbone, samples, counts_V, tokenizer, device, size)
    if tokenizer.mask_id is None:
        _LOG.warning("yardstick/masked_ce, masked_accuracy and unigram_ce are left out: the tokenizer has no mask token")
        return results
    return results | _masked(backbone, samples, counts_V, tokenizer, device, size)


@dataclass(frozen=True)
class _Samples:
    """Where rows are read."""

    train: ShardFolder
    validation: ShardFolder
    max_length: int

    def read(self, purpose: str, train_tokens: int, heldout_tokens: int) -> tuple[list[Example], list[Example]]:
        return (
            read_examples(self.train, f"{purpose} train", max_tokens=train_tokens, max_length=self.max_length),
            read_examples(self.validation, f"{purpose} heldout", max_tokens=heldout_tokens, max_length=self.max_length),
        )


def _longest(backbone: Backbone) -> int:
    """Positions a row may have; less than `MAX_LENGTH` only where the model cannot take them."""
    positions = getattr(backbone.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return MAX_LENGTH
    # RoBERTa and its kin number positions from pad_token_id + 1, so their last ones cannot be used.
    reserved = 2 if "roberta" in str(backbone.config.model_type) else 0
    return min(MAX_LENGTH, positions - reserved)


def _probe(
    backbone: Backbone, samples: _Samples, counts_V: np.ndarray, tokenizer: TokenizerInfo, device: torch.device, size: Size
) -> dict[str, float]:
    unigram_V = counts_V + 1.0
    unigram_V[list(tokenizer.special_ids)] = 0.0
    fitted, tested = (
        hidden_at(backbone, replaced_rows(examples, unigram_V, tokenizer.special_ids, tokenizer.pad_id), device)
        for examples in samples.read("probe", size.probe_tokens, size.heldout_tokens // 2)
    )
    accuracy, majority = probe_accuracy(fitted, tested)
    return {"yardstick/probe_accuracy": accuracy, "yardstick/majority_accuracy": majority}


def _masked(
    backbone: Backbone, samples: _Samples, counts_V: np.ndarray, tokenizer: TokenizerInfo, device: torch.device, size: Size
) -> dict[str, float]:
    mlm = get_objective("mlm")
    collator = mlm.build_collator(MLMConfig(masking="exact"), tokenizer)
    train, heldout = samples.read("masked", size.training_tokens, size.heldout_tokens)
    train_hidden_ND, train_targets_N = hidden_at(backbone, masked_rows(train, collator), device)
    hidden_ND, targets_N = hidden_at(backbone, masked_rows(heldout, collator), device)
    log_unigram_V = torch.from_numpy(np.log((counts_V + 1) / (counts_V + 1).sum())).float().to(device)
    table_VE = _embedding_table(backbone, tokenizer.vocab_size).to(device)
    head = recover_head(train_hidden_ND, train_targets_N, table_VE, log_unigram_V, steps=size.head_steps, seed=_SEED)
    score = head.score(hidden_ND, targets_N)
    return {
        "yardstick/masked_ce": score.cross_entropy,
        "yardstick/masked_accuracy": score.accuracy,
        "yardstick/unigram_ce": -log_unigram_V[targets_N].double().mean().item(),
    }


def masked_rows(examples: list[Example], collator: Collator) -> Iterator[Corrupted]:
    """Rows with masked tokens, corrupted by an MLM collator; answers are the ids that stood there."""
    for chunk in chunks(examples):
        batch = collator(chunk)
        labels = batch["labels"].flatten()
        places_N = torch.nonzero(labels != IGNORE_INDEX).squeeze(1)
        yield Corrupted(batch["input_ids"], batch["attention_mask"], places_N, labels[places_N])


def _embedding_table(backbone: Backbone, vocab_size: int) -> Tensor:
    """The input embeddings fp32 [V, E] of the tokenizer's ids; a model may have more rows."""
    embedding = backbone.get_input_embeddings()
    return embedding.weight.detach()[:vocab_size].float()

"""Measures that compare runs whatever they were trained on, for losses of different objectives cannot be compared.

- `yardstick/masked_ce` (nats) and `yardstick/masked_accuracy`: masked tokens of held-out rows, predicted through a head
  recovered for the purpose on the frozen backbone (`head_recovery.py`);
- `yardstick/unigram_ce`: the floor of the first, the same targets under the unigrams of the training shards;
- `yardstick/probe_accuracy`: telling replaced from original tokens by the frozen hidden states (`probe.py`), and
  `yardstick/majority_accuracy`, its floor.

Rows, masks, replacements and the order of training are fixed by constants and the shards: neither the objective nor the
run's seed plays a part, so two runs on the same shards answer the same questions. Measured on samples (`Size`), not
on all of the held-out text; compare only figures of one size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sparselt_dist.data.batch import IGNORE_INDEX, Example
from sparselt_dist.evaluation.features import (
    MAX_LENGTH,
    Corrupted,
    chunks,
    count_unigrams,
    documents_of,
    hidden_at,
    read_examples,
)
from sparselt_dist.evaluation.head_recovery import recover_head
from sparselt_dist.evaluation.probe import probe_accuracy, replaced_rows
from sparselt_dist.models.exporting import longest_input
from sparselt_dist.objectives.base import Collator, TokenizerInfo, get_objective
from sparselt_dist.objectives.settings import MLMConfig

if TYPE_CHECKING:
    from sparselt_dist.data.corpora import Corpora
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
    train: Corpora,
    validation: Corpora,
    tokenizer: TokenizerInfo,
    *,
    device: torch.device,
    size: Size | None = None,
) -> dict[str, float]:
    """All yardsticks by name. Without a mask token the three masked ones are left out and the log says so.

    The backbone, which lies on `device`, keeps its weights and its training or evaluation mode, and the global random
    state stays as it was.
    """
    size = size or Size()
    counts_V = count_unigrams(train, tokenizer.vocab_size, tokenizer.special_ids, max_tokens=size.counted_tokens)
    setting = _Setting(backbone, train, validation, tokenizer, counts_V, device, size)
    results = _probe(setting)
    if tokenizer.mask_id is None:
        _LOG.warning("no yardstick/masked_ce, masked_accuracy and unigram_ce: the tokenizer has no mask token")
        return results
    return results | _masked(setting)


@dataclass(frozen=True)
class _Setting:
    """What is measured, on which rows."""

    backbone: Backbone
    train: Corpora
    validation: Corpora
    tokenizer: TokenizerInfo
    counts_V: np.ndarray
    device: torch.device
    size: Size

    def read(self, purpose: str, train_tokens: int, heldout_tokens: int) -> tuple[list[Example], list[Example]]:
        """Training and held-out rows, shortened only where the model cannot take them as they are."""
        length = min(MAX_LENGTH, longest_input(self.backbone.config) or MAX_LENGTH)
        return (
            read_examples(self.train, f"{purpose} train", max_tokens=train_tokens, max_length=length),
            read_examples(self.validation, f"{purpose} heldout", max_tokens=heldout_tokens, max_length=length),
        )

    def hidden_at(self, corrupted: Iterable[Corrupted]) -> tuple[Tensor, Tensor]:
        return hidden_at(self.backbone, corrupted, self.device)


def _probe(setting: _Setting) -> dict[str, float]:
    special_ids, pad_id = setting.tokenizer.special_ids, setting.tokenizer.pad_id
    unigram_V = setting.counts_V + 1.0
    unigram_V[list(special_ids)] = 0.0
    fitted, tested = (
        setting.hidden_at(replaced_rows(examples, unigram_V, special_ids, pad_id))
        for examples in setting.read("probe", setting.size.probe_tokens, setting.size.heldout_tokens // 2)
    )
    accuracy, majority = probe_accuracy(fitted, tested)
    return {"yardstick/probe_accuracy": accuracy, "yardstick/majority_accuracy": majority}


def _masked(setting: _Setting) -> dict[str, float]:
    collator = get_objective("mlm").build_collator(MLMConfig(masking="exact"), setting.tokenizer)
    (train_hidden_ND, train_targets_N), (hidden_ND, targets_N) = (
        setting.hidden_at(masked_rows(examples, collator))
        for examples in setting.read("masked", setting.size.training_tokens, setting.size.heldout_tokens)
    )
    smoothed_V = setting.counts_V + 1.0
    log_unigram_V = torch.from_numpy(np.log(smoothed_V / smoothed_V.sum())).float().to(setting.device)
    table_VE = _embedding_table(setting.backbone, setting.tokenizer.vocab_size)
    head = recover_head(
        train_hidden_ND, train_targets_N, table_VE, log_unigram_V, steps=setting.size.head_steps, seed=_SEED
    )
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
        documents = documents_of(batch["input_ids"], chunk)
        yield Corrupted(batch["input_ids"], batch["attention_mask"], places_N, labels[places_N], documents)


def _embedding_table(backbone: Backbone, vocab_size: int) -> Tensor:
    """The input embeddings fp32 [V, E] of the tokenizer's ids; a model may have more rows."""
    weight: Tensor = backbone.get_input_embeddings().get_parameter("weight")
    return weight.detach()[:vocab_size].float()

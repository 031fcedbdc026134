"""Sparse latent typing (Ren et al. 2022, EMNLP, "Language Model Pre-Training with Sparse Latent Typing").

Two encoder passes a batch, the corrupted ids and the clean ones, run as one of twice the rows. The corrupted pass serves
masked language modelling; the states of the clean one are typed, gated by their type vectors and decoded again:

    loss = MLM + alpha * reconstruction + beta * sparsity + gamma * diversity.

The numbers follow the official code (github.com/renll/SparseLT); what differs is listed in docs/objectives/slt.md. The
noise is a pure function of the examples' seeds, temperature and LayerDrop are pure functions of the step, and each term
is weighed by its own count (targets, predicted tokens, tokens), so the update does not depend on the split.

B rows, T positions, S = T - 1 decoder positions, D hidden size, K types, N targets, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselt_dist.data.batch import IGNORE_INDEX, Batch, Example
from sparselt_dist.data.randomness import combine, purpose_key
from sparselt_dist.errors import ConfigError
from sparselt_dist.objectives.base import API_VERSION, Collator, SplitLossOutput, TokenizerInfo, register
from sparselt_dist.objectives.cost import Workload
from sparselt_dist.objectives.gumbel import gumbel_noise
from sparselt_dist.objectives.latent_typing import (
    LatentTyper,
    TyperOutput,
    best_types,
    diversity_loss,
    diversity_of,
    linearised,
    mean_probabilities,
    perplexity_of,
    sparsity_loss,
    sparsity_of,
    temperature_at,
    temperature_of_budget,
)
from sparselt_dist.objectives.linear_cross_entropy import CrossEntropy, head_cross_entropy
from sparselt_dist.objectives.mlm import POSITIONS_KEY, MLMCollator
from sparselt_dist.objectives.reconstruction import ReconstructionDecoder, check_embeddings
from sparselt_dist.objectives.settings import SLTConfig

__all__ = [
    "SLT",
    "LatentTyper",
    "SLTCollator",
    "SLTModule",
    "TyperOutput",
    "diversity_loss",
    "sparsity_loss",
    "temperature_at",
]

TARGETS_KEY = "slt/targets"  # [N] int64: places of the MLM targets in the flattened [B * T] batch, ascending
PREDICTED_KEY = (
    "slt/predicted"  # [N] int64: places in the flattened [B * S] decoder input whose next token is predicted
)
NUM_PREDICTED_KEY = "slt/num_predicted"  # [] int64: how many
SEEDS_KEY = "slt/seeds"  # [B] int64: the bits of the examples' seeds

_PACKED_KEYS = ("segment_ids", "position_ids")


class SLTCollator:
    """The rows of masked language modelling, and beside them the clean ids and what the decoder predicts."""

    def __init__(self, cfg: SLTConfig, tokenizer: TokenizerInfo) -> None:
        """Raises ConfigError: the tokenizer cannot serve this masking."""
        self._mask = MLMCollator(cfg, tokenizer)

    def __call__(self, examples: list[Example]) -> Batch:
        batch = self._mask(examples)
        batch[TARGETS_KEY] = batch.pop(POSITIONS_KEY)
        labels_BT = batch["labels"]
        predicted_N = torch.from_numpy(np.flatnonzero(_predicted(examples, batch["attention_mask"].numpy())))
        return {
            **batch,
            "original_ids": torch.where(labels_BT != IGNORE_INDEX, labels_BT, batch["input_ids"]),
            PREDICTED_KEY: predicted_N,
            NUM_PREDICTED_KEY: torch.tensor(len(predicted_N)),
            SEEDS_KEY: torch.from_numpy(
                np.array([example["seed"] for example in examples], dtype=np.uint64).view("i8")
            ),
        }


def _predicted(examples: list[Example], attention_BT: np.ndarray) -> np.ndarray:
    """bool [B, S]: the next token is real and of the same document."""
    predicted_BS: np.ndarray = attention_BT[:, 1:].astype(bool)
    for row, example in enumerate(examples):
        if "documents" in example:
            predicted_BS[row, np.cumsum(example["documents"])[:-1] - 1] = False
    return predicted_BS


class _Fit(NamedTuple):
    """Cross-entropy over N targets: its sum, the number of targets and the number of hits."""

    total: Tensor
    targets: Tensor
    correct: Tensor

    @property
    def mean(self) -> Tensor:
        return self.total / self.targets.clamp(min=1)


def _fit(found: CrossEntropy, labels_N: Tensor) -> _Fit:
    return _Fit(found.total, (labels_N != IGNORE_INDEX).sum(), found.correct)


class _Regularisers(NamedTuple):
    """Both regularisers and what the journal tells of the types."""

    sparsity: Tensor
    diversity: Tensor
    perplexity: Tensor
    types_used: Tensor


class SLTModule(nn.Module):
    """Typer, decoder and the loss; the vocabulary head belongs to the backbone."""

    counts = (NUM_PREDICTED_KEY,)

    def __init__(self, cfg: SLTConfig, backbone: nn.Module) -> None:
        super().__init__()
        self._cfg = cfg
        self.typer = LatentTyper(cast(int, backbone.hidden_size), cfg.num_types)
        self.decoder = ReconstructionDecoder(
            backbone, dropout=cfg.decoder_dropout, embedding_passes=cfg.decoder_embedding_passes
        )
        self._drop_key = combine(purpose_key("slt layer drop"), torch.initial_seed())  # the run's seed, on all ranks
        self._is_chunked = cfg.cross_entropy == "chunked"
        self._whole_S: Tensor | None = None
        self.set_progress(0, 0.0)

    def set_progress(self, step: int, progress: float) -> None:
        """Temperature and LayerDrop of the step; nothing is counted up."""
        cfg = self._cfg
        if cfg.temperature_schedule == "steps" or (cfg.first_step_at_floor and step == 0):
            self.temperature = temperature_at(
                step,
                start=cfg.temperature_start,
                floor=cfg.temperature_floor,
                decay=cfg.temperature_decay,
                first_at_floor=cfg.first_step_at_floor,
            )
        else:
            self.temperature = temperature_of_budget(
                progress, start=cfg.temperature_start, floor=cfg.temperature_floor, share=cfg.temperature_decay_share
            )
        self.keep_layer = combine(self._drop_key, step) / 2.0**64 >= cfg.decoder_layer_drop

    # ---------------------------------------------------------------- sums over the whole step

    @property
    def needs_statistics(self) -> bool:
        """Whether a step of several micro-batches must sum `statistics` first."""
        return self._cfg.regularizer_scope == "global-batch"

    def statistics(self, backbone: nn.Module, batch: Batch) -> Tensor:
        """[1 + 2K] float64: tokens, sums of the K probabilities, tokens of each of the K types."""
        packed = {key: batch[key] for key in _PACKED_KEYS if key in batch}
        clean_BTD = backbone(batch["original_ids"], attention_mask=batch["attention_mask"], **packed)
        scores_BTK, probabilities_BTK = self.typer.distribution(clean_BTD, batch["attention_mask"])
        counted_BT = _counted(batch)
        sums_K = (probabilities_BTK.double() * counted_BT[..., None]).sum(dim=(0, 1))
        used_K = _type_counts(best_types(scores_BTK), counted_BT, self.typer.num_types)
        return torch.cat([counted_BT.sum()[None].double(), sums_K, used_K.double()])

    def set_statistics(self, total: Tensor | None) -> None:
        """The sum of `statistics` over the step's micro-batches on all ranks; None: there is but one."""
        self._whole_S = None if total is None else total.detach()

    # ---------------------------------------------------------------- the loss

    def forward(self, backbone: nn.Module, batch: Batch) -> SplitLossOutput:
        corrupted_BTD, clean_BTD = _encode(backbone, batch)
        typed = self._type(clean_BTD, batch)
        masked = self._masked(backbone, corrupted_BTD, batch)
        rebuilt = self._rebuilt(backbone, clean_BTD * typed.type_vectors, batch)
        counted_BT = _counted(batch)
        regularisers = self._regularise(typed, counted_BT)
        cfg = self._cfg
        terms = {
            "num_targets": masked.mean,
            NUM_PREDICTED_KEY: cfg.reconstruction_weight * rebuilt.mean,
            "num_tokens": cfg.sparsity_weight * regularisers.sparsity + cfg.diversity_weight * regularisers.diversity,
        }
        loss = torch.stack(list(terms.values())).sum()
        metrics = self._metrics(loss, masked, rebuilt, typed, regularisers, counted_BT)
        return SplitLossOutput(loss=loss, metrics=metrics, terms=terms)

    def _type(self, clean_BTD: Tensor, batch: Batch) -> TyperOutput:
        noise_BTK = None
        if self.training and SEEDS_KEY in batch:
            noise_BTK = gumbel_noise(batch[SEEDS_KEY], clean_BTD.shape[1], self.typer.num_types)
        typed: TyperOutput = self.typer(
            clean_BTD,
            batch["attention_mask"],
            temperature=self.temperature,
            gumbel_noise=noise_BTK,
            hard=self._cfg.draw == "straight-through",
        )
        return typed

    def _masked(self, backbone: nn.Module, corrupted_BTD: Tensor, batch: Batch) -> _Fit:
        labels = batch["labels"].flatten()
        places_N = batch[TARGETS_KEY] if TARGETS_KEY in batch else torch.nonzero(labels != IGNORE_INDEX).squeeze(1)
        states_ND = corrupted_BTD.flatten(0, 1).index_select(0, places_N)
        labels_N = labels.index_select(0, places_N)
        # With N = 0 this is a zero attached to every parameter, which ZeRO and DDP rely on; so is the decoder's.
        return _fit(head_cross_entropy(backbone, states_ND, labels_N, chunked=self._is_chunked), labels_N)

    def _rebuilt(self, backbone: nn.Module, memory_BTD: Tensor, batch: Batch) -> _Fit:
        packed = {key: batch[key] for key in _PACKED_KEYS if key in batch}
        ids_BT = batch["original_ids"]
        states_BSD = self.decoder(
            backbone,
            ids_BT[:, :-1],
            memory_BTD,
            batch["attention_mask"],
            keep_layer=self.keep_layer or not self.training,
            **packed,
        )
        labels = _next_tokens(batch).flatten()
        places_N = batch[PREDICTED_KEY] if PREDICTED_KEY in batch else torch.nonzero(labels != IGNORE_INDEX).squeeze(1)
        states_ND = states_BSD.flatten(0, 1).index_select(0, places_N)
        labels_N = labels.index_select(0, places_N)
        return _fit(self.decoder.cross_entropy(backbone, states_ND, labels_N, chunked=self._is_chunked), labels_N)

    def _regularise(self, typed: TyperOutput, counted_BT: Tensor) -> _Regularisers:
        cfg = self._cfg
        own_K = mean_probabilities(typed.probabilities, counted_BT)
        used_K = _type_counts(typed.types, counted_BT, self.typer.num_types)
        whole_K = own_K
        if self.training and self.needs_statistics and self._whole_S is not None:
            tokens, sums_K, used_K = self._whole_S.split([1, self.typer.num_types, self.typer.num_types])
            whole_K = (sums_K / tokens.clamp(min=1)).to(own_K.dtype)
        if cfg.sparsity_form == "log-mean":
            sparsity = linearised(sparsity_of, whole_K, own_K)
        else:
            sparsity = sparsity_loss(typed.probabilities, counted_BT, form="mean-log")
        diversity = linearised(partial(diversity_of, form=cfg.diversity_form), whole_K, own_K)
        is_any = counted_BT.any()  # without a token both are zero, and attached
        return _Regularisers(
            is_any * sparsity, is_any * diversity, perplexity_of(whole_K).detach(), (used_K[1:] > 0).sum()
        )

    def _metrics(
        self,
        loss: Tensor,
        masked: _Fit,
        rebuilt: _Fit,
        typed: TyperOutput,
        regularisers: _Regularisers,
        counted_BT: Tensor,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums and counts; what is not a mean over tokens is averaged over micro-batches, weighted by their tokens."""
        tokens, one = counted_BT.sum(), counted_BT.any().to(loss.dtype)
        return {
            "loss": (loss.detach() * tokens, tokens),
            "mlm_loss": (masked.total.detach(), masked.targets),
            "mlm_accuracy": (masked.correct, masked.targets),
            "reconstruction_loss": (rebuilt.total.detach(), rebuilt.targets),
            "reconstruction_accuracy": (rebuilt.correct, rebuilt.targets),
            "sparsity_loss": (regularisers.sparsity.detach() * tokens, tokens),
            "diversity_loss": (regularisers.diversity.detach() * tokens, tokens),
            "null_probability": ((typed.probabilities[..., 0].detach() * counted_BT).sum(), tokens),
            "null_share": (((typed.types == 0) & counted_BT).sum(), tokens),
            "types_used": (regularisers.types_used * one, one),
            "type_perplexity": (regularisers.perplexity * tokens, tokens),
            "temperature": (one * self.temperature, one),
        }


def _encode(backbone: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states [B, T, D] of the corrupted and of the clean ids, in one pass of 2B rows."""
    twice = {key: torch.cat([batch[key], batch[key]]) for key in ("attention_mask", *_PACKED_KEYS) if key in batch}
    hidden_BTD: Tensor = backbone(torch.cat([batch["input_ids"], batch["original_ids"]]), **twice)
    corrupted_BTD, clean_BTD = hidden_BTD.chunk(2)
    return corrupted_BTD, clean_BTD


def _counted(batch: Batch) -> Tensor:
    """bool [B, T]: tokens that are learned from; none in a batch that says it counts none."""
    return batch["attention_mask"].bool() & (batch["num_tokens"] > 0)


def _next_tokens(batch: Batch) -> Tensor:
    """Labels [B, S]: the token behind each decoder position; none behind the last, nor into another document."""
    is_label_BS = _counted(batch)[:, 1:]
    if "segment_ids" in batch:
        is_label_BS = is_label_BS & (batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1])
    return torch.where(is_label_BS, batch["original_ids"][:, 1:], IGNORE_INDEX)


def _type_counts(types_BT: Tensor, counted_BT: Tensor, num_types: int) -> Tensor:
    """[K] int64: tokens of each type."""
    return (F.one_hot(types_BT, num_types) * counted_BT[..., None]).sum(dim=(0, 1))


class SLT:
    """The plug-in."""

    name = "slt"
    api_version = API_VERSION
    config_cls = SLTConfig

    def needs_lm_head(self, cfg: SLTConfig) -> bool:
        return True

    def flops_per_token(self, cfg: SLTConfig, work: Workload) -> float:
        """FLOPs of a token: two passes and MLM's head, typer, decoder layer, and all next tokens over the vocabulary."""
        typer = 2 * work.scores(cfg.num_types)  # scores of the types, and the mixture of their vectors
        width, inner = work.hidden_size, work.inner_size
        layer = 8 * work.scores(width) + 2 * work.scores(inner) + 2 * 12.0 * width * work.mean_length
        rebuilt = (1 - 1 / max(work.mean_length, 1.0)) * (layer + work.scores(work.vocab_size))
        again = cfg.regularizer_scope == "global-batch" and work.micro_batches > 1
        statistics = (work.encoding + work.scores(cfg.num_types)) / 3 if again else 0.0  # forward alone
        return 2 * work.encoding + work.head + typer + rebuilt + statistics

    def build_collator(self, cfg: SLTConfig, tokenizer: TokenizerInfo) -> Collator:
        return SLTCollator(cfg, tokenizer)

    def build_module(self, cfg: SLTConfig, backbone: nn.Module) -> nn.Module:
        """Raises ConfigError: a causal model, or one whose embeddings the decoder cannot share."""
        if getattr(backbone, "is_causal", False):
            raise ConfigError(
                "objective.name: found 'slt' with a causal model, whose states say nothing of what follows; expected an "
                "encoder: set model.architecture to crammed-bert, bert, roberta or modernbert"
            )
        check_embeddings(backbone)
        return SLTModule(cfg, backbone)


register(SLT())

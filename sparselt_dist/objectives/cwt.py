"""Contrastive weight tying: "headless" language models (Godey, de la Clergerie, Sagot, ICLR 2024, arXiv 2309.08351).

At every target the final hidden state must have a larger dot product with the input embedding of its target than with
those of the other targets. With A the hidden states and Y = E[y] the raw rows of the input table (no normalisation, no
projection, gradients through both):

    s_ij = <A_i, Y_j> / temperature,    loss = mean_i ( log sum_j exp(s_ij) - s_ii ),    1 <= i, j <= K

(their equation lacks the logarithm that their code has). Equal ids stay in the denominator as often as they occur, so
with n_v targets of id v and the U distinct ids as columns the same numbers follow from

    z_iv = <A_i, E[v]> / temperature + log n_v,    loss = mean_i ( cross-entropy of z_i + log n_(y_i) ).

Scores and their log-sum-exp are float32 or wider whatever autocast says, and the loss never holds a tensor of the
vocabulary's size. The table is reached through its module, so it may be partitioned (ZeRO-3).

K targets, C columns, U distinct ids, N targets with a head, B rows, L positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sparselt_dist.data.batch import IGNORE_INDEX, Batch
from sparselt_dist.errors import ConfigError
from sparselt_dist.objectives.base import API_VERSION, Collator, LossOutput, TokenizerInfo, register
from sparselt_dist.objectives.cost import Workload, expected_distinct
from sparselt_dist.objectives.cwt_collation import make_collator
from sparselt_dist.objectives.cwt_head import RecoveredHead
from sparselt_dist.objectives.linear_cross_entropy import (
    CrossEntropy,
    chunked_cross_entropy,
    head_cross_entropy,
    rows_at_once,
)
from sparselt_dist.objectives.settings import CWTConfig

_PACKED_KEYS = ("segment_ids", "position_ids")

Metrics = dict[str, tuple[Tensor, Tensor]]


# --- the loss --------------------------------------------------------------------------------------------------------


def contrastive_weight_tying_loss(
    predictions_KD: Tensor, targets_KD: Tensor, *, temperature: float = 1.0, eps: float = 0.0
) -> Tensor:
    """Mean loss over K targets, all K x K scores at once; scalar, float32 or wider. K = 0 gives an attached zero.

    Args:
        targets_KD: the rows of the input table of each prediction's target, repeated where ids repeat.
        eps: added to the denominator, in the log domain; the official code has 1e-9, which shows only in rows whose
            scores all lie below about -7.
    """
    predictions_KD, targets_KD = _wide(predictions_KD, targets_KD)
    count = len(predictions_KD)
    if count == 0:
        return predictions_KD.sum() + targets_KD.sum()
    with torch.autocast(device_type=predictions_KD.device.type, enabled=False):
        scores_KK = (predictions_KD / temperature) @ targets_KD.T
    if eps == 0:
        return F.cross_entropy(scores_KK, torch.arange(count, device=scores_KK.device))
    log_eps = scores_KK.new_tensor(math.log(eps))
    return (torch.logaddexp(scores_KK.logsumexp(dim=1), log_eps) - scores_KK.diagonal()).mean()


def contrastive_weight_tying_loss_from_ids(
    predictions_KD: Tensor, table_VD: Tensor, target_ids_K: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """The same loss and gradients from ids int64 and the input table: a column for each distinct id.

    Scalar, float32 or wider. K = 0 gives an attached zero.
    """
    columns = distinct_columns(target_ids_K)
    contrast = contrast_with(predictions_KD, F.embedding(columns.ids_C, table_VD), columns, temperature=temperature)
    return contrast.total / max(len(target_ids_K), 1)


class Columns(NamedTuple):
    """What the targets of a contrast are told apart from."""

    ids_C: Tensor
    """int64: the id of each column."""
    labels_K: Tensor
    """int64: the column of each target."""
    log_multiplicity_C: Tensor
    """float64: log of how often a column stands in the denominator."""
    log_counts_K: Tensor
    """float64: log of how often each target's id occurs among all targets."""


def distinct_columns(all_ids: Tensor, first: int = 0, count: int | None = None) -> Columns:
    """A column for each distinct id, weighted by its count; the targets are `count` ids from `first` on."""
    ids_U, places, counts_U = torch.unique(all_ids, return_inverse=True, return_counts=True)
    labels_K = places[first : None if count is None else first + count]
    log_counts_U = counts_U.double().log()
    return Columns(ids_U, labels_K, log_counts_U, log_counts_U[labels_K])


def repeated_columns(all_ids: Tensor, first: int = 0, count: int | None = None) -> Columns:
    """A column for each target of all, equal ids included: the K x K form."""
    distinct = distinct_columns(all_ids, first, count)
    labels_K = torch.arange(first, first + len(distinct.labels_K), device=all_ids.device)
    once_C = torch.zeros(len(all_ids), dtype=torch.float64, device=all_ids.device)
    return Columns(all_ids, labels_K, once_C, distinct.log_counts_K)


class Contrast(NamedTuple):
    """Sums over K targets."""

    total: Tensor
    """The loss, float32 or wider."""
    in_batch: Tensor
    """Cross-entropy over the distinct ids: the loss less log n of each target; detached."""
    correct: Tensor
    """int64: targets found."""
    largest: Tensor
    """The largest score of all, log multiplicity included."""


def contrast_with(predictions_KD: Tensor, rows_CD: Tensor, columns: Columns, *, temperature: float = 1.0) -> Contrast:
    """The loss over given columns, whose rows of the table are `rows_CD`; scores exist a piece at a time."""
    predictions_KD, rows_CD = _wide(predictions_KD, rows_CD)
    bias_C = columns.log_multiplicity_C.to(rows_CD.dtype)

    def scores(piece_KD: Tensor) -> Tensor:
        with torch.autocast(device_type=piece_KD.device.type, enabled=False):
            return torch.addmm(bias_C, piece_KD / temperature, rows_CD.T)

    found: CrossEntropy = chunked_cross_entropy(
        scores, predictions_KD, columns.labels_K, shared=[rows_CD], rows=rows_at_once(len(rows_CD))
    )
    # A column that stands for n equal targets offers n times the probability of one of them.
    lost = columns.log_multiplicity_C[columns.labels_K].sum()
    total = found.total + lost.to(found.total.dtype)
    return Contrast(total, total.detach() - columns.log_counts_K.sum(), found.correct, found.largest)


def _wide(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both in their common type, float32 at least."""
    dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    return first.to(dtype), second.to(dtype)


def gather_ids(ids_K: Tensor) -> tuple[Tensor, int]:
    """The ids int64 of all ranks in their order, and where this rank's begin; alone, its own and 0.

    This is all that ranks must exchange: each looks rows up in its own view of the table, computes the loss of its own
    targets against them, and the usual averaging of gradients over ranks completes the sum. So no gradient passes
    through a collective. All ranks call it together; they may hold different numbers of ids, none included.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ids_K, 0
    own_count = torch.tensor([len(ids_K)], device=ids_K.device)
    counts = [torch.empty_like(own_count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, own_count)
    sizes = [int(count) for count in counts]
    padded = [ids_K.new_empty(max(sizes)) for _ in sizes]
    dist.all_gather(padded, F.pad(ids_K, (0, max(sizes) - len(ids_K))))
    gathered = torch.cat([ids[:size] for ids, size in zip(padded, sizes, strict=True)])
    return gathered, sum(sizes[: dist.get_rank()])


# --- the module ------------------------------------------------------------------------------------------------------


class CWTModule(nn.Module):
    """The weighted sum of contrast and cross-entropy, or, once recovery has begun, the recovered head's cross-entropy."""

    def __init__(self, cfg: CWTConfig, head: RecoveredHead | None) -> None:
        super().__init__()
        self._cfg = cfg
        self.head = head
        self._recovers = False

    def set_progress(self, step: int, progress: float) -> None:
        """Recovery begins at a share of the budget."""
        self._recovers = self._cfg.recover_from is not None and progress >= self._cfg.recover_from

    def exported_head(self, backbone: nn.Module) -> tuple[Tensor, Tensor | None] | None:
        """Matrix [V, D] and bias [V] of the recovered head, for an export; None where there is none (yet)."""
        if self.head is None or not bool(self.head.started):
            return None
        with torch.no_grad():
            return self.head.table_and_bias(_table(backbone))

    def forward(self, backbone: nn.Module, batch: Batch) -> LossOutput:
        packed = {key: batch[key] for key in _PACKED_KEYS if key in batch}
        hidden_BLD = backbone(batch["input_ids"], attention_mask=batch["attention_mask"], **packed)
        labels_BL = batch["labels"]
        positions_K = torch.nonzero(labels_BL.flatten() != IGNORE_INDEX).squeeze(1)
        hidden_KD = hidden_BLD.flatten(0, 1).index_select(0, positions_K)
        labels_K = labels_BL.flatten().index_select(0, positions_K)
        # Contrast is with the original ids, also where cross-entropy predicts those of a corrupted copy.
        originals_K = batch.get("original_ids", labels_BL).flatten().index_select(0, positions_K)
        if self.head is not None and self._is_recovering(self.head, backbone):
            found = self.head(_table(backbone), hidden_KD, labels_K)
            return _output(found.total, len(labels_K), _head_metrics(found, len(labels_K)))
        return self._pretrain(backbone, hidden_KD, labels_K, originals_K)

    def _pretrain(self, backbone: nn.Module, hidden_KD: Tensor, labels_K: Tensor, originals_K: Tensor) -> LossOutput:
        cfg, count = self._cfg, len(labels_K)
        total = hidden_KD.new_zeros((), dtype=torch.float32) if self.head is None else self.head.idle()
        metrics: Metrics = {}
        if cfg.contrastive_weight > 0:
            contrast, columns = self._contrast(backbone, hidden_KD, originals_K)
            total = total + cfg.contrastive_weight * contrast.total
            metrics |= _contrast_metrics(contrast, columns)
        if cfg.cross_entropy_weight > 0:
            found = head_cross_entropy(backbone, hidden_KD, labels_K, chunked=cfg.cross_entropy == "chunked")
            total = total + cfg.cross_entropy_weight * found.total
            metrics |= _head_metrics(found, count)
        return _output(total, count, metrics)

    def _contrast(self, backbone: nn.Module, hidden_KD: Tensor, ids_K: Tensor) -> tuple[Contrast, Columns]:
        gathered, first = gather_ids(ids_K) if self._asks_other_ranks() else (ids_K, 0)
        if self.training and self.head is not None:
            self.head.count(gathered)
        if self._cfg.negatives == "local" or not self.training:
            gathered, first = ids_K, 0
        make_columns = distinct_columns if self._cfg.form == "deduplicated" else repeated_columns
        columns = make_columns(gathered, first, len(ids_K))
        rows_CD = _table(backbone)(columns.ids_C)
        return contrast_with(hidden_KD, rows_CD, columns, temperature=self._cfg.temperature), columns

    def _asks_other_ranks(self) -> bool:
        """In training alone, where all ranks take the same steps; held-out loss is always over local negatives."""
        return self.training and (self._cfg.negatives == "global" or self.head is not None)

    def _is_recovering(self, head: RecoveredHead, backbone: nn.Module) -> bool:
        """Whether the head has taken over; out of training, whether it had when the weights were saved."""
        if not self.training:
            return bool(head.started)
        if self._recovers:
            head.start(_table(backbone))
        return self._recovers


def _table(backbone: nn.Module) -> nn.Module:
    return cast(nn.Module, cast(Any, backbone).get_input_embeddings())


def _output(total: Tensor, count: int, metrics: Metrics) -> LossOutput:
    counted = torch.tensor(count)
    return LossOutput((total / max(count, 1)).float(), {"loss": (total.detach(), counted), **metrics})


def _head_metrics(found: CrossEntropy, count: int) -> Metrics:
    counted = torch.tensor(count)
    return {"cross_entropy": (found.total.detach(), counted), "accuracy": (found.correct, counted)}


def _contrast_metrics(contrast: Contrast, columns: Columns) -> Metrics:
    """Means over targets, and, of micro-batches with any, the mean size of the contrast and the mean largest score.

    Counts stay on the CPU, for handing them to an accelerator would be waited for.
    """
    counted, one = torch.tensor(len(columns.labels_K)), torch.tensor(int(len(columns.labels_K) > 0))
    return {
        "contrastive": (contrast.total.detach(), counted),
        "in_batch_cross_entropy": (contrast.in_batch, counted),
        "in_batch_accuracy": (contrast.correct, counted),
        "targets": (counted, one),
        "columns": (torch.tensor(len(columns.ids_C)) * one, one),
        "largest_score": (contrast.largest, one),
    }


# --- the plug-in -----------------------------------------------------------------------------------------------------


class CWT:
    """The plug-in."""

    name = "cwt"
    api_version = API_VERSION
    config_cls = CWTConfig

    def needs_lm_head(self, cfg: CWTConfig) -> bool:
        return cfg.cross_entropy_weight > 0

    def flops_per_token(self, cfg: CWTConfig, work: Workload) -> float:
        """FLOPs of a token: scores against the columns of the contrast, and the head's for its share of the budget."""
        rivals = (
            work.targets_per_token * work.micro_batch_tokens * (work.world_size if cfg.negatives == "global" else 1)
        )
        columns = rivals if cfg.form == "full" else expected_distinct(rivals, work.vocab_size)
        contrast = work.targets_per_token * work.scores(columns) if cfg.contrastive_weight > 0 else 0.0
        pretraining = contrast + (work.head if cfg.cross_entropy_weight > 0 else 0.0)
        recovery = work.targets_per_token * work.scores(work.vocab_size)
        share = 0.0 if cfg.recover_from is None else 1.0 - cfg.recover_from
        return work.encoding + (1 - share) * pretraining + share * recovery

    def build_collator(self, cfg: CWTConfig, tokenizer: TokenizerInfo) -> Collator:
        return make_collator(cfg, tokenizer)

    def build_module(self, cfg: CWTConfig, backbone: nn.Module) -> nn.Module:
        """Raises ConfigError: the backbone reads in the other direction, or its table is no match for its states."""
        described = cast(Any, backbone)
        _check_direction(cfg, bool(getattr(backbone, "is_causal", False)))
        width = getattr(_table(backbone), "embedding_dim", described.hidden_size)
        if width != described.hidden_size:
            raise ConfigError(
                f"objective.name: found 'cwt' with an input table of width {width} under hidden states of "
                f"{described.hidden_size}, expected equal widths, for their dot products are the scores; choose "
                "another model.architecture"
            )
        if cfg.recover_from is None:
            return CWTModule(cfg, None)
        head = RecoveredHead(
            described.vocab_size,
            described.hidden_size,
            is_copy=cfg.recovered_table == "copy",
            has_bias=cfg.recovered_bias == "log_unigram",
        )
        return CWTModule(cfg, head)


def _check_direction(cfg: CWTConfig, is_causal: bool) -> None:
    if (cfg.prediction == "causal") == is_causal:
        return
    if is_causal:
        raise ConfigError(
            "objective.prediction: found 'masked' with a causal model, whose predictions cannot use what follows a mask; "
            "set objective.prediction=causal, or model.architecture to an encoder such as bert"
        )
    raise ConfigError(
        "objective.prediction: found 'causal' with an encoder, which sees the token it shall predict; "
        "set objective.prediction=masked, or model.architecture to a decoder such as gpt_neox"
    )


register(CWT())

"""Stage 1 of DAC: a submodel for each family of agreements, and the embedding tables that come of it.

A submodel scores how well two sides of a pair fit: cos(U v_h, D v_d) / tau, where v is the weighted mean of the rows of
a side's pieces (those of its root word count double). It is trained to find the true partner among those of the batch, in
both directions, and to tell the relation. Where the pair marks number, a copy in the wrong number is one more false
partner, which is what teaches agreement rather than co-occurrence.

A reconstruction from the abstract of Kuo, Zhang, Chen 2023 (arXiv 2311.04799), which states four submodels that turn
dependency agreements at the chunk level into embeddings, and no more. The contrastive loss is InfoNCE (van den Oord, Li,
Vinyals 2018, equation 4), in both directions.

Shapes: N pairs, F of them with a flipped copy, S pieces a side, V vocabulary, M table width, L labels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselt_dist.errors import DataError
from sparselt_dist.objectives.dac_fit import FitReport, fit, index_batches
from sparselt_dist.objectives.settings import DACConfig

ROOT_WEIGHT = 2.0
INITIAL_STD = 0.02
INITIAL_TEMPERATURE = 0.07
TEMPERATURES = (0.01, 1.0)


class Sides(NamedTuple):
    """One side of each pair: ids [N, S] int64 and weights [N, S], 0 where a side has fewer pieces."""

    ids_NS: Tensor
    weights_NS: Tensor

    def rows(self, chosen: Tensor) -> Sides:
        return Sides(self.ids_NS[chosen], self.weights_NS[chosen])


@dataclass(frozen=True)
class Pairs:
    """Pairs of one family. The flipped copies belong to the pairs `flipped_F`, ascending."""

    heads: Sides
    dependents: Sides
    labels_N: Tensor
    flipped_F: Tensor
    flipped_heads: Sides
    flipped_dependents: Sides

    def __len__(self) -> int:
        return len(self.labels_N)

    def batch(self, chosen: Tensor) -> Pairs:
        """The pairs of these indices [n] int64, in this order, with the copies that belong to them."""
        place = torch.full((len(self),), -1, dtype=torch.int64)
        place[self.flipped_F] = torch.arange(len(self.flipped_F))
        copies = place[chosen]
        has_copy = copies >= 0
        return Pairs(
            self.heads.rows(chosen),
            self.dependents.rows(chosen),
            self.labels_N[chosen],
            torch.nonzero(has_copy).squeeze(1),
            self.flipped_heads.rows(copies[has_copy]),
            self.flipped_dependents.rows(copies[has_copy]),
        )

    def to(self, device: torch.device) -> Pairs:
        sides = (self.heads, self.dependents, self.flipped_heads, self.flipped_dependents)
        heads, dependents, flipped_heads, flipped_dependents = (Sides(*(part.to(device) for part in s)) for s in sides)
        labels_N, flipped_F = self.labels_N.to(device), self.flipped_F.to(device)
        return Pairs(heads, dependents, labels_N, flipped_F, flipped_heads, flipped_dependents)

    def shuffled(self, seed: int) -> Pairs:
        """The same heads with the dependents of other pairs; a control without agreement."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        none = torch.zeros(0, dtype=torch.int64)
        dependents = self.dependents.rows(order)
        return Pairs(self.heads, dependents, self.labels_N, none, self.heads.rows(none), dependents.rows(none))


def pairs_from_arrays(arrays: Mapping[str, np.ndarray], *, words_only: bool = False) -> Pairs:
    """Stored pairs of a family (ragged lists, see `data/pair_files.py`) as padded tensors.

    `words_only` reduces each side to the pieces of its root word, as far as it has any.
    """
    heads, dependents, flipped_heads, flipped_dependents = (
        _padded(arrays[f"{name}_ids"], arrays[f"{name}_ends"], arrays[f"{name}_roots"], words_only)
        for name in ("heads", "dependents", "flipped_heads", "flipped_dependents")
    )
    labels_N = torch.from_numpy(arrays["labels"].astype(np.int64))
    flipped_F = torch.from_numpy(arrays["flipped"].astype(np.int64))
    changed = ~(_equal(heads.rows(flipped_F), flipped_heads) & _equal(dependents.rows(flipped_F), flipped_dependents))
    copies = torch.nonzero(changed).squeeze(1)
    return Pairs(
        heads, dependents, labels_N, flipped_F[copies], flipped_heads.rows(copies), flipped_dependents.rows(copies)
    )


def _equal(first: Sides, second: Sides) -> Tensor:
    """bool [N]: the same pieces count."""
    width = max(first.ids_NS.shape[1], second.ids_NS.shape[1])
    keys = (
        F.pad(side.ids_NS.masked_fill(side.weights_NS == 0, -1), (0, width - side.ids_NS.shape[1]), value=-1)
        for side in (first, second)
    )
    same: Tensor = torch.eq(*keys).all(dim=1)
    return same


def _padded(ids: np.ndarray, ends: np.ndarray, roots: np.ndarray, words_only: bool) -> Sides:
    lengths = np.diff(ends.astype(np.int64), prepend=0)
    width = int(lengths.max(initial=1))
    filled = np.arange(width) < lengths[:, None]
    ids_NS, weights_NS = np.zeros(filled.shape, dtype=np.int64), np.zeros(filled.shape, dtype=np.float32)
    ids_NS[filled] = ids
    weights_NS[filled] = np.where(roots, ROOT_WEIGHT, 1.0)
    if words_only:
        has_root = (weights_NS == ROOT_WEIGHT).any(axis=1, keepdims=True)
        weights_NS[has_root & (weights_NS != ROOT_WEIGHT)] = 0.0
    return Sides(torch.from_numpy(ids_NS), torch.from_numpy(weights_NS))


class SubmodelLoss(NamedTuple):
    """Terms of a batch, fp32 scalars; `total` = contrast + label_weight * label."""

    total: Tensor
    contrast: Tensor
    label: Tensor


class Submodel(nn.Module):
    """The submodel of one family."""

    def __init__(self, vocab_size: int, num_labels: int, width: int = 64, label_weight: float = 0.1) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, width)
        self.head_map = nn.Linear(width, width, bias=False)
        self.dependent_map = nn.Linear(width, width, bias=False)
        self.label_classifier = nn.Linear(3 * width, num_labels)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(INITIAL_TEMPERATURE)))
        self.label_weight = label_weight
        nn.init.normal_(self.table.weight, std=INITIAL_STD)
        nn.init.eye_(self.head_map.weight)
        nn.init.eye_(self.dependent_map.weight)

    def vectors(self, sides: Sides) -> Tensor:
        """Chunk vectors [N, M]: the weighted means of the pieces' rows."""
        weights_NS1 = sides.weights_NS.unsqueeze(-1)
        sums_NM = (self.table(sides.ids_NS) * weights_NS1).sum(dim=1)
        mean_NM: Tensor = sums_NM / weights_NS1.sum(dim=1).clamp(min=1e-9)
        return mean_NM

    def scores(self, heads: Sides, dependents: Sides) -> Tensor:
        """How well each head fits its own dependent [N], temperature included."""
        head_NM = self.head_map(self.vectors(heads))
        dependent_NM = self.dependent_map(self.vectors(dependents))
        return F.cosine_similarity(head_NM, dependent_NM, dim=-1) / self.log_temperature.exp()

    def forward(self, pairs: Pairs) -> SubmodelLoss:
        head_NM = self.head_map(self.vectors(pairs.heads))
        dependent_NM = self.dependent_map(self.vectors(pairs.dependents))
        unit_heads, unit_dependents = F.normalize(head_NM, dim=-1), F.normalize(dependent_NM, dim=-1)
        scores_NN = (unit_heads @ unit_dependents.T / self.log_temperature.exp()).float()
        flipped_N = scores_NN.new_full((len(pairs),), -torch.inf)
        if len(pairs.flipped_F):
            flipped_F = self.scores(pairs.flipped_heads, pairs.flipped_dependents)
            flipped_N = flipped_N.index_copy(0, pairs.flipped_F, flipped_F.float())
        contrast = 0.5 * (
            contrastive_loss(scores_NN, same_sides(pairs.dependents), flipped_N)
            + contrastive_loss(scores_NN.T, same_sides(pairs.heads), flipped_N)
        )
        features_NC = torch.cat([head_NM, dependent_NM, head_NM * dependent_NM], dim=-1)
        label = F.cross_entropy(self.label_classifier(features_NC).float(), pairs.labels_N)
        return SubmodelLoss(contrast + self.label_weight * label, contrast, label)

    @torch.no_grad()
    def keep_temperature_in_range(self) -> None:
        """To be called after each step."""
        self.log_temperature.clamp_(math.log(TEMPERATURES[0]), math.log(TEMPERATURES[1]))


def same_sides(sides: Sides) -> Tensor:
    """bool [N, N]: two pairs have the same pieces on this side."""
    keys_NS = sides.ids_NS.masked_fill(sides.weights_NS == 0, -1)
    number_N = torch.unique(keys_NS, dim=0, return_inverse=True)[1]
    same_NN: Tensor = number_N[:, None] == number_N[None, :]
    return same_NN


def contrastive_loss(scores_NN: Tensor, same_NN: Tensor, flipped_N: Tensor) -> Tensor:
    """Mean cross-entropy of finding column i in row i.

    Columns equal to the true one (`same_NN`) are no candidates but for the true one itself; `flipped_N` is one more
    candidate of each row, -inf where there is none.
    """
    others_NN = same_NN & ~torch.eye(len(scores_NN), dtype=torch.bool, device=scores_NN.device)
    candidates = torch.cat([scores_NN.masked_fill(others_NN, -torch.inf), flipped_N[:, None]], dim=1)
    return F.cross_entropy(candidates, torch.arange(len(scores_NN), device=scores_NN.device))


# --- training --------------------------------------------------------------------------------------------------------


def fit_submodel(
    submodel: Submodel,
    pairs: Pairs,
    cfg: DACConfig,
    *,
    seed: int,
    max_seconds: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
    keep_going: Callable[[], None] = lambda: None,
) -> FitReport:
    """Train a submodel in place on its own device; stops after the configured passes or minutes, or `max_seconds`.

    `keep_going` is called before each step, and may raise. See `dac_fit.py`; the loss it reports is the contrast.

    Raises:
        DataError: there is no pair.
    """
    if not len(pairs):
        raise DataError(
            "objective dac: a family has no pair, expected some thousands; prepare more text, or leave the family out of "
            "objective.families"
        )
    size = min(cfg.stage1_pairs_per_step, len(pairs))

    def losses(chosen: Tensor) -> tuple[Tensor, Tensor]:
        loss = submodel(pairs.batch(chosen).to(submodel.table.weight.device))
        return loss.total, loss.contrast

    return fit(
        submodel,
        index_batches(len(pairs), size, cfg.stage1_max_passes, seed),
        losses,
        cfg,
        total_steps=len(pairs) // size * cfg.stage1_max_passes,
        max_seconds=max_seconds,
        clock=clock,
        after_step=submodel.keep_temperature_in_range,
        keep_going=keep_going,
    )

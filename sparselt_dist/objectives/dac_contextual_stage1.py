"""Stage 1 of DAC's contextual variant: annotated text to the frozen submodels of stage 2, within a number of seconds.

A row is as many whole sentences, one after the other, as fit into 128 pieces; it is masked as in pretraining, anew in every
pass. A reconstruction; see `objectives/dac_contextual.py`.

Shapes: N pieces of the text, S sentences, C rows of the text, B rows of a batch, L positions, M table width, V vocabulary.
"""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparselt_dist.data.batch import IGNORE_INDEX, Example
from sparselt_dist.data.randomness import mix64, random_bits
from sparselt_dist.errors import DataError
from sparselt_dist.objectives.base import TokenizerInfo
from sparselt_dist.objectives.dac_contextual import (
    CLASSES,
    Annotated,
    ContextualSubmodel,
    FrozenSubmodel,
    contextual_states,
    present_pieces,
)
from sparselt_dist.objectives.dac_fit import FitReport, fit, index_batches
from sparselt_dist.objectives.dac_tables import MIN_PAIRS, SCALE
from sparselt_dist.objectives.mlm import MLMCollator
from sparselt_dist.objectives.settings import DACConfig

ROW_PIECES = 128
ROWS_PER_STEP = 64
MEASURED_ROWS = 1024


class AnnotatedText:
    """Text with the classes of one family, in rows of whole sentences that follow each other."""

    def __init__(self, arrays: Mapping[str, np.ndarray], family: str, cfg: DACConfig, tokenizer: TokenizerInfo) -> None:
        """`arrays`: `ids` [N], `ends` [S], `begins` bool [N], `roles_<family>` and `distances_<family>` [N].

        Raises:
            DataError: there is no text.
            ConfigError: the tokenizer cannot serve the masking of `cfg`.
        """
        self._ids_N = arrays["ids"]
        if not len(self._ids_N):
            raise DataError(
                "objective dac: the annotated text is empty, expected some thousand sentences; prepare more text, or set "
                "objective.variant to static"
            )
        names = ("begins", f"roles_{family}", f"distances_{family}")
        self._classes_N3 = np.stack([arrays[name].astype(np.uint8) for name in names], axis=1)
        bounds = list(_row_bounds(arrays["ends"].tolist(), ROW_PIECES))
        self._bounds_C2 = np.array(bounds, dtype=np.int64)
        self._collate = MLMCollator(cfg, tokenizer)
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self._bounds_C2)

    def known_pieces(self) -> Tensor:
        """bool [V]: seen 5 times at least, or the mask, which the text does not hold."""
        known_V = torch.from_numpy(np.bincount(self._ids_N, minlength=self._tokenizer.vocab_size) >= MIN_PAIRS)
        known_V[self._tokenizer.mask_id] = True
        return known_V

    def batch(self, rows: np.ndarray, seeds_B: np.ndarray) -> Annotated:
        """Rows of these numbers, masked as in pretraining by these seeds, uint64 [B]."""
        bounds = self._bounds_C2[rows]
        examples: list[Example] = [
            {"key": "", "ids": self._ids_N[start:stop], "seed": int(seed)}
            for (start, stop), seed in zip(bounds, seeds_B, strict=True)
        ]
        ids_BL = self._collate(examples)["input_ids"]
        places_BL = bounds[:, :1] + np.arange(ids_BL.shape[1])
        filled_BL = places_BL < bounds[:, 1:]
        classes_BL3 = np.full((*ids_BL.shape, len(CLASSES)), IGNORE_INDEX, dtype=np.int64)
        classes_BL3[filled_BL] = self._classes_N3[places_BL[filled_BL]]
        return Annotated(ids_BL, torch.from_numpy(classes_BL3))

    def steps(self, size: int, passes: int, seed: int) -> Iterator[Annotated]:
        """The batches of a training; every pass has its own order and masks."""
        for step, rows in enumerate(index_batches(len(self), size, passes, seed)):
            stream = mix64(np.array([seed])) + np.uint64(step)
            yield self.batch(rows.numpy(), random_bits(stream, size, "stage 1 masks")[0])


def _row_bounds(ends: Sequence[int], width: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of rows: as many whole sentences as fit; a longer one is cut."""
    start = 0
    while start < ends[-1]:
        fitting = bisect.bisect_right(ends, start + width)
        stop = ends[fitting - 1] if fitting and ends[fitting - 1] > start else start + width
        yield start, stop
        start = stop


def fit_contextual(
    submodel: ContextualSubmodel,
    text: AnnotatedText,
    cfg: DACConfig,
    *,
    seed: int,
    max_seconds: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
    keep_going: Callable[[], None] = lambda: None,
    rows_per_step: int = ROWS_PER_STEP,
) -> FitReport:
    """Train a submodel in place on its own device; ends as `fit_submodel` does, after the same passes and minutes."""
    device = submodel.table.weight.device

    def losses(batch: Annotated) -> tuple[Tensor, Tensor]:
        total = submodel(Annotated(*(part.to(device) for part in batch))).total
        return total, total

    size = min(rows_per_step, len(text))
    return fit(
        submodel,
        text.steps(size, cfg.stage1_max_passes, seed),
        losses,
        cfg,
        total_steps=len(text) // size * cfg.stage1_max_passes,
        max_seconds=max_seconds,
        clock=clock,
        keep_going=keep_going,
    )


@torch.no_grad()
def freeze(submodel: ContextualSubmodel, text: AnnotatedText, seed: int) -> FrozenSubmodel:
    """A trained submodel for stage 2, measured on masked rows from all over the text."""
    device = submodel.table.weight.device
    present_V, filters_KTMM = submodel.present_V, submodel.filters_KTMM.detach()
    table_VM = (submodel.table.weight * text.known_pieces().to(device)[:, None]).to(torch.float16)
    rows = np.unique(np.linspace(0, len(text) - 1, MEASURED_ROWS).astype(np.int64))
    count = torch.zeros((), dtype=torch.float64, device=device)
    sums_M, squares_M = torch.zeros(2, table_VM.shape[1], dtype=torch.float64, device=device)
    for chunk in np.array_split(rows, math.ceil(len(rows) / ROWS_PER_STEP)):
        seeds_B = random_bits(mix64(np.array([seed])) + chunk.astype(np.uint64), 1, "stage 1 measure")[:, 0]
        ids_BL = text.batch(chunk, seeds_B).ids_BL.to(device)
        present_BL = present_V[ids_BL]
        rows_BL1M = table_VM[ids_BL].to(filters_KTMM.dtype).unsqueeze(2)
        states_NM = contextual_states(rows_BL1M, filters_KTMM.unsqueeze(2), present_BL)[present_BL].squeeze(1).double()
        count += len(states_NM)
        sums_M += states_NM.sum(dim=0)
        squares_M += states_NM.square().sum(dim=0)
    mean_M = sums_M / count
    root_mean_square = (squares_M / count - mean_M.square()).mean().clamp(min=0).sqrt()
    scale = float(SCALE / root_mean_square.clamp(min=1e-30))
    return FrozenSubmodel(table_VM.cpu(), filters_KTMM.float().cpu().clone(), mean_M.float().cpu(), scale)


@dataclass(frozen=True)
class ContextualStage1:
    """The frozen submodels, in the order of `cfg.families`, and what they took."""

    submodels: list[FrozenSubmodel]
    present_V: Tensor
    reports: dict[str, FitReport]
    seconds: float

    def metrics(self) -> dict[str, float]:
        """For the journal: seconds and steps, and losses in nats (of a family that made a step)."""
        named: dict[str, float] = {"stage1_seconds": self.seconds}
        for family, report in self.reports.items():
            named[f"{family}/steps"] = report.steps
            if math.isfinite(report.loss):
                named[f"{family}/loss"] = report.loss
        return named


def make_submodels(
    arrays: Mapping[str, np.ndarray],
    cfg: DACConfig,
    tokenizer: TokenizerInfo,
    *,
    seed: int,
    max_seconds: float,
    device: torch.device,
    clock: Callable[[], float] = time.monotonic,
    keep_going: Callable[[], None] = lambda: None,
) -> ContextualStage1:
    """Train a submodel for each family on the annotated text and freeze it.

    With `tables: random` none is trained: the control, in which every family has its initial weights.

    Args:
        arrays: see `AnnotatedText`.
        cfg: which families, how long, how to mask.
        tokenizer: of the text.
        seed: of initial weights, order and masks.
        max_seconds: of all families together; what one leaves is shared by those after it.
        device: where submodels are trained.
        clock: in seconds.
        keep_going: called before each step; may raise.

    Raises:
        DataError: there is no text.
    """
    started = clock()
    present_V = present_pieces(tokenizer)
    submodels: list[FrozenSubmodel] = []
    reports: dict[str, FitReport] = {}
    for number, family in enumerate(cfg.families):
        text = AnnotatedText(arrays, family, cfg, tokenizer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + number)
            submodel = ContextualSubmodel(present_V, cfg.table_width).to(device)
        if cfg.tables != "random":
            share = (max_seconds - (clock() - started)) / (len(cfg.families) - number)
            reports[family] = fit_contextual(
                submodel, text, cfg, seed=seed, max_seconds=share, clock=clock, keep_going=keep_going
            )
        submodels.append(freeze(submodel, text, seed))
    return ContextualStage1(submodels, present_V, reports, clock() - started)

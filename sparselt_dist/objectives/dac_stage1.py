"""Stage 1 of DAC as a whole: stored pairs of every family to the tables of stage 2, within a number of seconds.

A reconstruction; see `objectives/dac_submodels.py`. Shapes: N pairs, S pieces of both sides, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparselt_dist.objectives.dac_fit import FitReport
from sparselt_dist.objectives.dac_submodels import Pairs, Submodel, fit_submodel, pairs_from_arrays
from sparselt_dist.objectives.dac_tables import AgreementTable, export_table, permuted_rows, random_rows
from sparselt_dist.objectives.settings import DACConfig, Family


@dataclass(frozen=True)
class StoredFamily:
    """What a family's file holds."""

    arrays: Mapping[str, np.ndarray]
    num_labels: int


@dataclass(frozen=True)
class Stage1:
    """The tables, in the order of `cfg.families`, and what they took."""

    tables: list[AgreementTable]
    reports: dict[Family, FitReport]
    seconds: float

    def metrics(self) -> dict[str, float]:
        """For the journal: seconds and steps, contrast in nats (of a family that made a step), coverage as a share of
        running tokens."""
        named: dict[str, float] = {"stage1_seconds": self.seconds}
        for table, (family, report) in zip(self.tables, self.reports.items(), strict=True):
            named |= {f"{family}/steps": report.steps, f"{family}/coverage": table.coverage}
            if math.isfinite(report.loss):
                named[f"{family}/contrast"] = report.loss
        return named


def make_tables(
    read: Callable[[Family], StoredFamily],
    cfg: DACConfig,
    *,
    frequencies_V: Tensor,
    special_ids: Sequence[int],
    seed: int,
    max_seconds: float,
    device: torch.device,
    clock: Callable[[], float] = time.monotonic,
    keep_going: Callable[[], None] = lambda: None,
) -> Stage1:
    """Train a submodel for each family and export its table, or that of the configured control.

    Args:
        read: the stored pairs of a family; called once each, so that one family is in memory at a time.
        cfg: which families, how long, which control.
        frequencies_V: how often each piece occurs in the training text.
        special_ids: their rows are zero.
        seed: of initial weights, order and controls.
        max_seconds: of all families together; what one leaves is shared by those after it.
        device: where submodels are trained.
        clock: in seconds.
        keep_going: called before each step; may raise.

    Raises:
        DataError: a family has no pairs, or hardly any.
    """
    started = clock()
    tables: list[AgreementTable] = []
    reports: dict[Family, FitReport] = {}
    for number, family in enumerate(cfg.families):
        stored = read(family)
        pairs = pairs_from_arrays(stored.arrays, words_only=cfg.sides == "words")
        if cfg.tables == "shuffled-pairs":
            pairs = pairs.shuffled(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + number)
            submodel = Submodel(len(frequencies_V), stored.num_labels, cfg.table_width, cfg.stage1_label_weight)
        share = (max_seconds - (clock() - started)) / (len(cfg.families) - number)
        reports[family] = fit_submodel(
            submodel.to(device), pairs, cfg, seed=seed, max_seconds=share, clock=clock, keep_going=keep_going
        )
        used_V = pairs_by_piece(pairs, len(frequencies_V))
        table = export_table(submodel.table.weight.cpu(), frequencies_V, used_V, special_ids, family)
        tables.append(_control(table, cfg, frequencies_V, seed + number))
    return Stage1(tables, reports, clock() - started)


def _control(table: AgreementTable, cfg: DACConfig, frequencies_V: Tensor, seed: int) -> AgreementTable:
    if cfg.tables == "random":
        return random_rows(table, seed)
    if cfg.tables == "permuted":
        return permuted_rows(table, frequencies_V, seed)
    return table


def pairs_by_piece(pairs: Pairs, vocab_size: int) -> Tensor:
    """In how many pairs each piece is used, on either side: int64 [V]."""
    sides = (pairs.heads, pairs.dependents)
    ids_NS = torch.cat([side.ids_NS.masked_fill(side.weights_NS == 0, vocab_size) for side in sides], dim=1)
    sorted_NS = ids_NS.sort(dim=1).values
    first_NS = torch.ones_like(sorted_NS, dtype=torch.bool)
    first_NS[:, 1:] = sorted_NS[:, 1:] != sorted_NS[:, :-1]
    return torch.bincount(sorted_NS[first_NS], minlength=vocab_size + 1)[:vocab_size]

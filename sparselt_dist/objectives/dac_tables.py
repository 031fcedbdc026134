"""Agreement tables between the stages of DAC: the export of a submodel's table, and the tables of the control arms.

Stage 2 adds the rows to input embeddings, so what it gets is centred, of the scale of a word embedding, and zero where
nothing was learned: special tokens (the mask among them, so that a masked position has no agreement term) and pieces that
hardly occur in pairs. A reconstruction; see `objectives/dac_submodels.py`.

Shapes: V vocabulary, M table width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparselt_dist.errors import DataError

MIN_PAIRS = 5
SCALE = 0.02
BANDS = 10


@dataclass(frozen=True)
class AgreementTable:
    """A family's table for stage 2."""

    table_VM: Tensor
    """float16"""
    coverage: float
    """Share of running tokens whose row is not zero."""

    @property
    def sha256(self) -> str:
        """Of the bytes of the table."""
        return hashlib.sha256(self.table_VM.cpu().contiguous().numpy().tobytes()).hexdigest()


def export_table(
    table_VM: Tensor, frequencies_V: Tensor, pairs_V: Tensor, special_ids: Sequence[int], family: str
) -> AgreementTable:
    """A submodel's table, made fit for stage 2.

    Args:
        table_VM: as trained.
        frequencies_V: how often each piece occurs in the training text.
        pairs_V: in how many pairs of the family each piece was used.
        special_ids: rows that are zero whatever the counts say.
        family: for the error.

    Rows of special tokens and of pieces in fewer than 5 pairs are 0; over the others, weighted by frequency, the mean is 0
    and the root mean square entry 0.02.

    Raises:
        DataError: no row is left.
    """
    kept_V = pairs_V >= MIN_PAIRS
    kept_V[list(special_ids)] = False
    weights_V = frequencies_V.double() * kept_V
    total = weights_V.sum()
    if total == 0:
        raise DataError(
            f"objective dac, family {family}: no piece of the vocabulary occurs in {MIN_PAIRS} pairs and in the text, expected "
            "some thousands that do; prepare more text, or leave the family out of objective.families"
        )
    rows_VM = table_VM.detach().double()
    shares_V1 = (weights_V / total)[:, None]
    centred_VM = (rows_VM - (shares_V1 * rows_VM).sum(dim=0)) * kept_V[:, None]
    root_mean_square = (shares_V1 * centred_VM.square()).sum().div(rows_VM.shape[1]).sqrt()
    scaled_VM = centred_VM * (SCALE / root_mean_square.clamp(min=1e-30))
    coverage = float(total / frequencies_V.sum())
    return AgreementTable(scaled_VM.to(torch.float16), coverage)


def random_rows(table: AgreementTable, seed: int) -> AgreementTable:
    """Control: each row in a random direction, with its own norm. What is left is the untying alone."""
    rows_VM = table.table_VM.float()
    noise_VM = torch.randn(rows_VM.shape, generator=torch.Generator().manual_seed(seed))
    directions_VM = torch.nn.functional.normalize(noise_VM, dim=-1)
    return AgreementTable((directions_VM * rows_VM.norm(dim=-1, keepdim=True)).to(torch.float16), table.coverage)


def permuted_rows(table: AgreementTable, frequencies_V: Tensor, seed: int) -> AgreementTable:
    """Control: the rows that are not zero change places with those of pieces of like frequency (ten bands)."""
    generator = torch.Generator().manual_seed(seed)
    used = torch.nonzero(table.table_VM.abs().sum(dim=-1)).squeeze(1)
    by_frequency = used[torch.argsort(frequencies_V[used], descending=True, stable=True)]
    permuted_VM = table.table_VM.clone()
    for band in by_frequency.tensor_split(BANDS):
        permuted_VM[band] = table.table_VM[band[torch.randperm(len(band), generator=generator)]]
    return AgreementTable(permuted_VM, table.coverage)

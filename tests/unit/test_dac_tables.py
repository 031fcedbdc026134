"""DAC: tables exported from submodels, their hash, and the control arms' tables."""

import math

import numpy as np
import pytest
import torch

from sparselt_dist.errors import DataError
from sparselt_dist.objectives.dac_tables import AgreementTable, export_table, permuted_rows, random_rows

VOCAB, WIDTH = 50, 8
FREQUENCIES = torch.from_numpy(np.random.default_rng(0).integers(1, 1000, VOCAB))
USED = torch.tensor([4] * 12 + [5] * (VOCAB - 12))
SPECIAL = (0, 1, 2, 3, 49)


def exported() -> AgreementTable:
    rows = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0)) + 3.0
    return export_table(rows, FREQUENCIES, USED.clone(), SPECIAL, "A1")


def test_exported_table() -> None:
    table = exported()
    rows, weights = table.table_VM.double().numpy(), FREQUENCIES.double().numpy()
    zero = np.array([row in SPECIAL or row < 12 for row in range(VOCAB)])
    assert (rows[zero] == 0).all()
    assert (np.abs(rows[~zero]).max(axis=1) > 0).all()
    share = np.where(zero, 0, weights) / weights[~zero].sum()
    np.testing.assert_allclose(share @ rows, 0, atol=1e-5)  # float16 rounds
    assert math.sqrt((share @ rows**2).mean()) == pytest.approx(0.02, rel=1e-3)
    assert table.table_VM.dtype == torch.float16
    assert table.coverage == pytest.approx(weights[~zero].sum() / weights.sum())


def test_hash_of_a_table() -> None:
    table = exported()
    assert table.sha256 == exported().sha256
    changed = table.table_VM.clone()
    changed[20, 0] += 0.01
    assert AgreementTable(changed, table.coverage).sha256 != table.sha256


def test_table_without_rows_is_an_error() -> None:
    with pytest.raises(DataError, match="family A3: no piece"):
        export_table(torch.randn(VOCAB, WIDTH), FREQUENCIES, torch.full((VOCAB,), 4), SPECIAL, "A3")


def test_random_control_keeps_norms() -> None:
    table = exported()
    control = random_rows(table, seed=1)
    norms = table.table_VM.float().norm(dim=1)
    torch.testing.assert_close(control.table_VM.float().norm(dim=1), norms, rtol=2e-3, atol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(control.table_VM.float(), table.table_VM.float())
    assert cosine.abs().max() < 0.99


def test_permuted_control_keeps_rows_within_bands() -> None:
    table = exported()
    control = permuted_rows(table, FREQUENCIES, seed=1).table_VM
    used = torch.nonzero(table.table_VM.abs().sum(1)).squeeze(1)
    order = used[torch.argsort(FREQUENCIES[used], descending=True, stable=True)]
    for band in order.tensor_split(10):
        assert sorted(map(tuple, control[band].tolist())) == sorted(map(tuple, table.table_VM[band].tolist()))
    assert not torch.equal(control, table.table_VM)
    assert (control[0] == 0).all()

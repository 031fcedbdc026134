"""Stage 1 of DAC as a whole: families to tables, within the seconds given."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from sparselt_dist.objectives.dac_stage1 import Stage1, StoredFamily, make_tables, pairs_by_piece
from sparselt_dist.objectives.dac_submodels import Pairs, Submodel, SubmodelLoss, pairs_from_arrays
from sparselt_dist.objectives.settings import DACConfig

VOCAB = 40
CONFIG = DACConfig(table_width=8, stage1_pairs_per_step=32, families=("A1", "A3"))
FREQUENCIES = torch.arange(VOCAB) + 1


def stored(family: str) -> StoredFamily:
    """64 pairs of one or two pieces a side; no copies."""
    rng = np.random.default_rng(ord(family[1]))
    none = np.zeros(0, dtype=np.uint16)
    arrays: dict[str, np.ndarray] = {"labels": rng.integers(0, 3, 64).astype(np.uint16), "flipped": none}
    for name in ("heads", "dependents"):
        lengths = rng.integers(1, 3, 64)
        arrays[f"{name}_ids"] = rng.integers(5, VOCAB, lengths.sum()).astype(np.uint16)
        arrays[f"{name}_ends"] = np.cumsum(lengths).astype(np.uint32)
        arrays[f"{name}_roots"] = np.concatenate([[True] + [False] * (n - 1) for n in lengths])
        for kind in ("ids", "ends", "roots"):
            arrays[f"flipped_{name}_{kind}"] = none
    return StoredFamily(arrays, num_labels=3)


def made(seconds: float = 1e9, clock: Callable[[], float] = lambda: 0.0, **changes: object) -> Stage1:
    return make_tables(
        stored,
        CONFIG.model_copy(update=changes),
        frequencies_V=FREQUENCIES,
        special_ids=range(5),
        seed=3,
        max_seconds=seconds,
        device=torch.device("cpu"),
        clock=clock,
    )


def test_one_table_a_family() -> None:
    result = made()
    assert [table.table_VM.shape for table in result.tables] == [(VOCAB, 8)] * 2
    assert list(result.reports) == ["A1", "A3"]
    assert result.tables[0].sha256 != result.tables[1].sha256
    assert set(result.metrics()) == {
        "stage1_seconds",
        *(f"{f}/{m}" for f in ("A1", "A3") for m in ("contrast", "coverage", "steps")),
    }


def test_the_result_follows_from_the_seed_and_leaves_global_randomness_alone() -> None:
    torch.manual_seed(1)
    first = made()
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    assert [table.sha256 for table in made().tables] == [table.sha256 for table in first.tables]


@pytest.mark.parametrize("control", ["random", "permuted", "shuffled-pairs"])
def test_controls_differ_from_the_trained_tables(control: str) -> None:
    trained, other = made(), made(tables=control)
    assert [table.sha256 for table in trained.tables] != [table.sha256 for table in other.tables]
    if control != "shuffled-pairs":
        for one, two in zip(trained.tables, other.tables, strict=True):
            assert float(one.table_VM.float().norm()) == pytest.approx(float(two.table_VM.float().norm()), rel=1e-3)


def test_root_words_alone_are_another_table() -> None:
    assert made(sides="words").tables[0].sha256 != made().tables[0].sha256


@pytest.mark.parametrize("seconds", [20.5, 61.0])
def test_the_seconds_are_kept(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes a second; unhindered there would be 400."""
    now, forward = [0.0], Submodel.forward

    def slow(submodel: Submodel, pairs: Pairs) -> SubmodelLoss:
        now[0] += 1.0
        return forward(submodel, pairs)

    monkeypatch.setattr(Submodel, "forward", slow)
    result = made(seconds, clock=lambda: now[0], stage1_max_passes=100)
    assert seconds - 2 < result.seconds <= seconds
    assert [report.steps for report in result.reports.values()] == [seconds // 2, seconds // 2 + seconds % 2 // 1]


def test_pieces_are_counted_once_a_pair() -> None:
    arrays = dict(stored("A1").arrays)
    arrays["heads_ids"], arrays["heads_ends"] = np.array([7, 7, 8]), np.array([2, 3])
    arrays["dependents_ids"], arrays["dependents_ends"] = np.array([7, 9, 8]), np.array([1, 3])
    arrays["heads_roots"] = arrays["dependents_roots"] = np.ones(3, dtype=bool)
    arrays["labels"] = np.zeros(2, dtype=np.uint16)
    counts = pairs_by_piece(pairs_from_arrays(arrays), VOCAB)
    assert {piece: int(counts[piece]) for piece in (0, 7, 8, 9)} == {0: 0, 7: 1, 8: 1, 9: 1}
    assert len(counts) == VOCAB

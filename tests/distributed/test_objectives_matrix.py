"""Every objective gives the same samples, losses, terms and weights however a run is split, and after a resume.

Compared with one rank and no accumulation: ZeRO stages 0 to 3, 1, 2 and 4 ranks, accumulation, bf16. Parameters whose
gradient is zero but for rounding (`key.bias`: a softmax does not see a shift of all scores) are left out, for Adam
makes steps of full length of any gradient. So are held-out losses: their diversity and contrast are those of each
micro-batch.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import Finished, run_ranks, slow

from sparselt_dist import checkpoint

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]

STEPS = 4
RESUMED_AT = 2
SLT = "{name: slt, weight: 0.5, decoder_dropout: 0.0, decoder_layer_drop: 0.0}"
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "mlm": ("objective.name=mlm",),
    "slt": ("objective.name=slt", "objective.decoder_dropout=0.0", "objective.decoder_layer_drop=0.0"),
    "cwt-global": ("objective.name=cwt", "objective.negatives=global"),
    "cwt-local": ("objective.name=cwt", "objective.negatives=local"),
    "mix": ("objective.name=mix", "objective.parts=[{name: mlm}, " + SLT + "]"),
}
# Negatives are those of a micro-batch (local) or of one micro-batch of every rank (global): this stays the same.
MICRO_BATCH_OF_LOCAL = 2
SPLITS = [
    (ranks, micro_batch_size, zero_stage)
    for ranks in (1, 2, 4)
    for micro_batch_size in (1, 2, 4, 8)
    if ranks * micro_batch_size <= 8
    for zero_stage in range(4)
]
ALWAYS = {("slt", 2, 2, 3), ("cwt-global", 2, 4, 2), ("mix", 4, 1, 1)}
ALWAYS_RESUMED = {("cwt-local", 2)}
ALWAYS_HALF = {("mix", 3)}

Reference = Callable[..., Finished]


def fits(objective: str, ranks: int, micro_batch_size: int) -> bool:
    """Whether a split leaves the negatives of contrast as they are in the reference."""
    if objective == "cwt-global":
        return ranks * micro_batch_size == 8
    return objective != "cwt-local" or micro_batch_size == MICRO_BATCH_OF_LOCAL


CASES = [
    (objective, *split) if (objective, *split) in ALWAYS else slow(objective, *split)
    for objective in OBJECTIVES
    for split in SPLITS
    if fits(objective, *split[:2])
]


def assert_equal_runs(ours: Finished, theirs: Finished, *, relative: float, half: bool = False) -> None:
    """The same samples, losses and terms; where nothing is rounded to half precision, the same weights."""
    assert ours.code == theirs.code == 0, ours.output + theirs.output
    assert [line["step"] for line in ours.journal] == [line["step"] for line in theirs.journal] != []
    for mine, other in zip(ours.journal, theirs.journal, strict=True):
        assert mine["batch_digest"] == other["batch_digest"]
        terms = [name for name in other if name.endswith(("_loss", "/loss")) and not name.startswith("eval")]
        expected_terms = {name: pytest.approx(other[name], rel=relative) for name in terms}
        assert {name: mine.get(name) for name in terms} == expected_terms
    if half:
        return
    weights, expected = ours.weights(), theirs.weights()
    assert weights.keys() == expected.keys()
    for name in (name for name in expected if not name.endswith("key.bias")):
        torch.testing.assert_close(
            weights[name], expected[name], rtol=1e-4, atol=5e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def reference(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """One rank, all samples of a step in one micro-batch; for local negatives, in micro-batches of the same size."""

    @functools.cache
    def _run(objective: str) -> Finished:
        micro_batch_size = MICRO_BATCH_OF_LOCAL if objective == "cwt-local" else 8
        settings = (*OBJECTIVES[objective], f"budget.max_steps={STEPS}", f"train.micro_batch_size={micro_batch_size}")
        return run_ranks(1, shards, tmp_path_factory.mktemp(objective), *settings)

    return _run


@pytest.mark.parametrize(("objective", "ranks", "micro_batch_size", "zero_stage"), CASES)
def test_any_split_is_the_run_of_one_rank(
    shards: Path,
    tmp_path: Path,
    reference: Reference,
    objective: str,
    ranks: int,
    micro_batch_size: int,
    zero_stage: int,
) -> None:
    settings = (f"train.micro_batch_size={micro_batch_size}", f"train.zero_stage={zero_stage}")
    split = run_ranks(ranks, shards, tmp_path, *OBJECTIVES[objective], f"budget.max_steps={STEPS}", *settings)
    assert_equal_runs(split, reference(objective), relative=2e-5)


@pytest.mark.parametrize(
    ("objective", "zero_stage"),
    [
        (objective, stage) if (objective, stage) in ALWAYS_RESUMED else slow(objective, stage)
        for objective in OBJECTIVES
        for stage in range(4)
    ],
)
def test_a_resume_on_other_ranks_is_the_run_of_one_rank(
    shards: Path, tmp_path: Path, reference: Reference, objective: str, zero_stage: int
) -> None:
    """Two ranks save in the middle; four ranks of another ZeRO stage continue."""
    whole = reference(objective)
    settings = (*OBJECTIVES[objective], f"budget.max_steps={STEPS}", f"checkpoint.every_steps={RESUMED_AT}")
    micro_batch_size = 4 if objective == "cwt-global" else MICRO_BATCH_OF_LOCAL
    first = run_ranks(
        *(2, shards, tmp_path / "run", *settings),
        *(f"train.micro_batch_size={micro_batch_size}", f"train.zero_stage={zero_stage}"),
    )
    assert first.code == 0, first.output
    shutil.rmtree(first.folder / "checkpoints" / checkpoint.folder_name(STEPS))
    micro_batch_size = 8 // 4
    resumed = run_ranks(
        *(4, shards, first.folder, *settings),
        *(f"train.micro_batch_size={micro_batch_size}", f"train.zero_stage={3 - zero_stage}"),
        flags=("--resume", "must"),
    )
    assert f"at step {RESUMED_AT}" in resumed.output, resumed.output
    assert_equal_runs(resumed, whole, relative=2e-5)


@pytest.mark.parametrize(
    ("objective", "zero_stage"),
    [
        (objective, stage) if (objective, stage) in ALWAYS_HALF else slow(objective, stage)
        for objective in OBJECTIVES
        for stage in range(4)
    ],
)
def test_bf16_stays_near_fp32(
    shards: Path, tmp_path: Path, reference: Reference, objective: str, zero_stage: int
) -> None:
    micro_batch_size = 4 if objective == "cwt-global" else MICRO_BATCH_OF_LOCAL
    settings = (f"train.micro_batch_size={micro_batch_size}", f"train.zero_stage={zero_stage}", "train.precision=bf16")
    half = run_ranks(2, shards, tmp_path, *OBJECTIVES[objective], f"budget.max_steps={STEPS}", *settings)
    assert_equal_runs(half, reference(objective), relative=3e-2, half=True)

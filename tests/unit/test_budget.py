"""Schedules, the batch ramp and the budget's arithmetic."""

import math

import pytest

from sparselt_dist.budget import SCHEDULES, Budget, batch_size_at, lr_multiplier
from sparselt_dist.config import BudgetSection

TRIANGLE_2 = [0.25 + 0.05 * i for i in range(16)] + [0.8, 0.6, 0.4, 0.2, 0.0]


def test_triangle2_at_21_points() -> None:
    values = [lr_multiplier("budget-triangle2", 0.05 * i) for i in range(21)]
    assert values == pytest.approx(TRIANGLE_2, abs=5e-6)


def test_triangle1_starts_at_half_and_peaks_at_three_quarters() -> None:
    assert [lr_multiplier("budget-triangle1", x) for x in (0, 0.375, 0.75, 0.875, 1)] == pytest.approx(
        [0.5, 0.75, 1, 0.5, 0]
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("budget-constant", [1.0] * 21),
        ("budget-linear", [1 - i / 20 for i in range(21)]),
        ("budget-cosine", [(1 + math.cos(math.pi * i / 20)) / 2 for i in range(21)]),
        ("budget-triangle1", [0.5 + i / 30 for i in range(16)] + [0.8, 0.6, 0.4, 0.2, 0.0]),
    ],
)
def test_the_other_budget_schedules_at_21_points(name: str, expected: list[float]) -> None:
    assert [lr_multiplier(name, i / 20) for i in range(21)] == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name.startswith("budget-")])
def test_budget_schedules_are_zero_past_the_deadline(name: str) -> None:
    assert lr_multiplier(name, 1.001) == 0.0


@pytest.mark.parametrize("name", [name for name in SCHEDULES if not name.startswith("budget-")])
def test_warmup_and_floor(name: str) -> None:
    assert lr_multiplier(name, 0.0, warmup=0.1) == 0.0
    assert lr_multiplier(name, 0.05, warmup=0.1) == pytest.approx(0.5)
    assert lr_multiplier(name, 0.1, warmup=0.1) == pytest.approx(1.0)
    assert lr_multiplier(name, 1.0, warmup=0.1, min_lr_ratio=0.1) == pytest.approx(1.0 if name == "constant" else 0.1)


def test_shapes_in_the_middle() -> None:
    assert lr_multiplier("cosine", 0.25) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert lr_multiplier("linear", 0.25) == pytest.approx(0.75)
    assert lr_multiplier("wsd", 0.8, decay=0.2) == 1.0
    assert lr_multiplier("wsd", 0.85, decay=0.2) == pytest.approx(0.5)
    of_the_clock = Budget(None, None, 100.0).fraction(steps=7, tokens=9, seconds=85.0)
    assert lr_multiplier("wsd", of_the_clock, decay=0.2) == pytest.approx(0.5)


def test_unknown_schedule_names_the_choices() -> None:
    with pytest.raises(ValueError, match="cosine"):
        lr_multiplier("cosin", 0.5)


def test_ramp_at_five_per_cent_steps() -> None:
    expected = [128, 768, 1408, 2176, 2816, 3456, 4224, 4864, 5504, 6272, 6912, 7552] + [8192] * 9
    assert [batch_size_at(i / 20, micro_batch_size=128, target=8192) for i in range(21)] == expected


@pytest.mark.parametrize("micro", [128, 256, 512])
def test_ramp_at_five_per_cent_steps_in_whole_numbers(micro: int) -> None:
    expected = [min((45_000 * i * 8192 // 540_000 // micro + 1) * micro, 8192) for i in range(21)]
    assert [batch_size_at(i / 20, micro_batch_size=micro, target=8192) for i in range(21)] == expected


@pytest.mark.parametrize("micro", [128, 256, 512])
def test_ramp_grows_in_whole_micro_batches_to_the_target(micro: int) -> None:
    sizes = [batch_size_at(i / 997, micro_batch_size=micro, target=8192) for i in range(998)]
    assert sizes == sorted(sizes) and sizes[0] == micro and sizes[-1] == 8192
    assert all(size % micro == 0 for size in sizes)


def test_the_furthest_spent_limit_counts() -> None:
    budget = Budget.from_section(BudgetSection(max_steps=100, max_tokens=1000, max_hours=1.0))
    assert budget.fraction(steps=10, tokens=500, seconds=360) == 0.5
    assert not budget.spent(steps=99, tokens=999, seconds=3599)
    assert budget.spent(steps=100, tokens=0, seconds=0)
    assert budget.spent(steps=0, tokens=1000, seconds=0)
    assert budget.spent(steps=0, tokens=0, seconds=3600)


def test_a_prelude_counts_and_schedules_run_on_what_it_leaves() -> None:
    budget = Budget.from_section(BudgetSection(max_steps=None, max_hours=1.0), prelude_seconds=600.0)
    assert [budget.fraction(steps=9, tokens=9, seconds=s) for s in (600, 2100, 3600)] == [0.0, 0.5, 1.0]
    assert budget.spent(steps=0, tokens=0, seconds=3600.0) and not budget.spent(steps=0, tokens=0, seconds=3599.0)
    assert lr_multiplier("budget-triangle2", budget.fraction(steps=0, tokens=0, seconds=3600.0)) == 0.0
    assert Budget(None, None, 60.0, prelude_seconds=60.0).spent(steps=0, tokens=0, seconds=60.0)


def test_budgets_of_steps_and_tokens_know_no_prelude() -> None:
    assert Budget(10, None, None, prelude_seconds=600.0).fraction(steps=5, tokens=0, seconds=605.0) == 0.5
    assert Budget(None, 100, None, prelude_seconds=600.0).fraction(steps=5, tokens=25, seconds=605.0) == 0.25


def test_schedules_end_before_the_reserve() -> None:
    budget = Budget(None, None, 100.0, prelude_seconds=10.0, reserve_seconds=10.0)
    assert [budget.fraction(steps=9, tokens=9, seconds=s) for s in (10, 50, 90, 95)] == [0.0, 0.5, 1.0, 1.0]

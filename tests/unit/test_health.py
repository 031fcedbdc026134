"""Which rank is slow, what is a leak, when a run has slowed down."""

from __future__ import annotations

import pytest

from sparselt_dist.health import LEAK_LOOKS, SPEED_LOOKS, LeakWatch, SpeedWatch, leak, slow_ranks


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        ([0.10, 0.10], []),
        ([0.10, 0.16], [1]),
        ([0.16, 0.10, 0.10, 0.10], [0]),
        ([0.10, 0.14], []),
        ([0.0001, 0.0009], []),  # too little to matter
        ([0.5], []),
    ],
)
def test_a_rank_is_slow_beside_the_median(seconds: list[float], slow: list[int]) -> None:
    assert slow_ranks(seconds) == slow


def test_a_leak_is_a_steady_rise_and_no_step_and_no_saw_tooth() -> None:
    assert leak([1 + 0.05 * look for look in range(LEAK_LOOKS)]) == pytest.approx(0.45)
    assert leak([1.0, *[2.0] * (LEAK_LOOKS - 1)]) is None
    assert leak([1.0 + (look % 2) for look in range(LEAK_LOOKS)]) is None
    assert leak([40 + 0.05 * look for look in range(LEAK_LOOKS)]) is None  # about one per cent
    assert leak([1.0, 2.0, 3.0]) is None


@pytest.mark.parametrize("gib_a_look", [0.05, 0.001])
def test_a_leak_is_found_however_slow_it_is_and_told_once(gib_a_look: float) -> None:
    watch = LeakWatch()
    told = [watch.add([1.0, 1.0 + gib_a_look * look]) for look in range(600)]
    ((rank, grown),) = (pair for each in told for pair in each.items())
    assert rank == 1 and 0.25 < grown < 0.5


def test_a_slow_down_is_said_once_until_it_is_over() -> None:
    watch = SpeedWatch()
    phases = [1.0] * SPEED_LOOKS + [1.7] * 6 + [1.0] * 6 + [2.0] * 6
    told = [ratio for ratio in map(watch.add, phases) if ratio is not None]
    assert told == pytest.approx([1.7, 2.0])

"""The guard that compares a run's loss with its profile's reference."""

from pathlib import Path

import pytest

from sparselt_dist.config_loading import list_profiles, load_config
from sparselt_dist.errors import ConfigError
from sparselt_dist.expected_curve import ExpectedCurve

POINTS = [(0.1, 6.0, 0.1), (0.5, 4.0, 0.1), (1.0, 3.0, 0.3)]


def test_the_reference_is_joined_by_straight_lines_and_ends_where_it_ends() -> None:
    curve = ExpectedCurve(POINTS)
    assert curve.expected(0.3) == pytest.approx((5.0, 0.1))
    assert curve.expected(0.75) == pytest.approx((3.5, 0.2))
    assert curve.expected(1.0) == pytest.approx((3.0, 0.3))
    assert curve.expected(0.05) is None and curve.compare(0.05, 99.0) == ({}, None)


def test_it_warns_once_each_time_the_loss_goes_out() -> None:
    curve, warnings = ExpectedCurve(POINTS), []
    for number, offset in enumerate([0.0] * 6 + [1.0] * 12 + [0.0] * 12 + [-1.0] * 6):
        share = 0.1 + 0.01 * number
        figures, warning = curve.compare(share, 6.0 - 5.0 * (share - 0.1) + offset)
        assert figures["expected/loss"] == pytest.approx(6.0 - 5.0 * (share - 0.1))
        warnings += [warning] if warning else []
    assert len(warnings) == 2 and "sigma above" in warnings[0] and "sigma below" in warnings[1]


def test_a_wrong_reference_is_refused() -> None:
    for points in ("[[0.5, 4, 0.1]]", "[[0.5, 4, 0.1], [0.5, 3, 0.1]]", "[[0, 4, 0.1], [1, 3, 0]]"):
        with pytest.raises(ConfigError, match=r"log.expected_loss: .*shares rising"):
            load_config(["quickstart"], [f"log.expected_loss={points}"])


def test_references_of_the_shipped_profiles_can_be_read() -> None:
    for name in list_profiles():
        points = load_config([name], ["model.init_from=null"]).log.expected_loss
        if points is not None:
            assert ExpectedCurve(points).expected(points[0][0]) is not None


def test_a_reference_goes_where_a_later_layer_changes_the_recipe(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("log: {expected_loss: [[0, 5, 1], [1, 4, 1]]}\noptim: {peak_lr: 1.0e-2}\n")
    names = ["quickstart", str(mine)]
    assert load_config(names).log.expected_loss == [(0, 5, 1), (1, 4, 1)]
    neutral = ["run.name=x", "run.seed=4", "train.micro_batch_size=8", "prepare.output_dir=/tmp/x", "log.every_steps=1"]
    assert load_config(names, neutral).log.expected_loss is not None
    for change in ("optim.peak_lr=1e-3", "objective.name=cwt", "budget.max_steps=7", "data.train=elsewhere"):
        assert load_config(names, [*neutral, change]).log.expected_loss is None

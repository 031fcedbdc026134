"""The table of `train.profile`."""

from pathlib import Path

import torch

from sparselt_dist.profiling import TABLE, TRACE, WARM_UP_STEPS, StepProfile, phase_table


def test_the_phases_of_the_table_add_up() -> None:
    table = phase_table(4, 2, {"forward": 1.0, "backward": 2.0, "data": 0.0, "log": 1.0, "prelude": 0.0})
    rows = dict(line.rsplit(maxsplit=3)[:2] for line in table.splitlines()[3:])
    assert "steps 4 to 5" in table and "2.0000 s a step" in table
    assert rows == {"backward": "1.0000", "forward": "0.5000", "log": "0.5000", "data wait": "0.0000"}


def test_steps_after_the_first_ones_are_traced(tmp_path: Path) -> None:
    profile = StepProfile(tmp_path / "profile", 2)
    told = []
    for step in range(1, WARM_UP_STEPS + 4):
        torch.ones(8, 8) @ torch.ones(8, 8)
        told.append(profile.after_step(step, {"forward": 2.0 * step, "log": 1.0 * step}))
    assert [bool(text) for text in told] == [False] * (WARM_UP_STEPS + 1) + [True, False]
    assert "steps 4 to 5" in (told[-2] or "") and "3.0000 s a step" in (told[-2] or "")
    written = (tmp_path / "profile" / TABLE).read_text()
    assert "aten::matmul" in written and (tmp_path / "profile" / TRACE).stat().st_size > 1000
    assert profile.finish({}) is None


def test_a_run_that_ends_early_keeps_what_was_traced(tmp_path: Path) -> None:
    profile = StepProfile(tmp_path, 9)
    assert profile.finish({}) is None and not list(tmp_path.iterdir())
    for step in range(1, WARM_UP_STEPS + 2):
        profile.after_step(step, {"forward": 2.0 * step})
    text = profile.finish({"forward": 10.0}) or ""
    assert f"steps {WARM_UP_STEPS + 1} to {WARM_UP_STEPS + 1}" in text

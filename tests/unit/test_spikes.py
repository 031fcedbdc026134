"""What is a spike, and where the stream goes on when its data is left out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from sparselt_dist.config import TrainSection
from sparselt_dist.errors import CheckpointError
from sparselt_dist.spikes import (
    LEAST,
    MOST_REWINDS,
    WINDOW,
    RewindRun,
    SpikeWatch,
    advanced,
    drawn_between,
    merged,
    read_left_out,
    shifted,
    sigmas_above,
    write_left_out,
)

NOISE = np.random.default_rng(0).normal(3.0, 0.1, 400).tolist()


def never() -> int | None:
    """A run that only warns must not wait for its saves."""
    raise AssertionError


def answer(saved: int | None) -> Callable[[], int | None]:
    return lambda: saved


def watch(rewinds: int = 0, **keys: object) -> tuple[SpikeWatch, list[float]]:
    losses: list[float] = []
    return SpikeWatch(TrainSection(**keys), losses, rewinds), losses  # type: ignore[arg-type]


def test_sigmas_are_those_of_a_normal_distribution_and_outliers_do_not_move_them() -> None:
    assert sigmas_above(NOISE, 3.5) == pytest.approx(5.0, rel=0.1)
    assert sigmas_above([*NOISE, *[50.0] * 40], 3.5) == pytest.approx(5.0, rel=0.25)
    assert sigmas_above(NOISE[: LEAST - 1], 50.0) == 0.0
    assert sigmas_above([2.0] * LEAST, 2.001) == pytest.approx(0.5)  # not infinitely many


def test_a_falling_loss_has_no_spike_and_a_warning_comes_once() -> None:
    seen, losses = watch()
    falling = [8.0 - 0.01 * step + 0.01 * (step % 3) for step in range(300)]
    assert [seen.look(loss, step, 0, 1, never) for step, loss in enumerate(falling)] == [None] * 300
    assert losses == falling[-WINDOW:]
    told = [seen.look(20.0, 300 + step, 0, 1, never) for step in range(3)]
    assert "step 300: the loss is 20.0000" in str(told[0]) and told[1:] == [None, None]


@pytest.mark.parametrize(("steps", "saved", "begin"), [(1, 0, 156), (4, 0, 144), (4, 150, 150)])
def test_a_rewind_leaves_out_the_last_steps_but_none_before_the_checkpoint(steps: int, saved: int, begin: int) -> None:
    seen, losses = watch(on_spike="rewind", spike_steps=steps)
    for step in range(39):
        assert seen.look(NOISE[step], step, 4 * step, 4 * step + 4, answer(saved)) is None
    with pytest.raises(RewindRun) as spike:
        seen.look(9.0, 39, 156, 160, answer(saved))
    assert spike.value.positions == (begin, 160)
    assert 9.0 not in losses


def test_without_a_checkpoint_or_after_many_rewinds_it_only_warns() -> None:
    for rewinds, saved, reason in ((0, None, "no checkpoint"), (MOST_REWINDS, 0, "often enough")):
        seen, _ = watch(rewinds, on_spike="rewind")
        for loss in NOISE[:40]:
            seen.look(loss, 1, 0, 1, answer(saved))
        assert reason in str(seen.look(9.0, 1, 0, 1, answer(saved)))


def test_positions_jump_over_what_is_left_out_however_the_reading_is_cut() -> None:
    ranges = merged([(40, 48), (8, 12), (12, 16), (44, 50)])
    assert ranges == [[8, 16], [40, 50]]
    whole = shifted(np.arange(60), 0, ranges)
    expected = [p for p in range(100) if not (8 <= p < 16 or 40 <= p < 50)][:60]
    assert whole.tolist() == expected
    position, read = 0, []
    for count in (4, 4, 4, 20, 1, 27):  # each start goes on where the one before ended
        read += shifted(np.arange(position, position + count), position, ranges).tolist()
        after = advanced(position, count, ranges)
        assert drawn_between(0, after, ranges) == len(read)
        position = after
    assert read == expected
    assert all(later > earlier for earlier, later in pairwise(read))


def test_the_note_is_read_back_from_a_checkpoint_on(tmp_path: Path) -> None:
    assert read_left_out(tmp_path, 0) == []
    write_left_out(tmp_path, [[8, 16], [40, 50]])
    assert read_left_out(tmp_path, 16) == [[40, 50]]
    (tmp_path / "left_out.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"left_out\.json: cannot be read"):
        read_left_out(tmp_path, 0)

"""The clock of a run, simulated: it lands on its second, whatever steps, stops and clocks do."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from sparselt_dist import distributed
from sparselt_dist.budget import lr_multiplier
from sparselt_dist.config import Config
from sparselt_dist.distributed import Ranks
from sparselt_dist.landing import NextStep, Pace, RunClock, plan_step, reserve_seconds
from sparselt_dist.timekeeping import Progress, Timekeeper


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "reduce_sum", lambda values: values)


@dataclass
class World:
    """A machine with a clock of its own, and what things take on it."""

    micro: float = 0.3
    update: float = 0.1
    save: float = 0.8
    evaluate: float = 1.2
    first: float = 0.0
    noise: float = 0.0
    now: float = 1000.0
    draw: random.Random = field(default_factory=lambda: random.Random(3))

    def take(self, seconds: float) -> float:
        taken = seconds * (1 + self.noise * self.draw.uniform(-1, 1))
        self.now += taken
        return taken


def keeper(
    world: World, seconds: float, progress: Progress, *, batch: int = 8, ramp: float | None = None
) -> Timekeeper:
    config = Config.model_validate(
        {"budget": {"max_hours": seconds / 3600}, "train": {"global_batch_size": batch, "batch_ramp_end": ramp}}
    )
    device = torch.device("cpu")
    return Timekeeper(config, progress, Ranks(0, 1, 0), micro_batch_size=1, device=device, clock=lambda: world.now)


def train(
    world: World,
    seconds: float,
    progress: Progress | None = None,
    *,
    stop_at: float = float("inf"),
    on_step: Callable[[Timekeeper, NextStep], None] = lambda time, step: None,
    rehearse: bool = True,
) -> tuple[Timekeeper, bool]:
    """What the trainer does with the clock; True if it was stopped."""
    time = keeper(world, seconds, progress or Progress())
    time.start()
    if rehearse:
        time.pace = time.pace._replace(save=world.save, evaluate=world.evaluate)
        time.meet()
    first = world.first
    while (step := time.next_step) is not None:
        on_step(time, step)
        time.pace = time.pace.after_pass(world.take(world.micro * step.micro_steps) + first, step.micro_steps)
        world.now += first
        first = 0.0
        time.agree([])
        taken = world.take(world.update)
        time.progress.step += 1
        time.plan()
        time.pace = time.pace.after_update(taken)
        if time.progress.seconds >= stop_at:
            time.meet()
            return time, True
    time.progress.landed_seconds = seconds
    time.meet()
    world.take(world.save)
    world.take(world.evaluate)
    time.meet()
    return time, False


@pytest.mark.parametrize("seconds", [60.0, 300.0, 3600.0])
@pytest.mark.parametrize("stops", [(), (0.4,), (0.1, 0.5, 0.93)])
def test_save_and_evaluation_end_between_98_and_100_per_cent(seconds: float, stops: tuple[float, ...]) -> None:
    world, progress = World(noise=0.1), Progress()
    for share in stops:
        time, stopped = train(world, seconds, progress, stop_at=share * seconds)
        assert stopped
        world.now += 1e5  # free while it waits
        progress = Progress.from_dict(time.progress.as_dict())
    time, stopped = train(world, seconds, progress)
    assert not stopped and 0.98 * seconds <= time.progress.seconds <= seconds
    assert time.verdict() is None


def test_the_last_step_is_the_shortest_and_at_the_floor() -> None:
    shares, sizes = [], []

    def note(time: Timekeeper, step: NextStep) -> None:
        shares.append(time.share(step))
        sizes.append(step.micro_steps)

    train(World(), 60.0, on_step=note)
    rates = [lr_multiplier("budget-triangle2", share) for share in shares]
    assert rates[0] == 0.25 and rates[-1] == 0.0 and 0 < rates[-2] < 0.3
    assert sizes[:-2] == [8] * (len(sizes) - 2) and sizes[-1] <= 2
    assert shares == sorted(shares)


def test_a_run_that_has_landed_takes_no_further_step_unless_it_gets_more_time() -> None:
    world = World()
    time, _ = train(world, 60.0)
    again = Progress.from_dict(time.progress.as_dict())
    again.seconds = 57.0  # where the last checkpoint was begun
    steps = again.step
    assert train(world, 60.0, again)[0].progress.step == steps
    more = Progress.from_dict(time.progress.as_dict())
    assert train(world, 120.0, more)[0].progress.step > steps


def test_a_clock_that_goes_back_takes_nothing_away() -> None:
    world = World()
    clock = RunClock(5.0, lambda: world.now)
    world.now += 3
    assert clock.seconds() == 8.0
    world.now -= 1000
    assert clock.seconds() == 8.0
    world.now += 2
    assert clock.seconds() == 10.0

    def turn_back(time: Timekeeper, step: NextStep) -> None:
        world.now -= 500.0 if time.progress.step == 7 else 0.0
        seen.append(time.progress.seconds)

    seen: list[float] = []
    time, _ = train(world, 60.0, on_step=turn_back)
    assert seen == sorted(seen) and 58.8 <= time.progress.seconds <= 61.0 + world.micro * 8


def test_the_clock_starts_when_it_is_told_to_and_stands_between_starts() -> None:
    world = World()
    time = keeper(world, 60.0, Progress(step=3, seconds=20.0))
    world.now += 500.0  # loading
    time.start()
    assert time.progress.seconds == 20.0
    world.now += 5.0
    time.meet()
    assert time.progress.seconds == 25.0


@pytest.mark.parametrize("stored", [61.0, 1e9])
def test_more_spent_than_there_is_leaves_no_step(stored: float) -> None:
    time = keeper(World(), 60.0, Progress(step=3, seconds=stored))
    time.start()
    assert time.next_step is None and time.fraction() == 1.0
    assert lr_multiplier("budget-triangle2", time.fraction()) == 0.0


def test_a_budget_shorter_than_a_step_takes_one_step_and_says_that_it_is_late() -> None:
    rates: list[float] = []
    time, _ = train(World(), 2.2, on_step=lambda time, step: rates.append(time.share(step)))
    assert time.progress.step == 1 and rates == [0.0]
    assert "2.3 s after the budget of 2.2 s" in (time.verdict() or "")


def test_a_budget_shorter_than_compilation_takes_one_step() -> None:
    time, _ = train(World(first=90.0), 60.0)
    assert time.progress.step == 1 and "compilation included" in (time.verdict() or "")


def test_a_budget_that_is_mostly_reserve_is_told_of_before_the_first_step() -> None:
    time = keeper(World(), 3.0, Progress())
    time.start()
    assert time.complaint() is None
    time.pace = Pace(save=1.0, evaluate=1.5)
    time.meet()
    assert "2.5 s; lower train.evaluate_samples" in (time.complaint() or "")
    assert time.next_step == NextStep(8), "the first step is always taken"


def test_a_prelude_that_took_all_leaves_no_step() -> None:
    time = keeper(World(), 60.0, Progress(seconds=60.0, prelude_seconds=60.0))
    time.start()
    assert time.next_step is None


def test_a_given_reserve_is_kept() -> None:
    config = Config.model_validate({"budget": {"max_hours": 0.1, "reserve_seconds": 60.0}})
    time = Timekeeper(
        config,
        Progress(step=5, seconds=150.0),
        Ranks(0, 1, 0),
        micro_batch_size=1,
        device=torch.device("cpu"),
        clock=lambda: 0.0,
    )
    time.start()
    assert time.reserve() == 60.0 and time.left() == 150.0 and time.fraction() == 0.5
    assert not time.needs_rehearsal()


def test_the_margin_grows_with_what_is_predicted_and_is_a_hundredth_at_most() -> None:
    assert reserve_seconds(60.0, Pace(save=1.0, evaluate=2.0)) == pytest.approx(3.6)
    assert reserve_seconds(86400.0, Pace(save=10.0, evaluate=20.0, update=0.5)) == pytest.approx(46.5)


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        (10.0, NextStep(4)),
        (3.3, NextStep(2)),  # leaves room for one of a micro-step
        (3.0, NextStep(1)),
        (2.15, NextStep(2, is_last=True)),
        (1.3, NextStep(1, is_last=True)),
        (0.7, NextStep(1, is_last=True)),
        (0.5, None),
        (-1.0, None),
    ],
)
def test_steps_near_the_end_are_cut(left: float, expected: NextStep | None) -> None:
    assert plan_step(left, 4, Pace(micro_step=1.0, update=0.1)) == expected


def test_without_a_pace_a_step_is_taken_whole_while_time_is_left() -> None:
    assert plan_step(0.1, 4, Pace()) == NextStep(4)
    assert plan_step(0.0, 4, Pace()) is None

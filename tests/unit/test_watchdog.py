"""Who holds a run up, whose end is meant for a rank, and which loss is another rank's doing."""

from __future__ import annotations

import os
import socket

import pytest

from sparselt_dist.hang import Report, hang_message, hung_ranks
from sparselt_dist.launcher_watch import LAUNCHER_VARIABLE, Launcher, launcher_mark


def at(phase: str, age: float, step: int = 7, silent: float = 0.5) -> Report:
    return Report(step, phase, age, silent)


@pytest.mark.parametrize(
    ("reports", "behind"),
    [
        ([at("forward", 3), at("communication", 900)], []),  # one gets on
        ([at("data", 901), at("communication", 900)], [0]),
        ([at("communication", 905), at("data", 900)], [1]),
        ([at("backward", 900), at("backward", 950)], [1]),
        ([at("communication", 900, step=8), at("communication", 900, step=7)], [1]),
        ([at("checkpoint", 900), at("communication", 900)], []),  # a save may take longer
        ([at("checkpoint", 3700), at("communication", 3700)], [0]),
        ([at("yardsticks", 9000), at("other", 9000)], []),
        ([at("other", 1, silent=700), at("export", 700)], [0]),  # a second thread speaks in every phase
        ([], []),
    ],
)
def test_a_run_hangs_when_nobody_gets_on_or_one_says_nothing(reports: list[Report], behind: list[int]) -> None:
    assert hung_ranks(dict(enumerate(reports)), 600.0) == behind


def test_the_message_names_rank_machine_step_phase_and_for_how_long() -> None:
    peers = {0: {"host": "a", "pid": 10}, 1: {"host": "b", "pid": 11}}
    text = hang_message([1], {0: at("communication", 600), 1: at("data", 2, silent=601)}, peers, 10)
    assert text.splitlines() == [
        "the run hangs: nothing got on for 10 minutes (train.hang_minutes)",
        "  behind: rank 1 on b (pid 11): step 7, data for 603 s, silent for 601 s",
        "  waits:  rank 0 on a (pid 10): step 7, communication for 600 s",
    ]


def test_a_launcher_is_gone_when_its_process_is() -> None:
    assert not Launcher({LAUNCHER_VARIABLE: launcher_mark()}).is_gone()
    assert Launcher({LAUNCHER_VARIABLE: f"{socket.gethostname()}:{os.getpid()}:another birth"}).is_gone()
    assert not Launcher({LAUNCHER_VARIABLE: "another host:1:2"}).is_gone()
    assert not Launcher({}).is_gone()

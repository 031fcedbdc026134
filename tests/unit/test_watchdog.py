"""Who holds a run up, whose end is meant for a rank, and which loss is another rank's doing."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparselt_dist import watchdog
from sparselt_dist.follower import process_birth
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
    assert Launcher({LAUNCHER_VARIABLE: launcher_mark() + "0"}).is_gone()  # its number is another's by now
    assert not Launcher({LAUNCHER_VARIABLE: "another host:1:2"}).is_gone()
    assert not Launcher({LAUNCHER_VARIABLE: f"{socket.gethostname()}:1:2"}).is_gone()  # of the same name
    assert not Launcher({}).is_gone()


@pytest.mark.parametrize("is_here", [True, False])
def test_only_a_rank_of_this_machine_is_killed(is_here: bool) -> None:
    with subprocess.Popen(["sleep", "30"]) as process:
        host = socket.gethostname() if is_here else "another host"
        watchdog._kill_local([{"host": host, "pid": process.pid, "birth": process_birth(process.pid)}])
        time.sleep(0.2)
        assert (process.poll() is None) != is_here
        process.kill()


NODE_LAUNCHER = """
import os, subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[2]], env={**os.environ, "RANK": "0"})
"""
RANK = """
import os, pathlib, sys, time
from sparselt_dist.launcher_watch import Launcher
launcher, note = Launcher(os.environ), pathlib.Path(sys.argv[1])
note.write_text("up")
deadline = time.monotonic() + 3
while not launcher.is_gone() and time.monotonic() < deadline:
    time.sleep(0.05)
note.write_text("gone" if launcher.is_gone() else "there")
"""


@pytest.mark.parametrize(("mark", "told"), [({LAUNCHER_VARIABLE: "another host:1:2"}, "gone"), ({}, "there")])
def test_a_launcher_elsewhere_is_gone_when_its_ssh_session_is(tmp_path: Path, mark: dict[str, str], told: str) -> None:
    """In sshd's place stands a process that starts a shell; that and the node launcher below it outlive the session."""
    note = tmp_path / "note"
    shell = f"{shlex.join([sys.executable, '-c', NODE_LAUNCHER, RANK, str(note)])}; true"
    session = [sys.executable, "-c", "import subprocess, sys; subprocess.run(['sh', '-c', sys.argv[1]])", shell]
    with subprocess.Popen(session, env={**os.environ, **mark}) as process:
        wait_for(note, "up")
        process.kill()
    wait_for(note, told)


def wait_for(note: Path, text: str) -> None:
    deadline = time.monotonic() + 30
    while not note.exists() or note.read_text() != text:
        assert time.monotonic() < deadline, note.exists() and note.read_text()
        time.sleep(0.02)

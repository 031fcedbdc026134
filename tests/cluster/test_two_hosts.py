"""`deepspeed --hostfile` over ssh between two hosts: they train together, a stop reaches both, and a cut link ends both."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from main_job import journal_steps, main_job_arguments, summary
from two_hosts import TwoHosts, missing, two_hosts

REASON = missing()
pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as running:
        yield running


def command(hosts: TwoHosts, folder: Path, steps: int) -> list[str]:
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in hosts.addresses))
    launch = [sys.executable, "-m", "sparselt_dist.launch", "--hostfile", str(hostfile), "-m", "sparselt_dist.pretrain"]
    return [*launch, *main_job_arguments(folder, steps)]


def test_two_hosts_train_together(hosts: TwoHosts, tmp_path: Path) -> None:
    process = hosts.start(0, *command(hosts, tmp_path, 10), cwd=tmp_path, output=tmp_path / "output")
    assert process.wait(timeout=400) == 0, (tmp_path / "output").read_text()
    assert journal_steps(tmp_path) == list(range(1, 11))
    assert summary(tmp_path)["world_size"] == 2


def test_a_stop_is_saved_on_both_hosts(hosts: TwoHosts, tmp_path: Path) -> None:
    process = hosts.start(0, *command(hosts, tmp_path, 100_000), cwd=tmp_path, output=tmp_path / "output")
    deadline = time.monotonic() + 300
    while len(journal_steps(tmp_path)) < 3:
        assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "output").read_text()
        time.sleep(0.5)
    process.terminate()
    assert process.wait(timeout=200) == 75, (tmp_path / "output").read_text()
    closing = summary(tmp_path)
    assert (closing["status"], closing["steps"]) == ("stopped", journal_steps(tmp_path)[-1])
    for host in (0, 1):
        assert hosts.processes(host, "sparselt_dist.pretrain") == []


def started(hosts: TwoHosts, folder: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """A run on both hosts, at its fifth step or later."""
    launch = [*command(hosts, folder, 100_000), "checkpoint.every_steps=2", *overrides]
    process = hosts.start(0, *launch, cwd=folder, output=folder / "output")
    deadline = time.monotonic() + 300
    while len(journal_steps(folder)) < 5:
        assert time.monotonic() < deadline and process.poll() is None, (folder / "output").read_text()
        time.sleep(0.5)
    return process


def wait_until_nothing_runs(hosts: TwoHosts, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while left := [hosts.processes(host, "sparselt_dist.pretrain") for host in (0, 1)]:
        if not any(left):
            return
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


@pytest.mark.parametrize("victim", ["pdsh -S", "ssh -"])
def test_a_killed_pdsh_or_ssh_ends_the_run_on_both_hosts(hosts: TwoHosts, tmp_path: Path, victim: str) -> None:
    process = started(hosts, tmp_path)
    found = [each for each in hosts.processes(0, victim) if each.name() in ("pdsh", "pdsh.bin", "ssh")]
    assert found
    found[-1].kill()
    assert process.wait(timeout=200) in (1, 75), (tmp_path / "output").read_text()
    wait_until_nothing_runs(hosts)
    assert summary(tmp_path)["status"] == "stopped", (tmp_path / "output").read_text()


def test_a_killed_launcher_ends_the_run_on_both_hosts(hosts: TwoHosts, tmp_path: Path) -> None:
    process = started(hosts, tmp_path)
    for each in hosts.processes(0, "sparselt_dist.launch"):
        each.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    wait_until_nothing_runs(hosts)
    assert summary(tmp_path)["status"] == "stopped", (tmp_path / "output").read_text()


def test_a_stopped_rank_alone_on_its_host_is_killed_there(hosts: TwoHosts, tmp_path: Path) -> None:
    process = started(hosts, tmp_path, "train.hang_minutes=0.2")
    rank = next(each for each in hosts.processes(1, "sparselt_dist.pretrain") if "RANK" in each.environ())
    rank.suspend()
    assert process.wait(timeout=400) == 1, (tmp_path / "output").read_text()
    wait_until_nothing_runs(hosts, seconds=30)
    said = (tmp_path / "output").read_text()
    assert "the run hangs" in said and "ranks on other hosts outlive a failure by 180 s and are killed" in said


def test_a_cut_link_ends_the_run_on_both_hosts(hosts: TwoHosts, tmp_path: Path) -> None:
    """Last of this file, for the cable stays pulled."""
    process = started(hosts, tmp_path, "train.hang_minutes=0.2")
    hosts.pull_the_cable()
    assert process.wait(timeout=200) == 1, (tmp_path / "output").read_text()
    said = (tmp_path / "output").read_text()
    assert "the run hangs: nothing got on for 0.2 minutes" in said
    assert "rank 1 on host1" in said  # by another name, so that no rank takes the other for one that it can kill
    wait_until_nothing_runs(hosts, seconds=60)
    assert any((tmp_path / "run" / "checkpoints").iterdir())

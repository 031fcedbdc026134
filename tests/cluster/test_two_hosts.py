"""`deepspeed --hostfile` over ssh between two hosts: they train together, a stop reaches both, and a cut link ends both."""

from __future__ import annotations

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


def test_a_cut_link_ends_the_run_on_both_hosts(hosts: TwoHosts, tmp_path: Path) -> None:
    """Last of this file, for the cable stays pulled."""
    launch = [*command(hosts, tmp_path, 100_000), "train.hang_minutes=0.2", "checkpoint.every_steps=2"]
    process = hosts.start(0, *launch, cwd=tmp_path, output=tmp_path / "output")
    deadline = time.monotonic() + 300
    while len(journal_steps(tmp_path)) < 5:
        assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "output").read_text()
        time.sleep(0.5)
    hosts.pull_the_cable()
    assert process.wait(timeout=200) == 1, (tmp_path / "output").read_text()
    assert "the run hangs: nothing got on for 0.2 minutes" in (tmp_path / "output").read_text()
    for host in (0, 1):
        deadline = time.monotonic() + 60
        while left := hosts.processes(host, "sparselt_dist.pretrain"):
            assert time.monotonic() < deadline, left
            time.sleep(0.5)
    assert any((tmp_path / "run" / "checkpoints").iterdir())

"""Ranks from the environment, and the stop flag."""

import os
import resource
import signal
import socket
import time
from datetime import timedelta

import pytest

from sparselt_dist.distributed import (
    Ranks,
    StopFlag,
    _meet,
    _rendezvous_defaults,
    allow_open_files,
    first_host,
    ranks_from_environment,
)
from sparselt_dist.errors import ConfigError, RunFailureError
from sparselt_dist.launch import free_port


def test_alone() -> None:
    ranks = ranks_from_environment({})
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.is_main) == (0, 1, 0, True)


def test_launcher_variables() -> None:
    ranks = ranks_from_environment({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert (ranks.rank, ranks.world_size, ranks.local_rank) == (5, 8, 1)


def test_slurm_variables() -> None:
    env = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
    ranks = ranks_from_environment(env)
    assert (ranks.rank, ranks.world_size, ranks.local_rank) == (3, 4, 1)


@pytest.mark.parametrize(
    "env",
    [{"RANK": "0"}, {"WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}],
)
def test_incomplete_or_contradictory_variables_are_refused(env: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="environment"):
        ranks_from_environment(env)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_waits_for_the_others_only_so_long(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": str(rank), "WORLD_SIZE": "2"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunFailureError, match=f"rank {rank}: the 2 ranks did not meet at 127.0.0.1:.* within 0.5 s"):
        _meet(Ranks(rank, 2, 0), "gloo", timeout=timedelta(seconds=0.5))


def test_a_rank_0_that_was_stopped_is_waited_for_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(silent.getsockname()[1]),
            "RANK": "1",
            "WORLD_SIZE": "2",
        }
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        started = time.monotonic()
        with pytest.raises(RunFailureError, match="did not meet"):
            _meet(Ranks(1, 2, 0), "gloo", timeout=timedelta(seconds=0.5))
    assert time.monotonic() - started < 10


def test_a_signal_only_sets_the_flag() -> None:
    flag = StopFlag()
    earlier = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        flag.install()
        assert not flag.is_set
        os.kill(os.getpid(), signal.SIGUSR1)
        assert flag.is_set and flag.signal_name == "SIGUSR1"
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node7", "node7"),
        ("a,b", "a"),
        ("gpu[03-05,9],login", "gpu03"),
        ("r1n[1,4]-ib", "r1n1-ib"),
        ("localhost", "localhost"),
    ],
)
def test_first_host_of_a_slurm_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_rank_0_of_many_may_open_a_connection_to_each() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2000:
        pytest.skip("this system lets no process open so many files")
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
        allow_open_files(64)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(1024 + 64 * 8, hard), hard)
        allow_open_files(1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(1024 + 64 * 8, hard), "it is never lowered"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_rank_alone_in_a_job_takes_a_free_port(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for ranks in (Ranks(0, 1, 0), Ranks(0, 2, 0)):
        place = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "gpu[03-05]"}
        monkeypatch.setattr(os, "environ", place)
        _rendezvous_defaults(ranks)
        found.append((place["MASTER_ADDR"], int(place["MASTER_PORT"])))
    assert found[1] == ("gpu03", 20000 + 77 * 7) and found[0][0] == "127.0.0.1" and found[0][1] != found[1][1]

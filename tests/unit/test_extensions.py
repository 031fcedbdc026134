"""What `prepare_environment` chooses, and that only dead builds' locks are removed."""

from __future__ import annotations

import math
import os
import shutil
import signal
import stat
import sys
import tempfile
import time
from pathlib import Path

import pytest

from sparselt_dist import extensions, rank_report


@pytest.fixture(autouse=True)
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "torch_build", lambda: "2.13.0")


@pytest.mark.parametrize(
    ("node", "env", "build", "visible"),
    [
        (None, {}, "2.13.0", False),
        ("nvidia0", {}, "2.13.0", True),
        ("nvidiactl", {}, "2.13.0", False),
        ("kfd", {}, "2.13.0+rocm6.4", True),
        ("nvidia0", {"CUDA_VISIBLE_DEVICES": ""}, "2.13.0", False),
        ("nvidia0", {"CUDA_VISIBLE_DEVICES": "0"}, "2.13.0", True),
        ("nvidia0", {}, "2.13.0+cpu", False),
        (None, {}, "2.13.0+xpu", True),
    ],
)
def test_accelerator_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: str | None, env: dict[str, str], build: str, visible: bool
) -> None:
    monkeypatch.setattr(extensions, "torch_build", lambda: build)
    if node:
        (tmp_path / node).touch()
    assert extensions.accelerator_visible(env, tmp_path) is visible


def test_prepare_environment_fills_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "accelerator_visible", lambda env: False)
    monkeypatch.setattr(extensions, "usable_cores", lambda: 8)
    env = {"HOME": str(tmp_path), "LOCAL_SIZE": "3", "PATH": "/nowhere"}
    extensions.prepare_environment(env)
    assert (env["DS_ACCELERATOR"], env["OMP_NUM_THREADS"]) == ("cpu", "2")
    folder = Path(env["TORCH_EXTENSIONS_DIR"])
    assert folder.is_relative_to(tmp_path / ".cache/sparselt_dist") and folder.is_dir()
    assert "torch2.13.0" in folder.name and os.uname().nodename in folder.name
    assert env["PATH"].startswith("/nowhere")
    chosen = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "5", "TORCH_EXTENSIONS_DIR": str(tmp_path / "own")}
    again = chosen | {"PATH": os.environ["PATH"]}
    extensions.prepare_environment(again)
    assert {name: again[name] for name in chosen} == chosen


def test_threads_are_left_alone_on_accelerators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "accelerator_visible", lambda env: True)
    env = {"HOME": str(tmp_path)}
    extensions.prepare_environment(env)
    assert "OMP_NUM_THREADS" not in env and "DS_ACCELERATOR" not in env


def test_ninja_beside_python_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ninja = tmp_path / "bin" / "ninja"
    ninja.parent.mkdir()
    ninja.write_text("#!/bin/sh\n")
    ninja.chmod(ninja.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(ninja.parent / "python"))
    env = {"HOME": str(tmp_path), "PATH": "/nowhere"}
    extensions.prepare_launch(env)
    assert shutil.which("ninja", path=env["PATH"]) == str(ninja)


def test_an_unwritable_home_gives_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").write_text("a file: nothing can be made below it")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    folder = extensions.private_folder({"HOME": str(tmp_path / "home")})
    assert folder is not None and folder.is_relative_to(tmp_path / "temporary")
    monkeypatch.setattr(os, "getuid", lambda: 4242)  # somebody else's folder is not trusted
    (tmp_path / "temporary" / "sparselt_dist-4242").mkdir()
    assert extensions.private_folder({"HOME": str(tmp_path / "home")}) is None


def test_only_a_lock_that_nobody_holds_is_removed(tmp_path: Path) -> None:
    for name in ("dead", "alive"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    with open(tmp_path / "alive" / "lock"):
        assert extensions.remove_stale_locks(tmp_path) == [tmp_path / "dead" / "lock"]
        assert not (tmp_path / "dead" / "lock").exists()
        assert (tmp_path / "alive" / "lock").exists()
    assert extensions.remove_stale_locks(tmp_path) == [tmp_path / "alive" / "lock"]
    assert extensions.remove_stale_locks(tmp_path / "missing") == []


def test_in_a_folder_of_the_users_choice_a_lock_must_also_be_old(tmp_path: Path) -> None:
    lock = tmp_path / "op" / "lock"
    lock.parent.mkdir()
    lock.touch()
    env = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    extensions.prepare_launch(env)
    assert lock.exists()
    old = time.time() - extensions.FOREIGN_LOCK_SECONDS - 1
    os.utime(lock, (old, old))
    extensions.prepare_launch(env)
    assert not lock.exists()


@pytest.mark.parametrize(
    ("env", "ranks"),
    [
        ({}, 1),
        ({"LOCAL_SIZE": "4"}, 4),
        ({"LOCAL_WORLD_SIZE": "2"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "2"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "3"}, 1),
        ({"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_NODEID": "0"}, 8),
    ],
)
def test_ranks_on_host(env: dict[str, str], ranks: int) -> None:
    assert extensions.ranks_on_host(env) == ranks


@pytest.mark.parametrize(
    ("env", "cores"),
    [
        ({}, math.inf),
        ({"SLURM_CPUS_ON_NODE": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x4)", "SLURM_NODEID": "3"}, 0.125),
        ({"SLURM_CPUS_ON_NODE": "64", "SLURM_STEP_TASKS_PER_NODE": "8(x4)", "SLURM_NODEID": "0"}, 8.0),
    ],
)
def test_a_rank_has_its_share_of_what_slurm_gives(env: dict[str, str], cores: float) -> None:
    assert extensions.slurm_cores_per_rank(env) == cores


def test_slurms_cores_for_a_task_are_its_threads() -> None:
    assert extensions.threads_per_rank({"SLURM_PROCID": "1", "SLURM_CPUS_PER_TASK": "7"}) == 7


@pytest.mark.parametrize(("text", "most"), [("100000 100000\n", 1), ("50000 100000\n", 1), ("max 100000\n", None)])
def test_a_containers_quota_limits_the_cores(tmp_path: Path, text: str, most: int | None) -> None:
    quota = tmp_path / "cpu.max"
    quota.write_text(text)
    assert extensions.usable_cores(quota) == (most or extensions.usable_cores(tmp_path / "missing"))


def test_reports_tell_ready_ranks_and_exit_codes_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank_report.announce()  # without a launcher: nothing
    monkeypatch.setenv(rank_report.REPORT_DIR_VARIABLE, str(tmp_path))
    for rank in ("3", "0"):
        monkeypatch.setenv("RANK", rank)
        rank_report.announce()
    assert rank_report.read_reports(tmp_path).any_lost
    rank_report.record_exit(75)
    time.sleep(0.02)
    monkeypatch.setenv("RANK", "3")
    rank_report.record_exit(2)
    reports = rank_report.read_reports(tmp_path)
    assert reports.ready_pids == {"rank_0": os.getpid(), "rank_3": os.getpid()}
    assert list(reports.exit_codes.items()) == [("rank_0", 75), ("rank_3", 2)]
    assert not reports.any_lost


def test_an_announced_rank_takes_the_notice_that_was_held() -> None:
    caught: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: caught.append(number))
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        signal.raise_signal(signal.SIGUSR1)  # to this thread: another one would take one sent to the process
        assert caught == []
        rank_report.announce()
        assert caught == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)

"""Claiming a run folder, where the file system has locks and where it has none."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from sparselt_dist import run_folder
from sparselt_dist.errors import CheckpointError


def test_a_folder_is_claimed_once(tmp_path: Path) -> None:
    warnings: list[str] = []
    with run_folder.lock(tmp_path, warnings.append), pytest.raises(CheckpointError, match="another process trains in"):
        run_folder.lock(tmp_path, warnings.append)
    run_folder.lock(tmp_path, warnings.append).close()
    assert warnings == []


def test_a_file_system_without_locks_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    warnings: list[str] = []
    run_folder.lock(tmp_path, warnings.append).close()
    assert len(warnings) == 1 and "No locks available" in warnings[0]

"""Claiming a run folder, where the file system has locks and where it has none."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from sparselt_dist import run_folder
from sparselt_dist.errors import CheckpointError, DataError


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


def test_a_tokenizer_that_is_a_link_out_of_its_folder_is_refused_at_the_start(tmp_path: Path) -> None:
    source, run = tmp_path / "shards" / "tokenizer", tmp_path / "run"
    source.mkdir(parents=True)
    (tmp_path / "elsewhere.json").write_text("{}")
    (source / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(DataError, match="a link that leads out of the folder"):
        run_folder.copy_tokenizer(source, run)
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").write_text("{}")
    for _ in range(2):
        run_folder.copy_tokenizer(source, run)
    assert (run / "tokenizer" / "tokenizer.json").read_text() == "{}"

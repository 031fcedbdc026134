"""What a preparation keeps on disk survives a kill at any byte."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from sparselt_dist.data.workspace import DataFile, Workers, WorkLog, locked
from sparselt_dist.errors import DataError


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    with WorkLog(path) as log:
        for number in range(3):
            log.append({"n": number})
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        complete = whole[:size].count(b"\n")
        with WorkLog(path) as log:
            assert log.records == [{"n": number} for number in range(complete)]
            log.append({"n": "new"})
        with WorkLog(path) as log:
            assert log.records[complete:] == [{"n": "new"}]


def test_data_after_the_committed_size_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"committed, and not")
    with DataFile(path, committed=9) as file:
        file.append(b"!")
        assert file.size == 10
    assert path.read_bytes() == b"committed!"


def test_a_work_folder_is_held_by_one(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(DataError, match="another `sparselt prepare` is at work"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_one_worker_or_one_job_needs_no_process() -> None:
    with Workers(1) as one, Workers(4) as four:
        assert list(one.map(abs, [-1, -2, -3])) == [1, 2, 3]
        assert list(four.map(abs, [-1])) == [1]
        assert multiprocessing.active_children() == []

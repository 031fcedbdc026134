"""What a preparation keeps on disk survives a kill at any byte."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from sparselt_dist.data.workspace import LogReader, Workers, WorkLog, committed, locked


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


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with pytest.raises(TypeError), committed(path) as file:
        file.write("no bytes")  # type: ignore[arg-type]
    assert not path.exists()
    with committed(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"


def test_a_reader_sees_whole_lines_of_all_logs_once(tmp_path: Path) -> None:
    logs = LogReader(tmp_path, "stage.*.log")
    assert list(logs.new_records()) == []
    with WorkLog(tmp_path / "stage.0.log") as first, WorkLog(tmp_path / "stage.1.log") as second:
        first.append({"n": 1})
        second.append({"n": 2})
        assert list(logs.new_records()) == [{"n": 1}, {"n": 2}]
        second.append({"n": 3})
    with (tmp_path / "stage.0.log").open("ab") as file:
        file.write(b'{"n": ')
        file.flush()
        assert list(logs.new_records()) == [{"n": 3}]
        file.write(b"4}\n")
    assert list(logs.new_records()) == [{"n": 4}]


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path) as first, locked(path) as second:
        assert first and not second
    with locked(path) as again:
        assert again


def test_one_worker_or_one_job_needs_no_process() -> None:
    with Workers(1) as one, Workers(4) as four:
        assert list(one.map(abs, [-1, -2, -3])) == [1, 2, 3]
        assert list(four.map(abs, [-1])) == [1]
        assert multiprocessing.active_children() == []

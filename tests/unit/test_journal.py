"""The journal: valid, complete and in order whatever is written and whenever the writer dies."""

import errno
import json
import math
import os
from pathlib import Path

import pytest

from sparselt_dist.errors import CheckpointError, DataError
from sparselt_dist.journal import JOURNAL_NAME, Journal, replace_file


def raw(folder: Path) -> bytes:
    return (folder / JOURNAL_NAME).read_bytes()


def filled(folder: Path, steps: int) -> Journal:
    journal = Journal(folder, clock=lambda: 1000.0)
    for step in range(1, steps + 1):
        journal.append({"step": step, "train/loss": 1.0 / step})
    return journal


def test_a_line_starts_with_step_and_time(tmp_path: Path) -> None:
    journal = Journal(tmp_path, clock=lambda: 12.5)
    journal.append({"train/loss": 2.0, "batch_digest": "ab", "step": 3})
    assert raw(tmp_path) == b'{"step": 3, "time": 12.5, "train/loss": 2.0, "batch_digest": "ab"}\n'
    journal.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_become_null(tmp_path: Path, value: float) -> None:
    journal = Journal(tmp_path)
    journal.append({"step": 1, "train/loss": value})
    journal.close()
    assert json.loads(raw(tmp_path), parse_constant=pytest.fail)["train/loss"] is None


def test_lines_are_readable_before_the_journal_is_closed(tmp_path: Path) -> None:
    journal = filled(tmp_path, 3)
    assert [line["step"] for line in Journal.read(tmp_path)] == [1, 2, 3]
    journal.close()


def test_the_last_step_again_completes_its_line(tmp_path: Path) -> None:
    journal = filled(tmp_path, 2)
    journal.append({"step": 2, "eval/loss": 3.0})
    journal.append({"step": 2, "train/loss": 1})  # shorter than before
    journal.append({"step": 3, "train/loss": 9.0})
    journal.close()
    assert Journal.read(tmp_path)[1:] == [
        {"step": 2, "time": 1000.0, "train/loss": 1, "eval/loss": 3.0},
        {"step": 3, "time": 1000.0, "train/loss": 9.0},
    ]


def test_an_earlier_step_is_refused(tmp_path: Path) -> None:
    journal = filled(tmp_path, 5)
    with pytest.raises(ValueError, match="step 4 after step 5"):
        journal.append({"step": 4})
    journal.close()
    assert len(Journal.read(tmp_path)) == 5


def test_cut_back_keeps_up_to_the_step_and_goes_on(tmp_path: Path) -> None:
    journal = filled(tmp_path, 10)
    journal.cut_back(6)
    journal.append({"step": 7, "train/loss": 5.0})
    journal.close()
    lines = Journal.read(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert lines[-1]["train/loss"] == 5.0
    assert [path.name for path in tmp_path.iterdir()] == [JOURNAL_NAME]


@pytest.mark.parametrize("torn", [b'{"step": 4, "ti', b'{"step": 4}', b"\0\0\0\0\n", b'{"step": 4, "t\n\0\0'])
def test_a_torn_end_is_left_out_and_written_over(tmp_path: Path, torn: bytes) -> None:
    filled(tmp_path, 3).close()
    before = raw(tmp_path)
    (tmp_path / JOURNAL_NAME).write_bytes(before + torn)
    assert [line["step"] for line in Journal.read(tmp_path)] == [1, 2, 3]
    journal = Journal(tmp_path)
    journal.append({"step": 4, "train/loss": 1.0})
    journal.close()
    assert raw(tmp_path).startswith(before)
    assert [line["step"] for line in Journal.read(tmp_path)] == [1, 2, 3, 4]


def test_a_damaged_middle_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    filled(tmp_path, 3).close()
    lines = raw(tmp_path).splitlines(keepends=True)
    (tmp_path / JOURNAL_NAME).write_bytes(lines[0] + b"garbage\n" + lines[2])
    with pytest.raises(DataError, match=r"metrics\.jsonl: line 2 is not a journal line"):
        Journal.read(tmp_path)


def test_a_full_disk_leaves_the_earlier_lines_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = filled(tmp_path, 3)
    before = raw(tmp_path)
    write = os.pwrite
    answers = iter([7])  # seven bytes fit, then none

    def full(descriptor: int, data: bytes, offset: int) -> int:
        for room in answers:
            return write(descriptor, data[:room], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl: cannot be written \(No space left"):
            journal.append({"step": 4, "train/loss": 1.0})
    assert raw(tmp_path) == before
    journal.append({"step": 4, "train/loss": 1.0})
    journal.close()
    assert len(Journal.read(tmp_path)) == 4


def test_lines_reach_the_disk_at_most_once_a_second_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    journal = filled(tmp_path, 20)
    assert len(synced) == 1
    monkeypatch.setattr("time.monotonic", lambda: 101.5)
    journal.append({"step": 21})
    assert len(synced) == 2
    journal.close()
    assert len(synced) == 3


def test_an_unwritable_folder_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written"):
        Journal(tmp_path / "missing")


def test_replace_file_never_leaves_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    replace_file(path, b"old")

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(CheckpointError):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_line_that_finds_no_room_waits_for_the_next_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter(range(100, 200))
    journal = Journal(tmp_path, clock=lambda: float(next(moments)))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert journal.offer({"step": 1, "train/loss": 1.0}) is None
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        assert "1 line(s) wait" in str(journal.offer({"step": 2, "train/loss": 2.0}))
        assert "2 line(s) wait" in str(journal.offer({"step": 2, "eval/loss": 2.5}))
        with pytest.raises(CheckpointError, match="No space left"):
            journal.sync()
    assert journal.offer({"step": 3}) is None
    journal.close()
    assert Journal.read(tmp_path) == [
        {"step": 1, "time": 100.0, "train/loss": 1.0},
        {"step": 2, "time": 101.0, "train/loss": 2.0, "eval/loss": 2.5},
        {"step": 3, "time": 103.0},
    ]

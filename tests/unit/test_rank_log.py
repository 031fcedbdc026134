"""A rank's own log: every line with rank and step, from the first one on, whatever the disk does."""

from __future__ import annotations

import errno
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparselt_dist import rank_log


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    yield
    rank_log.stop()


def lines(folder: Path, rank: int) -> list[str]:
    """The log's lines without their times."""
    found = (folder / "logs" / f"rank_{rank:05d}.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d rank ", line) for line in found)
    return [line.partition(" ")[2] for line in found]


def test_every_line_has_its_rank_and_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rank_log.start(3)
    print("early")
    rank_log.open_in(tmp_path)
    rank_log.at_step(7)
    print("a warning\nof two lines", file=sys.stderr)
    sys.stdout.write("half ")
    sys.stdout.write("and half\n")
    rank_log.note("for the file alone")
    rank_log.stop()
    print("after")
    early, process, *rest = lines(tmp_path, 3)
    assert (early, process.split()[:5]) == ("rank 3 step 0: early", "rank 3 step 0: process".split())
    told = ["a warning", "of two lines", "half and half", "for the file alone"]
    assert rest == [f"rank 3 step 7: {text}" for text in told]
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("early\nhalf and half\nafter\n", "a warning\nof two lines\n")


def test_a_live_line_leaves_its_last_state(tmp_path: Path) -> None:
    rank_log.start(0)
    rank_log.open_in(tmp_path)
    sys.stderr.write("\r\x1b[Kstep 1\r\x1b[Kstep 2\n")
    rank_log.stop()
    assert lines(tmp_path, 0)[-1] == "rank 0 step 0: step 2"


def test_the_error_that_ends_a_rank_is_in_its_log(tmp_path: Path) -> None:
    rank_log.start(1)
    rank_log.open_in(tmp_path)
    rank_log.at_step(12)
    rank_log.stop(RuntimeError("lost the peer"))
    assert lines(tmp_path, 1)[-1] == "rank 1 step 12: RuntimeError: lost the peer"


def test_a_folder_that_cannot_be_written_costs_only_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").write_text("in the way")
    rank_log.start(0)
    rank_log.open_in(tmp_path)
    print("goes on")
    rank_log.stop()
    assert capsys.readouterr().out == "goes on\n"


def test_a_second_start_appends(tmp_path: Path) -> None:
    for step in (0, 5):
        rank_log.start(0)
        rank_log.open_in(tmp_path)
        rank_log.at_step(step)
        print("begins")
        rank_log.stop()
    assert [line for line in lines(tmp_path, 0) if line.endswith("begins")] == [
        "rank 0 step 0: begins",
        "rank 0 step 5: begins",
    ]


def test_a_terminal_that_is_gone_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Gone())
    rank_log.start(0)
    rank_log.open_in(tmp_path)
    print("a warning", file=sys.stderr, flush=True)
    rank_log.stop()
    assert lines(tmp_path, 0)[-1] == "rank 0 step 0: a warning"

"""A preparation in parts, each a process of its own on one folder: the bytes of one process, whatever happens to a part."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prepare_helpers import TEXTS, arguments_of, file_hashes, write_jsonl

from sparselt_dist.config_loading import load_config
from sparselt_dist.data import parts, sources
from sparselt_dist.data.parts import Part
from sparselt_dist.data.preparation import prepare
from sparselt_dist.errors import ConfigError, DataError

SETTINGS = {
    "prepare.packing": "best-fit",
    "prepare.order": "sentence-length",
    "prepare.validation_fraction": 0.2,
    "prepare.samples_per_shard": 300,
    "prepare.deduplicate_near": True,
}

# small segments, so that a little text gives each part several; dies at the given moment at which something is durable
_PART = """
import os, signal, sys
from sparselt_dist.data import parts, sources
sources.MIN_SEGMENT_BYTES = 30_000
parts.HEARTBEAT_SECONDS, parts.GRACE_SECONDS = 0.2, 4.0
moment, count, sync = int(sys.argv[1]), 0, os.fsync
def fsync(file):
    global count
    sync(file)
    count += 1
    if count == moment:
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fsync
from sparselt_dist.prepare import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MIN_SEGMENT_BYTES", 30_000)
    monkeypatch.setattr(parts, "HEARTBEAT_SECONDS", 0.2)


class Started:
    """Parts that run; none is left behind."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[str]] = []

    def part(self, arguments: list[str], part: str, *more: str, dies_at: int = 0) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _PART, str(dies_at), *arguments, "--part", part, *more]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._processes.append(process)
        return process

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()


@pytest.fixture
def started() -> Iterator[Started]:
    running = Started()
    yield running
    running.end()


def _finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    shown, errors = process.communicate(timeout=120)
    return process.returncode, shown + errors


def test_two_parts_make_the_bytes_of_one_though_each_is_killed(tmp_path: Path, started: Started) -> None:
    source = write_jsonl(tmp_path / "c.jsonl", [*TEXTS[:50], *TEXTS[10:20]])
    prepare(load_config([], arguments_of(source, tmp_path / "alone", SETTINGS), for_training=False), progress=False)
    arguments = arguments_of(source, tmp_path / "out", SETTINGS)
    first, second = started.part(arguments, "0/2", dies_at=90), started.part(arguments, "1/2", dies_at=40)
    assert _finish(second)[0] == -signal.SIGKILL
    second = started.part(arguments, "1/2")
    assert _finish(first)[0] == -signal.SIGKILL
    ended = [_finish(started.part(arguments, "0/2")), _finish(second)]
    assert [code for code, _ in ended] == [0, 0], ended
    assert "part 1 of 2: done" in ended[1][1] and "next: sparselt pretrain" in ended[0][1]
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "alone")


def test_a_missing_part_is_named_and_one_process_can_finish(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "c.jsonl", TEXTS[:30])
    config = load_config([], arguments_of(source, tmp_path / "out", {}), for_training=False)
    told = r"part 1 of 2 has not started for 0\.002 minutes.*all must run at once.*start it with --part 1/2"
    with pytest.raises(DataError, match=told):
        prepare(config, progress=False, part=Part(0, 2, wait_minutes=0.002))
    prepare(config, progress=False)
    alone = load_config([], arguments_of(source, tmp_path / "alone", {}), for_training=False)
    prepare(alone, progress=False)
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "alone")


def test_a_part_that_fails_ends_the_others_with_its_message(tmp_path: Path, started: Started) -> None:
    lines = write_jsonl(tmp_path / "c.jsonl", TEXTS[:30]).read_text()
    (tmp_path / "c.jsonl").write_text(lines + "no JSON\n")
    arguments = arguments_of(tmp_path / "c.jsonl", tmp_path / "out", {})
    ended = [_finish(process) for process in [started.part(arguments, f"{number}/2") for number in range(2)]]
    assert [code for code, _ in ended] == [2, 2], ended
    assert all("c.jsonl:31: not JSON" in shown for _, shown in ended)
    assert sum("of 2 failed: prepare.source" in shown for _, shown in ended) == 1
    (tmp_path / "c.jsonl").write_text(lines)
    again = [_finish(process) for process in [started.part(arguments, f"{number}/2") for number in range(2)]]
    assert [code for code, _ in again] == [0, 0], again


def test_parts_of_another_number_are_refused_while_some_are_at_work(tmp_path: Path, started: Started) -> None:
    source = write_jsonl(tmp_path / "c.jsonl", TEXTS[:30])
    arguments = arguments_of(source, tmp_path / "out", {})
    waiting = started.part(arguments, "0/2")
    log = tmp_path / "out/.work/collect.0.log"
    while not (log.exists() and log.stat().st_size):
        assert waiting.poll() is None
    code, shown = _finish(started.part(arguments, "0/3"))
    assert code == 2 and "another `sparselt prepare` is at work" in shown
    code, shown = _finish(started.part(arguments, "1/3"))
    assert code == 2 and "is at work there in 2 parts, not in 3" in shown
    code, shown = _finish(started.part([*arguments, "prepare.min_characters=300"], "1/2"))
    assert code == 2 and "min_characters is 200 there and 300 here" in shown
    assert _finish(started.part(arguments, "1/2"))[0] == 0 == _finish(waiting)[0]


@pytest.mark.parametrize("text", ["2/2", "1", "-1/2", "a/b", "", "1/2/3"])
def test_a_part_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--part: found"):
        Part.parse(text, 1.0)

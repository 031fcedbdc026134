"""A preparation that was there already, was killed, or failed; and its memory."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from prepare_helpers import TEXTS, arguments_of, file_hashes, run_prepare, write_jsonl

from sparselt_dist.data.manifest import read_manifest
from sparselt_dist.data.verification import verify
from sparselt_dist.errors import ConfigError, DataError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", TEXTS[:40])


def test_complete_shards_are_reused_and_never_overwritten(corpus: Path, tmp_path: Path) -> None:
    first = run_prepare(corpus, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = run_prepare(corpus, tmp_path / "out", prepare__num_workers=2, run__seed=5)
    assert again.reused and not first.reused and again.rows == first.rows[: len(again.rows)]
    with pytest.raises(
        DataError, match=r"another preparation: min_characters is 200 there and 300 here, vocab_size is 700"
    ):
        run_prepare(corpus, tmp_path / "out", prepare__min_characters=300, prepare__vocab_size=701)
    with pytest.raises(DataError, match="sequence_length is 32 there and 64 here"):
        run_prepare(corpus, tmp_path / "out", data__sequence_length=64)
    write_jsonl(corpus, TEXTS[:41])
    with pytest.raises(DataError, match="the files have changed"):
        run_prepare(corpus, tmp_path / "out")
    corpus.unlink()
    assert run_prepare(corpus, tmp_path / "out").reused
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


# counts the moments at which something is made durable, and dies by SIGKILL at the given one
_KILLED = """
import os, signal, sys
from sparselt_dist.data import sources
sources.MIN_SEGMENT_BYTES = 50_000
moment, count, sync = int(sys.argv[1]), 0, os.fsync
def strike():
    global count
    count += 1
    if count == moment:
        os.kill(os.getpid(), signal.SIGKILL)
def fsync(file):
    strike()  # written, perhaps not yet recorded
    sync(file)
    strike()
os.fsync = fsync
from sparselt_dist.prepare import main
code = main(sys.argv[2:])
print("moments", count)
sys.exit(code)
"""


def _run_until(moment: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _KILLED, str(moment), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_killed_preparation_continues_to_the_same_bytes(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "c.jsonl", TEXTS)
    settings = {
        "prepare.validation_fraction": 0.1,
        "prepare.samples_per_shard": 500,
        "prepare.deduplicate_near": True,
    }
    undisturbed = _run_until(0, arguments_of(source, tmp_path / "a", settings))
    assert undisturbed.returncode == 0, undisturbed.stderr
    step = int(undisturbed.stdout.split()[-1]) // 9 | 1  # odd, so that kills fall before and after a flush
    arguments = [
        arguments_of(source, tmp_path / "b", settings | {"prepare.num_workers": workers}) for workers in (1, 2)
    ]
    kills = 0
    while (result := _run_until(step, arguments[kills % 2])).returncode == -signal.SIGKILL:
        kills += 1
        assert kills < 30
    assert result.returncode == 0, result.stderr
    assert kills >= 4
    assert file_hashes(tmp_path / "a") == file_hashes(tmp_path / "b")


def test_a_kill_leaves_no_process_and_the_end_is_accounted_for(tmp_path: Path) -> None:
    settings = ["prepare.source=embedded", "prepare.vocab_size=8192", "prepare.validation_fraction=0.05"]
    command = [sys.executable, "-m", "sparselt_dist.prepare", *settings, f"prepare.output_dir={tmp_path / 'out'}"]
    command.append("prepare.num_workers=2")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "out/.work/tokenize.0.log"
    _wait_for(lambda: log.exists() and log.stat().st_size > 0)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert len(children) >= 2
    _wait_for(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children))
    finished = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    for part in ("documents read", "505", "tokens", "bytes a token", "MB of text a second", "peak memory"):
        assert part in finished.stdout
    assert "prepare: tokenizing" in finished.stderr  # lines, not a bar, where there is no terminal
    assert verify(tmp_path / "out/train") == verify(tmp_path / "out/validation") == []
    assert read_manifest(tmp_path / "out/validation").samples > 500


def _wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def test_unfinished_work_of_another_configuration_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "c.jsonl", TEXTS)
    assert _run_until(5, arguments_of(source, tmp_path / "out", {})).returncode == -signal.SIGKILL
    with pytest.raises(DataError, match="vocab_size is 700 there and 800 here"):
        run_prepare(source, tmp_path / "out", prepare__vocab_size=800)
    write_jsonl(source, TEXTS[:-1])
    with pytest.raises(DataError, match="unfinished preparation of something else: the source files have changed"):
        run_prepare(source, tmp_path / "out")


def test_work_that_ended_with_an_error_gives_way_to_the_remedy(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prepare\.vocab_size"):
        run_prepare(corpus, tmp_path / "out", prepare__vocab_size=64)
    with pytest.raises(DataError, match="the validation split has"):
        run_prepare(corpus, tmp_path / "out", prepare__validation_fraction=0.02, data__sequence_length=20_000)
    with corpus.open("a") as file:
        file.write("no JSON\n")
    with pytest.raises(DataError, match=r"corpus\.jsonl:41: not JSON"):
        run_prepare(corpus, tmp_path / "out")
    write_jsonl(corpus, TEXTS[:40])
    run_prepare(corpus, tmp_path / "out")
    run_prepare(corpus, tmp_path / "fresh")
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "fresh")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    settings = {"prepare.tokenizer_characters": 500_000, "prepare.deduplicate_exact": True, "prepare.num_workers": 1}
    peaks = []
    for copies in (10, 80):
        texts = (f"{number} {text}" for number in range(copies) for text in TEXTS)
        with (tmp_path / f"{copies}.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        arguments = arguments_of(tmp_path / f"{copies}.jsonl", tmp_path / f"out{copies}", settings)
        program = "import resource, sys; from sparselt_dist.prepare import main; main(sys.argv[1:]); "
        program += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        run = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
        peaks.append(int(run.stdout.split()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 60, peaks

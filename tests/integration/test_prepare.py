"""Preparation as a whole: what becomes of documents, order, splits, restarts, and what is refused."""

from __future__ import annotations

import gzip
import json
import os
import pydoc_data.topics
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from sparselt_dist import prepare as prepare_command
from sparselt_dist import shards as shards_command
from sparselt_dist.config_loading import load_config
from sparselt_dist.data.cleaning import normalize
from sparselt_dist.data.preparation import PrepareReport, prepare
from sparselt_dist.data.shards import ShardFolder, file_sha256, read_manifest
from sparselt_dist.data.tokenizer import check_tokenizer, load_for_text
from sparselt_dist.data.verification import verify
from sparselt_dist.errors import ConfigError, DataError

TEXTS = [text for _, text in sorted(pydoc_data.topics.topics.items())]
SMALL = {"prepare.vocab_size": 700, "prepare.num_workers": 1, "data.sequence_length": 32}


def _jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return _jsonl(tmp_path / "corpus.jsonl", TEXTS[:40])


def _arguments(source: Path, output: Path, settings: dict[str, Any]) -> list[str]:
    values = {"prepare.source": source, "prepare.output_dir": output, **SMALL, **settings}
    return [f"{key}={json.dumps(value) if not isinstance(value, Path) else value}" for key, value in values.items()]


def _prepare(source: Path, output: Path, **settings: Any) -> PrepareReport:
    overrides = _arguments(source, output, {key.replace("__", "."): value for key, value in settings.items()})
    return prepare(load_config([], overrides, for_training=False), progress=False)


def _ids(folder: Path) -> list[np.ndarray]:
    shards = ShardFolder(folder)
    return shards.read(np.arange(shards.num_samples))


def _hashes(output: Path) -> dict[str, str]:
    return {str(path.relative_to(output)): file_sha256(path) for path in sorted(output.rglob("*")) if path.is_file()}


def _kept(texts: list[str], minimum: int = 200) -> list[str]:
    return list(dict.fromkeys(text for text in (normalize(raw, "nfc") for raw in texts) if len(text) >= minimum))


# --- what becomes of the documents -----------------------------------------------------------------------------------


def test_rows_are_the_documents_end_to_end(corpus: Path, tmp_path: Path) -> None:
    report = _prepare(corpus, tmp_path / "out", prepare__order="source")
    tokenizer, info = load_for_text(tmp_path / "out/tokenizer"), check_tokenizer(report.train_dir)
    stream: list[int] = []
    for text in _kept(TEXTS[:40]):
        stream += [*tokenizer.encode(text, add_special_tokens=False).ids, info.sep_id or -1]
    rows = _ids(report.train_dir)
    assert all(len(row) == 32 for row in rows)
    assert np.concatenate(rows).tolist() == stream[: len(stream) // 32 * 32]
    statistics = read_manifest(report.train_dir).statistics
    assert statistics["tokens"] == len(stream) and statistics["tokens_dropped"] == len(stream) % 32
    text_bytes = sum(len(text.encode()) for text in _kept(TEXTS[:40]))
    assert statistics["bytes_per_token"] == pytest.approx(
        text_bytes / (len(stream) - statistics["documents"]), abs=1e-4
    )
    assert not (tmp_path / "out/.work").exists() and verify(report.train_dir) == []


def test_shuffled_rows_are_the_same_rows(corpus: Path, tmp_path: Path) -> None:
    source = [row.tobytes() for row in _ids(_prepare(corpus, tmp_path / "a", prepare__order="source").train_dir)]
    shuffled = [
        row.tobytes() for row in _ids(_prepare(corpus, tmp_path / "b", prepare__samples_per_shard=100).train_dir)
    ]
    assert sorted(source) == sorted(shuffled) and source != shuffled
    assert len(ShardFolder(tmp_path / "b").shards) == -(-len(source) // 100)
    moved = np.mean([one != other for one, other in zip(source, shuffled, strict=True)])
    assert moved > 0.95


def test_sentence_length_order_is_descending_and_stable(corpus: Path, tmp_path: Path) -> None:
    source = _ids(_prepare(corpus, tmp_path / "a", prepare__order="source").train_dir)
    ordered = _ids(_prepare(corpus, tmp_path / "b", prepare__order="sentence-length").train_dir)
    full_stop = load_for_text(tmp_path / "b/tokenizer").token_to_id(".")
    expected = sorted(source, key=lambda row: -int((row == full_stop).sum()))  # Python's sort is stable
    assert [row.tobytes() for row in ordered] == [row.tobytes() for row in expected]
    assert (ordered[0] == full_stop).sum() > (ordered[-1] == full_stop).sum()


@pytest.mark.parametrize("settings", [{"data__sequence_length": None}, {"prepare__packing": "documents"}])
def test_documents_are_kept_whole(corpus: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    report = _prepare(corpus, tmp_path / "out", prepare__order="source", **settings)
    tokenizer, info = load_for_text(tmp_path / "out/tokenizer"), check_tokenizer(report.train_dir)
    manifest = read_manifest(report.train_dir)
    assert (manifest.kind, manifest.sequence_length) == ("documents", None)
    for text, ids in zip(_kept(TEXTS[:40]), _ids(report.train_dir), strict=True):
        assert ids.tolist() == [info.cls_id, *tokenizer.encode(text, add_special_tokens=False).ids, info.sep_id]


def test_each_filter_drops_what_it_should(tmp_path: Path) -> None:
    texts = _kept(TEXTS[:40])
    spoiled = [*texts, texts[3] + "  ", texts[5], "short", "x" * 30_000]
    report = _prepare(_jsonl(tmp_path / "c.jsonl", spoiled), tmp_path / "out", prepare__max_characters=29_000)
    statistics = read_manifest(report.train_dir).statistics
    too_long = sum(len(text) > 29_000 for text in texts)
    found = [statistics[key] for key in ("documents_read", "too_short", "too_long", "exact_duplicates", "documents")]
    assert found == [len(texts) + 4, 1, too_long + 1, 2, len(texts) - too_long]
    assert any("exact duplicates" in name and "-2 ->" in value for name, value in report.rows)


def test_compressible_documents_are_kept_exactly(corpus: Path, tmp_path: Path) -> None:
    limit = 0.37
    report = _prepare(
        corpus,
        tmp_path / "out",
        prepare__max_tokens_per_character=limit,
        prepare__packing="documents",
        prepare__order="source",
    )
    tokenizer = load_for_text(tmp_path / "out/tokenizer")
    texts = _kept(TEXTS[:40])
    counts = [len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]
    expected = [count for count, text in zip(counts, texts, strict=True) if count < limit * len(text)]
    assert 0 < len(expected) < len(texts)
    assert [len(ids) - 2 for ids in _ids(report.train_dir)] == expected
    assert read_manifest(report.train_dir).statistics["incompressible"] == len(texts) - len(expected)


def test_near_duplicates_go_and_one_of_each_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datatrove")
    monkeypatch.setattr("sparselt_dist.data.collection.BATCH_CHARACTERS", 20_000)  # duplicates lie in several chunks
    texts = [text for text in _kept(TEXTS) if len(text) > 2000][:12]
    near = [text.replace(" the ", " The ", 3) + " One more closing sentence." for text in texts[:4]]
    source = _jsonl(tmp_path / "c.jsonl", texts + near + [near[0].upper()])
    settings = {"prepare__packing": "documents", "prepare__order": "source", "prepare__normalize": "nfc"}
    report = _prepare(source, tmp_path / "out", prepare__deduplicate_near=True, **settings)
    statistics = read_manifest(report.train_dir).statistics
    assert statistics["near_duplicates"] == 5 and statistics["documents"] == len(texts)
    tokenizer = load_for_text(tmp_path / "out/tokenizer")
    openings = {tokenizer.decode(ids.tolist()[1:15]).lower() for ids in _ids(report.train_dir)}
    assert len(openings) == len(texts)


def test_the_held_out_split_depends_on_the_text_alone(tmp_path: Path) -> None:
    texts = _kept([f"Paragraph {number}. {text[:900]}" for number, text in enumerate(TEXTS * 4)])

    def splits(texts: list[str], output: str) -> list[set[int]]:
        """The numbers of the paragraphs in each split."""
        report = _prepare(
            _jsonl(tmp_path / "c.jsonl", texts),
            tmp_path / output,
            prepare__validation_fraction=0.2,
            prepare__packing="documents",
            prepare__tokenizer="byte-bpe",  # decodes to the very text
        )
        tokenizer = load_for_text(report.train_dir / "tokenizer")
        folders = [report.train_dir, tmp_path / output / "validation"]
        decoded = [[tokenizer.decode(ids.tolist()) for ids in _ids(folder)] for folder in folders]
        return [{int(text.split()[1].rstrip(".")) for text in texts} for texts in decoded]

    (train, held_out), (other_train, other_held_out) = splits(texts[:220], "a"), splits(texts[100:][::-1], "b")
    assert train | held_out == set(range(220)) and not train & held_out
    assert 0.12 * 220 < len(held_out) < 0.28 * 220
    common = set(range(100, 220))
    assert held_out & common == other_held_out & common and train & common == other_train & common


def test_a_few_documents_still_give_a_held_out_one(tmp_path: Path) -> None:
    source = _jsonl(tmp_path / "c.jsonl", [text for text in TEXTS if len(text) > 3000][:4])
    report = _prepare(source, tmp_path / "out", prepare__validation_fraction=1e-6)
    assert report.validation_dir is not None
    assert read_manifest(report.validation_dir).statistics["documents"] == 1
    assert read_manifest(report.train_dir).statistics["documents"] == 3


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "byte-bpe", "unigram"])
def test_every_tokenizer_serves(corpus: Path, tmp_path: Path, kind: str) -> None:
    report = _prepare(corpus, tmp_path / "out", prepare__tokenizer=kind)
    assert read_manifest(report.train_dir).vocab_size == 700 and verify(report.train_dir) == []


def test_crammed_shards_hold_no_unknown_token(corpus: Path, tmp_path: Path) -> None:
    report = _prepare(corpus, tmp_path / "out", prepare__normalize="crammed")
    info = check_tokenizer(report.train_dir)
    ids = np.concatenate(_ids(report.train_dir))
    assert set(np.unique(ids)) & set(info.special_ids) == {info.sep_id} == {5}


def test_an_existing_tokenizer_is_taken(corpus: Path, tmp_path: Path) -> None:
    first = _prepare(corpus, tmp_path / "a").train_dir
    second = _prepare(corpus, tmp_path / "b", prepare__tokenizer=str(first / "tokenizer")).train_dir
    assert [ids.tobytes() for ids in _ids(first)] == [ids.tobytes() for ids in _ids(second)]
    assert check_tokenizer(first) == check_tokenizer(second)


def test_sources_and_licences_are_accounted_for(tmp_path: Path) -> None:
    rows = [{"text": text, "license": "A" if number % 2 else "B"} for number, text in enumerate(TEXTS[:12])]
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    manifest = read_manifest(_prepare(tmp_path / "c.jsonl.gz", tmp_path / "out", prepare__min_characters=0).train_dir)
    assert {(source.license, source.documents) for source in manifest.sources} == {("A", 6), ("B", 6)}
    assert sum(source.characters for source in manifest.sources) == sum(len(text) for text in _kept(TEXTS[:12], 0))


# --- again, and after a kill -----------------------------------------------------------------------------------------


def test_complete_shards_are_reused_and_never_overwritten(corpus: Path, tmp_path: Path) -> None:
    first = _prepare(corpus, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = _prepare(corpus, tmp_path / "out", prepare__num_workers=2, run__seed=5)
    assert again.reused and not first.reused and again.rows == first.rows[: len(again.rows)]
    with pytest.raises(
        DataError, match=r"another preparation: min_characters is 200 there and 300 here, vocab_size is 700"
    ):
        _prepare(corpus, tmp_path / "out", prepare__min_characters=300, prepare__vocab_size=701)
    with pytest.raises(DataError, match="sequence_length is 32 there and 64 here"):
        _prepare(corpus, tmp_path / "out", data__sequence_length=64)
    _jsonl(corpus, TEXTS[:41])
    with pytest.raises(DataError, match="the files have changed"):
        _prepare(corpus, tmp_path / "out")
    corpus.unlink()
    assert _prepare(corpus, tmp_path / "out").reused
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


# counts the moments at which something is made durable, and dies by SIGKILL at the given one
_KILLED = """
import os, signal, sys
from sparselt_dist.data import collection
collection.BATCH_CHARACTERS = 50_000
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
    source = _jsonl(tmp_path / "c.jsonl", TEXTS)
    settings = {
        "prepare.validation_fraction": 0.1,
        "prepare.samples_per_shard": 500,
        "prepare.deduplicate_near": True,
    }
    undisturbed = _run_until(0, _arguments(source, tmp_path / "a", settings))
    assert undisturbed.returncode == 0, undisturbed.stderr
    step = int(undisturbed.stdout.split()[-1]) // 6 | 1  # odd, so that kills fall before and after a flush
    arguments = _arguments(source, tmp_path / "b", settings | {"prepare.num_workers": 2})
    kills = 0
    while (result := _run_until(step, arguments)).returncode == -signal.SIGKILL:
        kills += 1
        assert kills < 30
    assert result.returncode == 0, result.stderr
    assert kills >= 4
    assert _hashes(tmp_path / "a") == _hashes(tmp_path / "b")


def test_a_kill_leaves_no_process_and_the_end_is_accounted_for(tmp_path: Path) -> None:
    settings = ["prepare.source=embedded", "prepare.vocab_size=8192", "prepare.validation_fraction=0.05"]
    command = [sys.executable, "-m", "sparselt_dist.prepare", *settings, f"prepare.output_dir={tmp_path / 'out'}"]
    command.append("prepare.num_workers=2")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "out/.work/tokenize.log"
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
    source = _jsonl(tmp_path / "c.jsonl", TEXTS)
    assert _run_until(5, _arguments(source, tmp_path / "out", {})).returncode == -signal.SIGKILL
    with pytest.raises(DataError, match="vocab_size is 700 there and 800 here"):
        _prepare(source, tmp_path / "out", prepare__vocab_size=800)
    _jsonl(source, TEXTS[:-1])
    with pytest.raises(DataError, match="unfinished preparation of something else: the source files have changed"):
        _prepare(source, tmp_path / "out")


def test_work_that_ended_with_an_error_gives_way_to_the_remedy(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prepare\.vocab_size"):
        _prepare(corpus, tmp_path / "out", prepare__vocab_size=64)
    with pytest.raises(DataError, match="the validation split has"):
        _prepare(corpus, tmp_path / "out", prepare__validation_fraction=0.02, data__sequence_length=20_000)
    with corpus.open("a") as file:
        file.write("no JSON\n")
    with pytest.raises(DataError, match=r"corpus\.jsonl:41: not JSON"):
        _prepare(corpus, tmp_path / "out")
    _jsonl(corpus, TEXTS[:40])
    _prepare(corpus, tmp_path / "out")
    _prepare(corpus, tmp_path / "fresh")
    assert _hashes(tmp_path / "out") == _hashes(tmp_path / "fresh")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    settings = {"prepare.tokenizer_characters": 500_000, "prepare.deduplicate_exact": True, "prepare.num_workers": 1}
    peaks = []
    for copies in (10, 80):
        texts = (f"{number} {text}" for number in range(copies) for text in TEXTS)
        with (tmp_path / f"{copies}.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        arguments = _arguments(tmp_path / f"{copies}.jsonl", tmp_path / f"out{copies}", settings)
        program = "import resource, sys; from sparselt_dist.prepare import main; main(sys.argv[1:]); "
        program += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        run = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
        peaks.append(int(run.stdout.split()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 60, peaks


# --- what is refused -------------------------------------------------------------------------------------------------


def _fails(capsys: pytest.CaptureFixture[str], arguments: list[str], *expected: str) -> None:
    assert prepare_command.main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.count("error:") == 1
    for part in expected:
        assert part in error, error


def test_bad_input_is_one_message_and_exit_code_2(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (tmp_path / "binary.txt").write_bytes(b"\0\1\2" * 400)
    (tmp_path / "file").touch()
    _fails(capsys, _arguments(tmp_path / "binary.txt", out, {}), "binary.txt: is a binary file")
    _fails(capsys, _arguments(tmp_path / "file", out, {}), "file: the file is empty")
    _fails(capsys, _arguments(tmp_path / "no.txt", out, {}), "no.txt: no such file")
    _fails(capsys, _arguments(corpus, tmp_path / "file/out", {}), "prepare.output_dir", "cannot be written")
    _fails(capsys, _arguments(corpus, Path("/proc/nothing"), {}), "prepare.output_dir", "/proc/nothing")
    _fails(
        capsys, _arguments(corpus, tmp_path / "b", {"prepare.min_characters": 10**7}), "nothing is left of 40 documents"
    )
    _fails(capsys, _arguments(corpus, tmp_path / "c", {"prepare.vocab_size": 70}), "prepare.vocab_size: found 70")
    _fails(capsys, _arguments(corpus, tmp_path / "d", {"prepare.tokenizer": "wordpiec"}), "prepare.tokenizer")
    _fails(
        capsys,
        _arguments(corpus, tmp_path / "e", {"prepare.max_tokens_per_character": 0.01}),
        "prepare.max_tokens_per_character: 0.01 leaves none",
    )
    _fails(capsys, _arguments(corpus, tmp_path / "f", {"data.sequence_length": 10**6}), "expected at least one row")
    assert prepare_command.main(["prepare.output_dir=" + str(out)]) == 2
    assert "prepare.source: found null" in capsys.readouterr().err


def test_a_full_disk_is_a_data_error(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match="No space left on device"):
            _prepare(corpus, tmp_path / "out")
    assert _prepare(corpus, tmp_path / "out").train_dir.exists()


# --- the command `shards` --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(corpus: Path, tmp_path: Path) -> Path:
    _prepare(corpus, tmp_path / "out", prepare__validation_fraction=0.1, prepare__samples_per_shard=200)
    return tmp_path / "out"


def test_inspect_shows_shards_text_lengths_and_licences(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shards_command.main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    manifest = read_manifest(folder / "train")
    for part in (
        "shard-000001.tar",
        f"{manifest.tokens:,}",
        "unknown",
        "length: median 32",
        "shard-000000/0:",
    ):
        assert part in shown
    assert shown.count("sequence length 32") == 2


def test_inspect_shows_a_histogram_of_document_lengths(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _prepare(corpus, tmp_path / "docs", data__sequence_length=None)
    assert shards_command.main(["inspect", str(tmp_path / "docs"), "--samples", "0"]) == 0
    bins = [line.split() for line in capsys.readouterr().out.splitlines() if " to " in line]
    assert len(bins) > 4 and sum(int(line[3].replace(",", "")) for line in bins) == len(_kept(TEXTS[:40]))


def test_verify_exits_2_and_names_the_shard(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shards_command.main(["verify", str(folder)]) == 0
    path = folder / "train/shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[-9000] ^= 4
    path.write_bytes(data)
    assert shards_command.main(["verify", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "train/shard-000001.tar: changed" in error and "Traceback" not in error
    assert shards_command.main(["verify", str(folder / "nothing")]) == 2
    assert "no such shard folder" in capsys.readouterr().err

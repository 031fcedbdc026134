"""Preparation as a whole: what becomes of documents, order, splits, restarts, and what is refused."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepare_helpers import TEXTS, all_ids, arguments_of, kept_texts, run_prepare, write_jsonl

from sparselt_dist import prepare as prepare_command
from sparselt_dist import shards as shards_command
from sparselt_dist.data.corpora import open_folder
from sparselt_dist.data.manifest import read_manifest
from sparselt_dist.data.tokenizer import load_for_text
from sparselt_dist.data.verification import verify
from sparselt_dist.errors import DataError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", TEXTS[:40])


# --- what becomes of the documents -----------------------------------------------------------------------------------


def test_rows_are_the_documents_end_to_end(corpus: Path, tmp_path: Path) -> None:
    report = run_prepare(corpus, tmp_path / "out", prepare__order="source")
    tokenizer, info = load_for_text(tmp_path / "out/tokenizer"), open_folder(report.train_dir).check_tokenizer()
    stream: list[int] = []
    for text in kept_texts(TEXTS[:40]):
        stream += [*tokenizer.encode(text, add_special_tokens=False).ids, info.sep_id or -1]
    rows = all_ids(report.train_dir)
    assert all(len(row) == 32 for row in rows)
    assert np.concatenate(rows).tolist() == stream[: len(stream) // 32 * 32]
    statistics = read_manifest(report.train_dir).statistics
    assert statistics["tokens"] == len(stream) and statistics["tokens_dropped"] == len(stream) % 32
    text_bytes = sum(len(text.encode()) for text in kept_texts(TEXTS[:40]))
    assert statistics["bytes_per_token"] == pytest.approx(
        text_bytes / (len(stream) - statistics["documents"]), abs=1e-4
    )
    assert not (tmp_path / "out/.work").exists() and verify(report.train_dir) == []


def test_shuffled_rows_are_the_same_rows(corpus: Path, tmp_path: Path) -> None:
    source = [row.tobytes() for row in all_ids(run_prepare(corpus, tmp_path / "a", prepare__order="source").train_dir)]
    shuffled = [
        row.tobytes() for row in all_ids(run_prepare(corpus, tmp_path / "b", prepare__samples_per_shard=100).train_dir)
    ]
    assert sorted(source) == sorted(shuffled) and source != shuffled
    assert len(open_folder(tmp_path / "b").manifest.shards) == -(-len(source) // 100)
    moved = np.mean([one != other for one, other in zip(source, shuffled, strict=True)])
    assert moved > 0.95


def test_sentence_length_order_is_descending_and_stable(corpus: Path, tmp_path: Path) -> None:
    source = all_ids(run_prepare(corpus, tmp_path / "a", prepare__order="source").train_dir)
    ordered = all_ids(run_prepare(corpus, tmp_path / "b", prepare__order="sentence-length").train_dir)
    full_stop = load_for_text(tmp_path / "b/tokenizer").token_to_id(".")
    expected = sorted(source, key=lambda row: -int((row == full_stop).sum()))  # Python's sort is stable
    assert [row.tobytes() for row in ordered] == [row.tobytes() for row in expected]
    assert (ordered[0] == full_stop).sum() > (ordered[-1] == full_stop).sum()


@pytest.mark.parametrize("settings", [{"data__sequence_length": None}, {"prepare__packing": "documents"}])
def test_documents_are_kept_whole(corpus: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    report = run_prepare(corpus, tmp_path / "out", prepare__order="source", **settings)
    tokenizer, info = load_for_text(tmp_path / "out/tokenizer"), open_folder(report.train_dir).check_tokenizer()
    manifest = read_manifest(report.train_dir)
    assert (manifest.kind, manifest.sequence_length) == ("documents", None)
    for text, ids in zip(kept_texts(TEXTS[:40]), all_ids(report.train_dir), strict=True):
        assert ids.tolist() == [info.cls_id, *tokenizer.encode(text, add_special_tokens=False).ids, info.sep_id]


def test_each_filter_drops_what_it_should(tmp_path: Path) -> None:
    texts = kept_texts(TEXTS[:40])
    spoiled = [*texts, texts[3] + "  ", texts[5], "short", "x" * 30_000]
    report = run_prepare(write_jsonl(tmp_path / "c.jsonl", spoiled), tmp_path / "out", prepare__max_characters=29_000)
    statistics = read_manifest(report.train_dir).statistics
    too_long = sum(len(text) > 29_000 for text in texts)
    found = [statistics[key] for key in ("documents_read", "too_short", "too_long", "exact_duplicates", "documents")]
    assert found == [len(texts) + 4, 1, too_long + 1, 2, len(texts) - too_long]
    assert any("exact duplicates" in name and "-2 ->" in value for name, value in report.rows)


def test_compressible_documents_are_kept_exactly(corpus: Path, tmp_path: Path) -> None:
    limit = 0.37
    report = run_prepare(
        corpus,
        tmp_path / "out",
        prepare__max_tokens_per_character=limit,
        prepare__packing="documents",
        prepare__order="source",
    )
    tokenizer = load_for_text(tmp_path / "out/tokenizer")
    texts = kept_texts(TEXTS[:40])
    counts = [len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]
    expected = [count for count, text in zip(counts, texts, strict=True) if count < limit * len(text)]
    assert 0 < len(expected) < len(texts)
    assert [len(ids) - 2 for ids in all_ids(report.train_dir)] == expected
    assert read_manifest(report.train_dir).statistics["incompressible"] == len(texts) - len(expected)


def test_near_duplicates_go_and_one_of_each_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datatrove")
    monkeypatch.setattr("sparselt_dist.data.sources.MIN_SEGMENT_BYTES", 20_000)  # duplicates lie in several chunks
    texts = [text for text in kept_texts(TEXTS) if len(text) > 2000][:12]
    near = [text.replace(" the ", " The ", 3) + " One more closing sentence." for text in texts[:4]]
    source = write_jsonl(tmp_path / "c.jsonl", texts + near + [near[0].upper()])
    settings = {"prepare__packing": "documents", "prepare__order": "source", "prepare__normalize": "nfc"}
    report = run_prepare(source, tmp_path / "out", prepare__deduplicate_near=True, **settings)
    statistics = read_manifest(report.train_dir).statistics
    assert statistics["near_duplicates"] == 5 and statistics["documents"] == len(texts)
    tokenizer = load_for_text(tmp_path / "out/tokenizer")
    openings = {tokenizer.decode(ids.tolist()[1:15]).lower() for ids in all_ids(report.train_dir)}
    assert len(openings) == len(texts)


def test_the_held_out_split_depends_on_the_text_alone(tmp_path: Path) -> None:
    texts = kept_texts([f"Paragraph {number}. {text[:900]}" for number, text in enumerate(TEXTS * 4)])

    def splits(texts: list[str], output: str) -> list[set[int]]:
        """The numbers of the paragraphs in each split."""
        report = run_prepare(
            write_jsonl(tmp_path / "c.jsonl", texts),
            tmp_path / output,
            prepare__validation_fraction=0.2,
            prepare__packing="documents",
            prepare__tokenizer="byte-bpe",  # decodes to the very text
        )
        tokenizer = load_for_text(report.train_dir / "tokenizer")
        folders = [report.train_dir, tmp_path / output / "validation"]
        decoded = [[tokenizer.decode(ids.tolist()) for ids in all_ids(folder)] for folder in folders]
        return [{int(text.split()[1].rstrip(".")) for text in texts} for texts in decoded]

    (train, held_out), (other_train, other_held_out) = splits(texts[:220], "a"), splits(texts[100:][::-1], "b")
    assert train | held_out == set(range(220)) and not train & held_out
    assert 0.12 * 220 < len(held_out) < 0.28 * 220
    common = set(range(100, 220))
    assert held_out & common == other_held_out & common and train & common == other_train & common


def test_a_few_documents_still_give_a_held_out_one(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "c.jsonl", [text for text in TEXTS if len(text) > 3000][:4])
    report = run_prepare(source, tmp_path / "out", prepare__validation_fraction=1e-6)
    assert report.validation_dir is not None
    assert read_manifest(report.validation_dir).statistics["documents"] == 1
    assert read_manifest(report.train_dir).statistics["documents"] == 3


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "byte-bpe", "unigram"])
def test_every_tokenizer_serves(corpus: Path, tmp_path: Path, kind: str) -> None:
    report = run_prepare(corpus, tmp_path / "out", prepare__tokenizer=kind)
    assert read_manifest(report.train_dir).vocab_size == 700 and verify(report.train_dir) == []


def test_crammed_shards_hold_no_unknown_token(corpus: Path, tmp_path: Path) -> None:
    report = run_prepare(corpus, tmp_path / "out", prepare__normalize="crammed")
    info = open_folder(report.train_dir).check_tokenizer()
    ids = np.concatenate(all_ids(report.train_dir))
    assert set(np.unique(ids)) & set(info.special_ids) == {info.sep_id} == {5}


def test_an_existing_tokenizer_is_taken(corpus: Path, tmp_path: Path) -> None:
    first = run_prepare(corpus, tmp_path / "a").train_dir
    second = run_prepare(corpus, tmp_path / "b", prepare__tokenizer=str(first / "tokenizer")).train_dir
    assert [ids.tobytes() for ids in all_ids(first)] == [ids.tobytes() for ids in all_ids(second)]
    assert open_folder(first).check_tokenizer() == open_folder(second).check_tokenizer()


def test_sources_and_licences_are_accounted_for(tmp_path: Path) -> None:
    rows = [{"text": text, "license": "A" if number % 2 else "B"} for number, text in enumerate(TEXTS[:12])]
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    manifest = read_manifest(
        run_prepare(tmp_path / "c.jsonl.gz", tmp_path / "out", prepare__min_characters=0).train_dir
    )
    assert {(source.license, source.documents) for source in manifest.sources} == {("A", 6), ("B", 6)}
    assert sum(source.characters for source in manifest.sources) == sum(len(text) for text in kept_texts(TEXTS[:12], 0))


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
    _fails(capsys, arguments_of(tmp_path / "binary.txt", out, {}), "binary.txt: is a binary file")
    _fails(capsys, arguments_of(tmp_path / "file", out, {}), "file: the file is empty")
    _fails(capsys, arguments_of(tmp_path / "no.txt", out, {}), "no.txt: no such file")
    _fails(capsys, arguments_of(corpus, tmp_path / "file/out", {}), "prepare.output_dir", "cannot be written")
    _fails(capsys, arguments_of(corpus, Path("/proc/nothing"), {}), "prepare.output_dir", "/proc/nothing")
    _fails(
        capsys,
        arguments_of(corpus, tmp_path / "b", {"prepare.min_characters": 10**7}),
        "nothing is left of 40 documents",
    )
    _fails(capsys, arguments_of(corpus, tmp_path / "c", {"prepare.vocab_size": 70}), "prepare.vocab_size: found 70")
    _fails(capsys, arguments_of(corpus, tmp_path / "d", {"prepare.tokenizer": "wordpiec"}), "prepare.tokenizer")
    _fails(
        capsys,
        arguments_of(corpus, tmp_path / "e", {"prepare.max_tokens_per_character": 0.01}),
        "prepare.max_tokens_per_character: 0.01 leaves none",
    )
    _fails(capsys, arguments_of(corpus, tmp_path / "f", {"data.sequence_length": 10**6}), "expected at least one row")
    assert prepare_command.main(["prepare.output_dir=" + str(out)]) == 2
    assert "prepare.source: found null" in capsys.readouterr().err


def test_a_full_disk_is_a_data_error(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match="No space left on device"):
            run_prepare(corpus, tmp_path / "out")
    assert run_prepare(corpus, tmp_path / "out").train_dir.exists()


# --- the command `shards` --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(corpus: Path, tmp_path: Path) -> Path:
    run_prepare(corpus, tmp_path / "out", prepare__validation_fraction=0.1, prepare__samples_per_shard=200)
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
    run_prepare(corpus, tmp_path / "docs", data__sequence_length=None)
    assert shards_command.main(["inspect", str(tmp_path / "docs"), "--samples", "0"]) == 0
    bins = [line.split() for line in capsys.readouterr().out.splitlines() if " to " in line]
    assert len(bins) > 4 and sum(int(line[3].replace(",", "")) for line in bins) == len(kept_texts(TEXTS[:40]))


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

"""Preparation with prepare.packing=best-fit: whole documents in rows, nothing lost, real text fills the rows."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
from greedy_packer import greedy_fill
from prepare_helpers import TEXTS, file_hashes, kept_texts, run_prepare, write_jsonl

from sparselt_dist.data.best_fit import cut_lengths, pack_best_fit
from sparselt_dist.data.corpora import open_folder
from sparselt_dist.data.embedded import CORPORA
from sparselt_dist.data.manifest import read_manifest
from sparselt_dist.data.tokenizer import load_for_text
from sparselt_dist.data.verification import verify


def _pieces(folder: Path) -> list[np.ndarray]:
    """Every piece in the rows of a shard folder."""
    shards = open_folder(folder)
    pieces = []
    for stored in shards.read(np.arange(shards.num_samples)):
        assert stored is not None and stored.documents is not None
        assert stored.documents.sum() == len(stored.ids)
        pieces += np.split(stored.ids, np.cumsum(stored.documents)[:-1])
    return pieces


def test_rows_hold_whole_documents_and_only_long_ones_are_cut(tmp_path: Path) -> None:
    length = 256
    source = write_jsonl(tmp_path / "c.jsonl", TEXTS)
    report = run_prepare(source, tmp_path / "out", prepare__packing="best-fit", data__sequence_length=length)
    shards, manifest = open_folder(report.train_dir), read_manifest(report.train_dir)
    tokenizer, info = load_for_text(report.train_dir / "tokenizer"), shards.check_tokenizer()
    expected = []
    for text in kept_texts(TEXTS):
        ids = [info.cls_id, *tokenizer.encode(text, add_special_tokens=False).ids, info.sep_id]
        expected += [tuple(ids[start : start + length]) for start in range(0, len(ids), length)]
    assert sorted(tuple(piece.tolist()) for piece in _pieces(report.train_dir)) == sorted(expected)
    assert (manifest.kind, manifest.sequence_length) == ("packed", length)
    assert manifest.tokens == manifest.statistics["tokens"] == sum(map(len, expected))
    assert manifest.statistics["tokens_dropped"] == 0 and verify(report.train_dir) == []
    fill = manifest.tokens / (manifest.samples * length)
    assert manifest.statistics["fill"] == pytest.approx(fill, abs=1e-6)
    assert any(f"{100 * fill:.2f} % full" in value for _, value in report.rows)


def test_rows_are_shuffled_over_the_corpus_and_end_in_padding(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "c.jsonl", TEXTS[:60])
    settings = {"prepare__packing": "best-fit", "data__sequence_length": 64}
    ordered = _pieces(run_prepare(source, tmp_path / "a", prepare__order="source", **settings).train_dir)
    shuffled = _pieces(run_prepare(source, tmp_path / "b", **settings).train_dir)
    assert sorted(map(bytes, ordered)) == sorted(map(bytes, shuffled))
    opened = open_folder(tmp_path / "b")
    openings = [piece[0] == opened.check_tokenizer().cls_id for piece in shuffled]
    assert 30 < sum(openings) < 60 and not all(openings[:20])
    with tarfile.open(tmp_path / "b/shard-000000.tar") as tar:  # as a stock reader sees it
        name = next(name for name in tar.getnames() if name.endswith(".ids.npy"))
        tar.extract(name, tmp_path, filter="data")
    rows = np.load(tmp_path / name)
    used = [len(ids) for ids in opened.ids(np.arange(len(rows)))]
    assert all((row[end:] == 0).all() and (row[:end] != 0).all() for row, end in zip(rows, used, strict=True))
    assert any(end < 64 for end in used)


@pytest.mark.parametrize("packing", ["concatenate", "documents", "best-fit"])
@pytest.mark.parametrize("order", ["shuffle", "sentence-length"])
def test_where_blocks_end_changes_no_byte(
    packing: str, order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "c.jsonl", TEXTS[:30])
    settings = {"prepare__packing": packing, "prepare__order": order}
    run_prepare(source, tmp_path / "a", **settings)
    monkeypatch.setattr("sparselt_dist.data.sources.MIN_SEGMENT_BYTES", 10_000)
    monkeypatch.setattr("sparselt_dist.data.stages.COUNTED_AT_ONCE", 100)
    run_prepare(source, tmp_path / "b", **settings)
    assert file_hashes(tmp_path / "a") == file_hashes(tmp_path / "b")


def test_windows_packed_apart_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "c.jsonl", TEXTS[:60])
    settings = {"prepare__packing": "best-fit", "data__sequence_length": 64}
    together = _pieces(run_prepare(source, tmp_path / "a", **settings).train_dir)
    monkeypatch.setattr("sparselt_dist.data.sources.MIN_SEGMENT_BYTES", 10_000)
    monkeypatch.setattr("sparselt_dist.data.packing.WINDOW_PIECES", 100)
    apart = _pieces(run_prepare(source, tmp_path / "b", **settings).train_dir)
    assert sorted(map(bytes, together)) == sorted(map(bytes, apart))
    assert [piece.tobytes() for piece in together] != [piece.tobytes() for piece in apart]


@pytest.mark.parametrize("length", [128, 512, 1024])
def test_real_text_fills_the_rows(length: int) -> None:
    """Paragraphs of the embedded corpus, counted in words: the lengths of real documents of many sizes."""
    texts = [text for read in CORPORA.values() for text in read()]
    lengths = np.array([2 + 4 * len(part.split()) // 3 for text in texts for part in text.split("\n") if part])
    pieces, _ = cut_lengths(lengths, length)
    fill = pieces.sum() / ((pack_best_fit(pieces, length).max() + 1) * length)
    assert fill >= 0.98 and fill >= greedy_fill(pieces.tolist(), length) - 0.01

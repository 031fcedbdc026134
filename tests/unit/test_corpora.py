"""From locations to samples: packed rows, several folders, mixtures, raw text of others, bad shards."""

import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpus_files import number_of, numbered_rows, save_tokenizer, texts, tokenizer, write_folder, write_text_tar

from sparselt_dist.config import Config, CorpusSection, DataSection, PrepareSection
from sparselt_dist.data import shard_files
from sparselt_dist.data.corpora import Corpora, open_corpora, open_folder
from sparselt_dist.data.loader import Loader, MicroBatch
from sparselt_dist.data.manifest import file_sha256
from sparselt_dist.data.text_index import around, boundary, cut
from sparselt_dist.data.verification import verify
from sparselt_dist.errors import DataError
from sparselt_dist.objectives.base import TokenizerInfo
from sparselt_dist.objectives.mlm import MLMCollator
from sparselt_dist.objectives.settings import MLMConfig

COLLATOR = MLMCollator(
    MLMConfig(mlm_probability=0.3), TokenizerInfo(vocab_size=96, pad_id=0, mask_id=4, special_ids=(0, 1, 2, 3, 4))
)


def config(cache: Path, **data: Any) -> Config:
    return Config(data=DataSection(cache_dir=str(cache), **data), prepare=PrepareSection())


def batches(corpora: Corpora, count: int, *, micro: int = 4, **options: Any) -> list[MicroBatch]:
    settings = {"seed": 1, "window": 2, "rank": 0, "world_size": 1, "num_workers": 0, "start_position": 0, **options}
    return list(islice(Loader(corpora, COLLATOR, micro_batch_size=micro, **settings), count))


# --- packed rows -----------------------------------------------------------------------------------------------------


def packed_folder(folder: Path) -> tuple[Path, list[np.ndarray]]:
    generator = np.random.default_rng(0)
    documents = [np.array(lengths) for lengths in ([16], [5, 4, 7], [3, 2], [10, 6], [1, 1, 1, 1, 1]) for _ in range(6)]
    rows = []
    for lengths in documents:
        row = np.zeros(16, dtype=np.uint16)
        row[: lengths.sum()] = generator.integers(5, 96, lengths.sum())
        rows.append(row)
    return write_folder(folder, rows, kind="packed", documents=documents), documents


def test_packed_rows_come_with_their_documents(tmp_path: Path) -> None:
    path, documents = packed_folder(tmp_path)
    corpora = pickle.loads(pickle.dumps(open_folder(path)))
    found = corpora.read(np.arange(30))
    assert [stored.documents.tolist() for stored in found] == [lengths.tolist() for lengths in documents]
    assert [len(stored.ids) for stored in found] == [lengths.sum() for lengths in documents]
    assert corpora.manifest.tokens == sum(lengths.sum() for lengths in documents)
    assert verify(path) == []
    (path / "shard-000001.index.json").unlink()
    assert [stored.documents.tolist() for stored in open_folder(path).read(np.arange(10, 20))] == [
        lengths.tolist() for lengths in documents[10:20]
    ]


def test_segments_and_positions_of_a_packed_batch(tmp_path: Path) -> None:
    corpora = open_folder(packed_folder(tmp_path)[0])
    batch = batches(corpora, 1, micro=30, window=0)[0].batch
    assert batch["segment_ids"][6].tolist() == [1] * 5 + [2] * 4 + [3] * 7
    assert batch["position_ids"][6].tolist() == [*range(5), *range(4), *range(7)]
    assert batch["segment_ids"][12].tolist() == [1, 1, 1, 2, 2] + [0] * 11
    assert torch.equal(batch["segment_ids"] > 0, batch["attention_mask"].bool())


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda lengths: lengths + 9, "the documents of a row are longer than the row"),
        (lambda lengths: lengths - 1, "found other ids than padding"),
    ],
)
def test_verify_finds_documents_that_do_not_fit_their_rows(tmp_path: Path, damage: Any, expected: str) -> None:
    lengths = [np.array([6, 8])] * 5
    rows = [np.concatenate([np.full(14, 7), [0, 0]]).astype(np.uint16)] * 5
    path = write_folder(tmp_path, rows, kind="packed", documents=[damage(each) for each in lengths])
    assert any(expected in fault for fault in verify(path)), verify(path)


# --- several folders and mixtures ------------------------------------------------------------------------------------


def test_a_pattern_of_folders_is_one_corpus(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", numbered_rows(23))
    write_folder(tmp_path / "b", numbered_rows(12, first=23))
    for pattern in ("{a,b}", "*", "[ab]/shard-*.tar"):
        corpora = open_corpora(str(tmp_path / pattern), Config())
        drawn = [number_of(ids) for ids in corpora.ids(np.arange(35))]
        assert drawn == list(range(35)), pattern
        assert corpora.shard_samples == [[10, 10, 3, 10, 2]]
        assert corpora.manifest.samples == 35 and corpora.manifest.tokens == 35 * 16
    assert corpora.keys(np.array([24])) == [f"{tmp_path}/b/shard-000000/1"]


def test_a_mixture_draws_its_shares(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", numbered_rows(20))
    write_folder(tmp_path / "b", numbered_rows(50, first=100))
    parts = [
        CorpusSection(shards=str(tmp_path / "a"), weight=1.0),
        CorpusSection(shards=str(tmp_path / "b"), weight=3.0),
    ]
    corpora = open_corpora(parts, Config())
    drawn = [
        number_of(row)
        for made in batches(corpora, 20, micro=4)
        for row in torch.where(made.batch["labels"] >= 0, made.batch["labels"], made.batch["input_ids"]).numpy()
    ]
    assert all(sum(number < 100 for number in drawn[start : start + 4]) == 1 for start in range(0, 80, 4))
    assert sorted(number for number in drawn if number < 100) == list(range(20))


def test_corpora_of_other_tokenizers_do_not_mix(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", numbered_rows(10))
    other = write_folder(tmp_path / "b", numbered_rows(10))
    manifest = (other / "manifest.json").read_text()
    digest = open_folder(other).manifest.tokenizer_sha256
    (other / "manifest.json").write_text(manifest.replace(digest, "0" * 64))
    with pytest.raises(DataError, match=r"b: tokenized otherwise than .*a; .*prepare\.tokenizer"):
        open_corpora(str(tmp_path / "{a,b}"), Config())


# --- bad shards ------------------------------------------------------------------------------------------------------


def damaged(folder: Path) -> Path:
    write_folder(folder, numbered_rows(40))
    path = folder / "shard-000002.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    return folder


def test_a_shard_of_another_checksum_stops_the_run(tmp_path: Path) -> None:
    corpora = open_folder(damaged(tmp_path))
    with pytest.raises(DataError, match=r"shard-000002\.tar: changed: found sha256 .*data\.on_bad_shard=skip"):
        corpora.ids(np.arange(40))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_skipped_shard_is_counted_and_moves_nothing_else(tmp_path: Path, workers: int) -> None:
    sound = write_folder(tmp_path / "sound", numbered_rows(40))
    expected = [number_of(ids) for ids in _drawn(batches(open_folder(sound), 10))]
    corpora = open_corpora(str(damaged(tmp_path / "bad")), config(tmp_path, on_bad_shard="skip"))
    made = batches(corpora, 10, num_workers=workers)
    found = [number_of(ids) for ids in _drawn(made)]
    assert found == [number for number in expected if not 20 <= number < 30]
    assert sum(each.skipped for each in made) == 10
    complaints = [text for each in made for text in each.complaints]
    assert (
        len(complaints) == 1 and "skipping a shard of 10 samples" in complaints[0] and "shard-000002" in complaints[0]
    )


def _drawn(made: list[MicroBatch]) -> list[np.ndarray]:
    """The rows that were delivered, before masking."""
    whole = [torch.where(each.batch["labels"] >= 0, each.batch["labels"], each.batch["input_ids"]) for each in made]
    return [
        row.numpy() for each, rows in zip(made, whole, strict=True) for row in rows if int(each.batch["num_tokens"])
    ]


def test_a_micro_batch_of_skipped_samples_only_has_no_targets(tmp_path: Path) -> None:
    corpora = open_corpora(str(damaged(tmp_path)), config(tmp_path, on_bad_shard="skip"))
    made = batches(corpora, 40, micro=1)
    empty = [each.batch for each in made if each.skipped]
    assert len(empty) == 10
    assert all(int(batch["num_targets"]) == int(batch["num_tokens"]) == 0 for batch in empty)
    assert all(int((batch["labels"] >= 0).sum()) == 0 for batch in empty)


# --- raw text of others ----------------------------------------------------------------------------------------------


def raw_folder(folder: Path, documents: list[str], *, with_tokenizer: bool = True, suffix: str = "txt") -> Path:
    for number in range(0, len(documents), 10):
        write_text_tar(folder / f"part-{number // 10}.tar", documents[number : number + 10], suffix=suffix)
    if with_tokenizer:
        save_tokenizer(folder / "tokenizer")
    return folder


@pytest.mark.parametrize("suffix", ["txt", "json"])
def test_raw_text_is_tokenized_whole_and_once(tmp_path: Path, suffix: str) -> None:
    documents = texts(35)
    folder = raw_folder(tmp_path / "raw", documents, suffix=suffix)
    corpora = open_corpora(str(folder), config(tmp_path / "cache", sequence_length=16))
    ids = np.concatenate(corpora.ids(np.arange(corpora.num_samples))).tolist()
    expected: list[int] = []
    for text in documents:
        expected += [2, *tokenizer().encode(text, add_special_tokens=False).ids, 3]
    assert ids == expected  # 2 begins a document and 3 ends it: pieces end to end are the documents
    assert corpora.num_samples > 35 and corpora.manifest.kind == "text"
    assert corpora.manifest.sources[0].documents == 35


def test_long_pieces_take_several_rows_and_nothing_is_lost(tmp_path: Path) -> None:
    folder = raw_folder(tmp_path / "raw", ["a a a a o o o o " * 50, "dog"])
    corpora = open_corpora(str(folder), config(tmp_path / "cache", sequence_length=8))
    count = -(-corpora.num_samples // 4)
    made = batches(corpora, count, micro=4, row_length=8, window=0)
    assert max(each.batch["input_ids"].shape[1] for each in made) == 8
    first_epoch = sum(len(ids) for ids in corpora.ids(np.arange(corpora.num_samples)))
    again = sum(len(ids) for ids in corpora.ids(np.arange(4 * count - corpora.num_samples)))
    assert sum(int(each.batch["num_tokens"]) for each in made) == first_epoch + again


def test_the_index_is_made_once_and_follows_the_file(tmp_path: Path) -> None:
    folder = raw_folder(tmp_path / "raw", texts(10))
    settings = config(tmp_path / "cache", sequence_length=16)
    first = open_corpora(str(folder), settings).manifest
    assert len(list((tmp_path / "cache" / "indexes").glob("*.npz"))) == 1
    assert open_corpora(str(folder), settings).manifest == first
    write_text_tar(folder / "part-0.tar", texts(12, seed=5))
    assert open_corpora(str(folder), settings).manifest.sha256 != first.sha256


def test_without_a_tokenizer_one_is_trained_and_kept(tmp_path: Path) -> None:
    folder = raw_folder(tmp_path / "raw", texts(30), with_tokenizer=False)
    settings = Config(
        data=DataSection(cache_dir=str(tmp_path / "cache"), sequence_length=16), prepare=PrepareSection(vocab_size=80)
    )
    corpora = open_corpora(str(folder), settings)
    assert corpora.check_tokenizer().vocab_size == 80
    kept = corpora.tokenizer / "tokenizer.json"
    before = kept.stat().st_mtime_ns
    assert open_corpora(str(folder), settings).manifest == corpora.manifest
    assert kept.stat().st_mtime_ns == before


def test_raw_text_does_not_depend_on_workers(tmp_path: Path) -> None:
    folder = raw_folder(tmp_path / "raw", texts(30))
    corpora = open_corpora(str(folder), config(tmp_path / "cache", sequence_length=16))
    one, other = (batches(corpora, 8, row_length=16, num_workers=workers) for workers in (0, 2))
    assert [each.digest for each in one] == [each.digest for each in other]
    assert all(torch.equal(a.batch["input_ids"], b.batch["input_ids"]) for a, b in zip(one, other, strict=True))


def test_raw_text_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    settings = config(tmp_path / "cache", sequence_length=16)
    write_text_tar(tmp_path / "a" / "x.tar", ["one"], suffix="json", text_key="content")
    with pytest.raises(
        DataError, match=r"x\.tar: member 000000\.json: found content, other, expected text under 'text'"
    ):
        open_corpora(str(tmp_path / "a"), settings)
    write_text_tar(tmp_path / "b" / "x.tar", [])
    with pytest.raises(DataError, match=r"x\.tar: holds no member \.txt or \.json"):
        open_corpora(str(tmp_path / "b"), settings)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.tar").write_bytes(b"x" * 3000)
    with pytest.raises(DataError, match=r"x\.tar: not a readable tar"):
        open_corpora(str(tmp_path / "c"), settings)
    (tmp_path / "d").mkdir()
    with pytest.raises(DataError, match="no complete shard folder"):
        open_corpora(str(tmp_path / "d"), settings)


@pytest.mark.parametrize(
    "text", ["one two three four five six", "ééééééééééééééééééééééééééééé", "a" * 61, "中文" * 20, " x " * 30]
)
@pytest.mark.parametrize("piece_bytes", [16, 20, 32])
def test_pieces_joined_are_the_text(text: str, piece_bytes: int) -> None:
    data = text.encode()
    pieces = 1 + max(0, len(data) - piece_bytes // 2 - 4) // piece_bytes
    parts = [cut(data, number, pieces, piece_bytes) for number in range(pieces)]
    assert b"".join(parts) == data and all(parts)
    for number, part in enumerate(parts):
        first, end = around(number, piece_bytes, len(data))
        assert cut(data[first:end], number, pieces, piece_bytes, before=first) == part
        part.decode()  # no character is cut


def test_a_piece_begins_after_white_space() -> None:
    assert boundary(b"one two three", 5, 8) == 8
    assert boundary(b"one two three", 4, 8) == 4
    assert boundary(b"onetwothree", 5, 3) == 5


def test_raw_text_mixes_with_shards_of_the_same_tokenizer(tmp_path: Path) -> None:
    prepared = write_folder(tmp_path / "prepared", numbered_rows(20))
    raw = raw_folder(tmp_path / "raw", texts(20), with_tokenizer=False)
    settings = Config(
        data=DataSection(cache_dir=str(tmp_path / "cache"), sequence_length=16),
        prepare=PrepareSection(tokenizer=str(prepared / "tokenizer")),
    )
    parts = [CorpusSection(shards=str(prepared), weight=3.0), CorpusSection(shards=f"{raw}/*.tar", weight=1.0)]
    corpora = open_corpora(parts, settings)
    assert corpora.manifest.kind == "documents" and corpora.manifest.sequence_length is None
    made = batches(corpora, 5, micro=4, row_length=16)
    assert sum(len(each.batch["input_ids"]) for each in made) >= 20
    assert corpora.mean_length == pytest.approx(16, abs=6)


def test_a_window_larger_than_memory_and_open_files_is_hashed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path, numbered_rows(40))
    size = (folder / "shard-000000.tar").stat().st_size
    monkeypatch.setattr(shard_files, "HELD_BYTES", size)  # one shard of four is held in memory
    monkeypatch.setattr(shard_files, "OPEN_SHARDS", 2)
    hashed: list[Path] = []
    monkeypatch.setattr(shard_files, "file_sha256", lambda path: hashed.append(path) or file_sha256(path))
    corpora = open_folder(folder)
    for _ in range(3):
        assert [number_of(corpora.ids(np.array([number]))[0]) for number in range(40)] == list(range(40))
    assert len(hashed) == 4
    at_once = corpora.ids(np.arange(40))  # more shards than may be open, all of which this read holds
    assert list(map(number_of, at_once)) == list(range(40))


def test_a_tar_that_is_not_there_is_said_in_a_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.tar: No such file or directory; correct the path"):
        open_corpora(str(tmp_path / "none.tar"), Config())


def test_ranks_look_for_a_share_of_the_shards_each(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "shards", numbered_rows(40))
    (folder / "shard-000001.tar").unlink()
    assert open_corpora(str(folder), Config(), (0, 2)).num_samples == 40
    with pytest.raises(DataError, match=r"shard-000001\.tar"):
        open_corpora(str(folder), Config(), (1, 2))
    with pytest.raises(DataError, match=r"shard-000001\.tar"):
        open_corpora(str(folder), Config())

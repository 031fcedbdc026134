"""The shard format: what is written is read back, by us and by webdataset, and every fault is named."""

from __future__ import annotations

import functools
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from sparselt_dist.data.corpora import open_folder
from sparselt_dist.data.manifest import Kind, file_sha256, read_manifest, write_manifest
from sparselt_dist.data.shard_index import index_path, read_index, scan_tar
from sparselt_dist.data.shard_writer import ShardWriter, id_dtype
from sparselt_dist.data.tokenizer_training import save_trained, train_tokenizer
from sparselt_dist.data.verification import verify
from sparselt_dist.errors import DataError

VOCAB_SIZE = 64
TEXT = "the quick brown fox jumps over the lazy dog and runs home again. " * 20


def _samples(kind: Kind, count: int = 700) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = np.full(count, 32) if kind == "rows" else rng.integers(1, 90, count)
    return [rng.integers(0, VOCAB_SIZE, length).astype("uint16") for length in lengths]


@functools.cache
def _tokenizer() -> Tokenizer:
    tokenizer = train_tokenizer(lambda: iter([TEXT]), kind="wordpiece", vocab_size=VOCAB_SIZE, crammed=False)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def _write(folder: Path, kind: Kind, samples: list[np.ndarray], samples_per_shard: int = 300) -> Path:
    save_trained(_tokenizer(), folder / "tokenizer", crammed=False, model_max_length=32)
    writer = ShardWriter(folder, kind=kind, dtype="uint16", samples_per_shard=samples_per_shard)
    writer.extend(samples)
    write_manifest(
        folder,
        writer.close(),
        kind=kind,
        sequence_length=32 if kind == "rows" else None,
        dtype="uint16",
        vocab_size=VOCAB_SIZE,
        tokenizer_sha256=file_sha256(folder / "tokenizer/tokenizer.json"),
    )
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return _write(tmp_path / "rows", "rows", _samples("rows"))


@pytest.mark.parametrize("kind", ["rows", "documents"])
def test_samples_are_read_back_at_random(tmp_path: Path, kind: Kind) -> None:
    samples = _samples(kind)
    folder = pickle.loads(pickle.dumps(open_folder(_write(tmp_path / "s", kind, samples))))
    order = np.random.default_rng(1).permutation(len(samples))
    assert all(np.array_equal(read, samples[number]) for read, number in zip(folder.ids(order), order, strict=True))
    assert folder.num_samples == 700 and folder.shard_samples == [[300, 300, 100]]
    assert folder.keys(np.array([301]))[0] == "shard-000001/1"
    assert folder.folders[0].lengths(2).tolist() == [len(sample) for sample in samples[600:]]
    assert folder.manifest.tokens == sum(map(len, samples))


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # it never closes its files
@pytest.mark.parametrize("kind", ["rows", "documents"])
def test_webdataset_alone_reads_every_sample(tmp_path: Path, kind: Kind) -> None:
    import webdataset

    samples = _samples(kind)
    folder = _write(tmp_path / "s", kind, samples)
    found: list[np.ndarray] = []
    for member in webdataset.WebDataset(str(folder / "shard-{000000..000002}.tar"), shardshuffle=False).decode():
        ids = member["ids.npy"]
        found += list(ids) if kind == "rows" else np.split(ids, np.cumsum(member["lengths.npy"])[:-1])
    assert all(np.array_equal(one, other) for one, other in zip(found, samples, strict=True))


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    one = read_manifest(_write(tmp_path / "a", "documents", _samples("documents")))
    other = read_manifest(_write(tmp_path / "b", "documents", _samples("documents")))
    assert one == other


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_ids_take_the_smallest_type(vocab_size: int, dtype: str) -> None:
    assert id_dtype(vocab_size) == dtype


def test_a_sound_folder_has_no_fault(rows: Path) -> None:
    assert verify(rows) == []


def test_index_is_optional_and_never_trusted_blindly(rows: Path) -> None:
    before = open_folder(rows).ids(np.array([450]))[0]
    shard = rows / "shard-000001.tar"
    index = json.loads(index_path(shard).read_text())
    assert read_index(shard, "rows") == scan_tar(shard, "rows")
    for member in index["members"]:
        member["offset"] += 512
    index_path(shard).write_text(json.dumps(index))
    assert np.array_equal(open_folder(rows).ids(np.array([450]))[0], before)
    assert any("shard-000001.index.json" in fault for fault in verify(rows))
    index_path(shard).unlink()
    assert np.array_equal(open_folder(rows).ids(np.array([450]))[0], before)


def test_a_glob_opens_some_shards(rows: Path) -> None:
    part = open_folder(str(rows / "shard-00000[12].tar"))
    assert part.shard_samples == [[300, 100]] and part.keys(np.array([0]))[0] == "shard-000001/0"
    assert part.manifest.samples == 400 and part.manifest.sha256 != open_folder(rows).manifest.sha256
    with pytest.raises(DataError, match="matches nothing"):
        open_folder(str(rows / "nothing-*.tar"))
    with pytest.raises(DataError, match=r"not listed in manifest\.json"):
        open_folder(str(rows / "shard-00000{1,7}.tar"))


def _truncate(folder: Path) -> None:
    path = folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-20000])


def _flip_a_bit(folder: Path) -> None:
    path = folder / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[1500] ^= 1
    path.write_bytes(data)


def _swap(folder: Path) -> None:
    one, other = folder / "shard-000000.tar", folder / "shard-000001.tar"
    aside = folder / "aside"
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def _remove(folder: Path) -> None:
    (folder / "shard-000001.tar").unlink()


def _garbage(folder: Path) -> None:
    path = folder / "shard-000001.tar"
    path.write_bytes(b"x" * path.stat().st_size)


def _wrong_count(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][1]["samples"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _repack_with(folder: Path, ids: np.ndarray) -> None:
    """Replace a shard by one of other content, with a manifest that agrees."""
    aside = folder.parent / "aside"
    writer = ShardWriter(aside, kind="rows", dtype="uint16", samples_per_shard=300, first_shard=1)
    writer.extend(ids)
    entry = writer.close()[0]
    shutil.copy(aside / entry.name, folder / entry.name)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][1] |= {"bytes": entry.bytes, "sha256": entry.sha256}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _id_outside(folder: Path) -> None:
    ids = np.zeros((300, 32), dtype="uint16")
    ids[7, 3] = VOCAB_SIZE
    _repack_with(folder, ids)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_truncate, "shard-000001.tar: truncated"),
        (_flip_a_bit, "shard-000001.tar: changed: found sha256"),
        (_swap, "shard-000000.tar: found member shard000001-00000, expected shard000000-00000"),
        (_remove, "shard-000001.tar: missing"),
        (_garbage, "shard-000001.tar: cannot be read"),
        (_wrong_count, "shard-000001.tar: found 300 samples, expected 301"),
        (_id_outside, "shard-000001.tar: sample 7 holds token id 64"),
    ],
)
def test_verify_names_the_file_and_the_fault(rows: Path, damage: Callable[[Path], None], expected: str) -> None:
    damage(rows)
    faults = verify(rows)
    assert any(expected in fault for fault in faults), faults


def test_verify_reports_another_tokenizer(rows: Path) -> None:
    path = rows / "tokenizer/tokenizer.json"
    path.write_text(path.read_text() + " ")
    assert any("does not match the shards" in fault for fault in verify(rows))
    shutil.rmtree(rows / "tokenizer")
    assert any("tokenizer.json: missing" in fault for fault in verify(rows))


def test_opening_names_a_truncated_or_missing_shard(rows: Path) -> None:
    _truncate(rows)
    with pytest.raises(DataError, match=r"shard-000001\.tar: truncated: found \d+ bytes, expected"):
        open_folder(rows)
    _remove(rows)
    with pytest.raises(DataError, match=r"shard-000001\.tar: listed in manifest\.json"):
        open_folder(rows)


def test_reading_names_an_id_outside_the_vocabulary(rows: Path) -> None:
    _id_outside(rows)
    folder = open_folder(rows)
    assert folder.ids(np.array([306]))[0].max() == 0
    with pytest.raises(DataError, match=r"shard-000001\.tar: sample 7 holds token id 64, outside the vocabulary of 64"):
        folder.ids(np.array([307]))[0]


def test_a_tar_packed_by_another_tool_is_read(rows: Path) -> None:
    shard = rows / "shard-000001.tar"
    before = open_folder(rows).ids(np.array([450]))[0]
    unpacked = rows.parent / "unpacked"
    with tarfile.open(shard) as tar:
        tar.extractall(unpacked, filter="data")
    with tarfile.open(shard, "w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(unpacked.iterdir()):
            info = tar.gettarinfo(path, path.name)
            info.pax_headers = {"comment": "moves the data"}
            with path.open("rb") as file:
                tar.addfile(info, file)
    manifest = json.loads((rows / "manifest.json").read_text())
    manifest["shards"][1] |= {"bytes": shard.stat().st_size, "sha256": file_sha256(shard)}
    (rows / "manifest.json").write_text(json.dumps(manifest))
    assert np.array_equal(open_folder(rows).ids(np.array([450]))[0], before)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "corrupt manifest"),
        ("{not json", "corrupt manifest"),
        ('{"format": "sparselt_dist.shards"}', "corrupt manifest: format_version"),
        ('{"shards": 3}', "corrupt manifest"),
    ],
)
def test_a_corrupt_manifest_is_refused(rows: Path, content: str, expected: str) -> None:
    (rows / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=expected):
        read_manifest(rows)
    assert len(verify(rows)) == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format_version": 2}, "version 2, expected"),
        ({"shards": []}, "lists no sample"),
        ({"samples": 0}, "no sample"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(rows: Path, change: dict[str, object], expected: str) -> None:
    manifest = json.loads((rows / "manifest.json").read_text())
    (rows / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(DataError, match=expected):
        read_manifest(rows)


def test_a_folder_without_manifest_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such shard folder"):
        read_manifest(tmp_path / "none")
    with pytest.raises(DataError, match=r"holds no manifest\.json"):
        read_manifest(tmp_path)
    (tmp_path / ".work").mkdir()
    with pytest.raises(DataError, match="unfinished preparation"):
        read_manifest(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train/manifest.json").touch()
    with pytest.raises(DataError, match="train/ and validation/; name one"):
        read_manifest(tmp_path)

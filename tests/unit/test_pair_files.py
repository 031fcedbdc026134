"""Agreement pairs on disk, and as tensors."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus_files import write_folder

from sparselt_dist.data import pair_columns
from sparselt_dist.data.manifest import read_manifest
from sparselt_dist.data.pair_columns import Columns, Pair, to_columns
from sparselt_dist.data.pair_files import (
    COST_FILE,
    FOLDER,
    MANIFEST_FILE,
    PairOrigin,
    StoredFamily,
    pair_faults,
    read_labelled_text,
    read_pair_manifest,
    read_pairs,
    shards_identity,
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


TEXT = {"ids": np.arange(5), "ends": np.array([2, 5])}
VOCAB_SIZE = 80_000


def columns(pairs: list[Pair]) -> Columns:
    return to_columns(pairs, VOCAB_SIZE)


def write(folder: Path) -> None:
    """Pairs beside shards of their own."""
    write_folder(folder, [np.arange(8)] * 3)
    windows = [Pair("window", side(1), side(2), None)] * len(PAIRS)
    families = [StoredFamily("A1", columns(PAIRS), columns(windows)), StoredFamily("A3", columns([]), columns([]))]
    identity = shards_identity(read_manifest(folder).shards)
    origin = PairOrigin("strict", "ab" * 32, identity, VOCAB_SIZE, documents=2, unaligned=0, words=12)
    assert write_pairs(folder, families, TEXT, origin, extraction_seconds=1.5) == {"A1": 3, "A3": 0}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path)
    manifest = read_pair_manifest(tmp_path, "ab" * 32)
    assert (manifest.track, manifest.words, manifest.pairs) == ("strict", 12, {"A1": 3, "A3": 0})
    assert manifest.labels["A1"] == ["expl", "nsubj"]
    assert (manifest.documents, manifest.text_pieces, manifest.extraction_seconds) == (2, 5, 1.5)
    pairs = pairs_from_arrays(read_pairs(tmp_path, manifest, "A1"))
    assert pairs.heads.ids_NS.tolist() == [[7, 8, 0], [5, 0, 0], [3, 4, 5]]
    assert pairs.heads.weights_NS.tolist() == [[1, 2, 0], [2, 0, 0], [2, 1, 1]]
    assert pairs.dependents.ids_NS.tolist() == [[9, 0], [6, 70_000], [9, 10]]
    assert pairs.labels_N.tolist() == [1, 0, 1]
    assert pairs.flipped_F.tolist() == [0, 2]
    assert pairs.flipped_heads.ids_NS.tolist() == [[7, 18, 0], [13, 4, 5]]
    assert pairs.heads.ids_NS.dtype == torch.int64
    assert len(pairs_from_arrays(read_pairs(tmp_path, manifest, "A3"))) == 0
    window = pairs_from_arrays(read_pairs(tmp_path, manifest, "A1", "window"))
    assert (window.heads.ids_NS.tolist(), window.dependents.ids_NS.tolist()) == ([[1]] * 3, [[2]] * 3)
    assert read_labelled_text(tmp_path, manifest)["ends"].tolist() == [2, 5]
    assert pair_faults(tmp_path, "ab" * 32) == []


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
    often, seldom, turned = PAIRS[0], PAIRS[1], Pair("nsubj", side(8, 7), side(9), None)
    drawn = columns([often] * 1000 + [seldom] * 10 + [turned] * 10)
    kept = pair_columns.thin_repeats(drawn, seed=0)
    assert kept[1000:].all()
    assert 70 < kept[:1000].sum() < 130  # expected 1000 * sqrt(10 / 1000) = 100
    assert (kept == pair_columns.thin_repeats(drawn, seed=0)).all()
    assert len(pair_columns.thin_repeats(columns([]), seed=0)) == 0


def test_columns_joined_and_chosen_are_those_of_the_pairs() -> None:
    more = [Pair("csubj", side(1), side(2, 3), (side(4), side(2, 3))), Pair("expl", side(9), side(8), None)]
    everything = [*PAIRS, *more, *PAIRS]
    joined = pair_columns.join([columns(PAIRS), columns([]), columns(more), columns(PAIRS)], VOCAB_SIZE)
    kept = np.array([True, True, False, True, False, False, True, True])
    chosen = pair_columns.select(joined, kept)
    for found, expected in (
        (joined, everything),
        (chosen, [pair for pair, k in zip(everything, kept, strict=True) if k]),
    ):
        wanted = columns(expected)
        assert found.labels == wanted.labels == ["csubj", "expl", "nsubj"]
        assert set(found.arrays) == set(pair_columns.COLUMNS)
        for name, array in wanted.arrays.items():
            assert found.arrays[name].dtype == array.dtype and found.arrays[name].tolist() == array.tolist(), name
    assert len(pair_columns.join([], VOCAB_SIZE)) == 0


def drop(folder: Path) -> None:
    (folder / FOLDER / MANIFEST_FILE).unlink()


def garble(folder: Path) -> None:
    (folder / FOLDER / MANIFEST_FILE).write_text("{")


def newer(folder: Path) -> None:
    path = folder / FOLDER / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))


def without_cost(folder: Path) -> None:
    (folder / FOLDER / COST_FILE).unlink()


def of_other_shards(folder: Path) -> None:
    """As if `agreements/` had been copied from there."""
    write_folder(folder, [np.arange(1, 9)] * 3)


@pytest.mark.parametrize(
    ("damage", "tokenizer", "message"),
    [
        (drop, "ab" * 32, r"holds no agreement pairs.*prepare\.agreements=strict"),
        (garble, "ab" * 32, "cannot be read"),
        (without_cost, "ab" * 32, "cannot be read"),
        (of_other_shards, "ab" * 32, "the pairs belong to shards .*…, expected those of the folder"),
        (newer, "ab" * 32, "found format 1, expected 2"),
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
    assert len(pair_faults(tmp_path, tokenizer)) == 1


def test_damaged_and_missing_families_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    manifest = read_pair_manifest(tmp_path, "ab" * 32)
    with pytest.raises(DataError, match=r"found A4, expected families of .*: A1, A3"):
        read_pairs(tmp_path, manifest, "A4")
    np.savez(tmp_path / FOLDER / "A1.npz", labels=np.zeros(1))
    with pytest.raises(DataError, match="found sha256"):
        read_pairs(tmp_path, manifest, "A1")
    (tmp_path / FOLDER / "text.npz").unlink()
    with pytest.raises(DataError, match=r"text\.npz: missing"):
        read_labelled_text(tmp_path, manifest)
    assert len(pair_faults(tmp_path, "ab" * 32)) == 2

"""Tensors cut over the files of some ranks, read whole or in part by others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparselt_dist import tensor_files
from sparselt_dist.errors import CheckpointError
from sparselt_dist.tensor_files import SLICES, Slice, TensorFiles, cut, write_slices

TENSORS = [
    ("table", torch.randn(50, 7)),
    ("scale", torch.tensor(2.0)),
    ("none", torch.zeros(0, 3)),
    ("counts", torch.arange(33)),
    ("half", torch.randn(5, 5).to(torch.bfloat16)),
    ("mask", torch.rand(11) > 0.5),
]


def save(folder: Path, world_size: int) -> None:
    for rank in range(world_size):
        if own := list(cut(TENSORS, rank, world_size)):
            write_slices(own, folder / f"weights-{rank:05d}.safetensors")


def saved(folder: Path, share: float = 0.0) -> TensorFiles:
    return TensorFiles(folder, sorted(path.name for path in folder.iterdir()), share)


@pytest.fixture(autouse=True)
def small_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "LEAST_SHARE_BYTES", 1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 2000])
def test_what_ranks_save_is_read_whole(tmp_path: Path, world_size: int) -> None:
    save(tmp_path, world_size)
    found = saved(tmp_path).read_all()
    assert found.keys() == {name for name, _ in TENSORS}
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS)


@pytest.mark.parametrize("world_size", [1, 3, 7])
def test_any_elements_are_read(tmp_path: Path, world_size: int) -> None:
    save(tmp_path, world_size)
    for share in (0.0, 0.4, 0.9):
        for start in range(33):
            for stop in range(start, 33):
                found = saved(tmp_path, share).read_elements("counts", start, stop - start)
                assert found.tolist() == list(range(start, stop))


def test_a_rank_alone_writes_what_any_reader_of_safetensors_understands(tmp_path: Path) -> None:
    save(tmp_path, 1)
    found = load_file(tmp_path / "weights-00000.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS)


def test_ranks_have_equal_shares() -> None:
    tensors = [("a", torch.zeros(1000)), ("b", torch.zeros(10, dtype=torch.float64)), ("c", torch.zeros(500))]
    shares = [sum(each.values.nbytes for each in cut(tensors, rank, 7)) for rank in range(7)]
    assert sum(shares) == 6080 and max(shares) - min(shares) <= 16


def test_few_bytes_are_shared_by_few_ranks_far_from_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "LEAST_SHARE_BYTES", 400)
    tensors = [("a", torch.zeros(350))]
    shares = [sum(each.values.numel() for each in cut(tensors, rank, 8)) for rank in range(8)]
    assert shares == [117, 0, 117, 0, 0, 116, 0, 0]


def test_only_the_files_that_are_needed_are_opened(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "weights-00000.safetensors").write_bytes(b"not opened")
    files = saved(tmp_path, 3 / 5)
    (own, *_) = cut(TENSORS, 3, 5)
    assert torch.equal(files.read_elements(own.name, own.start, own.values.numel()), own.values)
    with pytest.raises(
        CheckpointError, match=r"weights-00000\.safetensors cannot be read .*; use an earlier checkpoint"
    ):
        files.names()


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, 3)
    with pytest.raises(CheckpointError, match="holds no 'other'; it belongs to another model"):
        saved(tmp_path).read("other")
    with pytest.raises(CheckpointError, match=r"counts is \(33,\), expected 34 elements or more"):
        saved(tmp_path).read_elements("counts", 30, 4)
    (tmp_path / "weights-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds not all of table, elements 0 to 350 were expected"):
        saved(tmp_path).read("table")


PLACES = [[-1, 9], [8, 9], [0, 3], ["x", 9], [0.5], {}, 7, [0, float("inf")]]


@pytest.mark.parametrize("header", [*({"a": place} for place in PLACES), [1], 7, "x"])
def test_places_that_make_no_sense_are_an_error(tmp_path: Path, header: object) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / "weights-00000.safetensors", {SLICES: json.dumps(header)})
    with pytest.raises(CheckpointError, match="cannot be read"):
        saved(tmp_path).names()


def test_parts_of_unlike_tensors_are_an_error(tmp_path: Path) -> None:
    for rank, shape in enumerate([(8,), (2, 4)]):
        write_slices([Slice("a", shape, 4 * rank, torch.zeros(4))], tmp_path / f"weights-{rank:05d}.safetensors")
    with pytest.raises(CheckpointError, match="elements 4 to 8 of a of shape"):
        saved(tmp_path).read("a")

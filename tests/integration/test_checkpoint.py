"""Checkpoints on one rank: commit mark, rotation, errors. (Resume itself: tests/distributed.)"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sparselt_dist import checkpoint, committing
from sparselt_dist.checkpoint_writer import CheckpointWriter, Contents
from sparselt_dist.committing import Retention
from sparselt_dist.distributed import Ranks
from sparselt_dist.errors import CheckpointError
from sparselt_dist.snapshot import Snapshot
from sparselt_dist.tensor_files import Slice, cut, write_slices

ALONE = Ranks(0, 1, 0)


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def contents(step: int, model: nn.Module | None = None) -> Contents:
    model = model or nn.Linear(3, 2)
    weights = [(name, value.detach()) for name, value in model.named_parameters()]
    return Contents(
        step=step,
        weights=cut(weights, 0, 1),
        moments=cut([(f"{name}#exp_avg", torch.zeros_like(value)) for name, value in weights], 0, 1),
        num_bytes=2 * sum(value.nbytes for _, value in weights),
        rank_state={"cpu": torch.get_rng_state()},
        architecture={"model_type": "bert"},
        meta={"note": "x"},
    )


def writer(run_dir: Path, keep: int = 2, said: list[str] | None = None, **options: Any) -> CheckpointWriter:
    retention = Retention(keep, options.pop("every_steps", None))
    said = [] if said is None else said
    return CheckpointWriter(run_dir, ALONE, Snapshot(), retention, before=lambda: None, say=said.append, **options)


def save(run_dir: Path, step: int, keep: int = 2) -> Path:
    return writer(run_dir, keep).finish(contents(step))


def test_saved_is_complete_intact_and_named_by_latest(tmp_path: Path) -> None:
    path = save(tmp_path, 100)
    assert path.name == "step_00000100" and (path / "COMPLETE").is_file()
    assert (path.parent / "latest").read_text().strip() == path.name
    checkpoint.verify(path)
    assert checkpoint.find(tmp_path) == path
    assert not list(path.parent.glob("*.partial"))


def test_rotation_keeps_the_newest_and_counts_only_complete_ones(tmp_path: Path) -> None:
    foreign = tmp_path / "checkpoints" / "step_00000001"
    foreign.mkdir(parents=True)
    (foreign / "something").write_text("not ours to delete")
    for step in (10, 20, 30):
        save(tmp_path, step, keep=2)
    assert [path.name for path in checkpoint.complete_checkpoints(tmp_path)] == ["step_00000020", "step_00000030"]
    assert (foreign / "something").exists()


def test_a_step_saved_twice_is_left_as_it_is(tmp_path: Path) -> None:
    first = save(tmp_path, 5)
    before = (first / "meta.json").read_bytes()
    assert save(tmp_path, 5) == first
    assert (first / "meta.json").read_bytes() == before


def test_an_unfinished_folder_of_that_step_is_moved_aside(tmp_path: Path) -> None:
    torn = tmp_path / "checkpoints" / "step_00000007"
    torn.mkdir(parents=True)
    (torn / "weights-00000.safetensors").write_bytes(b"half")
    save(tmp_path, 7)
    (aside,) = torn.parent.glob("step_00000007.aside-*")
    assert (aside / "weights-00000.safetensors").read_bytes() == b"half"


def test_any_flipped_bit_is_found_and_the_earlier_checkpoint_used(tmp_path: Path) -> None:
    earlier, newest = save(tmp_path, 1), save(tmp_path, 2)
    files = sorted(newest.iterdir())
    names = "COMPLETE config.json meta.json moments-00000.safetensors rank_00000.pt weights-00000.safetensors"
    assert [path.name for path in files] == names.split()
    generator = random.Random(0)
    for path in files:
        sound = path.read_bytes()
        everywhere = range(8 * len(sound))
        for bit in everywhere if path.name == "COMPLETE" else generator.sample(everywhere, 20):
            content = bytearray(sound)
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            warnings: list[str] = []
            assert checkpoint.newest_intact(tmp_path, warnings.append) == earlier, (path.name, bit)
            assert path.name in warnings[0]
        path.write_bytes(sound)
    assert checkpoint.newest_intact(tmp_path, lambda text: None) == newest


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    meta = json.loads((path / "meta.json").read_text())
    (path / "COMPLETE").write_text("1\n")
    assert not checkpoint.is_intact(path)
    del meta["files"]["config.json"]
    (path / "meta.json").write_text(json.dumps(meta))
    assert checkpoint.find_intact(tmp_path) == path
    (path / "weights-00000.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="weights-00000"):
        checkpoint.find_intact(tmp_path)


def test_a_checkpoint_of_a_later_version_is_not_deleted(tmp_path: Path) -> None:
    later = save(tmp_path, 1) / "meta.json"
    later.write_text(json.dumps(json.loads(later.read_text()) | {"format": checkpoint.FORMAT + 1}))
    for step in (2, 3, 4):
        save(tmp_path, step)
    assert [checkpoint.step_of(path) for path in checkpoint.complete_checkpoints(tmp_path)] == [1, 3, 4]


def test_checkpoints_that_cannot_be_seen_are_an_error_and_not_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = save(tmp_path, 1)

    def refuse(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint.os, "listdir", refuse)  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"Permission denied.*mend its permissions"):
        checkpoint.newest_intact(tmp_path, pytest.fail)
    said: list[str] = []
    writer(tmp_path, said=said).finish(contents(2))  # what cannot be rotated stays
    monkeypatch.undo()
    assert checkpoint.complete_checkpoints(tmp_path) == [saved, saved.with_name("step_00000002")] and said == []


def test_files_of_another_save_in_the_folder_are_not_read(tmp_path: Path) -> None:
    """As a copy in object storage has them, where more ranks saved the same step before."""
    path = save(tmp_path, 1)
    expected = checkpoint.load_weights(path)
    write_slices([Slice("weight", (2, 3), 0, torch.full((4,), 9.0))], path / "weights-00001.safetensors")
    meta = json.loads((path / "meta.json").read_text())  # of somebody else, and not verified
    meta["files"]["weights-/../weights-00001.safetensors"] = {}
    (path / "meta.json").write_text(json.dumps(meta))
    found = checkpoint.load_weights(path)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_all_damaged_is_an_error_not_a_new_start(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "rank_00000.pt").unlink()
    with pytest.raises(CheckpointError, match="none of 1 checkpoints is intact"):
        checkpoint.newest_intact(tmp_path, lambda text: None)


def test_loading_into_another_model_names_what_differs(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    checkpoint.load_into(nn.Linear(3, 2), path)
    with pytest.raises(CheckpointError, match=r"other shape: weight \(2, 3\) \(expected \(2, 4\)\)"):
        checkpoint.load_into(nn.Linear(4, 2), path)
    with pytest.raises(CheckpointError, match="not in this model: bias"):
        checkpoint.load_into(nn.Linear(3, 2, bias=False), path)


def test_an_unwritable_folder_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(tmp_path, 1)


def test_later_checkpoints_of_another_branch_are_moved_aside_before_rotation(tmp_path: Path) -> None:
    for step in (10, 100):
        save(tmp_path, step)
    committing.set_aside_after(tmp_path, 10)
    newest = save(tmp_path, 20, keep=1)
    assert checkpoint.complete_checkpoints(tmp_path) == [newest]
    assert list(newest.parent.glob("step_00000100.aside-*"))

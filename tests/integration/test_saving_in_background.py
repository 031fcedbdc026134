"""Saves that go on beside training, on one rank: order, faults of the disk, what a kill leaves, copies elsewhere."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from s3_server import S3Server
from small_disk import fill, small_disk

from sparselt_dist import checkpoint, committing
from sparselt_dist.checkpoint_writer import CheckpointWriter, Contents
from sparselt_dist.committing import Retention
from sparselt_dist.data.storage import RetryPolicy
from sparselt_dist.distributed import Ranks
from sparselt_dist.errors import CheckpointError
from sparselt_dist.snapshot import Snapshot
from sparselt_dist.tensor_files import cut
from sparselt_dist.uploading import Uploader

MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def contents(step: int, weight: torch.Tensor | None = None) -> Contents:
    weight = torch.full((MEGABYTE // 4,), float(step)) if weight is None else weight
    weights, moments = (cut([(name, weight)], 0, 1) for name in ("w", "w#exp_avg"))
    return Contents(step, weights, moments, 2 * weight.nbytes, {"cpu": torch.zeros(1)}, {}, {})


def writer(run_dir: Path, said: list[str], snapshot: Snapshot | None = None) -> CheckpointWriter:
    return CheckpointWriter(
        run_dir,
        Ranks(0, 1, 0),
        snapshot or Snapshot(),
        Retention(2),
        before=lambda: None,
        say=said.append,
    )


def test_training_goes_on_and_changes_nothing_of_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, write = threading.Event(), committing.write_rank_files

    def late(*arguments: object) -> object:
        assert gate.wait(20)
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(committing, "write_rank_files", late)
    saves, weight = writer(tmp_path, []), torch.full((10,), 5.0)
    saves.begin(contents(5, weight))
    weight.fill_(6.0)
    saves.advance(saves.is_written)
    assert not saves.is_written and checkpoint.complete_checkpoints(tmp_path) == []
    gate.set()
    while saves.newest is None:
        saves.advance(saves.is_written)
        time.sleep(0.01)
    assert torch.equal(checkpoint.load_weights(saves.newest)["w"], torch.full((10,), 5.0))
    assert saves.seconds > 0
    saves.begin(contents(6, weight))
    saves.begin(contents(7, weight))  # waits for the one before
    assert checkpoint.is_intact(tmp_path / "checkpoints" / checkpoint.folder_name(6))
    saves.settle()
    assert [path.name for path in checkpoint.complete_checkpoints(tmp_path)] == ["step_00000006", "step_00000007"]


def assert_fails_and_recovers(run_dir: Path, saves: CheckpointWriter, said: list[str], reason: str) -> None:
    """With a disk that takes no checkpoint now: nothing but a warning, or an error for who waits."""
    saves.begin(contents(2))
    saves.settle()
    assert len(said) == saves.failures == 1 and reason in said[0] and "step_00000002" in said[0]
    with pytest.raises(CheckpointError, match=reason):
        saves.finish(contents(3))
    assert checkpoint.newest_intact(run_dir, pytest.fail) == run_dir / "checkpoints" / checkpoint.folder_name(1)
    assert not list((run_dir / "checkpoints").glob("*.partial/*"))


@pytest.mark.parametrize("room", [0.0, 0.5])
def test_a_full_disk(tmp_path: Path, room: float, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "disk", 8) as disk:
        said: list[str] = []
        saves = writer(disk, said)
        saves.finish(contents(1))
        fill(disk / "filler")
        if room:  # enough to begin with, and not known to be too little
            os.truncate(disk / "filler", (disk / "filler").stat().st_size - int(room * MEGABYTE))
            monkeypatch.setattr(committing, "_has_room", lambda folder, num_bytes: True)
        assert_fails_and_recovers(disk, saves, said, "No space left")
        monkeypatch.undo()
        (disk / "filler").unlink()
        saves.finish(contents(4))
        assert checkpoint.newest_intact(disk, pytest.fail) == saves.newest
        checkpoint.verify(disk / "checkpoints" / checkpoint.folder_name(4))


@pytest.mark.parametrize("place", ["rank_00000.pt", "meta.json", "COMPLETE"])
def test_a_write_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    said: list[str] = []
    saves, sync = writer(tmp_path, said), committing.sync
    saves.finish(contents(1))

    def refuse(path: Path) -> None:
        if path.name == place:
            raise PermissionError(13, "Permission denied", str(path))
        sync(path)

    monkeypatch.setattr(committing, "sync", refuse)
    assert_fails_and_recovers(tmp_path, saves, said, "Permission denied")
    monkeypatch.undo()
    assert checkpoint.is_intact(saves.finish(contents(3)))


def test_kills_at_random_points_of_saving_lose_only_the_save_under_way(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            _save_until_killed(tmp_path, write)
        os.close(write)
        first = int.from_bytes(os.read(read, 4), "little")
        time.sleep(0.1 * float(torch.rand((), generator=generator)))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        told = [first] + [int.from_bytes(part, "little") for part in iter(lambda: os.read(read, 4), b"")]  # noqa: B023
        os.close(read)
        newest = checkpoint.newest_intact(tmp_path, pytest.fail)
        assert newest is not None and told[-1] <= checkpoint.step_of(newest) <= told[-1] + 1
    committing.clean_leftovers(tmp_path)
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()} - {"latest"}
    assert left == {path.name for path in checkpoint.complete_checkpoints(tmp_path)} and len(left) in (
        2,
        3,
    )  # killed before it rotated


def _save_until_killed(run_dir: Path, pipe: int) -> None:
    """In a process of its own: stage, write, commit and rotate for ever; tell each step that was committed."""
    newest = checkpoint.complete_checkpoints(run_dir)
    step = checkpoint.step_of(newest[-1]) if newest else 0
    committing.clean_leftovers(run_dir)
    while True:
        step += 1
        final = run_dir / "checkpoints" / checkpoint.folder_name(step)
        committing.start_staging(final, 0)
        parts = {"weights": list(cut([("w", torch.full((10_000,), float(step)))], 0, 1))}
        written = committing.write_rank_files(committing.staging_of(final), parts, {}, 0)
        assert not isinstance(written, str)
        committing.commit(final, {}, {"format": checkpoint.FORMAT, "step": step, "files": written.files})
        os.write(pipe, step.to_bytes(4, "little"))
        committing.rotate(run_dir, Retention(2))


def test_only_our_own_leftovers_are_cleaned(tmp_path: Path) -> None:
    saved = writer(tmp_path, []).finish(contents(1))
    folder = saved.parent
    for name in ("step_00000002.partial", "step_00000003.removed", "step_00000004.partial", "step_00000005.aside-7"):
        (folder / name).mkdir()
        (folder / name / "weights-00000.safetensors").write_bytes(b"half")
    (folder / "step_00000004.partial" / "notes.txt").write_text("somebody's")
    assert committing.clean_leftovers(tmp_path) == ["step_00000002.partial", "step_00000003.removed"]
    assert {path.name for path in folder.iterdir()} == {
        "latest",
        "step_00000001",
        "step_00000004.partial",
        "step_00000005.aside-7",
    }


def test_multiples_stay_for_good_and_so_does_what_is_spared(tmp_path: Path) -> None:
    saves = CheckpointWriter(
        tmp_path,
        Ranks(0, 1, 0),
        Snapshot(),
        Retention(2, every_steps=3),
        before=lambda: None,
        say=pytest.fail,
        on_commit=lambda path: {path.with_name("step_00000001")},
    )
    for step in range(1, 9):
        saves.finish(contents(step, torch.ones(2)))
    assert [checkpoint.step_of(path) for path in checkpoint.complete_checkpoints(tmp_path)] == [1, 3, 6, 7, 8]


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_copy_uses_its_buffers_again(tmp_path: Path, on_disk: bool) -> None:
    tensors = [("a", torch.randn(100)), ("b", torch.randn(3).to(torch.bfloat16)), ("c", torch.randn(9, 10))]
    copy = Snapshot(scratch=tmp_path / "scratch" if on_disk else None)
    assert copy.take({"weights": cut(tensors, 0, 1)}) is None
    before = [each.values.data_ptr() for each in copy.parts["weights"]]
    moved = [(name, tensor + 1) for name, tensor in tensors]
    assert copy.take({"weights": cut(moved, 0, 1)}) is None
    for each, (name, tensor) in zip(copy.parts["weights"], moved, strict=True):
        assert each.name == name and torch.equal(each.values.view(each.shape), tensor)
    assert [each.values.data_ptr() for each in copy.parts["weights"]] == before
    if on_disk:
        assert list((tmp_path / "scratch").iterdir()) == []  # a killed run leaves nothing


def test_a_scratch_disk_without_room_is_a_save_that_fails(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        said: list[str] = []
        saves = writer(tmp_path, said, Snapshot(scratch=disk))
        saves.finish(contents(1, torch.ones(1000)))
        saves.begin(contents(2))
        saves.settle()
        assert "no room for the copy" in said[0] and checkpoint.step_of(saves.newest or tmp_path) == 1
        saves.finish(contents(3, torch.ones(1000)))


def test_committed_checkpoints_are_copied_to_object_storage(
    tmp_path: Path, s3_process: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_process.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client, bucket, said = s3_process.client(), f"sparselt-uploads-{uuid.uuid4().hex[:12]}", list[str]()
    client.create_bucket(Bucket=bucket)
    uploader = Uploader(f"s3://{bucket}/runs/a", said.append)
    saved = writer(tmp_path, []).finish(contents(1))
    assert saved in uploader.offer(saved)
    assert uploader.wait(30) and said == []
    for path in saved.iterdir():
        key = f"runs/a/{saved.name}/{path.name}"
        assert client.get_object(Bucket=bucket, Key=key)["Body"].read() == path.read_bytes()

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    refused = Uploader(f"s3://{bucket}/runs/b", said.append, RetryPolicy(1, 5.0, 0.01))
    refused.offer(saved)
    assert refused.wait(30)
    assert "step_00000001 was not uploaded" in said[0] and "give credentials that may write it" in said[0]

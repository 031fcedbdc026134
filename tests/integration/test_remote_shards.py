"""Shard folders and raw text at a web server that misbehaves and at a real S3 server, read as if they were local."""

import uuid
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus_files import numbered_rows, save_tokenizer, texts, write_folder, write_text_tar
from faulty_http import FaultyServer, Reply
from s3_server import S3Server

from sparselt_dist.config import Config, DataSection
from sparselt_dist.data.corpora import Corpora, open_corpora
from sparselt_dist.data.loader import Loader
from sparselt_dist.data.shard_files import Access
from sparselt_dist.data.storage import RetryPolicy
from sparselt_dist.data.verification import verify
from sparselt_dist.errors import DataError
from sparselt_dist.objectives.base import TokenizerInfo
from sparselt_dist.objectives.mlm import MLMCollator
from sparselt_dist.objectives.settings import MLMConfig

COLLATOR = MLMCollator(MLMConfig(), TokenizerInfo(vocab_size=96, pad_id=0, mask_id=4, special_ids=(0, 1, 2, 3, 4)))
ROWS = 60


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six shards of ten rows, and tars of raw text."""
    write_folder(tmp_path / "site" / "train", numbered_rows(ROWS))
    for number in range(2):
        write_text_tar(tmp_path / "site" / "raw" / f"part-{number}.tar", texts(10, seed=number))
    save_tokenizer(tmp_path / "site" / "raw" / "tokenizer")
    return tmp_path / "site"


@pytest.fixture
def server(folder: Path) -> Iterator[FaultyServer]:
    with FaultyServer(folder).running() as running:
        yield running


def opened(where: str, cache: Path, **data: Any) -> Corpora:
    section = DataSection(
        cache_dir=str(cache), sequence_length=16, download_attempts=3, download_timeout_seconds=0.5, **data
    )
    return open_corpora(where, Config(data=section))


def digests(corpora: Corpora, count: int = 20, workers: int = 0) -> list[tuple[int, int]]:
    """Digest of each micro-batch, and what it holds."""
    loader = Loader(
        corpora,
        COLLATOR,
        seed=1,
        window=2,
        micro_batch_size=4,
        rank=0,
        world_size=1,
        num_workers=workers,
        start_position=0,
        row_length=16,
    )
    return [(made.digest, int(made.batch["input_ids"].sum())) for made in islice(loader, count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_on_the_web_gives_the_batches_of_a_local_one(
    server: FaultyServer, folder: Path, tmp_path: Path, workers: int
) -> None:
    server.plan("/train/manifest.json", Reply(status=500))
    server.plan("/train/shard-000001.tar", Reply(status=503), Reply(close_after=3000))
    server.plan("/train/shard-000002.tar", Reply(stall_after=2000))
    server.plan("/train/shard-000003.tar", Reply(corrupt=True))
    remote = opened(f"{server.root}/train", tmp_path / "cache")
    assert remote.check_tokenizer().vocab_size == 96
    assert digests(remote, workers=workers) == digests(opened(str(folder / "train"), tmp_path / "cache"))


def test_a_pattern_on_the_web_names_some_shards(server: FaultyServer, tmp_path: Path) -> None:
    remote = opened(f"{server.root}/train/shard-{{000001..000003}}.tar", tmp_path)
    assert remote.shard_samples == [[10, 10, 10]]
    with pytest.raises(DataError, match=r"a web server lists no files"):
        opened(f"{server.root}/train/shard-*.tar", tmp_path)


def test_a_shard_that_stays_bad_stops_or_is_skipped(server: FaultyServer, folder: Path, tmp_path: Path) -> None:
    server.plan("/train/shard-000003.tar", then=Reply(corrupt=True))
    server.plan("/train/shard-000004.tar", then=Reply(status=500))
    with pytest.raises(DataError, match=r"shard-00000[34]\.tar"):
        opened(f"{server.root}/train", tmp_path / "one").ids(np.arange(ROWS))
    skipping = opened(f"{server.root}/train", tmp_path / "two", on_bad_shard="skip")
    found = skipping.read(np.arange(ROWS))
    assert [number for number, stored in enumerate(found) if stored is None] == list(range(30, 50))
    complaints = skipping.take_complaints()
    assert len(complaints) == 2 and all("skipping a shard of 10 samples" in text for text in complaints)


def test_the_cache_stays_within_its_bound(server: FaultyServer, folder: Path, tmp_path: Path) -> None:
    size = max(path.stat().st_size for path in (folder / "train").glob("*.tar"))
    bound = 3.5 * size / 2**30
    with pytest.raises(DataError, match=r"data\.cache_gib: .* cannot hold the 4 shards of data\.shuffle_window"):
        opened(f"{server.root}/train", tmp_path / "cache", cache_gib=bound, shuffle_window=4)
    remote = opened(f"{server.root}/train", tmp_path / "cache", cache_gib=bound, shuffle_window=2)
    expected = digests(opened(str(folder / "train"), tmp_path / "other"), 45)
    assert digests(remote, 45) == expected  # three epochs through a cache that holds half of the shards
    kept = sum(path.stat().st_size for path in (tmp_path / "cache" / "shards").glob("*.tar"))
    assert 0 < kept <= 3.5 * size


def test_raw_text_on_the_web_needs_no_preparation(server: FaultyServer, folder: Path, tmp_path: Path) -> None:
    local = opened(str(folder / "raw"), tmp_path / "cache")
    config = Config().model_copy(
        update={
            "data": DataSection(cache_dir=str(tmp_path / "cache"), sequence_length=16),
            "prepare": Config().prepare.model_copy(update={"tokenizer": str(folder / "raw" / "tokenizer")}),
        }
    )
    remote = open_corpora(f"{server.root}/raw/part-{{0..1}}.tar", config)
    assert digests(remote) == digests(local)
    assert [server.times_asked(f"/raw/part-{number}.tar") for number in range(2)] == [1, 1]  # indexed, then read


def test_a_remote_folder_is_verified(server: FaultyServer, tmp_path: Path) -> None:
    access = Access(cache_dir=tmp_path, retry=RetryPolicy(2, 0.5, 0.01))
    assert verify(f"{server.root}/train", access) == []
    server.plan("/train/shard-000005.tar", then=Reply(status=404))
    assert any(
        "shard-000005.tar" in fault for fault in verify(f"{server.root}/train", Access(cache_dir=tmp_path / "b"))
    )


def test_folders_and_patterns_at_an_s3_server(
    s3_process: S3Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, name = s3_process.client(), f"shards-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=name)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        client.upload_file(str(path), name, str(path.relative_to(folder)))
    for variable, value in s3_process.environment().items():
        monkeypatch.setenv(variable, value)
    bucket = f"s3://{name}"
    for where in ("train", "raw", "train/shard-*.tar", "{train,train}/shard-00000[0-9].tar"):
        remote = digests(open_s3(f"{bucket}/{where}", folder, tmp_path), workers=1)
        assert remote == digests(open_s3(str(folder / where), folder, tmp_path)), where


def open_s3(where: str, folder: Path, tmp_path: Path) -> Corpora:
    tokenizer = Config().prepare.model_copy(update={"tokenizer": str(folder / "raw" / "tokenizer")})
    data = DataSection(cache_dir=str(tmp_path / "cache"), sequence_length=16)
    return open_corpora(where, Config(data=data, prepare=tokenizer))


def test_a_manifest_is_asked_for_once(server: FaultyServer, tmp_path: Path) -> None:
    opened(f"{server.root}/train", tmp_path / "cache")
    assert server.times_asked("/train/manifest.json") == 1

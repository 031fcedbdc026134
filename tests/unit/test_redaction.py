"""Passwords and tokens of addresses stay out of messages, records, logs and command lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus_files import numbered_rows, write_folder

from sparselt_dist import diagnosis, follower, mlflow_sync, rank_log
from sparselt_dist.closing import closing_text
from sparselt_dist.config_loading import dump, load_config
from sparselt_dist.data import storage
from sparselt_dist.data.corpora import Corpora, Corpus
from sparselt_dist.data.shards import ShardFolder
from sparselt_dist.errors import DataError, RunFailureError
from sparselt_dist.follower import STORE_VARIABLE, read_json
from sparselt_dist.redaction import scrubbed, shown, shown_in

STORE = "http://me:s3cret@127.0.0.1:9/mlflow"


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("https://me:s3cret@h:1/a.tar?sig=s3cret#x", "https://h:1/a.tar"),
        ("https://h/shard-{000..127}.tar", "https://h/shard-{000..127}.tar"),
        ("postgresql+psycopg2://me:s3:cret@h:5432/runs?sslmode=require", "postgresql+psycopg2://me@h:5432/runs?sslmode=require"),
        ("mysql://h/runs?user=me&password=s3cret", "mysql://h/runs?user=me"),
        ("postgresql://me@h/runs", "postgresql://me@h/runs"),
        ("http://[half?sig=s3cret", "http://[half"),
        ("sqlite:////tmp/a b.db", "sqlite:////tmp/a b.db"),
        ("s3://bucket/a?b", "s3://bucket/a?b"),
        ("runs/a@b:c", "runs/a@b:c"),
    ],
)  # fmt: skip
def test_an_address_loses_its_secrets_alone(address: str, public: str) -> None:
    assert shown(address) == public
    assert shown_in({"a": [address, 1, None]}) == {"a": [public, 1, None]}


def test_addresses_inside_a_text_are_found() -> None:
    text = "asked 'http://me:s3cret@h/a?t=s3cret', then (see postgresql://me:s3cret@h/b): failed; http://h/c."
    assert scrubbed(text) == "asked 'http://h/a', then (see postgresql://me@h/b): failed; http://h/c."


@pytest.mark.parametrize("kind", [DataError, RunFailureError])
def test_no_error_shows_them(kind: type[Exception]) -> None:
    assert str(kind(f"{STORE}/x: not found; correct it")) == "http://127.0.0.1:9/mlflow/x: not found; correct it"


def test_the_resolved_configuration_holds_none() -> None:
    mixed = "data.train=[{shards: 'https://h/a?sig=s3cret'}, {shards: shards/b}]"
    config = load_config([], [mixed, f"log.mlflow_uri={STORE}", "budget.max_steps=1"])
    assert config.log.mlflow_uri == STORE
    written = dump(config)
    assert "s3cret" not in written and "http://127.0.0.1:9/mlflow" in written and "https://h/a" in written


def test_a_rank_log_holds_none(tmp_path: Path) -> None:
    rank_log.start(0)
    rank_log.open_in(tmp_path)
    try:
        print(f"warning: {STORE} is down", file=sys.stderr)
    finally:
        rank_log.stop(OSError(f"no answer of {STORE}"))
    written = (tmp_path / "logs" / "rank_00000.log").read_text()
    assert "s3cret" not in written and written.count("http://127.0.0.1:9/mlflow") == 2


def test_the_followers_command_line_and_state_hold_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, Any] = {}

    class Started:
        pid = 1

        def __init__(self, command: list[str], **options: Any) -> None:
            started.update(command=command, environment=options["env"])

    monkeypatch.setattr(follower.subprocess, "Popen", Started)
    follower.start_follower(tmp_path, STORE, 1)
    assert not any("s3cret" in word for word in started["command"])
    handed: list[str] = []
    monkeypatch.setenv(STORE_VARIABLE, started["environment"][STORE_VARIABLE])
    monkeypatch.setattr(mlflow_sync, "follow", lambda run_dir, uri, parent: handed.append(uri) or 0)
    assert mlflow_sync.main(started["command"][3:]) == 0
    assert handed == [STORE]

    fed = mlflow_sync.Follower(tmp_path, STORE, parent=0, patience_seconds=0)
    fed._count_failure(OSError(f"API request to {STORE}/api failed"))
    state = read_json(tmp_path / follower.STATE_NAME)
    assert "s3cret" not in json.dumps(state) and "http://127.0.0.1:9/mlflow/api failed" in state["error"]


def test_a_store_is_fed_by_one_process_whoever_knows_its_password(tmp_path: Path) -> None:
    with (
        mlflow_sync.feeding(tmp_path, STORE, lambda: False) as first,
        mlflow_sync.feeding(tmp_path, shown(STORE), lambda: False) as second,
    ):
        assert (first, second) == (True, False)


def test_doctor_and_the_closing_lines_show_none() -> None:
    findings = [
        *diagnosis.check_tracking(load_config([], [f"log.mlflow_uri={STORE}"], for_training=False)),
        *diagnosis.check_tracking(load_config([], ["log.mlflow_uri=mysql://me:s3cret@h/d"], for_training=False)),
    ]
    assert [finding.level for finding in findings] == ["warning", "note"] and "s3cret" not in str(findings)
    summary = {"name": "x", "status": "finished", "steps": 1, "tokens": 1, "seconds": 1.0, "world_size": 1}
    text = closing_text({**summary, "objective": "mlm", "peak_memory_gib": 1.0}, Path("run"), {}, STORE)
    assert "mlflow ui" in text and "s3cret" not in text


def test_samples_of_signed_shards_are_named_without_the_signature(tmp_path: Path) -> None:
    """They stand in messages about a loss, and a signature that is renewed must not change a digest."""
    for name in ("a", "b"):
        write_folder(tmp_path / name, numbered_rows(4))
    folders = tuple(ShardFolder(tmp_path / name) for name in ("a", "b"))
    folders[1].location = storage.join("https://me:s3cret@h/?sig=s3cret", "b")
    keys = Corpora([Corpus("two", folders)]).keys(np.arange(3, 6))
    assert keys == [f"{tmp_path}/a/shard-000000/3", "https://h/b/shard-000000/0", "https://h/b/shard-000000/1"]

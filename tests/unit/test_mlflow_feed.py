"""The feed's logic without MLflow: what was sent, what is asked again, how the journal is followed."""

import contextlib
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparselt_dist import follower, mlflow_sync
from sparselt_dist.errors import ConfigError, DataError
from sparselt_dist.journal import JOURNAL_NAME, Journal
from sparselt_dist.mlflow_sink import MlflowSink, StepSet, _legal_key, flatten, run_identity


def test_a_step_set_is_a_set() -> None:
    steps = StepSet([0, 7, 8, 1_000_000])
    assert [step for step in (0, 1, 7, 8, 9, 999_999, 1_000_000, 5_000_000) if step in steps] == [0, 7, 8, 1_000_000]


def test_the_configuration_is_flattened() -> None:
    tree = {"run": {"name": "a", "seed": 0}, "optim": {"betas": [0.9, 0.98]}, "budget": {"max_hours": None}, "x": {}}
    assert flatten(tree) == {
        "run.name": "a",
        "run.seed": "0",
        "optim.betas": "[0.9, 0.98]",
        "budget.max_hours": "null",
        "x": "{}",
    }


def test_names_that_mlflow_refuses_are_mended_and_others_kept() -> None:
    assert _legal_key("time/data_seconds") == "time/data_seconds"
    assert _legal_key("loss(a)%") == "loss_a__"
    assert len(_legal_key("k" * 400)) == 250


class Store:
    """Keeps points; `fail` makes the next request fail before or after it took effect."""

    def __init__(self) -> None:
        self.points: list[tuple[str, int, float]] = []
        self.batches: list[int] = []
        self.fail = ""

    def log_batch(self, run_id: str, metrics: Any = (), tags: Any = (), synchronous: bool = False) -> None:
        fail, self.fail = self.fail, ""
        if fail == "before":
            raise ConnectionError
        self.batches.append(len(metrics))
        self.points += [(metric.key, metric.step, metric.value) for metric in metrics]
        if fail == "after":
            raise ConnectionError

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        return [SimpleNamespace(step=step) for name, step, _ in self.points if name == key]


def connected(folder: Path, store: Store) -> MlflowSink:
    sink = MlflowSink(folder, "sqlite:///unused.db")
    sink._store = store  # type: ignore[assignment]
    reconnect(sink)
    return sink


def reconnect(sink: MlflowSink) -> None:
    """What connect() does to the points, without the run."""
    sink.run_id, sink._seen = "r", {}
    sink._stored_keys = {name for name, _, _ in sink._store.points}  # type: ignore[union-attr]


def lines(first: int, last: int, loss: float = 1.0) -> list[dict[str, Any]]:
    return [{"step": s, "time": 10.0 + s, "loss": loss, "acc": None, "digest": "ab"} for s in range(first, last + 1)]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_failed_request_is_neither_lost_nor_doubled(tmp_path: Path, moment: str) -> None:
    store = Store()
    sink = connected(tmp_path, store)
    sink.deliver(lines(1, 10))
    store.fail = moment
    with pytest.raises(ConnectionError):
        sink.deliver(lines(11, 20))
    assert sink.run_id is None
    reconnect(sink)
    sink.deliver(lines(11, 20))
    assert sorted({(name, step) for name, step, _ in store.points}) == sorted(
        (name, step) for name in ("acc", "loss") for step in range(1, 21)
    )
    assert len(store.points) == 40


def test_redone_steps_are_sent_once_and_new_metrics_of_them_too(tmp_path: Path) -> None:
    store = Store()
    connected(tmp_path, store).deliver(lines(1, 10, loss=1.0))
    again = connected(tmp_path, store)
    again.deliver([*lines(6, 12, loss=2.0), {"step": 12, "time": 1.0, "eval/loss": 4.0}])
    assert [value for name, _, value in store.points if name == "loss"] == [1.0] * 10 + [2.0] * 2
    assert ("eval/loss", 12, 4.0) in store.points
    assert again.already_there == 10


def test_null_is_nan_text_is_no_metric_and_batches_are_limited(tmp_path: Path) -> None:
    store = Store()
    connected(tmp_path, store).deliver(lines(1, 1200))
    assert store.batches == [1000, 1000, 400]
    assert all(math.isnan(value) for name, _, value in store.points if name == "acc")
    assert {name for name, _, _ in store.points} == {"loss", "acc"}


def test_the_tail_follows_additions_completions_and_cuts(tmp_path: Path) -> None:
    tail = mlflow_sync.JournalTail(tmp_path)
    assert tail.read() == []
    journal = Journal(tmp_path)
    for step in (1, 2, 3):
        journal.append({"step": step, "loss": 1.0})
    assert [line["step"] for line in tail.read()] == [1, 2, 3]
    assert tail.read() == []
    journal.append({"step": 3, "eval/loss": 2.0})
    journal.append({"step": 4, "loss": 1.0})
    read = tail.read()
    assert [line["step"] for line in read] == [3, 4]
    assert read[0]["eval/loss"] == 2.0
    journal.cut_back(2)
    journal.append({"step": 3, "loss": 9.0})
    assert [line["step"] for line in tail.read()] == [1, 2, 3]
    journal.close()


def test_the_tail_reads_a_large_journal_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_sync, "_CHUNK_BYTES", 200)
    journal = Journal(tmp_path)
    for step in range(1, 51):
        journal.append({"step": step})
    tail, steps = mlflow_sync.JournalTail(tmp_path), []
    while read := tail.read():
        steps += [line["step"] for line in read]
    assert steps == list(range(1, 51))
    with (tmp_path / JOURNAL_NAME).open("ab") as file:
        file.write(b'{"step": 51')
    tail.read()
    assert [line["step"] for line in tail.read()] == []
    journal.close()


def test_only_one_process_feeds_a_store_from_a_folder(tmp_path: Path) -> None:
    def feeding(uri: str) -> contextlib.AbstractContextManager[bool]:
        return mlflow_sync.feeding(tmp_path, uri, lambda: False)

    with feeding("a") as first, feeding("a") as second, feeding("b") as other:
        assert (first, second, other) == (True, False, True)
    with feeding("a") as later:
        assert later


def test_a_relative_sqlite_file_is_made_absolute(tmp_path: Path) -> None:
    assert follower.resolve_store_uri("sqlite:///a/b.db", tmp_path) == f"sqlite:///{tmp_path}/a/b.db"
    assert follower.resolve_store_uri(f"sqlite:///{tmp_path}/b.db", Path("/")) == f"sqlite:///{tmp_path}/b.db"
    assert follower.resolve_store_uri("http://host:5000", tmp_path) == "http://host:5000"


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "/tmp/mlflow.db"])
def test_a_store_that_mlflow_refuses_is_named(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"log\.mlflow_uri: found .* expected sqlite:///FILE, http"):
        follower.resolve_store_uri(uri)


def test_who_trains_is_told_from_a_later_process_of_that_number(tmp_path: Path) -> None:
    follower.record_process(tmp_path, os.getpid())
    assert follower.run_is_alive(tmp_path)
    content = json.loads((tmp_path / follower.PROCESS_NAME).read_text())
    (tmp_path / follower.PROCESS_NAME).write_text(json.dumps({**content, "birth": "1"}))
    assert not follower.run_is_alive(tmp_path)
    (tmp_path / follower.PROCESS_NAME).write_text(json.dumps({**content, "host": "elsewhere"}))
    assert not follower.run_is_alive(tmp_path)
    Journal(tmp_path).close()
    assert follower.run_is_alive(tmp_path)  # on another machine: its journal is young
    os.utime(tmp_path / JOURNAL_NAME, (0, 0))
    assert not follower.run_is_alive(tmp_path)


def test_the_identity_of_a_folder_lasts(tmp_path: Path) -> None:
    first = run_identity(tmp_path)
    assert len(first) == 32
    assert run_identity(tmp_path) == first


@pytest.mark.parametrize(
    ("status", "expected"), [("finished", "FINISHED"), ("stopped", "KILLED"), ("failed", "FAILED")]
)
def test_the_summary_tells_the_final_status(tmp_path: Path, status: str, expected: str) -> None:
    assert mlflow_sync.summary_status(tmp_path) == (None, None)
    (tmp_path / "summary.json").write_text(json.dumps({"status": status}))
    assert mlflow_sync.summary_status(tmp_path)[0] == expected


def test_a_folder_that_is_no_run_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mlflow_sync.main([str(tmp_path)]) == 2
    assert "found neither metrics.jsonl nor config.resolved.yaml; expected a run's folder" in capsys.readouterr().err
    assert mlflow_sync.main([]) == 2
    (tmp_path / "config.resolved.yaml").write_text("log: {mlflow_uri: null}\n")
    assert mlflow_sync.main([str(tmp_path)]) == 2
    assert "name the store with --uri" in capsys.readouterr().err
    (tmp_path / "config.resolved.yaml").write_text("log: [\n")
    with pytest.raises(DataError, match="cannot be read as YAML"):
        mlflow_sync.sync(tmp_path, None, None)


def test_a_folder_that_is_no_run_keeps_none_of_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sync(run_dir: Path, uri: str | None, experiment: str | None) -> str:
        if run_dir.name == "b":
            raise DataError(f"{run_dir}: found neither")
        return f"{run_dir.name} brought over"

    monkeypatch.setattr(mlflow_sync, "sync", sync)
    assert mlflow_sync.main([str(tmp_path / name) for name in "abc"]) == 2
    told = capsys.readouterr()
    assert told.out.splitlines() == ["a brought over", "c brought over"] and told.err.startswith("error: ")

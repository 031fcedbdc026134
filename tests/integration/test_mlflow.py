"""The journal in a real MLflow store: every point once whatever dies, goes down or is resumed on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow_server import Server

from sparselt_dist import compare, follower, mlflow_sync
from sparselt_dist.follower import mlflow_identity, read_json, start_follower, wait_follower
from sparselt_dist.journal import Journal
from sparselt_dist.mlflow_sink import open_client

WAIT_SECONDS = 120.0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One SQLite store for all tests, each with an experiment of its own: making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def run_dir(tmp_path: Path, store: str) -> Path:
    return make_folder(tmp_path / "run", store, tmp_path.name)


def make_folder(folder: Path, uri: str, experiment: str) -> Path:
    folder.mkdir()
    (folder / "config.resolved.yaml").write_text(
        "run: {name: tiny}\nobjective: {name: mlm, mlm_probability: 0.15}\nbudget: {max_steps: 100, max_hours: null}\n"
        f"log: {{mlflow_uri: '{uri}', experiment: {experiment}}}\nmodel: {{config: {{long: {'x' * 9000}}}}}\n"
        "optim: {betas: [0.9, 0.98]}\n"
    )
    environment = {"git_commit": "c0ffee", "profile": "quickstart", "data_manifest_sha256": "d" * 64, "world_size": 2}
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "ds_config.resolved.json").write_text("{}")
    return folder


def write(journal: Journal, first: int, last: int, loss: float = 1.0) -> None:
    for step in range(first, last + 1):
        journal.append({"step": step, "train/loss": loss + step, "train/lr": 0.1, "batch_digest": "ab"})


def end(folder: Path, status: str = "finished") -> None:
    (folder / "summary.json").write_text(json.dumps({"status": status, "mlflow_run_id": mlflow_identity(folder)}))


def until(condition: Callable[[], Any], seconds: float = WAIT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.1)


def delivered(uri: str, folder: Path, key: str = "train/loss") -> dict[int, float]:
    """The store's values by step; fails if any step stands twice."""
    history = open_client(uri).get_metric_history(read_json(folder / "mlflow.json")["run_id"], key)
    counts = Counter(point.step for point in history)
    assert all(count == 1 for count in counts.values()), counts
    return {point.step: point.value for point in history}


def reached(uri: str, folder: Path, step: int) -> bool:
    return bool(read_json(folder / "mlflow.json").get("run_id")) and step in delivered(uri, folder)


def status(uri: str, folder: Path) -> str:
    return str(open_client(uri).get_run(read_json(folder / "mlflow.json")["run_id"]).info.status)


def kill(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()


def test_a_run_is_followed_to_its_end(run_dir: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_dir.parent)
    journal = Journal(run_dir)
    process = start_follower(run_dir, store, os.getpid())
    write(journal, 1, 30)
    journal.append({"step": 30, "eval/loss": float("nan"), "time/forward_seconds": 12.5})
    until(lambda: reached(store, run_dir, 30))
    for number in follower.BLOCKED_SIGNALS:
        process.send_signal(number)
    write(journal, 31, 60)
    journal.close()
    (run_dir / "profile").mkdir()
    (run_dir / "profile" / "steps.txt").write_text("forward 1.0")
    end(run_dir)
    assert wait_follower(process, run_dir, WAIT_SECONDS) == ""

    assert delivered(store, run_dir) == {step: 1.0 + step for step in range(1, 61)}
    assert list(delivered(store, run_dir, "eval/loss")) == [30]
    assert delivered(store, run_dir, "time/forward_seconds") == {30: 12.5}
    client = open_client(store)
    run = client.get_run(read_json(run_dir / "summary.json")["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "tiny"
    assert run.data.params["objective.mlm_probability"] == "0.15"
    assert run.data.params["optim.betas"] == "[0.9, 0.98]"
    assert len(run.data.params["model.config.long"]) == 6000
    expected = {
        "objective": "mlm",
        "profile": "quickstart",
        "git_commit": "c0ffee",
        "data_sha256": "d" * 64,
        "run_id": (run_dir / "run_id").read_text(),
    }
    assert expected.items() <= {key.removeprefix("sparselt."): text for key, text in run.data.tags.items()}.items()
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
    configuration = {"config.resolved.yaml", "ds_config.resolved.json", "environment.json"}
    assert artifacts == {*configuration, "summary.json", "profile"}
    assert (Path(store.removeprefix("sqlite:///")).parent / "mlartifacts" / run.info.run_id).is_dir()
    assert not (run_dir.parent / "mlruns").exists()
    assert (run_dir / "mlflow.log").read_text() == ""


def test_killed_and_resumed_it_is_one_run_without_gaps_or_doubles(run_dir: Path, store: str) -> None:
    journal = Journal(run_dir)
    process = start_follower(run_dir, store, os.getpid())
    write(journal, 1, 40)
    until(lambda: reached(store, run_dir, 40))
    first = mlflow_identity(run_dir)
    write(journal, 41, 57)
    kill(process)
    assert status(store, run_dir) == "RUNNING"

    # Continued from step 25 with other values, logged at other steps too; what the store has stays as it is.
    journal.cut_back(25)
    write(journal, 26, 60, loss=2.0)
    journal.append({"step": 60, "eval/loss": 4.0})
    process = start_follower(run_dir, store, os.getpid())
    until(lambda: reached(store, run_dir, 60))
    end(run_dir, "stopped")
    assert wait_follower(process, run_dir, WAIT_SECONDS) == ""
    assert status(store, run_dir) == "KILLED"
    assert mlflow_identity(run_dir) == first

    (run_dir / "summary.json").unlink()
    process = start_follower(run_dir, store, os.getpid())
    until(lambda: status(store, run_dir) == "RUNNING")
    write(journal, 61, 70)
    journal.close()
    end(run_dir)
    assert wait_follower(process, run_dir, WAIT_SECONDS) == ""
    values = delivered(store, run_dir)
    assert list(values) == list(range(1, 71))
    assert values[40] == 41.0
    assert values[58] == 60.0
    assert delivered(store, run_dir, "eval/loss") == {60: 4.0}
    assert status(store, run_dir) == "FINISHED"


def test_a_dead_trainer_leaves_a_failed_run_with_all_its_points(run_dir: Path, store: str) -> None:
    trainer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    journal = Journal(run_dir)
    write(journal, 1, 20)
    process = start_follower(run_dir, store, trainer.pid)
    until(lambda: reached(store, run_dir, 20))
    write(journal, 21, 33)
    trainer.send_signal(signal.SIGKILL)  # not waited for: a zombie is dead too
    assert process.wait(WAIT_SECONDS) == 0
    assert list(delivered(store, run_dir)) == list(range(1, 34))
    assert status(store, run_dir) == "FAILED"
    trainer.wait()
    journal.close()


def test_both_killed_the_command_brings_the_rest(run_dir: Path, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    journal = Journal(run_dir)
    write(journal, 1, 20)
    process = start_follower(run_dir, store, trainer.pid)
    until(lambda: reached(store, run_dir, 20))
    write(journal, 21, 30)
    kill(process)
    journal.close()

    assert mlflow_sync.main([str(run_dir)]) == 0  # the trainer lives still
    assert status(store, run_dir) == "RUNNING"
    assert "20 points sent, 40 already there, status RUNNING" in capsys.readouterr().out
    kill(trainer)
    assert mlflow_sync.main([str(run_dir)]) == 0
    assert status(store, run_dir) == "FAILED"
    assert "0 points sent, 60 already there, status FAILED" in capsys.readouterr().out
    assert list(delivered(store, run_dir)) == list(range(1, 31))


def test_a_run_changed_on_resume_keeps_its_parameters_and_says_so(run_dir: Path, store: str) -> None:
    write(journal := Journal(run_dir), 1, 2)
    journal.close()
    end(run_dir)
    assert mlflow_sync.main([str(run_dir)]) == 0
    config = (run_dir / "config.resolved.yaml").read_text().replace("max_steps: 100", "max_steps: 200")
    (run_dir / "config.resolved.yaml").write_text(config)
    assert mlflow_sync.main([str(run_dir)]) == 0
    run = open_client(store).get_run(read_json(run_dir / "mlflow.json")["run_id"])
    assert run.data.params["budget.max_steps"] == "100"
    assert run.data.tags["sparselt.changed.budget.max_steps"] == "200"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "server"
    folder.mkdir()
    one = Server(folder)
    yield one
    one.kill()


def test_a_server_that_goes_down_and_comes_back_gets_everything_once(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_folder(tmp_path / "run", server.uri, "served")
    journal = Journal(run_dir)
    process = start_follower(run_dir, server.uri, os.getpid())
    write(journal, 1, 10)
    until(lambda: read_json(run_dir / "mlflow.json").get("outages") == 1)
    assert mlflow_identity(run_dir) is None
    server.start()
    until(lambda: reached(server.uri, run_dir, 10))
    before = read_json(run_dir / "mlflow.json")["outages"]  # more than one if the server was slow to start
    server.kill()
    write(journal, 11, 20)
    until(lambda: read_json(run_dir / "mlflow.json")["outages"] > before)
    server.start()
    write(journal, 21, 30)
    until(lambda: reached(server.uri, run_dir, 30))

    # Down at the end: the run is not held up, nothing stays behind, and the command completes it.
    server.kill()
    write(journal, 31, 40)
    journal.close()
    end(run_dir)
    begin = time.monotonic()
    message = wait_follower(process, run_dir, 3.0)
    assert time.monotonic() - begin < 10
    assert process.returncode == -signal.SIGKILL
    assert f"`sparselt mlflow-sync {run_dir}` brings it over" in message
    assert "\n" not in message
    assert mlflow_sync.main([str(run_dir)]) == 2
    assert "expected a reachable MLflow store; start it or name another" in capsys.readouterr().err
    server.start()
    assert mlflow_sync.main([str(run_dir)]) == 0
    assert list(delivered(server.uri, run_dir)) == list(range(1, 41))
    assert status(server.uri, run_dir) == "FINISHED"
    assert mlflow_sync.main([str(run_dir)]) == 0
    assert "0 points sent, 80 already there, status FINISHED" in capsys.readouterr().out


def test_the_exported_model_can_be_registered_and_loaded(run_dir: Path, store: str) -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat")
    tokenizer = Tokenizer(models.WordPiece({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **special)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=len(names), **sizes))
    model.save_pretrained(run_dir / "model")
    fast.save_pretrained(run_dir / "model")
    write(journal := Journal(run_dir), 1, 2)
    journal.close()
    end(run_dir)
    assert mlflow_sync.main([str(run_dir)]) == 0

    import mlflow

    mlflow.set_tracking_uri(store)
    run_id = read_json(run_dir / "mlflow.json")["run_id"]
    version = mlflow.register_model(f"runs:/{run_id}/model", "tiny")
    assert version.status == "READY"
    filler = mlflow.transformers.load_model("models:/tiny/1")
    assert filler.task == "fill-mask"
    assert filler.tokenizer.get_vocab() == fast.get_vocab()
    loaded = filler.model.state_dict()
    assert all((loaded[name] == tensor).all() for name, tensor in model.state_dict().items())


def test_compare_reads_the_store(tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name, ce in (("first", 4.0), ("second", 3.0)):
        folder = make_folder(tmp_path / name, store, "compared")
        text = (folder / "config.resolved.yaml").read_text().replace("name: tiny", f"name: {name}")
        (folder / "config.resolved.yaml").write_text(text)
        journal = Journal(folder)
        for step in range(1, 11):
            journal.append({"step": step, "train/loss": 10.0 - step, "progress/tokens": step * 100})
        journal.append({"step": 10, "yardstick/masked_ce": ce})
        journal.close()
        end(folder)
        assert mlflow_sync.main([str(folder)]) == 0
    capsys.readouterr()
    chosen = ["--uri", store, "--experiment", "compared"]
    assert compare.main(chosen) == 0
    out = capsys.readouterr().out
    assert out.index("second") < out.index("first")
    assert "100 steps" in out
    assert "finished" in out
    assert compare.main([*chosen, "first", "--at", "tokens=500", "--html", str(tmp_path / "r.html")]) == 0
    out = capsys.readouterr().out
    assert "5.0000" in out
    assert "second" not in out
    assert "<polyline" in (tmp_path / "r.html").read_text()
    assert compare.main([*chosen, "frist"]) == 2
    assert "did you mean first?" in capsys.readouterr().err
    assert compare.main(["--uri", store, "--experiment", "nothing"]) == 2
    assert "the store has no experiment 'nothing'" in capsys.readouterr().err

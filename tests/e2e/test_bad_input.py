"""Bad input: one message that says what, where, what was expected and what to do; exit code 2; no traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import pretrain_arguments

QUICK = ("budget.max_steps=2", "log.batch_digest=false")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that should have been refused writes here."""
    monkeypatch.chdir(tmp_path)


def command(module: str, *arguments: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", f"sparselt_dist.{module}", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def assert_refused(code: int, output: str, *words: str) -> None:
    assert code == 2, output
    assert "Traceback" not in output
    for word in words:
        assert word in output, output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["optim.peak_rl=1"], ["optim.peak_rl", "peak_lr"]),
        (["train.compile=perhaps"], ["train.compile", "perhaps", "true"]),
        (["budget.max_steps=0"], ["budget.max_steps", "0"]),
        (["train.global_batch_size=10", "train.micro_batch_size=4"], ["train.global_batch_size", "10", "8 or 12"]),
        (["objective.name=mlmm"], ["objective.name", "mlmm", "mlm"]),
        (["model.architecture=berd"], ["model.architecture", "berd", "bert"]),
        (["model.config.hiden_size=8"], ["hiden_size", "hidden_size"]),
        (["--config", "quickstrat"], ["quickstrat", "quickstart"]),
        (["schedule.name=cosin"], ["schedule.name", "cosin", "cosine"]),
        (["optim.peak_rl=1", "train.compile=perhaps"], ["optim.peak_rl", "train.compile"]),
        (["log.mlflow_uri=ftp://nowhere"], ["log.mlflow_uri", "ftp", "sqlite"]),
    ],
)
def test_configuration(arguments: list[str], words: list[str]) -> None:
    assert_refused(*command("pretrain", *arguments), *words)


def _truncate(folder: Path) -> str:
    shard = folder / "train" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-2000])
    return shard.name


def _corrupt_manifest(folder: Path) -> str:
    (folder / "train" / "manifest.json").write_text('{"format": "sparselt_dist.sha')
    return "manifest.json"


def _empty(folder: Path) -> str:
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()
    return "prepare"


def _missing(folder: Path) -> str:
    shutil.rmtree(folder / "train")
    return "prepare"


def _other_tokenizer(folder: Path) -> str:
    path = folder / "train" / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content))
    return "tokenizer"


def _id_outside(folder: Path) -> str:
    """Ids beyond the vocabulary in every row, index and manifest untouched."""
    for shard in (folder / "train").glob("*.tar"):
        content = bytearray(shard.read_bytes())
        for member in json.loads(shard.with_suffix(".index.json").read_text())["members"]:
            start = member["offset"]
            content[start : start + 2 * member["tokens"]] = b"\xff\xfe" * member["tokens"]
        shard.write_bytes(content)
    return "vocabulary"


@pytest.mark.parametrize("spoil", [_truncate, _corrupt_manifest, _empty, _missing, _other_tokenizer, _id_outside])
def test_shards(shards: Path, tmp_path: Path, spoil: Callable[[Path], str]) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    named = spoil(copy)
    code, output = command("pretrain", *pretrain_arguments(copy, tmp_path / "run", *QUICK))
    assert_refused(code, output, named, str(copy / "train"))
    assert not (tmp_path / "run" / "model").exists()


def test_an_output_folder_that_cannot_be_written(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, output = command("pretrain", *pretrain_arguments(shards, tmp_path / "file" / "run", *QUICK))
    assert_refused(code, output, "run.output_dir", "cannot be written")


@pytest.mark.parametrize(("resume", "words"), [("must", ["no complete checkpoint"]), ("nowhere", ["no such folder"])])
def test_nothing_to_resume(shards: Path, tmp_path: Path, resume: str, words: list[str]) -> None:
    arguments = pretrain_arguments(shards, tmp_path / "run", *QUICK)
    assert_refused(*command("pretrain", "--resume", resume, *arguments), *words)


@pytest.mark.parametrize(("content", "word"), [(b"\x00\x01\x02\xff" * 500, "binary"), (b"", "empty")])
def test_text_that_is_none(tmp_path: Path, content: bytes, word: str) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    source = f"prepare.source={tmp_path / 'text.txt'}"
    code, output = command("prepare", source, f"prepare.output_dir={tmp_path / 'out'}")
    assert_refused(code, output, "text.txt", word)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_plugin_that_fails_on_import(tmp_path: Path) -> None:
    (tmp_path / "sad_plugin.py").write_text("raise RuntimeError('no such driver')\n")
    info = tmp_path / "sad_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sad-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sparselt_dist.objectives]\nsad = sad_plugin:Sad\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    code, output = command("pretrain", "objective.name=sad", PYTHONPATH=path)
    assert_refused(code, output, "sad-plugin", "no such driver")

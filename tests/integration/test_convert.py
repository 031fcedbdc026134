"""The command: official weights in, a folder out that transformers loads, that is evaluated and that training starts from."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from official_states import ARCH, BERT_CONFIG, SPARSELT_CONFIG, TYPES, cramming_state, sparselt_state, write_folder
from runs import run_ranks
from safetensors.torch import load_file
from toy_run import LENGTH, VOCABULARY, make_data
from transformers import AutoModel, AutoTokenizer

from sparselt_dist import cli, convert
from sparselt_dist.config import ModelSection
from sparselt_dist.data.tokenizer import tokenizer_info
from sparselt_dist.models.backbone import build_backbone
from sparselt_dist.models.loading import load_exported


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards and their tokenizer."""
    folder = tmp_path_factory.mktemp("toy")
    make_data(folder)
    for shards in ("train", "validation"):
        shutil.copytree(folder / "tokenizer", folder / shards / "tokenizer")
    return folder


@pytest.fixture
def sparselt(root: Path, tmp_path: Path) -> Path:
    """What SparseLT's training leaves, with a tokenizer beside it."""
    torch.manual_seed(1)
    config = {**SPARSELT_CONFIG, "vocab_size": VOCABULARY}
    folder = write_folder(tmp_path / "official", sparselt_state(vocabulary=VOCABULARY), config)
    for path in (root / "tokenizer").iterdir():
        shutil.copyfile(path, folder / path.name)
    (folder / "training_args.bin").write_bytes(b"not read")
    return folder


def test_the_command_tells_of_every_tensor(sparselt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".out.partial").mkdir()  # of an earlier conversion that was killed
    assert cli.main(["convert", str(sparselt), str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    state = torch.load(sparselt / "pytorch_model.bin")
    assert all(f"  {name} " in shown for name in state)
    assert f"{tmp_path / 'out'}" in shown.splitlines()[-1]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md",
        "config.json",
        "conversion.json",
        "model.safetensors",
        "objective.safetensors",
        "sparselt_export.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert not (tmp_path / ".out.partial").exists()
    AutoModel.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").mask_token == "[MASK]"
    assert load_exported(tmp_path / "out")[0].has_head


@pytest.mark.parametrize("kind", ["sparselt", "cramming"])
def test_training_starts_from_what_was_converted(kind: str, root: Path, sparselt: Path, tmp_path: Path) -> None:
    source, objective = sparselt, ["objective.name=slt", f"objective.num_types={TYPES}"]
    if kind == "cramming":
        arch: dict[str, Any] = {**ARCH, "embedding": {**ARCH["embedding"], "vocab_size": VOCABULARY}}
        source, objective = write_folder(tmp_path / "crammed", cramming_state(vocabulary=VOCABULARY), arch), []
    assert (
        convert.main([str(source), str(tmp_path / "out"), "--kind", kind, "--tokenizer", str(root / "tokenizer")]) == 0
    )
    architecture = "bert" if kind == "sparselt" else "crammed-bert"
    ended = run_ranks(
        1,
        root,
        tmp_path / "run",
        *objective,
        f"model.architecture={architecture}",
        "model.config={}",
        f"model.init_from={tmp_path / 'out'}",
        f"data.sequence_length={LENGTH}",
        "optim.peak_lr=1e-9",
        "budget.max_steps=2",
    )
    assert ended.code == 0, ended.output
    trained, converted = ended.weights(), load_file(tmp_path / "out" / "model.safetensors")
    for name, value in converted.items():
        torch.testing.assert_close(trained[f"backbone.model.{name}"], value, atol=1e-6, rtol=0)


def test_training_from_a_headless_encoder_needs_no_head(root: Path, tmp_path: Path) -> None:
    from official_states import bert_state

    state = bert_state(has_head=False, vocabulary=VOCABULARY)
    source = write_folder(tmp_path / "in", state, {**BERT_CONFIG, "vocab_size": VOCABULARY})
    assert convert.main([str(source), str(tmp_path / "out")]) == 0
    built = build_backbone(
        ModelSection(init_from=str(tmp_path / "out")),
        tokenizer_info(root / "tokenizer"),
        sequence_length=LENGTH,
        with_head=False,
    )
    weights = built.model.state_dict()
    assert torch.equal(
        weights["encoder.layer.1.output.dense.weight"], state["bert.encoder.layer.1.output.dense.weight"]
    )


def test_a_user_error_is_one_message(
    root: Path, sparselt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    small = write_folder(tmp_path / "small", sparselt_state(), SPARSELT_CONFIG)
    for arguments, told in (
        ([tmp_path / "nowhere", tmp_path / "out"], "found nothing at"),
        ([sparselt, tmp_path / "file" / "out"], "cannot be written"),
        ([sparselt, sparselt], "is there already"),
        ([sparselt, tmp_path / "out", "--kind", "cramming"], "of no known layout, expected cramming's crammed-bert"),
        ([sparselt, tmp_path / "out", "--tokenizer", tmp_path / "empty"], "holds no tokenizer.json"),
        ([sparselt, tmp_path / "out", "--model-config", tmp_path / "empty"], "--model-config: found no file"),
        (
            [small, tmp_path / "out", "--tokenizer", root / "tokenizer"],
            "has 200 entries, expected at most the model's 37",
        ),
    ):
        assert convert.main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and told in error
    assert not (tmp_path / "out").exists()


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"no checkpoint")
    command = [sys.executable, "-m", "sparselt_dist.convert", str(tmp_path / "x.ckpt"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "cannot be read" in done.stderr and "Traceback" not in done.stderr

"""A run's checkpoint becomes a Hugging Face folder that loads anywhere, and both are evaluated."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toy_run import LENGTH, make_data, tokenizer_sha256, toy_config, write_run
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline

from sparselt_dist import evaluate, export
from sparselt_dist.errors import CheckpointError
from sparselt_dist.models.backbone import Backbone, PretrainingModel, build_backbone
from sparselt_dist.models.exporting import export_checkpoint, export_model
from sparselt_dist.objectives.base import TokenizerInfo

Run = tuple[Path, PretrainingModel]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    make_data(folder)
    return folder


@pytest.fixture(scope="module")
def run(root: Path) -> Run:
    return write_run(toy_config(root), root)


@pytest.fixture
def other_run(root: Path, tmp_path: Path) -> Run:
    """A run of its own for tests that change it."""
    config = toy_config(root)
    config = config.model_copy(update={"run": config.run.model_copy(update={"output_dir": str(tmp_path / "other")})})
    return write_run(config, root, run_id="2" * 32)


def _newest(run: Run) -> Path:
    return run[0] / "checkpoints" / "step_00000007"


def _ids() -> torch.Tensor:
    return torch.randint(5, 200, (3, LENGTH), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(backbone: Backbone, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = backbone.model(input_ids=ids).logits
    return logits


# --- export ----------------------------------------------------------------------------------------------------------


def test_export_loads_with_equal_logits_and_tied_weights(run: Run, tmp_path: Path) -> None:
    folder = export_checkpoint(_newest(run), tmp_path / "model")
    loaded = AutoModelForMaskedLM.from_pretrained(folder).eval()
    assert torch.equal(loaded(input_ids=_ids()).logits, _logits(run[1].backbone, _ids()))
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())  # nothing half-written is left
    assert not (folder / "objective.safetensors").exists()


def test_export_loads_where_only_transformers_is_installed(run: Run, tmp_path: Path) -> None:
    folder = export_checkpoint(_newest(run), tmp_path / "model")
    torch.save({"ids": _ids(), "logits": _logits(run[1].backbone, _ids())}, tmp_path / "expected.pt")
    script = f"""
import sys
sys.modules["sparselt_dist"] = None  # any import of the package fails
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline
path = {str(folder)!r}
model = AutoModelForMaskedLM.from_pretrained(path, trust_remote_code=True).eval()
expected = torch.load({str(tmp_path / "expected.pt")!r})
assert torch.equal(model(input_ids=expected["ids"]).logits, expected["logits"])
assert AutoTokenizer.from_pretrained(path, trust_remote_code=True).mask_token_id == 4
print(len(pipeline("fill-mask", model=path, trust_remote_code=True, top_k=3)("w1 w2 [MASK] w4")))
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3"


def test_fill_mask_pipeline_takes_texts_of_any_length(run: Run, tmp_path: Path) -> None:
    folder = export_checkpoint(_newest(run), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == run[1].backbone.config.max_position_embeddings
    fill = pipeline("fill-mask", model=AutoModelForMaskedLM.from_pretrained(folder), tokenizer=tokenizer)
    text = "w1 [MASK] " + "w2 " * 500
    found = fill(text, tokenizer_kwargs={"truncation": True})
    assert len(found) == 5 and all(guess["token_str"] for guess in found)


def test_card_and_marker_tell_the_runs_story(run: Run, tmp_path: Path) -> None:
    folder = export_checkpoint(_newest(run), tmp_path / "model")
    card = (folder / "README.md").read_text()
    assert "| toy\\|chain | CC0-1.0 | 7 | 12,345 |" in card
    assert "| `yardstick/masked_ce` | 3.5000 |" in card
    assert "| `eval/loss` | 4.2500 |" in card  # of the checkpoint's step, not of a later one
    marker = json.loads((folder / "sparselt_export.json").read_text())
    assert (marker["run_id"], marker["step"], marker["objective"]) == ("1" * 32, 7, "mlm")
    assert (folder / "tokenizer.json").read_bytes() == (run[0] / "tokenizer" / "tokenizer.json").read_bytes()


def test_metrics_given_stand_in_the_card(run: Run, tmp_path: Path) -> None:
    folder = export_checkpoint(_newest(run), tmp_path / "model", metrics={"eval/loss": 1.125})
    assert "| `eval/loss` | 1.1250 |" in (folder / "README.md").read_text()


def test_an_earlier_export_of_the_same_run_is_replaced(run: Run, tmp_path: Path) -> None:
    folder = export_checkpoint(_newest(run), tmp_path / "model")
    (folder / "stale.txt").write_text("of the earlier export")
    export_checkpoint(_newest(run), tmp_path / "model")
    assert not (folder / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_export_of_another_run_and_a_foreign_folder_are_refused(
    run: Run, other_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export_checkpoint(_newest(run), tmp_path / "model")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())
    assert export.main([str(other_run[0]), str(folder)]) == 2
    assert f"holds an export of run {'1' * 32}" in capsys.readouterr().err
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir()) == before
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.tex").write_text("x")
    assert export.main([str(run[0]), str(foreign)]) == 2
    assert "holds other files (chapter1.tex, ...)" in capsys.readouterr().err
    assert [path.name for path in foreign.iterdir()] == ["chapter1.tex"]


def test_command_exports_a_runs_newest_checkpoint_into_its_model_folder(other_run: Run) -> None:
    assert export.main([str(other_run[0])]) == 0
    assert (other_run[0] / "model" / "model.safetensors").is_file()


def test_a_checkpoint_of_another_model_is_refused(other_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    architecture = _newest(other_run) / "config.json"
    content = json.loads(architecture.read_text())
    content["num_hidden_layers"] = 3
    architecture.write_text(json.dumps(content))
    assert export.main([str(other_run[0])]) == 2
    assert "encoder.layers.2" in capsys.readouterr().err
    assert not (other_run[0] / "model").exists()


def test_parameters_of_the_objective_are_kept_beside_the_model(other_run: Run, tmp_path: Path) -> None:
    vectors = {"type_vectors": torch.randn(4, 8)}
    folder = export_model(
        other_run[1].backbone, other_run[0] / "tokenizer", tmp_path / "model", "card", objective_state=vectors
    )
    assert torch.equal(load_file(folder / "objective.safetensors")["type_vectors"], vectors["type_vectors"])


def _backbone(root: Path, architecture: str, *, with_head: bool) -> tuple[Backbone, TokenizerInfo]:
    from sparselt_dist.data.tokenizer import tokenizer_info

    tokenizer = tokenizer_info(root / "tokenizer")
    torch.manual_seed(0)
    section = toy_config(root, architecture).model
    return build_backbone(section, tokenizer, sequence_length=LENGTH, with_head=with_head).eval(), tokenizer


@pytest.mark.parametrize("architecture", ["bert", "roberta", "modernbert"])
def test_encoders_of_transformers_export_with_their_heads(root: Path, tmp_path: Path, architecture: str) -> None:
    backbone, _ = _backbone(root, architecture, with_head=True)
    folder = export_model(backbone, root / "tokenizer", tmp_path / "model", "card")
    loaded = AutoModelForMaskedLM.from_pretrained(folder).eval()
    assert torch.equal(loaded(input_ids=_ids()).logits, _logits(backbone, _ids()))
    fill = pipeline("fill-mask", model=loaded, tokenizer=AutoTokenizer.from_pretrained(folder))
    assert len(fill("w1 [MASK] w2")) == 5


def test_a_headless_model_exports_as_bare_encoder(root: Path, tmp_path: Path) -> None:
    backbone, _ = _backbone(root, "bert", with_head=False)
    folder = export_model(backbone, root / "tokenizer", tmp_path / "model", "card")
    loaded = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=_ids()).last_hidden_state, backbone(_ids()))


def test_a_decoder_goes_on_after_its_prompt(root: Path, tmp_path: Path) -> None:
    """The tokenizer's template ends every text with [SEP]; a prompt must not end so."""
    backbone, _ = _backbone(root, "gpt_neox", with_head=True)
    folder = export_model(backbone, root / "tokenizer", tmp_path / "model", "card")
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer("w1 w2")["input_ids"] == [6, 7]
    assert tokenizer.padding_side == "left"
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 3
    generate = pipeline("text-generation", model=loaded, tokenizer=tokenizer)
    made = generate("w1 w2", max_new_tokens=3, do_sample=False)
    assert made[0]["generated_text"].startswith("w1 w2")


def test_a_folder_that_cannot_be_written_is_one_clear_error(root: Path, tmp_path: Path) -> None:
    backbone, _ = _backbone(root, "bert", with_head=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        export_model(backbone, root / "tokenizer", tmp_path / "file" / "model", "card")


# --- evaluate --------------------------------------------------------------------------------------------------------


def test_an_unknown_task_is_refused_with_the_nearest(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(run[0]), "--tasks", "yardstick"]) == 2
    assert "did you mean 'yardsticks'?" in capsys.readouterr().err


def test_a_checkpoint_is_evaluated_by_its_own_objective(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(run[0]), "--tasks", "heldout"]) == 0
    written = json.loads((run[0] / "results.json").read_text())
    assert written["step"] == 7
    assert written["metrics"]["eval/loss"] == pytest.approx(_objective_loss(run), rel=1e-6)
    assert f"{written['metrics']['eval/loss']:.4f}" in capsys.readouterr().out


@torch.no_grad()
def _objective_loss(run: Run) -> float:
    """The same rows and masks in one batch."""
    from sparselt_dist.data.corpora import open_folder
    from sparselt_dist.data.loader import evaluation_batches
    from sparselt_dist.data.tokenizer import tokenizer_info
    from sparselt_dist.models.assembly import build_collator

    root = run[0].parent
    collator = build_collator(toy_config(root), tokenizer_info(root / "tokenizer"))
    (batch,) = evaluation_batches(
        open_folder(root / "validation"), collator, max_samples=64, micro_batch_size=64, rank=0, world_size=1
    )
    return run[1](batch).loss.item()


def test_an_exported_model_is_evaluated_without_its_run(run: Run, root: Path, tmp_path: Path) -> None:
    folder = export_checkpoint(_newest(run), tmp_path / "model")
    shards = ["--data", str(root / "train"), "--validation", str(root / "validation")]
    nn.Module.train(run[1])  # a model in memory plays no part
    assert evaluate.main([str(folder), *shards, "--output", str(tmp_path / "out.json")]) == 0
    metrics = json.loads((tmp_path / "out.json").read_text())["metrics"]
    assert {"eval/masked_ce", "eval/masked_accuracy", "yardstick/masked_ce", "yardstick/probe_accuracy"} <= set(metrics)
    nn.Module.eval(run[1])


def test_shards_that_are_not_known_or_of_another_tokenizer_are_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export_checkpoint(_newest(run), tmp_path / "model")
    assert evaluate.main([str(folder), "--tasks", "heldout"]) == 2
    assert "name them by --validation" in capsys.readouterr().err
    make_data(tmp_path / "foreign", mask=False)
    assert tokenizer_sha256(tmp_path / "foreign" / "tokenizer") != tokenizer_sha256(run[0] / "tokenizer")
    assert evaluate.main([str(folder), "--validation", str(tmp_path / "foreign" / "validation")]) == 2
    assert "tokenized otherwise" in capsys.readouterr().err


def test_results_reach_the_runs_mlflow_run_once(
    other_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(other_run[0]), "--tasks", "heldout", "--mlflow-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    assert evaluate.main(command) == 0
    assert "MLflow: 2 new metrics" in capsys.readouterr().out
    assert evaluate.main(command) == 0
    assert "MLflow: 0 new metrics" in capsys.readouterr().out


def test_a_store_that_is_down_costs_a_warning_and_no_result(other_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(other_run[0]), "--tasks", "heldout", "--mlflow-uri", "http://127.0.0.1:9"]
    assert evaluate.main(command) == 0
    assert "was not told" in capsys.readouterr().err
    assert (other_run[0] / "results.json").is_file()

"""Encoders learn a task whose labels follow from their texts, by seed; `sparselt evaluate` does it by the published recipe."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toy_run import LENGTH, make_data, toy_config, write_run, write_tokenizer

from sparselt_dist import evaluate
from sparselt_dist.data.tokenizer import tokenizer_info
from sparselt_dist.errors import CheckpointError
from sparselt_dist.evaluation.fine_tuning import Recipe, fine_tune
from sparselt_dist.evaluation.glue import Kind
from sparselt_dist.evaluation.labelled_tasks import LabelledTask, Row
from sparselt_dist.evaluation.tasks import open_subject
from sparselt_dist.models.backbone import build_backbone
from sparselt_dist.models.classifier import load_classifier
from sparselt_dist.models.exporting import export_checkpoint, export_model

CPU = torch.device("cpu")
FAST = Recipe(epochs=4, peak_lr=3e-3)


def rows(count: int, seed: int, *, pairs: bool = False) -> list[Row]:
    """Label 1 where w1 stands somewhere in the (second) text, which is so of 40 %."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        words = [f"w{number}" for number in draw.integers(10, 40, draw.integers(3, 9))]
        label = int(draw.random() < 0.4)
        if label:
            words[draw.integers(len(words))] = "w1"
        found.append(Row("w2 w3", " ".join(words), label) if pairs else Row(" ".join(words), None, label))
    return found


def task(*, pairs: bool = False) -> LabelledTask:
    return LabelledTask("toy", Kind(), 2, rows(400, 0, pairs=pairs), {"validation": rows(100, 1, pairs=pairs)})


def exported(root: Path, architecture: str, *, with_head: bool = True) -> Path:
    """An untrained model in a folder of its own; its tokenizer has no template of pairs."""
    if not (root / "tokenizer").exists():
        write_tokenizer(root / "tokenizer")
    torch.manual_seed(0)
    backbone = build_backbone(
        toy_config(root, architecture).model,
        tokenizer_info(root / "tokenizer"),
        sequence_length=LENGTH,
        with_head=with_head,
    )
    return export_model(backbone, root / "tokenizer", root / architecture, "card")


@pytest.mark.parametrize("architecture", ["crammed-bert", "bert"])
def test_a_learnable_task_is_learned(tmp_path: Path, architecture: str) -> None:
    folder = exported(tmp_path, architecture, with_head=architecture != "bert")
    learnable = task(pairs=architecture == "bert")
    majority = np.mean([row.label == 0 for row in learnable.scored["validation"]])
    told: list[str] = []
    found = fine_tune(folder, [learnable], "none", CPU, tell=told.append, recipe=FAST)
    assert found["fine_tune/toy_accuracy"] > majority + 0.2
    assert len(told) == 1 and told[0].startswith("toy, trial 1 of 1: toy_accuracy ")


def test_trials_differ_by_seed_repeat_and_count_by_their_median(tmp_path: Path) -> None:
    folder = exported(tmp_path, "crammed-bert")
    short = Recipe(epochs=1, peak_lr=1e-3)
    regression = LabelledTask("stsb", Kind("pearson", 1), 1, rows(64, 0), {"validation": rows(64, 1)})
    torch.manual_seed(7)
    before = torch.get_rng_state()
    found = fine_tune(folder, [regression], "none", CPU, trials=3, recipe=short)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random numbers are its own
    torch.manual_seed(8)
    assert fine_tune(folder, [regression], "none", CPU, trials=3, recipe=short) == found
    low, median, high = (found[f"fine_tune/stsb_pearson{end}"] for end in ("_min", "", "_max"))
    assert low < median < high


def test_a_classifier_has_the_exported_weights_the_dropout_and_the_first_position(tmp_path: Path) -> None:
    folder = exported(tmp_path, "crammed-bert")
    model = load_classifier(folder, outputs=3, dropout=0.1, pad_id=0)
    stored = load_file(folder / "model.safetensors")
    own = {name: value for name, value in model.state_dict().items() if name.startswith("encoder.")}
    assert own and all(torch.equal(value, stored[name]) for name, value in own.items())
    config = model.config
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.classifier_dropout) == (0.1,) * 3
    assert (config.pooler, model.head.out_features) == ("zero_index", 3)
    modern = load_classifier(exported(tmp_path, "modernbert"), outputs=2, dropout=0.1, pad_id=0).config
    assert (modern.classifier_pooling, modern.mlp_dropout, modern.embedding_dropout) == ("cls", 0.1, 0.1)


def test_a_folder_without_its_encoder_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = exported(tmp_path, "crammed-bert")
    stored = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in stored.items() if ".layers.1." not in name}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="weights of the encoder are missing"):
        load_classifier(folder, outputs=2, dropout=0.1, pad_id=0)


def test_the_command_fine_tunes_a_runs_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_data(tmp_path / "toy", train_rows=40)
    run_dir, _ = write_run(toy_config(tmp_path / "toy"), tmp_path / "toy")
    folder = tmp_path / "labelled" / "SST-2"
    folder.mkdir(parents=True)
    for name, count in (("train", 40), ("validation", 20)):
        lines = [json.dumps({"text": row.text, "label": row.label}) + "\n" for row in rows(count, count)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    before = sorted(path.name for path in run_dir.iterdir())
    assert evaluate.main([str(run_dir), "--fine-tune", str(tmp_path / "labelled")]) == 0
    written = json.loads((run_dir / "results.json").read_text())
    assert written["tasks"] == ["fine-tune"] and written["trials"] == 1
    assert set(written["metrics"]) == {"fine_tune/sst2_accuracy"}
    assert "sst2, trial 1 of 1" in capsys.readouterr().err
    assert sorted(path.name for path in run_dir.iterdir()) == sorted([*before, "results.json"])
    (folder / "validation.jsonl").unlink()
    assert evaluate.main([str(run_dir), "--fine-tune", str(tmp_path / "labelled")]) == 2
    assert capsys.readouterr().err.startswith("error: --fine-tune: ")


def test_an_exported_model_knows_how_its_text_was_normalised(tmp_path: Path) -> None:
    make_data(tmp_path, train_rows=40)
    config = toy_config(tmp_path)
    config = config.model_copy(update={"prepare": config.prepare.model_copy(update={"normalize": "crammed"})})
    run_dir, _ = write_run(config, tmp_path)
    folder = export_checkpoint(run_dir / "checkpoints" / "step_00000007", tmp_path / "elsewhere" / "model")
    assert open_subject(folder).normalization == open_subject(run_dir).normalization == "crammed"


def test_a_decoder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = exported(tmp_path, "gpt_neox")
    assert evaluate.main([str(folder), "--fine-tune", str(tmp_path)]) == 2
    assert "found GPTNeoXForCausalLM, task fine-tune expects an encoder" in capsys.readouterr().err

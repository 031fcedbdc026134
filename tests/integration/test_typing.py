"""`sparselt typing` on a tiny checkpoint whose types of one sentence are planted; nothing is trained."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_run import LENGTH, make_data, markov_rows, save_weights, toy_config, write_run, write_shards, write_tokenizer

from sparselt_dist import typing as command
from sparselt_dist.config import Config
from sparselt_dist.errors import CheckpointError, DataError
from sparselt_dist.evaluation.latent_types import (
    TypeReader,
    open_reader,
    rebuild,
    rows_of_lines,
    rows_of_shards,
    type_rows,
)
from sparselt_dist.models.backbone import PretrainingModel

SENTENCE = "w3 w7 w11 w2"
PLANTED = [0, 2, 0, 1, 3, 0]  # of [CLS], the words and [SEP]
SCORES = {1: 4.0, 2: 6.0, 3: 5.0}  # of each type, where it is planted
OTHER_SCORE = -4.0


def objective_config(root: Path, name: str, objective: dict[str, Any]) -> Config:
    values = toy_config(root).model_dump(mode="json")
    run = {**values["run"], "output_dir": str(root / name)}
    return Config.model_validate({**values, "run": run, "objective": objective})


@torch.no_grad()
def plant(model: PretrainingModel, folder: Path) -> None:
    """Rewrite the classifier so that each piece of the sentence has the score of its planted type, and -4 for others."""
    ids = torch.tensor([[2, 8, 12, 16, 7, 3]])
    hidden_TD = model.backbone(ids)[0]
    scores_TK = torch.full((6, 4), OTHER_SCORE)
    for place, kind in enumerate(PLANTED):
        if kind:
            scores_TK[place, kind] = SCORES[kind]
    model.objective.typer.classifier.weight.copy_((torch.linalg.pinv(hidden_TD) @ scores_TK).T)
    save_weights(model, folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("typing")
    make_data(folder, train_rows=40)
    return folder


@pytest.fixture(scope="module")
def run_dir(root: Path) -> Path:
    run_dir, model = write_run(objective_config(root, "slt", {"name": "slt", "num_types": 4}), root)
    plant(model, run_dir / "checkpoints" / "step_00000007")
    return run_dir


@pytest.fixture(scope="module")
def reader(run_dir: Path) -> TypeReader:
    return open_reader(run_dir, torch.device("cpu"))


def run_command(*arguments: object) -> int:
    return command.main([str(argument) for argument in arguments])


# ---------------------------------------------------------------- what is computed


def test_planted_types_come_back_with_their_probabilities(reader: TypeReader) -> None:
    (text,) = type_rows(reader, rows_of_lines(reader, [SENTENCE]))
    assert text.types.tolist() == PLANTED
    other = np.exp(OTHER_SCORE)
    best = {kind: np.exp(score) / (1 + np.exp(score) + 2 * other) for kind, score in SCORES.items()}
    expected = [best.get(kind, 1 / (1 + 3 * other)) for kind in PLANTED]
    assert text.probabilities.tolist() == pytest.approx(expected, rel=1e-3)
    assert text.probability_sums.sum() == pytest.approx(6) and text.word_texts == SENTENCE.split()


def test_types_do_not_depend_on_the_texts_beside(reader: TypeReader) -> None:
    lines = [" ".join(f"w{number}" for number in row) for row in markov_rows(300, 3)[:, :12] - 5]
    together = list(type_rows(reader, rows_of_lines(reader, [SENTENCE, *lines])))
    assert len(together) == 301  # more than one forward pass
    assert together[0].types.tolist() == PLANTED
    (alone,) = type_rows(reader, rows_of_lines(reader, [lines[0]]))
    assert alone.types.tolist() == together[1].types.tolist()
    assert alone.probabilities == pytest.approx(together[1].probabilities, rel=1e-4)


@torch.no_grad()
def test_greedy_text_is_what_the_decoder_prefers_at_each_place(reader: TypeReader) -> None:
    """One teacher-forced pass over the finished text says the same as writing it piece by piece."""
    (row,) = rows_of_lines(reader, [SENTENCE])
    made = rebuild(reader, row)
    written = [2, *reader.tokenizer.encode(made.text, add_special_tokens=False).ids]
    backbone, slt = reader.loaded.model.backbone, reader.slt
    hidden = backbone(torch.tensor([row.ids]))
    mask = torch.ones(1, len(row.ids), dtype=torch.int64)
    memory = hidden * slt.typer.type_vectors[torch.tensor([PLANTED])] * (torch.tensor([PLANTED]) > 0)[..., None]
    states = slt.decoder(backbone, torch.tensor([written[:5]]), memory, mask)
    best = slt.decoder.head(states[0], backbone.get_input_embeddings()).argmax(dim=-1).tolist()
    assert len(written) == len(row.ids) and best == written[1:]
    assert made.accuracy == np.mean([own == other for own, other in zip(row.ids[1:], written[1:], strict=True)])
    assert rebuild(reader, row) == made


def test_samples_of_shards_are_read_as_stored(reader: TypeReader, root: Path) -> None:
    rows = list(rows_of_shards(reader, str(root / "train"), 5))
    stored = markov_rows(40, 1)
    assert [row.ids for row in rows] == [stored[place].tolist() for place in (0, 9, 19, 29, 39)]
    assert rows[0].text == " ".join(f"w{number - 5}" for number in stored[0])
    assert len(list(rows_of_shards(reader, str(root / "train"), 1000))) == 40


def test_the_normalisation_is_that_of_the_runs_shards(run_dir: Path, reader: TypeReader) -> None:
    assert reader.normalization == reader.loaded.config.prepare.normalize  # the manifest of the toy run tells none
    assert reader.row_length == LENGTH


# ---------------------------------------------------------------- the command


def test_a_text_with_everything(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "types.html"
    assert run_command(run_dir, SENTENCE, "--reconstruct", "--keywords", 2, "--html", target) == 0
    first = capsys.readouterr().out
    rows = [line.split() for line in first.splitlines()]
    assert ["w3", "w3", "2", "0.997"] in rows and ["w7", "w7", "null", "0.948"] in rows
    assert ["[CLS]", "null", "0.948"] in rows
    assert [row for row in rows if row[2:5] == ["1", "of", "1"]] == [
        ["w3", "0.998", "1", "of", "1", "2"],
        ["w2", "0.993", "1", "of", "1", "3"],
    ]
    assert "rebuilt (" in first and "null share 50.0%" in first and "3 of 3 types in use" in first
    page = target.read_text(encoding="utf-8")
    assert page.count('<span class="w">') == 4 and "step 7" in page and "rebuilt (" in page
    assert run_command(run_dir / "checkpoints" / "step_00000007", SENTENCE, "--reconstruct", "--keywords", 2) == 0
    assert capsys.readouterr().out == first.replace(f"report: {target}\n", "")


def test_standard_input_line_by_line(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{SENTENCE}\n\nw5\n".encode())))
    assert run_command(run_dir, "-", "--keywords", 0) == 0
    shown = capsys.readouterr().out
    assert "9 tokens in 2 texts" in shown and shown.count("piece") == 2 and "keyword" not in shown


def test_a_file_and_shards_as_corpora(
    run_dir: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(f"{SENTENCE}\n" * 5)
    assert run_command(run_dir, "--text-file", corpus) == 0
    shown = capsys.readouterr().out
    assert "30 tokens in 5 texts" in shown and "3 of 5 texts are shown" in shown
    assert "w3 100%" in shown and "w3 5" in shown
    assert run_command(run_dir, "--shards", root / "train", "--samples", 4, "--show", 0) == 0
    shown = capsys.readouterr().out
    assert f"{4 * LENGTH} tokens in 4 texts" in shown and "piece" not in shown
    assert "0 of 4 texts are shown" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "found no text, expected one of TEXT"),
        (["w1", "--shards", "x"], "found TEXT and --shards, expected one of"),
        ([" "], "TEXT: found no text, expected at least one line"),
        (["w\udcff"], "TEXT: found bytes that are no UTF-8"),
        (["--text-file", "/no/such/file"], "/no/such/file cannot be read (No such file"),
        (["--shards", "/no/such/folder"], "/no/such/folder: no such shard folder"),
        (["w1", "--html", "/no/such/folder/x.html"], "--html: /no/such/folder/x.html cannot be written"),
        (["w1", "--tagger", "no_such_model"], "parts of speech need"),
    ],
)
def test_faults_are_one_message(
    run_dir: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(run_dir, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")


def test_a_wrong_number_is_refused(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_command(run_dir, "w1", "--keywords", "-1")
    assert stopped.value.code == 2 and "expected a whole number" in capsys.readouterr().err


def test_a_checkpoint_without_latent_types_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, _ = write_run(objective_config(root, "mlm", {"name": "mlm"}), root)
    assert run_command(other, SENTENCE) == 2
    error = capsys.readouterr().err
    assert "found objective 'mlm', which has no latent types" in error and error.count("\n") == 1
    with pytest.raises(CheckpointError, match="found no complete checkpoint"):
        open_reader(root / "train", torch.device("cpu"))


def test_shards_of_another_tokenizer_are_refused(reader: TypeReader, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer", mask=False)
    write_shards(tmp_path / "shards", markov_rows(4, 1), tmp_path / "tokenizer")
    with pytest.raises(DataError, match="tokenized otherwise"):
        list(rows_of_shards(reader, str(tmp_path / "shards"), 2))


def test_help_is_quick_and_the_module_shadows_no_other(tmp_path: Path) -> None:
    """`typing` is a name of the standard library too."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "sparselt_dist.typing", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env=os.environ,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "sparselt typing runs/slt" in done.stdout, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1

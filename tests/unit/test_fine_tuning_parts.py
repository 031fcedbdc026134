"""GLUE's metrics and average, the published schedule, the template of pairs, and labelled texts that are wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from sparselt_dist import evaluate
from sparselt_dist.errors import DataError
from sparselt_dist.evaluation.fine_tuning import PUBLISHED, encode
from sparselt_dist.evaluation.glue import GLUE, GLUE_SCORES, accuracy, correlation, f1, glue_average, task_name
from sparselt_dist.evaluation.labelled_tasks import Row, read_tasks

# --- metrics ---------------------------------------------------------------------------------------------------------

# MNLI matched and mismatched, SST-2, STS-B, RTE, QNLI, QQP, MRPC, CoLA; arXiv 2212.14034 and its code.
PUBLISHED_ROWS = [
    (80.7, (84.1, 84.6, 92.0, 87.4, 58.5, 90.2, 87.5, 88.9, 53.3)),
    (78.6, (83.9, 84.1, 92.2, 84.6, 53.8, 89.5, 87.3, 87.5, 44.5)),
    (80.9, (83.2, 83.4, 91.9, 86.7, 59.2, 90.6, 87.7, 89.3, 56.5)),
]
ROW_NAMES = (
    "mnli_matched_accuracy mnli_mismatched_accuracy sst2_accuracy stsb_pearson rte_accuracy qnli_accuracy qqp_f1 mrpc_f1 "
    "cola_matthews"
).split()


@pytest.mark.parametrize(("average", "row"), PUBLISHED_ROWS)
def test_the_average_of_nine_numbers_gives_the_published_ones(average: float, row: tuple[float, ...]) -> None:
    scores = dict(zip(ROW_NAMES, row, strict=True))
    assert glue_average({**scores, "other_accuracy": 1.0}) == pytest.approx(average, abs=0.05)
    assert glue_average({name: scores[name] for name in ROW_NAMES[1:]}) is None


def test_the_nine_scores_are_those_of_the_tables() -> None:
    assert sorted(GLUE_SCORES) == sorted(ROW_NAMES)
    assert [task_name(name) for name in ("SST-2", "sts_b", "CoLA", "My-Task")] == ["sst2", "stsb", "cola", "My-Task"]


def test_metrics_of_counts_worked_out_by_hand() -> None:
    """6 true positives, 1 false, 2 missed and 3 true negatives: precision 6/7, recall 3/4."""
    labels = np.array([1] * 8 + [0] * 4)
    found = np.array([1] * 6 + [0] * 2 + [1] + [0] * 3)
    assert accuracy(found, labels) == pytest.approx(9 / 12)
    assert f1(found, labels) == pytest.approx(2 * (6 / 7) * (3 / 4) / (6 / 7 + 3 / 4))
    assert correlation(found, labels) == pytest.approx((6 * 3 - 1 * 2) / (7 * 8 * 4 * 5) ** 0.5)


def test_metrics_of_degenerate_answers_are_zero() -> None:
    labels = np.array([0, 1, 0])
    assert (correlation(np.zeros(3), labels), f1(np.zeros(3), labels), f1(np.zeros(3), np.zeros(3))) == (0.0, 0.0, 0.0)


def test_pearson_knows_no_scale() -> None:
    x = np.array([1.0, 2.0, 4.0])
    assert correlation(3 * x - 7, x) == pytest.approx(1)
    assert correlation(x, np.array([1.0, 3.0, 2.0])) == pytest.approx(1 / (2 * 14 / 3) ** 0.5)


# --- recipe ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("examples", "steps"), [(8551, 2670), (2490, 775)], ids=["cola", "rte"])
def test_every_task_warms_up_for_a_tenth_of_its_own_steps(examples: int, steps: int) -> None:
    assert PUBLISHED.epochs * PUBLISHED.steps_per_epoch(examples) == steps
    rates = np.array([PUBLISHED.rate(step, examples) for step in range(steps + 1)])
    assert (rates[0], rates[-1]) == (0, pytest.approx(0, abs=1e-12))
    assert rates.max() == pytest.approx(4e-5, rel=1e-4)
    assert rates.argmax() in (steps // 10, steps // 10 + 1)
    assert rates[steps // 20] == pytest.approx(4e-5 * (steps // 20) / (0.1 * steps))
    three_quarters = 0.1 * steps + 0.75 * 0.9 * steps
    assert rates[round(three_quarters)] == pytest.approx(4e-5 * 0.5 * (1 - 0.5**0.5), rel=0.02)


def test_a_task_smaller_than_a_batch_has_one_a_epoch() -> None:
    assert PUBLISHED.steps_per_epoch(3) == 1


def _tokenizer() -> Tokenizer:
    names = ["[PAD]", "[CLS]", "[SEP]", "a", "b", "c"]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return tokenizer


def test_single_texts_pass_through_the_template_of_pairs() -> None:
    single, pair = encode(_tokenizer(), [Row("a b", None, 1), Row("a", "C b", 0)], "crammed")
    assert single.ids.tolist() == [1, 3, 4, 2, 2]
    assert single.type_ids.tolist() == [0, 0, 0, 0, 1]
    assert pair.ids.tolist() == [1, 3, 2, 5, 4, 2]  # normalised as the model's text was
    assert (single.label, pair.label) == (1, 0)


# --- labelled texts --------------------------------------------------------------------------------------------------

GOOD = [{"text": "a", "label": 0}, {"text": "b", "label": 1, "idx": 7}]


def write_task(folder: Path, rows: list[Any], **others: list[Any]) -> Path:
    """A task's folder; `others`: files other than train, by their names."""
    folder.mkdir(parents=True)
    for name, lines in {"train": rows, **(others or {"validation": rows})}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_tasks_are_read_with_what_their_names_tell(tmp_path: Path) -> None:
    pairs = [{"text": "a", "text_pair": "", "label": label} for label in (0, 1, 2)]
    write_task(tmp_path / "MNLI", pairs, validation_matched=pairs[:1], validation_mismatched=pairs[1:])
    write_task(tmp_path / "STS-B", [{"text": "a", "text_pair": "b", "label": label} for label in (2.5, 0)])
    write_task(tmp_path / "movies", GOOD)
    mnli, stsb, movies = read_tasks(tmp_path)
    assert (mnli.name, mnli.outputs, stsb.name, stsb.outputs, movies.name, movies.outputs) == (
        *("mnli", 3, "stsb", 1),
        *("movies", 2),
    )
    assert [row.label for row in mnli.scored["validation_mismatched"]] == [1, 2]
    assert mnli.kind is GLUE["mnli"] and movies.kind.metric == "accuracy"
    assert movies.train == [Row("a", None, 0), Row("b", None, 1)]


BAD = {
    "no label": ([{"text": "a"}], "line 1: found no label, expected a class as a whole number from 0"),
    "label of text": ([{"text": "a", "label": "positive"}], "found label 'positive'"),
    "label of truth": ([{"text": "a", "label": True}], "found label True"),
    "label between classes": ([{"text": "a", "label": 0.5}], "found label 0.5"),
    "text": ([{"text": 3, "label": 0}], "found 3 as text, expected a string"),
    "text_pair": ([{"text": "a", "text_pair": ["b"], "label": 0}], "as text_pair, expected a string"),
    "list": ([["a", 0]], "expected an object"),
    "one class": ([{"text": "a", "label": 0}], "found labels 0 and no 1, expected every class from 0 to 1"),
    "gap": ([{"text": "a", "label": label} for label in (0, 2)], "found labels 0, 2 and no 1"),
    "hidden labels": ([{"text": "a", "label": label} for label in (-1, 0, 1)], "example 1: found label -1"),
    "some pairs": ([GOOD[0], {**GOOD[1], "text_pair": "b"}], "example 2: found a text_pair, expected none in every"),
    "empty": ([], "found no example"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_lines_are_named(tmp_path: Path, case: str) -> None:
    rows, message = BAD[case]
    write_task(tmp_path / "movies", rows)
    with pytest.raises(DataError) as caught:
        read_tasks(tmp_path)
    assert message in str(caught.value) and str(tmp_path / "movies" / "train.jsonl") in str(caught.value)


def test_wrong_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        read_tasks(tmp_path / "none")
    with pytest.raises(DataError, match="found no folder in it"):
        read_tasks(tmp_path)
    write_task(tmp_path / "rte", GOOD)
    with pytest.raises(DataError, match="found no text_pair, expected one in every line of task rte"):
        read_tasks(tmp_path)
    (tmp_path / "rte" / "validation.jsonl").unlink()
    with pytest.raises(DataError, match=r"validation.jsonl cannot be read \(FileNotFoundError"):
        read_tasks(tmp_path)


def test_a_class_that_training_lacks_and_a_second_spelling_are_refused(tmp_path: Path) -> None:
    write_task(tmp_path / "sst2", GOOD, validation=[*GOOD, {"text": "c", "label": 2}])
    with pytest.raises(DataError, match=r"validation.jsonl, example 3: found label 2, expected a class from 0 to 1"):
        read_tasks(tmp_path)
    write_task(tmp_path / "SST-2", GOOD)
    with pytest.raises(DataError, match="found task sst2 in two folders"):
        read_tasks(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "fine-tune"], "task fine-tune needs labelled texts"),
        (["--fine-tune", "folder", "--trials", "0"], "--trials: found 0"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["model", *arguments]) == 2
    assert message in capsys.readouterr().err

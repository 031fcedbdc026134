"""Labelled texts for fine-tuning: a folder of tasks, each a folder with `train.jsonl` and the files that are scored.

A line is {"text": ..., "text_pair": ..., "label": ...}; other fields are ignored. Labels are classes counted from 0, or numbers
where the task is a regression. Everything is read and checked before anything is trained.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sparselt_dist.errors import DataError
from sparselt_dist.evaluation.glue import GLUE, Kind, task_name

_TRAIN = "train"


class Row(NamedTuple):
    """A labelled text."""

    text: str
    pair: str | None
    """None where the task has single texts."""
    label: float
    """A class as a whole number, or the target of a regression."""


@dataclass(frozen=True)
class LabelledTask:
    """A task with its texts in memory."""

    name: str
    kind: Kind
    outputs: int
    """Classes, or 1 for a regression."""
    train: list[Row]
    scored: dict[str, list[Row]]
    """By the name of the file without its ending."""


def read_tasks(folder: Path) -> list[LabelledTask]:
    """All tasks of a folder, by name.

    Raises:
        DataError: no task, a file that is missing or cannot be read, a line without text or label, or labels that are no
            classes from 0 on.
    """
    if not folder.is_dir():
        raise DataError(
            f"--fine-tune: {folder}: no such folder; expected one with a folder for each task; name another"
        )
    folders = {path: task_name(path.name) for path in sorted(folder.iterdir()) if path.is_dir()}
    if not folders:
        raise DataError(
            f"--fine-tune: {folder}: found no folder in it, expected one for each task, such as {folder / 'sst2'} with "
            f"{_TRAIN}.jsonl and validation.jsonl"
        )
    names = list(folders.values())
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"--fine-tune: {folder}: found task {twice[0]} in two folders; remove one of them")
    return [_read_task(path, name) for path, name in folders.items()]


def _read_task(folder: Path, name: str) -> LabelledTask:
    kind = GLUE.get(name, Kind())
    is_regression = kind.classes == 1
    train = _read_rows(folder / f"{_TRAIN}.jsonl", is_regression)
    scored = {split: _read_rows(folder / f"{split}.jsonl", is_regression) for split in kind.splits}
    outputs = 1 if is_regression else _count_classes(folder / f"{_TRAIN}.jsonl", train, kind.classes)
    has_pairs = kind.is_pair if kind.is_pair is not None else train[0].pair is not None
    for split, rows in {_TRAIN: train, **scored}.items():
        path = folder / f"{split}.jsonl"
        if not is_regression:
            _check_classes(path, rows, outputs)
        _check_pairs(path, rows, has_pairs, name)
    return LabelledTask(name, kind, outputs, train, scored)


def _count_classes(path: Path, rows: list[Row], known: int | None) -> int:
    labels = {int(row.label) for row in rows}
    outputs = known if known is not None else max(labels) + 1
    missing = sorted(set(range(max(outputs, 2))) - labels)
    if missing:
        raise DataError(
            f"--fine-tune: {path}: found labels {_some(labels)} and no {missing[0]}, expected every class from 0 to "
            f"{max(outputs, 2) - 1}; number the classes from 0 without a gap"
        )
    return outputs


def _check_classes(path: Path, rows: list[Row], outputs: int) -> None:
    for number, row in enumerate(rows, start=1):
        if not 0 <= row.label < outputs:
            raise DataError(
                f"--fine-tune: {path}, example {number}: found label {int(row.label)}, expected a class from 0 to "
                f"{outputs - 1}, as in training; mend or remove the line"
            )


def _check_pairs(path: Path, rows: list[Row], expected: bool, name: str) -> None:
    wrong = next((number for number, row in enumerate(rows, start=1) if (row.pair is not None) != expected), None)
    if wrong is not None:
        found, wanted = ("no text_pair", "one") if expected else ("a text_pair", "none")
        raise DataError(
            f"--fine-tune: {path}, example {wrong}: found {found}, expected {wanted} in every line of task {name}; mend "
            "the line"
        )


def _some(labels: set[int]) -> str:
    named = [str(label) for label in sorted(labels)]
    return ", ".join(named[:6]) + (", ..." if len(named) > 6 else "")


# --- files -----------------------------------------------------------------------------------------------------------


def _read_rows(path: Path, is_regression: bool) -> list[Row]:
    rows = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(_row(json.loads(line), is_regression, f"{path}, line {number}"))
    except (OSError, ValueError) as cause:
        raise DataError(
            f"--fine-tune: {path} cannot be read ({type(cause).__name__}: {cause}); expected UTF-8 with an object "
            '{"text": ..., "label": ...} a line'
        ) from cause
    if not rows:
        raise DataError(f"--fine-tune: {path}: found no example, expected one a line; fill it")
    return rows


def _row(stored: Any, is_regression: bool, where: str) -> Row:
    if not isinstance(stored, dict):
        raise DataError(
            f'--fine-tune: {where}: found {_short(stored)}, expected an object {{"text": ..., "label": ...}}'
        )
    text, pair = stored.get("text"), stored.get("text_pair")
    for field, value in (("text", text), ("text_pair", pair)):
        if not isinstance(value, str) and not (field == "text_pair" and value is None):
            raise DataError(
                f"--fine-tune: {where}: found {_short(value)} as {field}, expected a string; mend the line's {field}"
            )
    return Row(str(text), pair, _label(stored.get("label"), is_regression, where))


def _label(found: Any, is_regression: bool, where: str) -> float:
    """A whole number stays one."""
    types = (int, float) if is_regression else (int,)
    if isinstance(found, types) and not isinstance(found, bool) and math.isfinite(found):
        return found
    wanted = "a number" if is_regression else "a class as a whole number from 0"
    named = "no label" if found is None else f"label {_short(found)}"
    raise DataError(f"--fine-tune: {where}: found {named}, expected {wanted}; mend the line's label")


def _short(value: Any) -> str:
    return repr(value)[:60]

"""Runs to be compared: read from an MLflow store or from run folders, cut at a common point, ranked, as text cells.

Losses of different objectives cannot be compared, so the ranking is by the yardstick `yardstick/masked_ce`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from sparselt_dist.errors import ConfigError
from sparselt_dist.follower import SUMMARY_NAME, read_json, run_is_alive
from sparselt_dist.journal import JOURNAL_NAME, Journal
from sparselt_dist.metrics import format_count, format_duration
from sparselt_dist.mlflow_sink import STEPS_TAG, read_config

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun
    from mlflow.tracking import MlflowClient

Axis = Literal["step", "tokens", "seconds"]
Line = dict[str, Any]
AXIS_METRIC: Final[dict[Axis, str]] = {
    "step": "step",
    "tokens": "progress/tokens",
    "seconds": "budget/elapsed_seconds",
}
RANKED_BY: Final = "yardstick/masked_ce"
_STATUS_WORDS: Final = {"FINISHED": "finished", "KILLED": "stopped", "FAILED": "failed", "RUNNING": "running"}
_YARDSTICK_ORDER: Final = ("masked_ce", "masked_accuracy", "probe_accuracy", "unigram_ce", "majority_accuracy")
_FIXED: Final = ("train/loss", "eval/loss", "perf/tokens_per_second", *list(AXIS_METRIC.values())[1:])


@dataclass(frozen=True)
class Run:
    """One run: facts, last values (`step` among them) and a way to its history, one line a step in rising order."""

    name: str
    source: str
    objective: str
    status: str
    budget: str
    last: Mapping[str, float]
    history: Callable[[], list[Line]]


@dataclass(frozen=True)
class Row:
    """A run at the point of comparison; `short` if it ended before that point."""

    run: Run
    values: Mapping[str, float]
    short: bool


# ---- reading runs --------------------------------------------------------------------------------------------------


def budget_text(parameters: Mapping[str, Any]) -> str:
    """`1000 steps`, `2.5 h`, ...; several joined by a stroke."""
    parts = []
    for key, unit in (("max_steps", "steps"), ("max_tokens", "tokens"), ("max_hours", "h")):
        value = parameters.get(key)
        if value not in (None, "null", "None", ""):
            parts.append(
                f"{float(str(value)):.6g} {unit}" if unit == "h" else f"{format_count(float(str(value)))} {unit}"
            )
    return " / ".join(parts) or "-"


def folder_run(run_dir: Path) -> Run:
    """A run from its folder. Raises DataError if the journal is damaged."""
    config = read_config(run_dir)
    summary = read_json(run_dir / SUMMARY_NAME)
    status = summary.get("status") or ("running" if run_is_alive(run_dir) else "failed")
    return Run(
        name=str((config.get("run") or {}).get("name") or summary.get("name") or run_dir.name),
        source=str(run_dir),
        objective=str(summary.get("objective") or (config.get("objective") or {}).get("name") or "-"),
        status=str(status),
        budget=budget_text(config.get("budget") or {}),
        last=_last_values(run_dir),
        history=partial(Journal.read, run_dir),
    )


def _last_values(run_dir: Path) -> dict[str, float]:
    """Last value of each metric: the last line, and those before it that hold an evaluation."""
    try:
        raw = (run_dir / JOURNAL_NAME).read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return {}
    try:
        lines = [json.loads(line) for line in raw[:-1] if b'"eval/' in line or b'"yardstick/' in line]
        lines += [json.loads(line) for line in raw[-1:]]
    except ValueError:
        lines = Journal.read(run_dir)  # leaves a torn end out, or says which line is damaged
    return merged(lines)


def merged(lines: Iterable[Line]) -> dict[str, float]:
    """The latest number of each metric over the lines."""
    values: dict[str, float] = {}
    for line in lines:
        values.update((key, value) for key, value in line.items() if isinstance(value, int | float))
    return values


def store_runs(client: MlflowClient, experiment: str) -> list[Run]:
    """All runs of an experiment of a store. Raises ConfigError if there is no such experiment."""
    names = {found.name: found.experiment_id for found in client.search_experiments()}
    if experiment not in names:
        raise ConfigError(
            f"--experiment: the store has no experiment {experiment!r}; it has {', '.join(sorted(names)) or 'none'}"
        )
    runs: list[Run] = []
    token = None
    while True:
        page = client.search_runs([names[experiment]], max_results=1000, page_token=token)
        runs += [_store_run(client, run) for run in page]
        token = page.token
        if not token:
            return runs


def _store_run(client: MlflowClient, run: MlflowRun) -> Run:
    parameters, tags = run.data.params, run.data.tags
    budget = {key.removeprefix("budget."): value for key, value in parameters.items() if key.startswith("budget.")}
    last = {key: value for key, value in run.data.metrics.items() if math.isfinite(value)}
    if tags.get(STEPS_TAG, "").isdigit():
        last["step"] = int(tags[STEPS_TAG])
    return Run(
        name=run.info.run_name or run.info.run_id,
        source=run.info.run_id,
        objective=tags.get("sparselt.objective") or parameters.get("objective.name") or "-",
        status=_STATUS_WORDS.get(run.info.status, run.info.status.lower()),
        budget=budget_text(budget),
        last=last,
        history=partial(_store_history, client, run.info.run_id, list(run.data.metrics)),
    )


def _store_history(client: MlflowClient, run_id: str, keys: Sequence[str]) -> list[Line]:
    """The lines of what a comparison shows, put together from the points of each metric."""
    lines: dict[int, Line] = {}
    for key in keys:
        if key in _FIXED or key.startswith(("eval/", "yardstick/")):
            for point in client.get_metric_history(run_id, key):
                if math.isfinite(point.value):
                    lines.setdefault(point.step, {"step": point.step})[key] = point.value
    return [lines[step] for step in sorted(lines)]


# ---- at a point, in order -------------------------------------------------------------------------------------------


def at_point(run: Run, point: tuple[Axis, float] | None) -> Row:
    """The run's last values at or before the point; at its end without one."""
    if point is None:
        return Row(run, run.last, False)
    metric, limit = AXIS_METRIC[point[0]], point[1]
    within: list[Line] = []
    reached = 0.0
    for line in run.history():
        reached = max(reached, float(line.get(metric) or 0.0))
        if reached > limit:
            break
        within.append(line)
    return Row(run, merged(within), short=reached < limit)


def ranked(rows: Iterable[Row]) -> list[Row]:
    """Best `yardstick/masked_ce` first; those without it at the end, by name."""

    def key(row: Row) -> tuple[float, str]:
        value = row.values.get(RANKED_BY)
        return (math.inf if value is None else value, row.run.name)

    return sorted(rows, key=key)


# ---- the table -----------------------------------------------------------------------------------------------------


def yardstick_keys(rows: Iterable[Row]) -> list[str]:
    """The yardsticks that any run has, the known ones first."""
    present = {key for row in rows for key in row.values if key.startswith("yardstick/")}
    known = [f"yardstick/{name}" for name in _YARDSTICK_ORDER if f"yardstick/{name}" in present]
    return known + sorted(present - set(known))


def table_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells, as text."""
    yardsticks = yardstick_keys(rows)
    headings = ["#", "name", "objective", "status", "budget", "steps", "tokens", "time", "tokens/s"]
    headings += ["train/loss", "eval/loss", *(key.removeprefix("yardstick/") for key in yardsticks)]
    return headings, [_cells(number, row, yardsticks) for number, row in enumerate(rows, start=1)]


def _cells(number: int, row: Row, yardsticks: Sequence[str]) -> list[str]:
    def show(key: str, form: Callable[[float], str] = "{:.4f}".format) -> str:
        value = row.values.get(key)
        return "-" if value is None else form(value)

    rank = str(number) if RANKED_BY in row.values else "-"
    name = row.run.name + ("*" if row.short else "")
    cells = [rank, name, row.run.objective, row.run.status, row.run.budget]
    cells += [show("step", "{:.0f}".format), show("progress/tokens", format_count)]
    cells += [show("budget/elapsed_seconds", format_duration), show("perf/tokens_per_second", format_count)]
    return cells + [show(key) for key in ("train/loss", "eval/loss", *yardsticks)]


def footnotes(rows: Sequence[Row], point: tuple[Axis, float] | None) -> list[str]:
    """What the table's reader must know."""
    notes = []
    if point is not None:
        notes.append(f"last values at or before {point[0]} {format_count(point[1])}")
        if any(row.short for row in rows):
            notes.append("* ended before that point: not at equal budget")
    if any(RANKED_BY in row.values for row in rows):
        notes.append("ranked by masked_ce in nats, lower is better; losses of different objectives cannot be compared")
    else:
        notes.append(f"no run has {RANKED_BY} here: listed by name")
    return notes

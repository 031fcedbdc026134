"""Command: runs side by side, at their ends or at equal step, tokens or seconds; terminal table and HTML report."""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from sparselt_dist.cli import make_parser, run_command
from sparselt_dist.comparison import (
    AXIS_METRIC,
    Axis,
    Row,
    Run,
    at_point,
    folder_run,
    footnotes,
    ranked,
    store_runs,
    table_cells,
)
from sparselt_dist.config import LogSection
from sparselt_dist.errors import ConfigError, DataError
from sparselt_dist.follower import SUMMARY_NAME, resolve_store_uri
from sparselt_dist.journal import JOURNAL_NAME
from sparselt_dist.mlflow_sink import open_client, sqlite_file

_UNITS: Final = {"k": 1e3, "M": 1e6, "G": 1e9}


def is_run_folder(path: Path) -> bool:
    """Does a journal or a summary lie here?"""
    return (path / JOURNAL_NAME).is_file() or (path / SUMMARY_NAME).is_file()


def named_folders(path: Path) -> list[Path]:
    """The run folder itself, or those directly inside. Raises DataError if there is none."""
    if is_run_folder(path):
        return [path]
    inside = sorted(child for child in path.iterdir() if child.is_dir() and is_run_folder(child))
    if not inside:
        raise DataError(
            f"{path}: found no {JOURNAL_NAME} in it or in its folders, expected a run's folder or a folder of runs"
        )
    return inside


def chosen(runs: Sequence[Run], wanted: Sequence[str]) -> list[Run]:
    """The store's runs of these ids or names, all if none is named. Raises ConfigError for an unknown one."""
    if not wanted:
        return list(runs)
    found: list[Run] = []
    for text in wanted:
        matches = [run for run in runs if text in (run.name, run.source)]
        if not matches:
            near = difflib.get_close_matches(text, [run.name for run in runs], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"found no folder and no MLflow run {text!r}, expected a run's folder, id or name{hint}")
        found += [run for run in matches if run not in found]
    return found


def parse_point(text: str) -> tuple[Axis, float]:
    """`tokens=10M` to ("tokens", 1e7). Raises ConfigError."""
    axis, _, number = text.partition("=")
    scale = _UNITS.get(number[-1:], 1.0)
    try:
        value = float(number[:-1] if scale > 1 else number) * scale
    except ValueError:
        value = math.nan
    if axis not in AXIS_METRIC or not value > 0:
        raise ConfigError(f"--at: found {text!r}, expected step=N, tokens=N or seconds=N with N above 0 (10k, 2.5M)")
    return axis, value


def print_table(rows: Sequence[Row], point: tuple[Axis, float] | None) -> None:
    """The table on standard output; whole lines where that is a file or a pipe."""
    from rich.console import Console
    from rich.table import Table

    headings, cells = table_cells(rows)
    table = Table(title=f"{len(rows)} runs", title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if 1 <= index <= 4 else "right", overflow="fold")
    for line in cells:
        table.add_row(*line)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        widths = [max(len(line[index]) for line in [headings, *cells]) for index in range(len(headings))]
        console = Console(highlight=False, markup=False, width=sum(widths) + 3 * len(widths) + 1)
    console.print(table)
    for note in footnotes(rows, point):
        console.print(note)


# ---- the command ---------------------------------------------------------------------------------------------------


def gather(names: Sequence[str], uri: str, experiment: str) -> list[Run]:
    """The runs that the command line names; all of the experiment if it names none.

    Raises:
        ConfigError: the store cannot be read, or a run is unknown. DataError: a folder holds no run.
    """
    folders = [name for name in names if Path(name).is_dir()]
    others = [name for name in names if name not in folders]
    runs = [folder_run(path) for name in folders for path in named_folders(Path(name))]
    if others or not names:
        runs += chosen(_read_store(resolve_store_uri(uri), experiment), others)
    if not runs:
        raise DataError(f"{uri}: experiment {experiment!r} has no runs; train one, or name folders of runs")
    return runs


def _read_store(uri: str, experiment: str) -> list[Run]:
    database = sqlite_file(uri)
    if database is not None and not database.is_file():
        raise ConfigError(f"--uri: found no store at {database}; give --uri, or name folders of runs, such as runs/*")
    try:
        return store_runs(open_client(uri), experiment)
    except ConfigError:
        raise
    except Exception as error:  # whatever the store fails with, it is the user's to mend
        text = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"--uri: the store {uri} failed ({type(error).__name__}: {text}); "
            "expected a reachable MLflow store; start it, or name folders of runs, such as runs/*"
        ) from error


def build_parser() -> argparse.ArgumentParser:
    """The command line of `compare`."""
    log = LogSection.model_fields
    parser = make_parser(
        "compare",
        "Runs side by side: budget, tokens, throughput, losses and yardsticks; ranked by yardstick/masked_ce.",
        "sparselt compare runs/mlm runs/slt --at tokens=10M --html report.html",
    )
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="folders of runs, MLflow run ids or names; none: the whole experiment"
    )
    parser.add_argument("--uri", default=log["mlflow_uri"].default, help="MLflow store, for runs that are no folders")
    parser.add_argument("--experiment", default=log["experiment"].default, help="MLflow experiment")
    parser.add_argument("--at", metavar="AXIS=N", help="compare at step=N, tokens=N or seconds=N; none: at each end")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a self-contained report with curves")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    point = parse_point(arguments.at) if arguments.at else None
    runs = gather(arguments.runs, arguments.uri, arguments.experiment)
    rows = ranked(at_point(run, point) for run in runs)
    print_table(rows, point)
    if arguments.html is not None:
        from sparselt_dist.compare_report import write_report

        write_report(arguments.html, rows, point)
        print(f"report: {arguments.html}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _run(arguments))


if __name__ == "__main__":
    sys.exit(main())

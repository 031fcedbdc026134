"""Comparison of runs from folders: points, ranking, table, report, errors."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from sparselt_dist import compare
from sparselt_dist.compare_report import curve, report, ticks
from sparselt_dist.comparison import Run, at_point, budget_text, folder_run, ranked, table_cells
from sparselt_dist.errors import ConfigError
from sparselt_dist.journal import Journal


def line(step: int, **more: float) -> dict[str, Any]:
    return {
        "step": step,
        "train/loss": 10.0 / step,
        "progress/tokens": step * 1000,
        "budget/elapsed_seconds": step * 0.5,
        "perf/tokens_per_second": 2000.0,
        **{key.replace("__", "/"): value for key, value in more.items()},
    }


def make_run(folder: Path, steps: int, *, ce: float | None = None, objective: str = "mlm", extra: int = 0) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.resolved.yaml").write_text(
        f"run: {{name: {folder.name}}}\nobjective: {{name: {objective}}}\n"
        f"budget: {{max_steps: {steps}, max_hours: 1.5}}\n"
    )
    journal = Journal(folder)
    for step in range(1, steps + 1):
        filler = {f"time/k{number}_seconds": 1.0 for number in range(extra)}
        journal.append({**line(step), **filler} | ({"eval/loss": 20.0 / step} if step % 10 == 0 else {}))
    if ce is not None:
        journal.append({"step": steps, "yardstick/masked_ce": ce, "yardstick/probe_accuracy": 0.5})
    journal.close()
    (folder / "summary.json").write_text(json.dumps({"status": "finished", "objective": objective}))
    return folder


def fixed(name: str, lines: list[dict[str, Any]], **last: float) -> Run:
    return Run(
        name, f"runs/{name}", "mlm", "finished", "-", {k.replace("__", "/"): v for k, v in last.items()}, lambda: lines
    )


def test_a_folder_gives_the_last_value_of_every_metric(tmp_path: Path) -> None:
    run = folder_run(make_run(tmp_path / "a", 25, ce=3.5))
    assert (run.name, run.objective, run.status, run.budget) == ("a", "mlm", "finished", "25 steps / 1.5 h")
    assert run.last["step"] == 25
    assert run.last["eval/loss"] == 1.0  # of step 20
    assert run.last["yardstick/masked_ce"] == 3.5
    assert run.last["train/loss"] == 0.4


@pytest.mark.parametrize(
    ("point", "step", "short"),
    [
        (("step", 12.0), 12, False),
        (("tokens", 12_999.0), 12, False),
        (("seconds", 6.0), 12, False),
        (("step", 30.0), 30, False),
        (("tokens", 1e6), 30, True),
    ],
)
def test_values_at_or_before_a_point(point: tuple[Any, float], step: int, short: bool) -> None:
    lines = [line(s, **({"eval__loss": float(s)} if s % 5 == 0 else {})) for s in range(1, 31)]
    row = at_point(fixed("a", lines), point)
    assert row.values["step"] == step
    assert row.values["eval/loss"] == step // 5 * 5
    assert row.short is short


def test_the_yardstick_ranks_and_runs_without_it_come_last() -> None:
    rows = [
        at_point(run, None)
        for run in (
            fixed("z", [], eval__loss=0.1),
            fixed("b", [], yardstick__masked_ce=4.0),
            fixed("c", [], yardstick__masked_ce=3.0),
            fixed("a", []),
        )
    ]
    assert [row.run.name for row in ranked(rows)] == ["c", "b", "a", "z"]
    _, cells = table_cells(ranked(rows))
    assert [cell[0] for cell in cells] == ["1", "2", "-", "-"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("step=100", ("step", 100.0)),
        ("tokens=2.5M", ("tokens", 2.5e6)),
        ("seconds=1e3", ("seconds", 1e3)),
        ("step=10k", ("step", 1e4)),
    ],
)
def test_points_are_parsed(text: str, expected: tuple[str, float]) -> None:
    assert compare.parse_point(text) == expected


@pytest.mark.parametrize("text", ["steps=3", "step", "step=", "step=x", "step=0", "tokens=-5", "seconds=nan", "k"])
def test_a_wrong_point_says_what_is_expected(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--at: found .* expected step=N, tokens=N or seconds=N"):
        compare.parse_point(text)


def test_budgets_as_text() -> None:
    assert budget_text({"max_steps": 1000, "max_tokens": None}) == "1k steps"
    assert budget_text({"max_tokens": "10000000", "max_hours": "0.5", "max_steps": "null"}) == "10M tokens / 0.5 h"
    assert budget_text({}) == "-"


def test_the_command_on_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "worse", 30, ce=4.0)
    make_run(tmp_path / "better", 20, ce=3.0, objective="cwt")
    page = tmp_path / "report.html"
    assert compare.main([str(tmp_path), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert out.index("better") < out.index("worse")
    assert "3.0000" in out
    assert "masked_ce" in out
    assert "ranked by masked_ce" in out
    assert page.read_text().count("<polyline") >= 6
    assert compare.main([str(tmp_path / "worse"), str(tmp_path / "better"), "--at", "step=25"]) == 0
    out = capsys.readouterr().out
    assert "better*" in out
    assert "not at equal budget" in out


def test_errors_are_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = f"sqlite:///{tmp_path}/none.db"
    assert compare.main(["--uri", missing]) == 2
    assert f"found no store at {tmp_path}/none.db" in capsys.readouterr().err
    assert not (tmp_path / "none.db").exists()
    assert compare.main([str(tmp_path)]) == 2
    assert "expected a run's folder or a folder of runs" in capsys.readouterr().err
    assert compare.main([str(make_run(tmp_path / "a", 2)), "--html", str(tmp_path / "no" / "r.html")]) == 2
    assert "--html:" in capsys.readouterr().err


def test_the_report_holds_everything_itself_and_escapes_names() -> None:
    lines = [line(step) for step in range(1, 2001)]
    rows = [at_point(fixed("<script>alert(1)</script>", lines, yardstick__masked_ce=2.0), None)]
    page = report(rows, None)
    assert "<script>" not in page
    assert "http" not in page
    assert "src=" not in page
    assert len(page) < 200_000


def test_curves_are_thinned_and_keep_their_end() -> None:
    points = curve([line(step) for step in range(1, 5001)], "train/loss", "tokens")
    assert len(points) <= 400
    assert points[-1] == (5_000_000.0, 10.0 / 5000)


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert ticks(2.31, 2.39) == pytest.approx([2.32, 2.34, 2.36, 2.38])
    assert ticks(5, 5) == [5]


def test_two_hundred_runs_are_read_quickly(tmp_path: Path) -> None:
    first = make_run(tmp_path / "run0", 300, ce=1.0, extra=25)
    for number in range(1, 200):
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        for name in ("metrics.jsonl", "config.resolved.yaml", "summary.json"):
            (folder / name).symlink_to(first / name)
    begin = time.process_time()
    rows = ranked(at_point(run, None) for run in compare.gather([str(tmp_path)], "sqlite:///unused.db", "e"))
    table_cells(rows)
    assert len(rows) == 200
    assert time.process_time() - begin < 2

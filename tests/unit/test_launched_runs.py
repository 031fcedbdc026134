"""How benchmarks judge the runs that they disturb: steps taken again, results kept over a kill, damage that is damage."""

from __future__ import annotations

import random
from pathlib import Path

from launched_runs import keep_result, last_step, logged_steps, most_repeated, read_results, table
from save_kills import damage


def test_steps_taken_again_are_counted_over_all_starts(tmp_path: Path) -> None:
    assert most_repeated(tmp_path) == 0
    (tmp_path / "logs").mkdir()
    steps = [*range(1, 14), *range(11, 16), *range(16, 19), 18]  # back to 10, a clean stop at 15, back to 17
    lines = [f"2026-01-01T00:00:00 rank 0 step {step}: loss 6.1\n" for step in steps]
    lines.insert(3, "2026-01-01T00:00:00 rank 0 step 3: warning: checkpoint of step 9: loss of words\n")
    (tmp_path / "logs" / "rank_00000.log").write_text("".join(lines))
    assert logged_steps(tmp_path, 0) == steps
    assert logged_steps(tmp_path, 1) == []
    assert most_repeated(tmp_path) == 3


def test_the_last_step_is_of_a_whole_line(tmp_path: Path) -> None:
    assert last_step(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3')
    assert last_step(tmp_path) == 2


def test_results_outlive_a_kill_while_one_is_written(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    keep_result(path, {"case": "a", "faults": []})
    path.write_text(path.read_text() + '{"case": "b", "fau')
    keep_result(path, {"case": "c", "faults": ["hung"]})
    assert {case: result["faults"] for case, result in read_results(path).items()} == {"a": [], "c": ["hung"]}


def test_damage_always_changes_the_file(tmp_path: Path) -> None:
    file, generator = tmp_path / "file", random.Random(0)
    told = set()
    for _ in range(50):
        file.write_bytes(b"sound")
        told.add(damage(file, generator).split()[0])
        assert file.read_bytes() != b"sound"
    assert told == {"bit", "cut"}


def test_a_table_has_a_line_for_each_row() -> None:
    assert table(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |"

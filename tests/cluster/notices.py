"""A notice in every phase of a run, to one rank or to the launcher: saved within the grace period, and continued alike.

    python tests/cluster/notices.py --work-dir /tmp/notices

A small run of two ranks (gloo) goes once undisturbed. Then, for each phase, signal and target, the same run is started as
users start it, but for an entry point (`notice_rank.py`) that sends the notice as a rank comes to that phase, and holds the
phase until it is there. What must follow: exit code 75, a whole checkpoint of the step at which journal, summary and the logs
of both ranks end, no process left, all within the grace period. The same run is then continued without a notice, and must
equal the undisturbed one bit by bit. Saves are in the background and waited for in turn.

Results are kept in the work folder; a case that is there is not made again. Exit code 0 says that all was as it must be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kill_and_resume import prepared
from launched_runs import (
    Toy,
    damaged,
    environment,
    keep_result,
    last_step,
    logged_steps,
    most_repeated,
    read_results,
    started,
    stop_in_order,
    table,
    undisturbed,
    wait_for_end,
)
from notice_rank import NOTICE, PHASES, START, Notice
from runs import Finished
from save_kills import same

from sparselt_dist import checkpoint

SIGNALS = ("SIGUSR1", "SIGTERM")
TARGETS = ("rank 0", "rank 1", "launcher")


class Wanted(NamedTuple):
    """One case."""

    phase: str
    signal: str
    target: str
    number: int

    @property
    def name(self) -> str:
        return "-".join(map(str, self)).replace(" ", "_")


def cases(arguments: argparse.Namespace) -> list[Wanted]:
    """All of them; only rank 0 commits."""
    every = product(arguments.phases, SIGNALS, TARGETS, range(arguments.repeats))
    return [wanted for wanted in map(Wanted._make, every) if (wanted.phase, wanted.target) != ("committing", "rank 1")]


def draw(wanted: Wanted, toy: Toy, folder: Path, generator: random.Random) -> Notice:
    """Which time the phase is met, in the first two thirds of the run, and by which rank a launcher's notice is sent."""
    if wanted.target == "launcher":
        rank = 0 if wanted.phase == "committing" else generator.randrange(2)
    else:
        rank = int(wanted.target.removeprefix("rank "))
    steps = 2 * toy.steps // 3
    times = {
        START: 1,
        "forward": steps * toy.micro_steps,
        "backward": steps * toy.micro_steps,
        "evaluate": steps // toy.evaluate_every,
        "copying": steps // toy.every,
        "writing": steps // toy.every,
        "committing": steps // toy.every,
    }
    occurrence = generator.randint(1, times.get(wanted.phase, steps))
    number = signal.Signals[wanted.signal].value
    return Notice(rank, wanted.phase, occurrence, number, wanted.target == "launcher", str(folder))


def give_notice(
    wanted: Wanted, toy: Toy, expected: Finished, folder: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One case: the noticed start, what it left, and the continued run."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = random.Random(f"{arguments.seed}-{wanted.name}")
    notice, run = draw(wanted, toy, folder, generator), folder / "run"
    saves = f"checkpoint.asynchronous={generator.choice(('true', 'false'))}"
    mark, output = f"{wanted.name}-{os.getpid()}", folder / "noticed.log"
    variables = environment(**{NOTICE: json.dumps(asdict(notice))})
    with started(toy.command(run, saves, module="notice_rank"), output, mark, variables) as process:
        ended = wait_for_end(process, output, mark, arguments.limit)
    sent, seconds = read(folder / "sent.json"), None
    if sent is not None:
        seconds = round(ended.at - sent["time"], 3)
    missed, unsaved, differ = (
        met(folder, notice),
        not_saved(run, ended.code, seconds, arguments.grace),
        steps_differ(run),
    )
    output = folder / "continued.log"
    with started(toy.command(run, saves), output, mark) as process:
        again = wait_for_end(process, output, mark, arguments.limit)
    alike = again.code == 0 and same(Finished(0, "", run), expected)
    other = [] if alike else [f"continued: exit code {again.code}, or other steps or weights"]
    return {
        "case": wanted.name,
        **wanted._asdict(),
        "occurrence": notice.occurrence,
        "asynchronous": saves.endswith("true"),
        "seconds": seconds,
        "saved": not unsaved,
        "same_step": not differ,
        "same_weights": alike,
        "repeated": most_repeated(run),
        "faults": [*missed, *unsaved, *differ, *other, *(f"left behind: {each}" for each in ended.left + again.left)],
    }


def read(path: Path) -> dict[str, Any] | None:
    """A note of the ranks, if it was made."""
    return dict(json.loads(path.read_text())) if path.exists() else None


def met(folder: Path, notice: Notice) -> list[str]:
    """Whether the notice was sent, and came while the phase was held; before there are handlers nothing can be held."""
    if not (folder / "sent.json").exists():
        return [f"the rank never came to {notice.phase} for the {notice.occurrence}th time"]
    if notice.phase == START and notice.to_launcher:
        arrived = (folder / "arrived_0.json").exists() or (folder / "arrived_1.json").exists()
    else:
        arrived = bool((read(folder / "met.json") or {}).get("arrived"))
    return [] if arrived else ["the notice did not arrive in its phase"]


def not_saved(run: Path, code: int | None, seconds: float | None, grace: float) -> list[str]:
    """What is missing of a stop with a whole checkpoint within the grace period."""
    faults = [] if code == 75 else [f"exit code {code}, expected 75"]
    if seconds is None or seconds > grace:
        faults.append(f"ended after {seconds} s")
    if not checkpoint.complete_checkpoints(run):
        faults.append("no checkpoint")
    return faults + damaged(run)


def steps_differ(run: Path) -> list[str]:
    """Where checkpoint, journal, summary and the logs of both ranks do not end at one step."""
    found = checkpoint.complete_checkpoints(run)
    summary = read(run / "summary.json") or {}
    told = {
        "checkpoint": checkpoint.step_of(found[-1]) if found else None,
        "journal": last_step(run),
        "summary": summary.get("steps"),
        **{f"rank {rank}": max(logged_steps(run, rank), default=0) for rank in range(2)},
    }
    alone = [] if summary.get("status") == "stopped" else [f"summary.json says {summary.get('status')}"]
    return alone + ([] if len(set(told.values())) == 1 else [f"steps differ: {told}"])


def show(results: list[dict[str, Any]]) -> None:
    """The table, and below it what was not as it must be."""
    rows = []
    for phase, number, target in product(PHASES, SIGNALS, TARGETS):
        group = [each for each in results if (each["phase"], each["signal"], each["target"]) == (phase, number, target)]
        seconds = [each["seconds"] for each in group if each["seconds"] is not None]
        if not group:
            continue
        counts = [sum(each[key] for each in group) for key in ("saved", "same_step", "same_weights")]
        times = [f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}"] if seconds else ["-", "-"]
        rows.append([phase, number, target, len(group), *times, *counts])
    heads = "phase|signal|target|cases|median s to exit|max s|saved, code 75|same step|same weights after".split("|")
    print(table(heads, rows))
    for each in results:
        for fault in each["faults"]:
            print(f"{each['case']}: {fault}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work-dir", type=Path, required=True, help="keeps shards, the undisturbed run and the results"
    )
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--repeats", type=int, default=1, help="of each phase, signal and target")
    parser.add_argument("--cases", type=int, help="at most so many; default: all")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--checkpoint-every", type=int, default=5, help="steps")
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--grace", type=float, default=120.0, help="seconds; default: what slurm/pretrain.sh asks for")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which a start counts as hung")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    stop_in_order()
    work = arguments.work_dir.absolute()
    work.mkdir(parents=True, exist_ok=True)
    toy = Toy(prepared(work), arguments.steps, arguments.checkpoint_every, arguments.zero_stage)
    expected, _ = undisturbed(toy, work, arguments.limit)
    kept = work / f"notices-{arguments.seed}.jsonl"
    wanted = cases(arguments)[: arguments.cases]
    for case in wanted:
        if case.name in read_results(kept):
            continue
        result = give_notice(case, toy, expected, work / case.name, arguments)
        keep_result(kept, result)
        print(f"{case.name}: {'; '.join(result['faults']) or 'as it must be'}, {result['seconds']} s", flush=True)
        if not result["faults"]:
            shutil.rmtree(work / case.name)
    done = read_results(kept)
    results = [done[case.name] for case in wanted]
    show(results)
    return int(any(result["faults"] for result in results))


if __name__ == "__main__":
    sys.exit(main())

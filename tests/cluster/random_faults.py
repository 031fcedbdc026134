"""Random faults at random moments of real runs: the same command, started again, ends with the same weights.

    python tests/cluster/random_faults.py --work-dir /tmp/faults --cases 50

A small run of two ranks (gloo), started by the command that users type, goes once undisturbed. Each case is that run with one
fault (`fault_kinds.py`) at a moment drawn from its whole life; then the same command is started again until it ends with 0.
What must hold: the right message and exit code; no process left, none that hangs; all checkpoints but the one that the fault
damaged are whole; no more steps are taken again than lie between two checkpoints, and were taken while the next was written
(a disk that stays full lets nothing be saved); batches, losses, weights and moments are those of the undisturbed run, bit by
bit.

A fault that finds its run ended is made anew, earlier. Results are kept in the work folder; a case that is there is not made
again. What this machine does not allow is left out, with a line that says so. Exit code 0 says that all was as it must be.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fault_kinds import KINDS, Case, Plan
from kill_and_resume import prepared, victims
from launched_runs import (
    Ended,
    Toy,
    damaged,
    keep_result,
    last_step,
    most_repeated,
    read_results,
    started,
    stop_in_order,
    table,
    undisturbed,
    wait_for_end,
)
from runs import Finished
from save_kills import same

STARTS = 8
TRIES = 15
PAUSE_SECONDS = 2.0  # before the same command is started again
EARLIER = 0.8  # of its moment, for a fault that came too late
POLL_SECONDS = 0.02
ENDS_ITS_RUN = ("rank killed", "launcher killed", "rank stopped")  # so that it counts how soon


def name_of(number: int, kind: str) -> str:
    """Of a case, among the results that are kept."""
    return f"{number}, {kind}"


def kind_of(number: int, seed: int, kinds: list[str]) -> str:
    """All kinds come equally often, in an order drawn anew for each round."""
    generator = random.Random(f"{seed}-{number // len(kinds)}")
    return generator.sample(kinds, len(kinds))[number % len(kinds)]


def disturbed_start(case: Case, plan: Plan, line: list[str], limit: float) -> tuple[Ended, int, float] | None:
    """The start that meets the fault, the step it met, and the seconds until nothing ran; None: it had ended before."""
    output, begun = case.folder / "start-1.log", time.monotonic()
    with started(line, output, case.mark, dict(plan.variables)) as process:
        while process.poll() is None and (time.monotonic() < begun + case.moment or not plan.may_make()):
            time.sleep(POLL_SECONDS)
            if time.monotonic() > begun + limit:
                break
        if process.poll() is not None:
            assert process.returncode == 0, f"the run failed before its fault was made: see {output}"
            return None
        assert plan.may_make(), f"nothing to disturb in {limit} s: see {output}"
        step = last_step(case.run)
        if not plan.make(process):
            return None
        made = time.monotonic()
        ended = wait_for_end(process, output, case.mark, limit)
        return ended, step, ended.gone_at - made


def starts_until_done(case: Case, plan: Plan, line: list[str], first: Ended, limit: float) -> list[Ended]:
    """All starts, the disturbed one first."""
    ended = [first]
    while ended[-1].code != 0 and len(ended) < STARTS:
        plan.mend()
        time.sleep(PAUSE_SECONDS)
        output = case.folder / f"start-{len(ended) + 1}.log"
        with started(line, output, case.mark, dict(plan.variables)) as process:
            ended.append(wait_for_end(process, output, case.mark, limit))
    return ended


def judge(case: Case, plan: Plan, starts: list[Ended], expected: Finished, bound: int) -> dict[str, Any]:
    """What came of a case that was started until it ended with 0."""
    teller = starts[min(plan.said_by, len(starts) - 1)]
    hangs = sum(start.code is None or (start.code < 0 and bool(start.left)) for start in starts)
    orphans = [each for start in starts if start.code is not None and start.code >= 0 for each in start.left]
    repeated = most_repeated(case.run)
    done = starts[-1].code == 0
    found = {
        "codes": [start.code for start in starts],
        "message": teller.code is not None and plan.said(teller.output, teller.code),
        "same": done and same(Finished(0, "", case.run), expected),
        "orphans": len(orphans),
        "hangs": hangs,
        "repeated": repeated,
        "tracebacks": sum("Traceback" in start.output for start in starts),
    }
    faults = [
        *([] if done else [f"did not end with 0: {found['codes']}"]),
        *([] if found["same"] else ["other steps or weights"]),
        *([] if found["message"] else ["not the right message or code"]),
        *(f"left behind: {each}" for each in orphans),
        *(["hung"] if hangs else []),
        *([f"{repeated} steps taken again, expected at most {bound}"] if repeated > bound else []),
        *(damaged(case.run) if done else []),
        *plan.check(),
    ]
    return {**found, "faults": faults}


def make_case(
    number: int, toy: Toy, expected: Finished, seconds: float, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One case, made anew and earlier as long as its fault finds the run ended."""
    kind = kind_of(number, arguments.seed, arguments.kinds)
    share = random.Random(f"{arguments.seed}-moment-{number}").random()
    for _ in range(TRIES):
        folder = arguments.work_dir / f"case-{arguments.seed}-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        generator = random.Random(f"{arguments.seed}-case-{number}")
        asynchronous = generator.random() < 0.5
        case = Case(toy, folder, f"{folder.name}-{os.getpid()}", generator, share * seconds, victims)
        with KINDS[kind](case) as plan:
            saves = f"checkpoint.asynchronous={str(asynchronous).lower()}"
            line = [*(plan.line or toy.command(case.run)), saves, *plan.overrides]
            disturbed = disturbed_start(case, plan, line, arguments.limit)
            if disturbed is None:
                share *= EARLIER
                continue
            ended, step, seconds_left = disturbed
            broken = [] if plan.damaged else damaged(case.run)
            starts = starts_until_done(case, plan, line, ended, arguments.limit)
            bound = toy.steps if plan.saves_fail else toy.every * (1 + asynchronous + plan.damaged)
            result = judge(case, plan, starts, expected, bound)
            result["faults"] += broken
        told = {"case": name_of(number, kind), "kind": kind, "second": round(case.moment, 2), "step": step}
        return {**told, "asynchronous": asynchronous, "ran_on": round(seconds_left, 2), **result}
    raise AssertionError(f"case {number}, {kind}: the run always ended before its fault")


def show(results: list[dict[str, Any]], skipped: dict[str, str], every: int) -> None:
    """The table, and below it what was not as it must be."""
    rows: list[list[object]] = []
    for kind in KINDS:
        group = [each for each in results if each["kind"] == kind]
        if kind in skipped:
            rows.append([kind, f"skipped: {skipped[kind]}", *"-----"])
        if group:
            counts = [sum(each[key] for each in group) for key in ("same", "message", "orphans", "hangs")]
            rows.append([kind, len(group), *counts, max(each["repeated"] for each in group)])
    print(table("kind|cases|same weights|right message|orphans|hangs|most steps repeated".split("|"), rows))
    for kind in ENDS_ITS_RUN:
        ran_on = [each["ran_on"] for each in results if each["kind"] == kind and each["codes"][0] != 0]
        if ran_on:
            print(
                f"{kind}: nothing ran after {statistics.median(ran_on):.1f} s in the median, {max(ran_on):.1f} s at most"
            )
    print(f"a checkpoint every {every} steps; starts with a traceback: {sum(each['tracebacks'] for each in results)}")
    for each in results:
        for fault in each["faults"]:
            print(f"case {each['case']} after {each['second']} s, step {each['step']}: {fault}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work-dir", type=Path, required=True, help="keeps shards, the undisturbed run and the results"
    )
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--checkpoint-every", type=int, default=5, help="steps")
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--limit", type=float, default=900.0, help="seconds after which a start counts as hung")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.work_dir = arguments.work_dir.absolute()
    return arguments


def main() -> int:
    arguments = parse()
    stop_in_order()
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    toy = Toy(prepared(arguments.work_dir), arguments.steps, arguments.checkpoint_every, arguments.zero_stage)
    expected, seconds = undisturbed(toy, arguments.work_dir, arguments.limit)
    kept, skipped = arguments.work_dir / f"faults-{arguments.seed}.jsonl", dict[str, str]()
    kinds = [kind_of(number, arguments.seed, arguments.kinds) for number in range(arguments.cases)]
    for number, kind in enumerate(kinds):
        if name_of(number, kind) in read_results(kept) or kind in skipped:
            continue
        try:
            result = make_case(number, toy, expected, seconds, arguments)
        except pytest.skip.Exception as reason:
            skipped[kind] = str(reason)
            print(f"{kind}: skipped, {reason}", flush=True)
            continue
        keep_result(kept, result)
        print(f"case {number}, {kind}: {'; '.join(result['faults']) or 'as it must be'}", flush=True)
        if not result["faults"]:
            shutil.rmtree(arguments.work_dir / f"case-{arguments.seed}-{number}")
    done = read_results(kept)
    results = [done[name] for name in map(name_of, range(arguments.cases), kinds) if name in done]
    show(results, skipped, toy.every)
    return int(any(each["faults"] for each in results))


if __name__ == "__main__":
    sys.exit(main())

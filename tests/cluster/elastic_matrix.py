"""Every checkpoint continued everywhere: {1, 2, 4} ranks x ZeRO {1, 2, 3} to each other, against a run that never stopped.

    python tests/cluster/elastic_matrix.py --work-dir /tmp/elastic

One run on one rank with ZeRO 0 goes undisturbed. Each of the nine layouts then trains the first steps, saves, and ends; from
its checkpoint each of the nine continues in a folder of its own. Compared with the undisturbed run are the digest of the
samples of every step (equal), the loss of every step and the weights at the end (but for rounding: sums over ranks are taken
in another order). All are real processes with real collectives (gloo), forked from one that has imported torch and DeepSpeed.
The rate is constant, so that a run of some steps is the beginning of a longer one.

Every case is a line of `results.jsonl` in the work folder; a run that was stopped goes on behind the last one. Exit code 0 says
that all digests are equal and all differences within their tolerance.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kill_and_resume import prepare
from runs import Finished, run_ranks

from sparselt_dist import checkpoint

LOSS_TOLERANCE = 1e-5  # relative
WEIGHT_TOLERANCE = 1e-4  # absolute: a thirtieth of what one step of Adam moves a weight by at this rate
OPTIONS = ("train.micro_batch_size=2", "schedule.name=constant", "schedule.warmup=0", "data.validation=null")


class Layout(NamedTuple):
    """How a run is spread."""

    ranks: int
    stage: int

    def __str__(self) -> str:
        return f"{self.ranks}xZ{self.stage}"


class Case(NamedTuple):
    """One resume and how far it is from the undisturbed run."""

    source: str
    target: str
    loss: float  # the largest relative difference over the further steps
    weights: float  # the largest difference of a weight at the end
    digests_equal: bool
    seconds: float

    @property
    def is_good(self) -> bool:
        return self.digests_equal and self.loss <= LOSS_TOLERANCE and self.weights <= WEIGHT_TOLERANCE


# --- runs ------------------------------------------------------------------------------------------------------------


def train(shards: Path, folder: Path, layout: Layout, steps: int, flags: tuple[str, ...] = ()) -> Finished:
    """A run up to that step, in a new folder.

    Raises:
        RuntimeError: it failed; says what the ranks printed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    limits = (f"budget.max_steps={steps}", f"train.zero_stage={layout.stage}")
    run = run_ranks(layout.ranks, shards, folder, *OPTIONS, *limits, flags=flags)
    if run.code != 0:
        raise RuntimeError(f"{folder}: {layout} ended with code {run.code}\n{run.output}")
    return run


def once(shards: Path, folder: Path, layout: Layout, steps: int) -> Finished:
    """As `train`; one that an earlier start of this script has finished is kept."""
    if (folder / "finished").exists():
        return Finished(0, "", folder)
    run = train(shards, folder, layout, steps)
    (folder / "finished").touch()
    return run


def loss_difference(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> float:
    """The largest relative difference of the loss over steps; infinite if they are not the same steps."""
    if [line["step"] for line in found] != [line["step"] for line in expected]:
        return float("inf")
    pairs = ((line["train/loss"], other["train/loss"]) for line, other in zip(found, expected, strict=True))
    return max(abs(loss - other) / abs(other) for loss, other in pairs)


def weight_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of a weight; infinite if they are not the same tensors."""
    if found.keys() != expected.keys():
        return float("inf")
    return max(float((found[name] - weight).abs().max()) for name, weight in expected.items())


def resume(shards: Path, folder: Path, source: Path, layout: Layout, expected: Finished, steps: int) -> Case:
    """Continue a layout's checkpoint in another one, and compare; `steps`: at the end."""
    started = time.perf_counter()
    saved = checkpoint.find(source)
    run = train(shards, folder, layout, steps, flags=("--resume", str(saved)))
    further = expected.journal[checkpoint.step_of(saved) :]
    digests = [line["batch_digest"] for line in run.journal] == [line["batch_digest"] for line in further]
    loss, weights = loss_difference(run.journal, further), weight_difference(run.weights(), expected.weights())
    shutil.rmtree(folder)
    return Case(source.name, str(layout), loss, weights, digests, round(time.perf_counter() - started, 1))


# --- the matrix ------------------------------------------------------------------------------------------------------


def read_cases(path: Path) -> list[Case]:
    """The complete lines of an earlier start; one that was cut off is removed."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    path.write_text("".join(whole))
    return [Case(**json.loads(line)) for line in whole]


def cases(shards: Path, work: Path, layouts: list[Layout], first: int, further: int) -> Iterator[Case]:
    """Every source to every target: those that are there already, and the others as they are made."""
    path = work / "results.jsonl"
    made = {(case.source, case.target): case for case in read_cases(path)}
    expected = once(shards, work / "undisturbed", Layout(1, 0), first + further)
    for source in layouts:
        folder = work / str(source)
        for target in layouts:
            case = made.get((str(source), str(target)))
            if case is None:
                begun = once(shards, folder, source, first)
                if loss_difference(begun.journal, expected.journal[:first]) > LOSS_TOLERANCE:
                    raise RuntimeError(f"{source}: its first {first} steps are not those of the undisturbed run")
                case = resume(shards, work / "target", folder, target, expected, first + further)
                with path.open("a") as file:
                    file.write(json.dumps(case._asdict()) + "\n")
            yield case


def table(found: list[Case], layouts: list[Layout]) -> str:
    """Sources down, targets across: the largest relative difference of the loss."""
    cells = {(case.source, case.target): case for case in found}
    names = [str(layout) for layout in layouts]
    lines = [f"| saved on \\ continued on | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for source in names:
        row = (cells[source, target] for target in names)
        shown = [f"{case.loss:.1e}{'' if case.digests_equal else ' (other samples)'}" for case in row]
        lines.append(f"| {source} | {' | '.join(shown)} |")
    return "\n".join(lines)


def summary(found: list[Case]) -> str:
    """One line over all cases."""
    loss, weights = max(found, key=lambda case: case.loss), max(found, key=lambda case: case.weights)
    equal, minutes = sum(case.digests_equal for case in found), sum(case.seconds for case in found) / 60
    return (
        f"{len(found)} resumes in {minutes:.1f} min: digests equal in {equal}; largest relative difference of the loss "
        f"{loss.loss:.1e} ({loss.source} to {loss.target}), largest difference of a weight {weights.weights:.1e} "
        f"({weights.source} to {weights.target}); {sum(not case.is_good for case in found)} beyond tolerance "
        f"({LOSS_TOLERANCE:g}, {WEIGHT_TOLERANCE:g})"
    )


def claim(work: Path, settings: dict[str, Any]) -> None:
    """Keep the settings with the results, or see that they are those of an earlier start."""
    path = work / "settings.json"
    work.mkdir(parents=True, exist_ok=True)
    if path.exists() and json.loads(path.read_text()) != settings:
        raise SystemExit(f"{work}: holds results of other settings ({path.read_text()}); give another --work-dir")
    path.write_text(json.dumps(settings))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="keeps shards, sources and results")
    parser.add_argument("--first", type=int, default=6, help="steps before the checkpoint")
    parser.add_argument("--further", type=int, default=6, help="steps after it")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    work = arguments.work_dir.absolute()
    claim(work, {"first": arguments.first, "further": arguments.further})
    layouts = [Layout(ranks, stage) for ranks in arguments.ranks for stage in arguments.stages]
    shards = work / "shards"
    if not (work / "prepared").exists():
        shutil.rmtree(shards, ignore_errors=True)
        prepare(work)
        (work / "prepared").touch()
    found = []
    for case in cases(shards, work, layouts, arguments.first, arguments.further):
        found.append(case)
        print(f"{case.source} to {case.target}: loss {case.loss:.1e}, weights {case.weights:.1e}", file=sys.stderr)
    print(table(found, layouts))
    print()
    print(summary(found))
    return 0 if all(case.is_good for case in found) else 1


if __name__ == "__main__":
    sys.exit(main())

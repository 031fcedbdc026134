"""How long checkpoints hold training up, written at once and in the background, at 120 M parameters.

    python tests/cluster/checkpoint_stall.py --ranks 1

Three runs of crammed-bert on the same batches: without checkpoints before the last, with synchronous and with asynchronous
ones. The stall is `perf/checkpoint_stall_seconds` of the journal: what one save took from training. Steps taken while a
copy is written are slower where the cores or the disk are shared, which the second column of step times shows; the last
column is everything together, by the wall clock: seconds a save cost over the run without.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kill_and_resume import prepare
from runs import run_ranks

LAYERS = 20  # of 5.9 M parameters each
SKIPPED = 2  # first steps, which warm up


@dataclass(frozen=True)
class Run:
    """One run's journal in numbers."""

    steps: list[float]
    stalls: list[float]
    wall: float

    @classmethod
    def of(cls, journal: list[dict[str, Any]], every: int) -> Run:
        told = {line["step"]: line["perf/checkpoint_stall_seconds"] for line in journal}
        # a save's stall is whole just before the next save's
        saves = range(every, journal[-1]["step"], every) if any(told.values()) else []
        stalls = [told[min(step + every, journal[-1]["step"])] for step in saves]
        steps = [line["perf/step_seconds"] for line in journal if line["step"] > SKIPPED]
        return cls(steps, stalls, journal[-1]["time"] - journal[SKIPPED - 1]["time"])


def measure(shards: Path, folder: Path, arguments: argparse.Namespace, *overrides: str) -> Run:
    """Run, and read the journal up to its last step, whose line comes before the last save."""
    run = run_ranks(
        arguments.ranks,
        shards,
        folder,
        "model.config.hidden_size=768",
        "model.config.num_attention_heads=12",
        "model.config.intermediate_size=3072",
        f"model.config.num_hidden_layers={arguments.layers}",
        f"train.global_batch_size={arguments.ranks * arguments.batch}",
        f"train.micro_batch_size={arguments.batch}",
        f"train.zero_stage={arguments.zero_stage}",
        f"budget.max_steps={arguments.steps}",
        "checkpoint.keep=1",
        *overrides,
        timeout=3600,
        fresh=True,
    )
    assert run.code == 0, run.output
    return Run.of(run.journal[:-1], arguments.every)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--zero-stage", type=int, default=0)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--batch", type=int, default=8, help="sequences a rank and step, of 32 tokens")
    parser.add_argument("--steps", type=int, default=31)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--work-dir", type=Path, help="folder on the disk to measure; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as temporary:
        work = Path(temporary)
        shards = prepare(work)
        saving = f"checkpoint.every_steps={arguments.every}"
        runs = {
            "none": measure(shards, work / "none", arguments),
            "synchronous": measure(shards, work / "synchronous", arguments, saving, "checkpoint.asynchronous=false"),
            "asynchronous": measure(shards, work / "asynchronous", arguments, saving),
        }
    report(runs)
    return 0


def report(runs: dict[str, Run]) -> None:
    """The table."""
    base = runs["none"]
    step = statistics.median(base.steps)
    print(
        "| checkpoints | stall, s | stall / step | median step, s | slowest step, s | cost of a save by the wall clock, s |"
    )
    print("|---|---|---|---|---|---|")
    for name, run in runs.items():
        stall = statistics.median(run.stalls) if run.stalls else 0.0
        cost = (run.wall - base.wall) / max(len(run.stalls), 1)
        print(
            f"| {name} | {stall:.2f} | {stall / step:.2f} | {statistics.median(run.steps):.2f} | {max(run.steps):.2f} | "
            f"{cost if run.stalls else 0.0:.2f} |"
        )


if __name__ == "__main__":
    sys.exit(main())

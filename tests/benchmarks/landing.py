"""Does a budget in hours land on its second? Runs of some budgets, stopped and resumed at random times.

    python tests/benchmarks/landing.py [key.path=value ...] --shards shards/quickstart --seconds 60 300 --stops 0 1 3

Each run is the profile `crammed-cpu` (or another) for so many seconds. A stop is SIGUSR1 to all ranks at a random time; the
run is started again until it is finished. Shown: at which share of the budget the last checkpoint and held-out evaluation
were committed, by the run's clock; what was reserved for them and what they took; the steps; the last rate as a share of the
peak; the ledger beside the wall clock of all starts, which has imports and exit besides. Exit code 0 says that all landed
between 98 and 100 % of the budget. With `--idle` a forward pass of training also sleeps, as where a device computes: an hour
then leaves the processor to others.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from runs import free_port, rank_environment

STOPPED = 75
IDLE = """
import sys, time
from sparselt_dist.pretrain import main
from sparselt_dist.objectives.mlm import MLMModule
forward = MLMModule.forward
MLMModule.forward = lambda self, *inputs: (time.sleep({seconds} * self.training), forward(self, *inputs))[1]
sys.exit(main())
"""


def start(ranks: int, arguments: list[str], idle: float) -> list[subprocess.Popen[bytes]]:
    program = ["-c", IDLE.format(seconds=idle)] if idle else ["-m", "sparselt_dist.pretrain"]
    port, command = free_port(), [sys.executable, *program, *arguments]
    quiet = subprocess.DEVNULL
    return [
        subprocess.Popen(
            command, env=rank_environment(rank, ranks, port), stdout=quiet, stderr=None if not rank else quiet
        )
        for rank in range(ranks)
    ]


def run(
    folder: Path, arguments: list[str], ranks: int, seconds: float, stops: int, draw: random.Random, idle: float
) -> tuple[int, float]:
    """Train to the end; stops made, and wall-clock seconds of the starts."""
    made, wall = 0, 0.0
    while True:
        began, processes = time.monotonic(), start(ranks, arguments, idle)
        if made < stops:
            journal = folder / "metrics.jsonl"
            size = journal.stat().st_size if journal.exists() else 0
            while not (journal.exists() and journal.stat().st_size > size) and processes[0].poll() is None:
                time.sleep(0.1)
            time.sleep(draw.uniform(0, seconds / (stops + 1)))
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGUSR1)
        codes = {process.wait() for process in processes}
        wall += time.monotonic() - began
        if codes == {0}:
            return made, wall
        assert codes == {STOPPED}, f"exit codes {codes}"
        made += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True, help="a folder with train/ and validation/")
    parser.add_argument("--config", default="crammed-cpu")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seconds", type=float, nargs="+", default=[60.0])
    parser.add_argument("--stops", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--idle", type=float, default=0.0, help="seconds that a forward pass sleeps besides")
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    options = parser.parse_intermixed_args()
    draw, landed = random.Random(options.seed), True
    print(
        "| budget s | stops | landed at | reserved s | save + evaluation s | steps | last rate / peak | ledger / wall |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for seconds in options.seconds:
        for stops in options.stops:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch, "run")
                arguments = ["--config", options.config, f"data.train={options.shards / 'train'}"]
                arguments += [f"data.validation={options.shards / 'validation'}", f"run.output_dir={folder}"]
                arguments += ["log.mlflow_uri=null", "log.every_steps=1", "train.yardsticks=false"]
                arguments += [f"budget.max_hours={seconds / 3600!r}", *options.overrides]
                made, wall = run(folder, arguments, options.ranks, seconds, stops, draw, options.idle)
                lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
                summary = json.loads((folder / "summary.json").read_text())
                newest = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
                checkpoint_seconds = json.loads((newest / "meta.json").read_text())["progress"]["seconds"]
            rates = [line["train/lr"] for line in lines if "train/lr" in line]
            share = summary["seconds"] / seconds
            after = summary["seconds"] - checkpoint_seconds
            ledger = sum(value for key, value in lines[-1].items() if key.startswith("time/"))
            landed &= 0.98 <= share <= 1.0
            reserve = lines[-1]["budget/reserve_seconds"]
            print(
                f"| {seconds:g} | {made} | {100 * share:.2f} % | {reserve:.1f} | {after:.1f} | {summary['steps']} | "
                f"{rates[-1] / max(rates):.3f} | {ledger / wall:.3f} |",
                flush=True,
            )
    return 0 if landed else 1


if __name__ == "__main__":
    sys.exit(main())

"""What each objective makes of equal time on the quickstart's corpus, by the yardsticks: runs of every arm and seed, and a table.

    python tests/benchmarks/objective_comparison.py --work-dir /tmp/comparison              # by the clock, on an idle machine
    python tests/benchmarks/objective_comparison.py --work-dir /tmp/comparison --by-steps   # on a busy one

One process of one thread a run, the quickstart's model, batch and learning rate for all: nothing is tuned for an arm. By the
clock an arm has `--minutes` of `budget.max_hours`. With `--by-steps` it has the steps that 20 minutes bought on the machine of
the documented table: 1,200 s over the step time of `mlm` on the idle machine, the others by the ratios that
`objective_cost.py --vocabularies 8192 --shape 128x2 --rows 32 --processor-time` gave. A run that is there is not made again;
one that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ARMS = {  # name: (steps of 20 minutes, what differs from the quickstart)
    "mlm": (4563, []),
    "cwt": (6195, ["objective.name=cwt", "objective.recover_from=0.9"]),
    "slt": (1079, ["objective.name=slt", "objective.masking=exact"]),
    "dac": (4149, ["objective.name=dac", "objective.stage1_pairs_per_step=512"]),
}
COLUMNS = ("yardstick/masked_ce", "yardstick/masked_accuracy", "yardstick/probe_accuracy", "tokens", "steps")


def _run(command: list[str], log: Path) -> None:
    with log.open("w") as file:
        subprocess.run(
            [sys.executable, "-m", *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
        )


def _summary(work_dir: Path, arm: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    folder = work_dir / f"{arm}-{seed}"
    steps, keys = ARMS[arm]
    if (
        not (folder / "summary.json").exists()
        or json.loads((folder / "summary.json").read_text())["status"] != "finished"
    ):
        limit = [f"budget.max_steps={steps}"] if args.by_steps else ["budget.max_steps=null"]
        limit += [] if args.by_steps else [f"budget.max_hours={args.minutes / 60}"]
        shards = work_dir / "shards"
        data = [f"data.train={shards / 'train'}", f"data.validation={shards / 'validation'}"]
        place = [f"run.output_dir={folder}", f"run.name={arm}-{seed}", f"run.seed={seed}", "log.mlflow_uri=null"]
        every = ["train.evaluate_every_steps=200", "checkpoint.every_steps=400"]
        command = ["sparselt_dist.pretrain", "--config", "quickstart", *data, *place, *every, *limit, *keys]
        _run(command, work_dir / f"{arm}-{seed}.log")
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--by-steps", action="store_true")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if not (args.work_dir / "shards").exists():
        shards = f"prepare.output_dir={args.work_dir / 'shards'}"
        agreements = "prepare.agreements=strict"
        _run(["sparselt_dist.prepare", "--config", "quickstart", shards, agreements], args.work_dir / "prepare.log")
    print("| objective | seed | " + " | ".join(COLUMNS) + " |\n|---" * (len(COLUMNS) + 2) + "|")
    for seed in args.seeds:
        for arm in args.arms:
            summary = _summary(args.work_dir, arm, seed, args)
            values = [summary.get(name, "-") for name in COLUMNS]
            shown = [f"{value:.4f}" if isinstance(value, float) else str(value) for value in values]
            print(f"| {arm} | {seed} | " + " | ".join(shown) + " |", flush=True)


if __name__ == "__main__":
    main()

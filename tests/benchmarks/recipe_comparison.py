"""What each change of the cramming recipe makes of equal time: the profiles, and the 2026 recipe with one switch turned.

    python tests/benchmarks/recipe_comparison.py --work-dir /tmp/hours --arms faithful constant trainer 2026 --seeds 0 1
    python tests/benchmarks/recipe_comparison.py --work-dir /tmp/recipes --minutes 5 --at-once 2 --threads 1

`faithful` is profile crammed-cpu, `2026` profile crammed-cpu-2026, `trainer` transformers' `Trainer` on a BERT of that size
(`trainer_run.py`). The other arms turn one switch of the 2026 recipe, not of the faithful one, which does not learn more than
the frequencies of words in minutes, so that no switch could be told from another. All have the same text, vocabulary and
minutes of the wall clock, so on a shared machine only runs at the same time (`--at-once`, started in the order of the arms)
compare with each other. The yardsticks (masked cross-entropy and accuracy of a recovered head, at one masking rate for all)
are on the same held-out text, in rows as the arm packs them: `sparselt evaluate` with other shards measures two packings on
the same rows. A run that is there is not made again; one that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FAITHFUL, LATER = "crammed-cpu", "crammed-cpu-2026"
ARMS: dict[str, tuple[str, list[str]]] = {
    "faithful": (FAITHFUL, []),
    "constant": (FAITHFUL, ["schedule.name=constant"]),
    "trainer": ("", []),
    "2026": (LATER, []),
    # the 2026 recipe with one of its switches turned back
    "fp32": (LATER, ["train.precision=fp32"]),
    "whole-head": (LATER, ["objective.cross_entropy=full"]),
    "concatenate": (LATER, ["prepare.packing=concatenate"]),
    "triangle": (LATER, ["schedule.name=budget-triangle2", "schedule.warmup=0"]),
    "adamw": (LATER, ["optim.name=adamw"]),
    "table-positions": (LATER, ["model.config.position_type=scaled-sinusoidal"]),
    # and with one more of them turned
    "compile": (LATER, ["train.compile=true"]),
    "rms": (LATER, ["model.config.norm_type=rms"]),
    "silu": (LATER, ["model.config.gate_activation=silu"]),
    "relu2": (LATER, ["model.config.gate_activation=relu2"]),
    "mask-rate": (LATER, ["objective.mlm_probability=[[0, 0.3], [1, 0.15]]"]),
    "row-length": (LATER, ["objective.row_lengths=[[0, 64], [0.5, 128]]"]),
}
COLUMNS = (
    "steps",
    "tokens",
    "seconds",
    "eval/loss",
    "yardstick/masked_ce",
    "yardstick/masked_accuracy",
    "yardstick/probe_accuracy",
)


class Comparison:
    """Where the runs are, and how one is made."""

    def __init__(self, work_dir: Path, minutes: float, threads: int) -> None:
        self.work_dir = work_dir
        self.minutes = minutes
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def shards(self, packing: str) -> Path:
        return self.work_dir / f"shards-{packing}"

    def prepare(self, packing: str) -> None:
        folder = self.shards(packing)
        if not (folder / "train" / "manifest.json").exists():
            keys = [f"prepare.output_dir={folder}", f"prepare.packing={packing}"]
            self._run("prepare", ["-m", "sparselt_dist.prepare", "--config", FAITHFUL, *keys])

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """The summary of an arm's run, with its yardsticks."""
        name = f"{arm}-{seed}"
        results = self.work_dir / f"{name}.json"
        if not results.exists():
            folder = self._train(name, arm, seed)
            summary = json.loads((folder / "summary.json").read_text())
            subject = folder if arm == "trainer" else folder / "model"
            rows = self.shards(packing_of(arm))
            data = [f"--data={rows / 'train'}", f"--validation={rows / 'validation'}"]
            task = ["--tasks", "yardsticks", "--output", str(results)]
            self._run(f"{name}.evaluate", ["-m", "sparselt_dist.evaluate", str(subject), *data, *task])
            measured = json.loads(results.read_text())
            results.write_text(json.dumps({**summary, **measured.get("metrics", measured)}))
        found: dict[str, Any] = json.loads(results.read_text())
        return found

    def _train(self, name: str, arm: str, seed: int) -> Path:
        folder = self.work_dir / name
        profile, keys = ARMS[arm]
        if arm == "trainer":
            script = Path(__file__).with_name("trainer_run.py")
            limits = [f"--seconds={self.minutes * 60}", f"--seed={seed}", f"--output={folder}"]
            self._run(name, [str(script), f"--shards={self.shards(packing_of(arm))}", *limits])
            return folder
        shards = self.shards(packing_of(arm))
        data = [f"data.train={shards / 'train'}", f"data.validation={shards / 'validation'}"]
        place = [f"run.output_dir={folder}", f"run.name={name}", f"run.seed={seed}", "log.mlflow_uri=null"]
        limits = [f"budget.max_hours={self.minutes / 60}", "train.evaluate_every_steps=100", "train.yardsticks=false"]
        self._run(name, ["-m", "sparselt_dist.pretrain", "--config", profile, *data, *place, *limits, *keys])
        return folder

    def _run(self, name: str, command: list[str]) -> None:
        with (self.work_dir / f"{name}.log").open("a") as log:
            subprocess.run(
                [sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, env=self.environment, check=True
            )


def packing_of(arm: str) -> str:
    """How an arm's documents become rows."""
    return "best-fit" if ARMS[arm][0] == LATER and arm != "concatenate" else "concatenate"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=2, help="of a run")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(args.work_dir, args.minutes, args.threads)
    for packing in sorted({packing_of(arm) for arm in args.arms}):
        comparison.prepare(packing)
    jobs = [(arm, seed) for seed in args.seeds for arm in args.arms]
    print("| arm | seed | " + " | ".join(COLUMNS) + " |\n|---" + "|---" * (len(COLUMNS) + 1) + "|")
    with ThreadPoolExecutor(args.at_once) as pool:
        for (arm, seed), summary in zip(jobs, pool.map(lambda job: comparison.run(*job), jobs), strict=True):
            values = [summary.get(name, "-") for name in COLUMNS]
            shown = [f"{value:.4f}" if isinstance(value, float) else str(value) for value in values]
            print(f"| {arm} | {seed} | " + " | ".join(shown) + " |", flush=True)


if __name__ == "__main__":
    main()

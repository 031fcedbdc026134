"""What each change of the cramming recipe makes of equal time: profile `crammed-cpu` with one switch turned, run by run.

    python tests/benchmarks/recipe_comparison.py --work-dir /tmp/hours --arms faithful constant trainer 2026 --seeds 0 1
    python tests/benchmarks/recipe_comparison.py --work-dir /tmp/recipes --minutes 10 --at-once 2 --threads 1

`faithful` is the profile, `2026` profile crammed-cpu-2026, `trainer` transformers' `Trainer` on a BERT of that size
(`trainer_run.py`). All have the same text, vocabulary and minutes of the wall clock, so on a shared machine only runs at the
same time (`--at-once`, started in the order of the arms) compare with each other. The yardsticks (masked cross-entropy
and accuracy of a recovered head, at one masking rate for all) are on the same held-out text, in
rows as the arm packs them: `sparselt evaluate` with other shards measures two packings on the same rows.
A run that is there is not made again; one that was stopped goes on.
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
    "batch-16": (FAITHFUL, ["train.global_batch_size=16", "train.batch_ramp_end=null"]),
    "batch-32": (FAITHFUL, ["train.global_batch_size=32"]),
    "fp32": (FAITHFUL, ["train.precision=fp32"]),
    "chunked": (FAITHFUL, ["objective.cross_entropy=chunked"]),
    "compile": (FAITHFUL, ["train.compile=true"]),
    "best-fit": (FAITHFUL, ["prepare.packing=best-fit"]),
    "wsd": (FAITHFUL, ["schedule.name=wsd", "schedule.warmup=0.02", "schedule.decay=0.25"]),
    "lr": (FAITHFUL, ["optim.peak_lr=3.0e-3"]),  # what Muon's arm shares with AdamW
    "muon": (FAITHFUL, ["optim.name=muon", "optim.muon_momentum=0.95", "optim.peak_lr=3.0e-3"]),
    "rms": (FAITHFUL, ["model.config.norm_type=rms"]),
    "rope": (FAITHFUL, ["model.config.position_type=rope"]),
    "silu": (FAITHFUL, ["model.config.gate_activation=silu"]),
    "mask-rate": (FAITHFUL, ["objective.mlm_probability=[[0, 0.3], [1, 0.15]]"]),
    "row-length": (FAITHFUL, ["objective.row_lengths=[[0, 64], [0.5, 128]]"]),
    "2026": (LATER, []),
    "trainer": ("", []),
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

    def shards(self, keys: tuple[str, ...] = ()) -> Path:
        return self.work_dir / "-".join(["shards", *(key.partition("=")[2] for key in keys)])

    def prepare(self, keys: tuple[str, ...]) -> None:
        folder = self.shards(keys)
        if not (folder / "train" / "manifest.json").exists():
            command = ["-m", "sparselt_dist.prepare", "--config", FAITHFUL, f"prepare.output_dir={folder}", *keys]
            self._run("prepare", command)

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """The summary of an arm's run, with its yardsticks."""
        name = f"{arm}-{seed}"
        results = self.work_dir / f"{name}.json"
        if not results.exists():
            folder = self._train(name, arm, seed)
            summary = json.loads((folder / "summary.json").read_text())
            subject = folder if arm == "trainer" else folder / "model"
            rows = self.shards(shards_of(arm))
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
            self._run(name, [str(script), f"--shards={self.shards()}", *limits])
            return folder
        shards = self.shards(shards_of(arm))
        data = [f"data.train={shards / 'train'}", f"data.validation={shards / 'validation'}"]
        place = [f"run.output_dir={folder}", f"run.name={name}", f"run.seed={seed}", "log.mlflow_uri=null"]
        limits = [f"budget.max_hours={self.minutes / 60}", "train.evaluate_every_steps=100", "train.yardsticks=false"]
        keys = [key for key in keys if not key.startswith("prepare.")]
        self._run(name, ["-m", "sparselt_dist.pretrain", "--config", profile, *data, *place, *limits, *keys])
        return folder

    def _run(self, name: str, command: list[str]) -> None:
        with (self.work_dir / f"{name}.log").open("a") as log:
            subprocess.run(
                [sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, env=self.environment, check=True
            )


def shards_of(arm: str) -> tuple[str, ...]:
    """What of the preparation an arm changes: keys of `pretrain` and `prepare` alike."""
    if arm == "2026":
        return ("prepare.packing=best-fit",)
    return tuple(key for key in ARMS[arm][1] if key.startswith("prepare."))


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
    for keys in {(), *map(shards_of, args.arms)}:
        comparison.prepare(keys)
    jobs = [(arm, seed) for seed in args.seeds for arm in args.arms]
    print("| arm | seed | " + " | ".join(COLUMNS) + " |\n|---" + "|---" * (len(COLUMNS) + 1) + "|")
    with ThreadPoolExecutor(args.at_once) as pool:
        for (arm, seed), summary in zip(jobs, pool.map(lambda job: comparison.run(*job), jobs), strict=True):
            values = [summary.get(name, "-") for name in COLUMNS]
            shown = [f"{value:.4f}" if isinstance(value, float) else str(value) for value in values]
            print(f"| {arm} | {seed} | " + " | ".join(shown) + " |", flush=True)


if __name__ == "__main__":
    main()

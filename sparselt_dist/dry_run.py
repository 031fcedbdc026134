"""`pretrain --dry-run`: a whole run of two steps in a folder that is removed after it."""

from __future__ import annotations

import shutil
from pathlib import Path

from sparselt_dist import distributed
from sparselt_dist.config import Config
from sparselt_dist.launcher_watch import Launcher
from sparselt_dist.run import pretrain
from sparselt_dist.run_plan import make_plan
from sparselt_dist.trainer import Outcome

DRY_PRELUDE_SECONDS = 5.0  # of an objective


def dry_run(
    config: Config,
    ranks: distributed.Ranks,
    stop_flag: distributed.StopFlag,
    *,
    profile: str,
    started: float,
    launcher: Launcher,
) -> Outcome:
    """Everything a run does, for two steps, in a folder that is removed after; shards it needs are prepared and kept."""
    folder = Path(make_plan(config, ranks.world_size).output_dir + ".dry-run")
    short = config.model_copy(
        update={
            "run": config.run.model_copy(update={"output_dir": str(folder)}),
            "budget": config.budget.model_copy(update={"max_steps": 2}),
            "log": config.log.model_copy(update={"mlflow_uri": None, "every_steps": 1}),
            "checkpoint": config.checkpoint.model_copy(update={"upload": None}),
            "train": config.train.model_copy(update={"yardsticks": False, "evaluate_samples": 64}),
        }
    )
    if ranks.is_main:
        shutil.rmtree(folder, ignore_errors=True)  # of a dry run that was killed
    try:
        outcome = pretrain(
            short,
            ranks,
            stop_flag,
            resume=["auto"],
            profile=profile,
            started=started,
            launcher=launcher,
            max_prelude_seconds=DRY_PRELUDE_SECONDS,
        )
    finally:
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
    if ranks.is_main and outcome == "finished":
        print("dry run: two steps, evaluation, checkpoint and export went through; the run folder was removed")
    return outcome

"""One run from a configuration to a finished folder: data, model, engine, training, yardsticks, export, summary."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from sparselt_dist import checkpoint, distributed, preflight, rank_log, run_folder
from sparselt_dist.allocator import keep_freed_memory
from sparselt_dist.closing import closing_text
from sparselt_dist.config import Config
from sparselt_dist.data.loader import Loader
from sparselt_dist.device import check_precision
from sparselt_dist.engine_start import build_engine, restore_rank
from sparselt_dist.errors import ConfigError
from sparselt_dist.expected_curve import ExpectedCurve
from sparselt_dist.follower import mlflow_identity, read_json, start_follower, wait_follower
from sparselt_dist.health import Health
from sparselt_dist.journal import Journal
from sparselt_dist.launcher_watch import Launcher
from sparselt_dist.metrics import ConsoleProgress, TimeLedger, peak_memory_gib
from sparselt_dist.micro_batch_search import find_fastest
from sparselt_dist.models.assembly import build_collator
from sparselt_dist.non_finite import NonFinite
from sparselt_dist.objectives.base import PreludeStopped
from sparselt_dist.prelude import begin, make_setting, prelude_metrics, prelude_summary
from sparselt_dist.profiling import FOLDER as PROFILE_FOLDER
from sparselt_dist.profiling import StepProfile
from sparselt_dist.run_plan import RunPlan, make_plan
from sparselt_dist.run_start import Data, Start, find_start, open_data, rewound, write_start
from sparselt_dist.saving import Saving
from sparselt_dist.spikes import RewindRun
from sparselt_dist.trainer import Outcome, Trainer
from sparselt_dist.utilisation import device_watts, row_length, utilisation
from sparselt_dist.watchdog import Watchdog

if TYPE_CHECKING:
    from sparselt_dist.models.backbone import PretrainingModel

FOLLOWER_SECONDS = 60.0  # how long a finished run waits for its MLflow store
STOPPED_SECONDS = 8.0  # how long a stopped one does: whoever asked for the stop may kill it soon
IDENTITY_SECONDS = 20.0  # how long for the store to name the run
LOCK_SECONDS = 120.0  # how long a requeued job waits for the folder: file servers may keep a lost host's lock


def _settled(
    config: Config, data: Data, start: Start, ranks: distributed.Ranks, device: torch.device, console: ConsoleProgress
) -> Config:
    """The configuration with a number for `train.micro_batch_size=fastest`; a resume keeps the number found before."""
    if config.train.micro_batch_size != "fastest":
        return config
    chosen: int | str | None = None
    if start.checkpoint is not None:
        chosen = checkpoint.read_meta(start.checkpoint)["config"]["train"]["micro_batch_size"]
    if not isinstance(chosen, int) or config.train.global_batch_size % (chosen * ranks.world_size):
        chosen, report = find_fastest(config, data.train, data.tokenizer, ranks, device)
        console.message(report)
    train = config.train.model_copy(update={"micro_batch_size": chosen})
    return config.model_copy(update={"train": train})


class Run:
    """The pieces of a run after start-up, and what happens at a log line, at a save and at the end."""

    def __init__(
        self,
        config: Config,
        plan: RunPlan,
        data: Data,
        ranks: distributed.Ranks,
        engine: DeepSpeedEngine,
        start: Start,
        stop_flag: distributed.StopFlag,
        console: ConsoleProgress,
        ledger: TimeLedger,
    ) -> None:
        self.config = config
        self.plan = plan
        self.data = data
        self.ranks = ranks
        self.engine = engine
        self.stop_flag = stop_flag
        self.console = console
        self.ledger = ledger
        self.dir = Path(plan.output_dir)
        self.journal = Journal(self.dir) if ranks.is_main else None
        self.last_values: dict[str, Any] = {}
        traced = config.train.profile if ranks.is_main else 0
        self.profile = StepProfile(self.dir / PROFILE_FOLDER, traced) if traced else None
        attended = distributed.agreed(ranks, lambda: row_length(data.train, config.data.sequence_length))
        points = config.log.expected_loss
        self.expected = ExpectedCurve(points) if points is not None and ranks.is_main else None
        for line in Journal.read(self.dir) if ranks.is_main else []:
            self.last_values.update(line)
        self.prelude = start.prelude
        self.prelude_is_told = False
        self.journal_fault: str | None = None
        self.saving = Saving(
            config,
            self.dir,
            ranks,
            engine,
            progress=start.progress,
            is_resumed=start.checkpoint is not None,
            ledger=ledger,
            manifest=data.train.manifest,
            prelude=start.prelude,
            journal=self.journal,
            say=self.complain,
        )
        self.health = Health(ranks, engine.device, ledger, start.progress, console.message)
        self.outcome: Outcome = "failed"
        self.peak_memory_gib = 0.0  # over all ranks, known at the end
        self.trainer = Trainer(
            config,
            engine=engine,
            ranks=ranks,
            micro_batch_size=plan.micro_batch_size,
            loader=Loader(
                data.train,
                build_collator(config, data.tokenizer),
                seed=config.run.seed,
                window=config.data.shuffle_window,
                micro_batch_size=plan.micro_batch_size,
                rank=ranks.rank,
                world_size=ranks.world_size,
                num_workers=config.data.num_workers,
                start_position=start.progress.position,
                left_out=start.progress.left_out,
                row_length=config.data.sequence_length,
                prefetch=config.data.prefetch,
                pin_memory=engine.device.type == "cuda",
            ),
            validation=data.validation,
            collator=build_collator(config, data.tokenizer),
            progress=start.progress,
            ledger=ledger,
            stop_flag=stop_flag,
            on_log=self.log,
            saving=self.saving,
            on_complaint=self.complain,
            on_message=console.message,
            on_step=self.after_step,
            on_non_finite=lambda progress: NonFinite(config, engine, ranks, progress, self.dir, console.message),
            utilisation=utilisation(config, engine, attended, ranks.world_size),
        )

    def train_or_rewind(self) -> RewindRun | None:
        """Train to the end of the budget or a stop, which is then `outcome`; or to a spike that is to be undone."""
        try:
            self.outcome = self.train()
        except RewindRun as spike:
            return spike.with_traceback(None)
        return None

    def give_up_engine(self) -> None:
        """Free what a run that is taken up again at a checkpoint held."""
        self.close(patience=FOLLOWER_SECONDS)
        self.saving.close()
        self.engine.destroy()
        del self.trainer, self.saving, self.engine
        gc.collect()

    def train(self) -> Outcome:
        """Train to the end of the budget or a stop, and finish."""
        if self.data.validation is None:
            self.console.message("no held-out shards (data.validation): no evaluation and no yardsticks")
        try:
            outcome = self.trainer.run()
        finally:
            self._tell(self.profile.finish(self.ledger.seconds()) if self.profile is not None else None)
        self.health.look(self.trainer.progress, now=True)
        if outcome == "finished":
            outcome = self._finish()
        memory = torch.tensor([peak_memory_gib()], dtype=torch.float64, device=self.engine.device)
        self.peak_memory_gib = float(distributed.reduce_sum(memory))
        return outcome

    def close(self, patience: float | None) -> None:
        """Flush and close the journal, and wait so many seconds for uploads."""
        if self.journal is not None:
            self.journal.close()
        if not self.saving.finish_uploads(patience):
            self.complain(
                "the last checkpoint was not uploaded to checkpoint.upload in time; the next start does not either"
            )

    def summary(self) -> dict[str, Any]:
        """What `summary.json` tells of a run besides its status."""
        progress = self.trainer.progress
        model_dir = self.dir / "model"
        yardsticks = {key: value for key, value in self.last_values.items() if key.startswith(("eval/", "yardstick/"))}
        return {
            "name": self.config.run.name,
            "objective": self.config.objective.name,
            "steps": self.last_values.get("step", 0),
            "tokens": self.last_values.get("progress/tokens", 0),
            "seconds": progress.seconds,
            "world_size": self.ranks.world_size,
            "model_dir": str(model_dir) if model_dir.exists() else None,
            "data_manifest_sha256": self.data.train.manifest.sha256,
            "peak_memory_gib": self.peak_memory_gib,
            **self._budget_summary(),
            **self.health.summary(),
            **prelude_summary(self.config, self.prelude, progress),
            **yardsticks,
        }

    def _budget_summary(self) -> dict[str, Any]:
        """The budget of the clock, where there is one; energy, where the device's power is known; a run that gave up."""
        limit = self.trainer.time.budget.max_seconds
        told: dict[str, Any] = {} if limit is None else {"budget_seconds": limit}
        watts = self.config.log.device_watts or device_watts(self.engine.device)
        if watts is not None:  # of the devices alone, as under load all the time
            told["energy_kwh"] = watts * self.ranks.world_size * self.ledger.total() / 3.6e6
        return {**told, **({"gave_up": True} if self.trainer.given_up else {})}

    def log(self, line: dict[str, Any]) -> None:
        """One journal line, and the live line."""
        if not self.prelude_is_told:  # in the first line of each start, for one of an earlier start may be cut off
            line = {**line, **prelude_metrics(self.config, self.prelude, self.trainer.progress)}
            self.prelude_is_told = True
        if self.expected is not None and "train/loss" in line:
            figures, warning = self.expected.compare(line["progress/fraction"], line["train/loss"])
            line = {**line, **figures}
            if warning is not None:
                self.complain(warning)
        self.last_values.update(line)
        if "train/loss" in line:  # of a rank that hangs, the last such line tells since when
            rank_log.at_step(line["step"])
            rank_log.note(f"loss {line['train/loss']:.4f}")
        if self.journal is None:
            return
        fault = self.journal.offer(line)
        if fault is not None and self.journal_fault is None:
            self.complain(fault)
        self.journal_fault = fault
        fraction = line.get("progress/fraction", self.trainer.time.fraction())
        seconds = self.trainer.progress.seconds - self.trainer.progress.prelude_seconds
        self.console.update(
            step=line["step"],
            fraction=fraction,
            loss=self.last_values.get("train/loss"),
            tokens_per_second=self.last_values.get("perf/tokens_per_second"),
            seconds_left=seconds * (1 - fraction) / fraction if fraction else None,
        )

    def after_step(self) -> None:
        """Count a step for this rank's log and for the profile; compare the ranks now and then."""
        rank_log.at_step(self.trainer.progress.step)
        self.health.look(self.trainer.progress)
        if self.profile is not None:
            self._tell(self.profile.after_step(self.trainer.progress.step, self.ledger.seconds()))

    def _tell(self, text: str | None) -> None:
        if text is not None:
            self.console.message(text)

    def complain(self, text: str) -> None:
        """A warning of this rank, such as a bad shard that is left out."""
        print(f"rank {self.ranks.rank}: warning: {text}", file=sys.stderr, flush=True)

    def _finish(self) -> Outcome:
        """After the budget: last checkpoint and held-out loss, which belong to it; yardsticks and export, which do not, and
        which a stop leaves to the next start.

        The last line gets all figures, the first of them at once.
        """
        line = {"step": self.trainer.progress.step, **self.trainer.land()}
        self.trainer.log(line, more_to_come=True)  # the journal joins lines of one step
        distributed.on_main(self.ranks, lambda: self.journal.sync() if self.journal is not None else None)
        for work in (self._yardsticks, lambda: self._export({**self.last_values, **line})):
            figures = self._unless_stopped(work)
            if figures is None:
                self.console.message("stopped after the budget was spent; the same command does what is left")
                return "stopped"
            line.update(figures)
        self.trainer.log(line)
        return "finished"

    def _unless_stopped(self, work: Callable[[], dict[str, float]]) -> dict[str, float] | None:
        """What rank 0 makes of its work; None where a stop was asked of any rank before, or of rank 0 meanwhile."""
        asked = torch.tensor([float(self.stop_flag.is_set)], device=self.engine.device)
        if distributed.reduce_sum(asked).item():
            return None

        def broken_off() -> dict[str, float] | None:
            try:
                with self.stop_flag.interrupting():
                    return work()
            except KeyboardInterrupt:
                return None

        return distributed.on_main(self.ranks, broken_off)

    def _yardsticks(self) -> dict[str, float]:
        from sparselt_dist.evaluation.yardsticks import run_yardsticks
        from sparselt_dist.models.loading import load_checkpoint

        if not self.config.train.yardsticks or self.data.validation is None:
            return {}
        self.console.message("measuring the yardsticks on held-out text")
        with self.ledger.phase("yardsticks"):
            return run_yardsticks(
                # whole, whatever the ZeRO stage, and with what the objective adds to it
                load_checkpoint(self.saving.newest or self.dir).model.to(self.engine.device).backbone,
                self.data.train,
                self.data.validation,
                self.data.tokenizer,
                device=self.engine.device,
            )

    def _export(self, metrics: dict[str, Any]) -> dict[str, float]:
        from sparselt_dist.models.exporting import export_checkpoint

        with self.ledger.phase("export"):
            export_checkpoint(self.saving.newest or self.dir, self.dir / "model", metrics=metrics)
        return {}


def _start_follower(config: Config, run_dir: Path, ranks: distributed.Ranks) -> subprocess.Popen[bytes] | None:
    """Rank 0's side process that feeds MLflow from the journal."""
    if not ranks.is_main or config.log.mlflow_uri is None:
        return None
    return start_follower(run_dir, config.log.mlflow_uri, os.getpid())


def _close(
    run: Run | None, run_dir: Path, ranks: distributed.Ranks, status: Outcome, follower: subprocess.Popen[bytes] | None
) -> None:
    """Write the summary, which tells the follower to end, wait for it, and say how it went."""
    if not ranks.is_main:
        return
    patience = FOLLOWER_SECONDS if status == "finished" else STOPPED_SECONDS
    identity = mlflow_identity(run_dir, min(patience, IDENTITY_SECONDS)) if follower is not None else None
    summary: dict[str, Any] = {"status": status, "mlflow_run_id": identity, "steps": 0, "tokens": 0, "seconds": 0.0}
    if run is not None:
        run.close(patience=None if status == "finished" else STOPPED_SECONDS)
        summary.update(run.summary())
    run_folder.write_json(run_dir / "summary.json", summary)
    complaint = wait_follower(follower, run_dir, timeout_seconds=patience) if follower is not None else ""
    if complaint:
        print(complaint, file=sys.stderr)
    if run is not None and status != "failed":
        uri = run.config.log.mlflow_uri if follower is not None else None
        print(closing_text(summary, run_dir, run.ledger.seconds(), uri), flush=True)


def pretrain(
    config: Config,
    ranks: distributed.Ranks,
    stop_flag: distributed.StopFlag,
    *,
    resume: Sequence[str],
    profile: str,
    started: float,
    launcher: Launcher,
    max_prelude_seconds: float = math.inf,
) -> Outcome:
    """Run from configuration to finished folder; all ranks call it. Returns how the run ended.

    `max_prelude_seconds` is what the objective may take before the first step, whatever the budget.

    Raises:
        SparseltError: configuration, data or checkpoint at fault.
        RunFailureError: a loss or gradient that is no number; another rank died or hangs.
    """
    ledger = TimeLedger(start=started)
    console = ConsoleProgress(rank=ranks.rank, total_steps=config.budget.max_steps)
    device = distributed.initialise(ranks)
    distributed.agreed(ranks, lambda: check_precision(config.train.precision, device))
    if device.type == "cpu":
        keep_freed_memory()
    plan = make_plan(config, ranks.world_size)
    run_dir = Path(plan.output_dir)
    watchdog = Watchdog(ranks, ledger, run_dir, config.train.hang_minutes, launcher)
    with watchdog.watching():
        claim, status = _watched(
            config, ranks, stop_flag, watchdog, ledger, console, device, resume, profile, max_prelude_seconds
        )
    distributed.barrier()  # a launcher that sees one rank end with 75 ends the others
    distributed.shut_down()
    if claim is not None:
        claim.close()
    return status


def _watched(
    config: Config,
    ranks: distributed.Ranks,
    stop_flag: distributed.StopFlag,
    watchdog: Watchdog,
    ledger: TimeLedger,
    console: ConsoleProgress,
    device: torch.device,
    resume: Sequence[str],
    profile: str,
    max_prelude_seconds: float,
) -> tuple[IO[str] | None, Outcome]:
    """What `pretrain` does while the watchdog looks on; returns the claim on the folder too."""
    plan = make_plan(config, ranks.world_size)
    run_dir = Path(plan.output_dir)
    try:
        data = open_data(config, ranks, stop_flag)
    except PreludeStopped:
        console.message("stopped while the shards were prepared; the same command goes on with that")
        return None, "stopped"
    start = find_start(config, data, plan, ranks, resume, console)
    opened = [corpora for corpora in (data.train, data.validation) if corpora is not None]
    preflight.check(config, run_dir, opened, ranks, device, console.message)
    config = _settled(config, data, start, ranks, device, console)
    plan = make_plan(config, ranks.world_size)
    patience = LOCK_SECONDS if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" else 0.0
    claim = distributed.agreed(
        ranks, lambda: run_folder.lock(run_dir, console.message, patience) if ranks.is_main else None
    )
    ended = distributed.on_main(ranks, lambda: read_json(run_dir / "summary.json"))  # how the start before did
    rank_log.open_in(run_dir)
    rank_log.at_step(start.progress.step)
    ledger.restore(start.ledger_seconds)
    distributed.on_main(ranks, lambda: write_start(run_dir, config, plan, data, ranks, start, profile, str(device)))
    follower = _start_follower(config, run_dir, ranks)
    status: Outcome = "failed"
    run: Run | None = None
    is_fruitless = False
    setting = make_setting(config, data.train, data.tokenizer, device, max_prelude_seconds)

    def prepared(model: PretrainingModel) -> None:
        keep = config.checkpoint.keep
        distributed.on_main(ranks, lambda: preflight.check_room(run_dir, model, keep, console.message))
        begin(model.objective, start, setting, ranks, stop_flag, ledger)

    def begun(start: Start) -> Run:
        engine = build_engine(
            config,
            plan,
            data,
            start,
            ranks,
            prepared,
        )
        restore_rank(start, ranks, config.run.seed)
        run = Run(config, plan, data, ranks, engine, start, stop_flag, console, ledger)
        watchdog.step = lambda: start.progress.step  # the run's own, which outlives its engine
        return run

    watchdog.at_worst = lambda: _close(run, run_dir, ranks, "failed", follower)
    try:
        run = begun(start)
        while (spike := run.train_or_rewind()) is not None:
            since, before, saved = time.monotonic(), run.trainer.progress, run.saving.newest or start.checkpoint
            assert saved is not None  # else no spike is undone
            run.give_up_engine()
            run = None
            start = rewound(config, data, plan, ranks, before, spike, saved, console)
            run = begun(start)
            run.trainer.progress.seconds += time.monotonic() - since
        status = run.outcome
    except PreludeStopped:
        is_fruitless = (ended.get("status"), ended.get("steps")) == ("stopped", 0)
        status = "failed" if is_fruitless else "stopped"
        console.message("stopped before the first step; the same command begins anew")
    except BaseException as error:
        explained = watchdog.explained(error)
        console.close()
        _close(run, run_dir, ranks, status, follower)
        if explained is error:
            raise
        raise explained from None
    console.close()
    distributed.agreed(ranks, lambda: _close(run, run_dir, ranks, status, follower))
    if is_fruitless:  # else a job that is requeued would do the same for ever
        fruitless = ConfigError(
            f"{run_dir}: two starts in a row were stopped before the first step, and what objective "
            f"{config.objective.name} does before it begins anew each time; give a start more time, or it less to do"
        )
        fruitless.silent = not ranks.is_main
        raise fruitless
    return claim, status

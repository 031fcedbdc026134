"""One run from a configuration to a finished folder: data, model, engine, training, yardsticks, export, summary."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from sparselt_dist import checkpoint, distributed, engine_state, run_folder
from sparselt_dist.closing import closing_text
from sparselt_dist.config import Config
from sparselt_dist.data.loader import Loader
from sparselt_dist.follower import mlflow_identity, start_follower, wait_follower
from sparselt_dist.journal import Journal
from sparselt_dist.metrics import ConsoleProgress, TimeLedger, flops_per_token, peak_flops, peak_memory_gib
from sparselt_dist.models.assembly import build_collator, build_model
from sparselt_dist.optim import build_optimizer
from sparselt_dist.run_plan import RunPlan, make_plan, resolve_deepspeed
from sparselt_dist.run_start import Data, Start, find_start, open_data, write_start
from sparselt_dist.trainer import Outcome, Trainer

if TYPE_CHECKING:
    from sparselt_dist.models.backbone import Backbone, PretrainingModel

FOLLOWER_SECONDS = 60.0  # how long a finished run waits for its MLflow store


def build_engine(config: Config, plan: RunPlan, data: Data, start: Start, ranks: distributed.Ranks) -> DeepSpeedEngine:
    """Model, optimizer and DeepSpeed engine, continued from the start's checkpoint."""
    model = distributed.agreed(ranks, lambda: _loaded_model(config, data, start.checkpoint))
    if config.train.compile:
        model.backbone.body.compile()
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, config.optim),
        config=resolve_deepspeed(config, plan),
        dist_init_required=False,
    )
    if start.checkpoint is not None:
        moments = checkpoint.TensorFiles.open(start.checkpoint, "moments")
        meta = checkpoint.read_meta(start.checkpoint)
        engine_state.restore_moments(engine, moments.read, meta["optimizer_steps"])
        engine_state.restore_loss_scaler(engine, meta["loss_scaler"])
        engine.global_steps = start.progress.step
    return engine


def _loaded_model(config: Config, data: Data, source: Path | None) -> PretrainingModel:
    model = build_model(config, data.tokenizer)
    if source is not None:
        checkpoint.load_into(model, source)
    return model


def _restore_rank(start: Start, ranks: distributed.Ranks, seed: int) -> None:
    """This rank's random state; after a change of the number of ranks a fresh one that follows from seed and step."""
    torch.manual_seed((seed * 1_000_003 + start.progress.step) * 65_537 + ranks.rank)
    if start.checkpoint is None or checkpoint.read_meta(start.checkpoint)["world_size"] != ranks.world_size:
        return
    state = torch.load(start.checkpoint / f"rank_{ranks.rank:05d}.pt", weights_only=True)
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _rank_state() -> dict[str, Any]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _flop_rate(config: Config, backbone: Backbone, engine: DeepSpeedEngine, world_size: int) -> float:
    """MFU of one token a second: FLOPs of a token over the peak of all devices."""
    hf = backbone.config
    embeddings = sum(p.numel() for p in backbone.get_input_embeddings().parameters())
    total = sum(getattr(p, "ds_numel", p.numel()) for p in backbone.parameters())
    length = float(config.data.sequence_length or 512)
    probability = 1.0 if backbone.is_causal else float(str(config.objective.own_keys().get("mlm_probability", 0.15)))
    cost = flops_per_token(
        num_backbone_parameters=max(total - embeddings, 0),
        num_layers=int(hf.num_hidden_layers),
        hidden_size=int(hf.hidden_size),
        mean_length=length,
        targets_per_token=probability if backbone.has_head else 0.0,
        vocab_size=int(hf.vocab_size) if backbone.has_head else 0,
    )
    given = config.log.peak_tflops
    peak = given * 1e12 if given is not None else peak_flops(engine.device, config.train.precision)
    # On a CPU the ranks share the cores that the peak was measured on by one rank's threads.
    return cost / (peak * world_size)


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
        self.console = console
        self.ledger = ledger
        self.dir = Path(plan.output_dir)
        self.journal = Journal(self.dir) if ranks.is_main else None
        self.last_values: dict[str, Any] = {}
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
                pin_memory=engine.device.type == "cuda",
            ),
            validation=data.validation,
            evaluation_collator=build_collator(config, data.tokenizer),
            progress=start.progress,
            ledger=ledger,
            stop_flag=stop_flag,
            on_log=self.log,
            on_save=self.save,
            flops_per_second_per_token=_flop_rate(config, engine.module.backbone, engine, ranks.world_size),
        )

    def train(self) -> Outcome:
        """Train to the end of the budget or a stop, and finish."""
        outcome = self.trainer.run()
        if outcome == "finished":
            self._finish()
        memory = torch.tensor([peak_memory_gib()], dtype=torch.float64, device=self.engine.device)
        self.peak_memory_gib = float(distributed.reduce_sum(memory))
        return outcome

    def close(self) -> None:
        """Flush and close the journal."""
        if self.journal is not None:
            self.journal.close()

    def summary(self) -> dict[str, Any]:
        """What `summary.json` tells of a run besides its status."""
        progress = self.trainer.progress
        model_dir = self.dir / "model"
        yardsticks = {key: value for key, value in self.last_values.items() if key.startswith(("eval/", "yardstick/"))}
        return {
            "name": self.config.run.name,
            "objective": self.config.objective.name,
            "steps": progress.step,
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "world_size": self.ranks.world_size,
            "model_dir": str(model_dir) if model_dir.exists() else None,
            "data_manifest_sha256": self.data.train.manifest.sha256,
            "peak_memory_gib": self.peak_memory_gib,
            **yardsticks,
        }

    def log(self, line: dict[str, Any]) -> None:
        """One journal line, and the live line."""
        self.last_values.update(line)
        if self.journal is None:
            return
        self.journal.append(line)
        fraction = line.get("progress/fraction", self.trainer.fraction())
        seconds = self.trainer.progress.seconds
        self.console.update(
            step=line["step"],
            fraction=fraction,
            loss=line.get("train/loss"),
            tokens_per_second=line.get("perf/tokens_per_second"),
            seconds_left=seconds * (1 - fraction) / fraction if fraction else None,
        )

    def save(self) -> None:
        """Commit a checkpoint of this moment."""
        progress = self.trainer.progress
        checkpoint.save(
            self.dir,
            progress.step,
            ranks=self.ranks,
            weights=engine_state.gather_weights(self.engine),
            moments=engine_state.gather_moments(self.engine),
            rank_state=_rank_state(),
            meta={
                "progress": progress.as_dict(),
                "tokens": progress.tokens,
                "loss_scaler": engine_state.loss_scaler_state(self.engine),
                "optimizer_steps": engine_state.optimizer_steps(self.engine),
                "ledger_seconds": self.ledger.seconds(),
                "objective": self.config.objective.name,
                "seed": self.config.run.seed,
                "data_manifest_sha256": self.data.train.manifest.sha256,
                "tokenizer_sha256": self.data.train.manifest.tokenizer_sha256,
                "config": self.config.model_dump(mode="json"),
            },
            keep=self.config.checkpoint.keep,
        )

    def _finish(self) -> None:
        """After the budget: last checkpoint, held-out loss, yardsticks, export, last line."""
        self.trainer.save()
        line = {"step": self.trainer.progress.step, **self.trainer.last_line}
        line.update(self.trainer.evaluate())
        if self.ranks.is_main:
            newest = checkpoint.find(self.dir)
            with self.ledger.phase("evaluate"):
                line.update(self._yardsticks(newest))
            with self.ledger.phase("checkpoint"):
                self._export(newest, line)
            self._log_last(line)
        distributed.barrier()

    def _yardsticks(self, newest: Path) -> dict[str, float]:
        from sparselt_dist.evaluation.yardsticks import run_yardsticks

        if not self.config.train.yardsticks or self.data.validation is None:
            return {}
        self.console.message("measuring the yardsticks on held-out text")
        model = _loaded_model(self.config, self.data, newest)  # whole on one device, whatever the ZeRO stage was
        return run_yardsticks(
            model.backbone.to(self.engine.device),
            self.data.train,
            self.data.validation,
            self.data.tokenizer,
            device=self.engine.device,
        )

    def _export(self, newest: Path, line: dict[str, Any]) -> None:
        from sparselt_dist.models.exporting import export_checkpoint

        export_checkpoint(newest, self.dir / "model", metrics=line)

    def _log_last(self, line: dict[str, Any]) -> None:
        """Complete the last step's line, which an earlier start may have written already."""
        assert self.journal is not None
        earlier = [old for old in Journal.read(self.dir) if old["step"] == line["step"]]
        self.trainer.log({**(earlier[-1] if earlier else {}), **line})  # the journal joins lines of one step


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
    summary = {"status": status, "mlflow_run_id": mlflow_identity(run_dir) if follower is not None else None}
    if run is not None:
        run.close()
        summary.update(run.summary())
    run_folder.write_json(run_dir / "summary.json", summary)
    complaint = wait_follower(follower, run_dir, timeout_seconds=FOLLOWER_SECONDS) if follower is not None else ""
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
    resume: str,
    profile: str,
    started: float,
) -> Outcome:
    """Run from configuration to finished folder; all ranks call it. Returns how the run ended.

    Raises:
        SparseltError: configuration, data or checkpoint at fault.
    """
    ledger = TimeLedger(start=started)
    console = ConsoleProgress(rank=ranks.rank, total_steps=config.budget.max_steps)
    device = distributed.initialise(ranks)
    plan = make_plan(config, ranks.world_size)
    run_dir = Path(plan.output_dir)
    data = open_data(config, ranks)
    start = find_start(config, data, plan, ranks, resume, console)
    ledger.restore(start.ledger_seconds)
    distributed.on_main(ranks, lambda: write_start(run_dir, config, plan, data, ranks, start, profile, str(device)))
    follower = _start_follower(config, run_dir, ranks)
    status: Outcome = "failed"
    run: Run | None = None
    try:
        engine = build_engine(config, plan, data, start, ranks)
        _restore_rank(start, ranks, config.run.seed)
        run = Run(config, plan, data, ranks, engine, start, stop_flag, console, ledger)
        status = run.train()
    finally:
        console.close()
        _close(run, run_dir, ranks, status, follower)
    distributed.shut_down()
    return status


def dry_run(
    config: Config, ranks: distributed.Ranks, stop_flag: distributed.StopFlag, *, profile: str, started: float
) -> Outcome:
    """Everything a run does, for two steps, in a folder that is removed after: the shards it needs are prepared and kept."""
    folder = os.path.join(tempfile.gettempdir(), f"sparselt-dry-run-{os.environ.get('MASTER_PORT', os.getpid())}")
    short = config.model_copy(
        update={
            "run": config.run.model_copy(update={"output_dir": folder}),
            "budget": config.budget.model_copy(update={"max_steps": 2}),
            "log": config.log.model_copy(update={"mlflow_uri": None, "every_steps": 1}),
            "train": config.train.model_copy(update={"yardsticks": False, "evaluate_samples": 64}),
        }
    )
    try:
        return pretrain(short, ranks, stop_flag, resume="auto", profile=profile, started=started)
    finally:
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            print("dry run: two steps, evaluation, checkpoint and export went through; the run folder was removed")

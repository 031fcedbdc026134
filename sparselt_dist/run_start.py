"""Where a run begins: its shards, the checkpoint it continues, and the files a start leaves in the run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparselt_dist import checkpoint, distributed, run_folder
from sparselt_dist.config import Config
from sparselt_dist.config_loading import dump
from sparselt_dist.data.shards import ShardFolder
from sparselt_dist.data.tokenizer import check_tokenizer, tokenizer_info
from sparselt_dist.errors import CheckpointError, DataError
from sparselt_dist.follower import resolve_store_uri
from sparselt_dist.journal import Journal
from sparselt_dist.metrics import ConsoleProgress
from sparselt_dist.run_plan import RunPlan, resolve_deepspeed
from sparselt_dist.trainer import Progress

if TYPE_CHECKING:
    from sparselt_dist.objectives.base import TokenizerInfo


@dataclass(frozen=True)
class Data:
    """The shards of a run."""

    train: ShardFolder
    validation: ShardFolder | None
    tokenizer: TokenizerInfo


@dataclass
class Start:
    """Where this start of a run begins."""

    checkpoint: Path | None
    progress: Progress
    ledger_seconds: dict[str, float]


def open_data(config: Config, ranks: distributed.Ranks) -> Data:
    """Open the shard folders; rank 0 first prepares them where `data.train` is null."""
    train, validation = config.data.train, config.data.validation
    if train is None:
        train, validation = distributed.on_main(ranks, lambda: _prepared(config))
    return distributed.agreed(ranks, lambda: _opened(train, validation))


def _opened(train: str, validation: str | None) -> Data:
    folder = ShardFolder(train)
    check_tokenizer(folder.path)
    held_out = ShardFolder(validation) if validation is not None else None
    if held_out is not None and held_out.manifest.tokenizer_sha256 != folder.manifest.tokenizer_sha256:
        raise DataError(
            f"data.validation: {validation} was tokenized otherwise than data.train {train}; prepare both together"
        )
    return Data(folder, held_out, tokenizer_info(folder.path))


def _prepared(config: Config) -> tuple[str, str | None]:
    from sparselt_dist.data.preparation import prepare

    report = prepare(config)
    return str(report.train_dir), None if report.validation_dir is None else str(report.validation_dir)


def find_start(
    config: Config, data: Data, plan: RunPlan, ranks: distributed.Ranks, resume: str, console: ConsoleProgress
) -> Start:
    """The checkpoint to continue and its progress; refuses one of other data or another objective."""
    run_dir = Path(plan.output_dir)
    found = distributed.on_main(ranks, lambda: run_folder.find_start(run_dir, resume, console.message))
    if found is None:
        return Start(None, Progress(), {})
    meta = checkpoint.read_meta(found)
    expected = {
        "objective": config.objective.name,
        "data_manifest_sha256": data.train.manifest.sha256,
        "seed": config.run.seed,
    }
    for key, ours in expected.items():
        if meta[key] != ours:
            raise CheckpointError(
                f"checkpoint {found}: {key} was {meta[key]}, this run has {ours}; "
                "continue with the same, choose another run.output_dir, or --resume never"
            )
    console.message(f"continuing from {found} at step {meta['step']}")
    return Start(found, Progress(**meta["progress"]), meta["ledger_seconds"])


def write_start(
    run_dir: Path,
    config: Config,
    plan: RunPlan,
    data: Data,
    ranks: distributed.Ranks,
    start: Start,
    profile: str,
    device: str,
) -> None:
    """The run folder's files of a start, and the journal cut back to the step continued from."""
    uri = config.log.mlflow_uri and resolve_store_uri(config.log.mlflow_uri)
    resolved = config.model_copy(
        update={
            "run": config.run.model_copy(update={"output_dir": plan.output_dir}),
            "log": config.log.model_copy(update={"mlflow_uri": uri}),
        }
    )
    (run_dir / "config.resolved.yaml").write_text(dump(resolved))
    run_folder.write_json(run_dir / "ds_config.resolved.json", resolve_deepspeed(config, plan))
    manifest_hash = data.train.manifest.sha256
    run_folder.write_json(
        run_dir / "environment.json", run_folder.environment(profile, manifest_hash, ranks.world_size, device)
    )
    run_folder.run_id(run_dir)
    run_folder.copy_tokenizer(data.train.path, run_dir)
    journal = Journal(run_dir)
    journal.cut_back(start.progress.step)
    journal.close()
    (run_dir / "summary.json").unlink(missing_ok=True)

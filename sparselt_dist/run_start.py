"""Where a run begins: its shards, the checkpoint it continues, and the files a start leaves in the run folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparselt_dist import checkpoint, committing, distributed, run_folder
from sparselt_dist.config import Config
from sparselt_dist.config_loading import dump
from sparselt_dist.data.corpora import Corpora, Location, open_corpora
from sparselt_dist.data.manifest import write_copy
from sparselt_dist.errors import CheckpointError, DataError
from sparselt_dist.follower import resolve_store_uri
from sparselt_dist.journal import Journal, replace_file
from sparselt_dist.metrics import ConsoleProgress, with_later
from sparselt_dist.objectives.base import PreludeReport, PreludeStopped
from sparselt_dist.run_plan import RunPlan, resolve_deepspeed
from sparselt_dist.spikes import RewindRun, merged, read_left_out, write_left_out
from sparselt_dist.timekeeping import Progress

if TYPE_CHECKING:
    from sparselt_dist.objectives.base import TokenizerInfo

CHECKED_TOKENS = 10_000_000  # ids looked at before a start, about 0.2 s; later ones are checked when drawn
CHECKED_AT_ONCE = 4096


@dataclass(frozen=True)
class Data:
    """The shards of a run."""

    train: Corpora
    validation: Corpora | None
    tokenizer: TokenizerInfo


@dataclass
class Start:
    """Where this start of a run begins."""

    checkpoint: Path | None
    progress: Progress
    ledger_seconds: dict[str, float]
    prelude: PreludeReport | None = None  # of the run's first start, where its objective has one


def open_data(config: Config, ranks: distributed.Ranks, stop_flag: distributed.StopFlag) -> Data:
    """Open the shard folders; rank 0 first prepares them where `data.train` is null.

    Raises:
        PreludeStopped: a stop was asked for meanwhile; the same preparation goes on where it was.
    """
    train: Location | None = config.data.train
    validation = config.data.validation
    if train is None:
        made = distributed.on_main(ranks, lambda: _prepared(config, stop_flag))
        if made is None:
            raise PreludeStopped
        train, validation = made
    where = train
    return distributed.agreed(ranks, lambda: _opened(config, where, validation, ranks))


def _opened(config: Config, where: Location, validation: str | None, ranks: distributed.Ranks) -> Data:
    share = (ranks.rank, ranks.world_size)  # else the storage would be asked for all of it by all at once
    train = open_corpora(where, config, share)
    tokenizer = train.check_tokenizer()
    held_out = open_corpora(validation, config, share) if validation is not None else None
    if held_out is not None and held_out.manifest.tokenizer_sha256 != train.manifest.tokenizer_sha256:
        raise DataError(
            f"data.validation: {validation} was tokenized otherwise than data.train {train.name}; prepare both together"
        )
    for opened in (train, held_out):
        if opened is not None:
            _check_rows(config, opened, share)
    return Data(train, held_out, tokenizer)


def _check_rows(config: Config, corpora: Corpora, share: tuple[int, int]) -> None:
    """The model is made for the rows' length, and the first ids, of which the ranks read a share each, lie inside the
    vocabulary."""
    found, wanted = corpora.manifest.sequence_length, config.data.sequence_length
    if found is not None and wanted is not None and found > wanted:
        raise DataError(
            f"{corpora.name}: its rows have {found} tokens, data.sequence_length is {wanted}; "
            f"set data.sequence_length={found} or prepare again"
        )
    if corpora.is_remote or corpora.manifest.kind == "text":
        return
    part, parts = share
    unread = CHECKED_TOKENS // parts
    for sample in range(part * CHECKED_AT_ONCE, corpora.num_samples, parts * CHECKED_AT_ONCE):
        if unread <= 0:
            return
        block = corpora.ids(np.arange(sample, min(sample + CHECKED_AT_ONCE, corpora.num_samples)))
        unread -= sum(len(ids) for ids in block)


def _prepared(config: Config, stop_flag: distributed.StopFlag) -> tuple[str, str | None] | None:
    """The folders, or None if it was interrupted."""
    from sparselt_dist.data.preparation import prepare

    try:
        with stop_flag.interrupting():
            report = prepare(config)
    except KeyboardInterrupt:
        return None
    return str(report.train_dir), None if report.validation_dir is None else str(report.validation_dir)


def find_start(
    config: Config, data: Data, plan: RunPlan, ranks: distributed.Ranks, resume: Sequence[str], console: ConsoleProgress
) -> Start:
    """The checkpoint to continue and its progress; refuses one of other data or another objective."""
    run_dir = Path(plan.output_dir)
    found = distributed.on_main(ranks, lambda: run_folder.find_start(run_dir, resume, console.message))
    if found is None:
        return Start(None, Progress(), {})
    meta = distributed.agreed(ranks, lambda: _matching_meta(found, config, data))
    console.message(f"continuing from {found} at step {meta['step']}")
    ledger_seconds = distributed.on_main(ranks, lambda: _ledger_of(run_dir, found, meta))
    prelude = meta.get("prelude")
    progress = Progress.from_dict(meta["progress"])
    noted = distributed.on_main(ranks, lambda: read_left_out(run_dir, progress.position))
    progress.left_out = merged([*progress.left_out, *noted])
    return Start(
        found,
        progress,
        ledger_seconds,
        None if prelude is None else PreludeReport(**prelude),
    )


def _ledger_of(run_dir: Path, found: Path, meta: dict[str, Any]) -> dict[str, float]:
    """Seconds of all earlier starts by phase; of the run in this folder also those after its last checkpoint."""
    lines = Journal.read(run_dir) if found.parent.parent == run_dir else []
    seconds: dict[str, float] = meta["ledger_seconds"]
    return with_later(seconds, lines[-1]["step"] > meta["step"], lines[-1]) if lines else seconds


def rewound(
    config: Config,
    data: Data,
    plan: RunPlan,
    ranks: distributed.Ranks,
    before: Progress,
    spike: RewindRun,
    saved: Path,
    console: ConsoleProgress,
) -> Start:
    """The start that a spike leads back to: the checkpoint saved last, without the spike's data; the clock goes on."""
    run_dir, left_out = Path(plan.output_dir), merged([*before.left_out, spike.positions])
    distributed.on_main(ranks, lambda: write_left_out(run_dir, left_out))
    begin, end = spike.positions
    console.message(f"{spike}; back to the last checkpoint, {end - begin} samples are left out")
    is_own = saved.parent.parent == run_dir  # then, if it is damaged, the one before it will do
    start = find_start(config, data, plan, ranks, ["must" if is_own else str(saved)], console)
    start.progress.left_out = merged([*start.progress.left_out, *left_out])
    start.progress.seconds, start.progress.pace = before.seconds, before.pace
    distributed.on_main(ranks, lambda: _cut_back(run_dir, start.progress.step))
    return start


def _cut_back(run_dir: Path, step: int) -> None:
    journal = Journal(run_dir)
    journal.cut_back(step)
    journal.close()


def _matching_meta(found: Path, config: Config, data: Data) -> dict[str, Any]:
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
    return meta


def _resolved(config: Config, plan: RunPlan) -> Config:
    """The configuration with nothing left to the place it was started from; `--config` takes it back."""
    uri = config.log.mlflow_uri and resolve_store_uri(config.log.mlflow_uri)
    model = config.model
    if model.init_from is not None:  # the checkpoint's architecture was followed
        stored = json.loads((Path(model.init_from) / "config.json").read_text())
        model = model.model_copy(update={"architecture": stored["model_type"]})
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"output_dir": plan.output_dir}),
            "log": config.log.model_copy(update={"mlflow_uri": uri}),
            "model": model,
        }
    )


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
    """The run folder's files of a start; journal and checkpoints cut back to the step continued from."""
    step = start.progress.step
    environment = run_folder.environment(profile, data.train.manifest.sha256, ranks.world_size, device)
    try:
        replace_file(run_dir / "config.resolved.yaml", dump(_resolved(config, plan)).encode())
        run_folder.write_json(run_dir / "ds_config.resolved.json", resolve_deepspeed(config, plan))
        run_folder.write_json(run_dir / "environment.json", environment)
        run_folder.run_id(run_dir)
        run_folder.copy_tokenizer(data.train.tokenizer, run_dir)
        write_copy(data.train.manifest, run_dir)
        committing.clean_leftovers(run_dir)
        committing.set_aside_after(run_dir, step)
        (run_dir / "summary.json").unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"run.output_dir: {run_dir} cannot be written ({error}); free space or choose another"
        ) from None
    _cut_back(run_dir, step)

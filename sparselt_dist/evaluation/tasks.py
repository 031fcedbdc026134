"""The named tasks of `sparselt evaluate`, on a run's checkpoint or on an exported folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from sparselt_dist import checkpoint
from sparselt_dist.budget import Budget
from sparselt_dist.config import Config
from sparselt_dist.config_loading import load_config, make_plan
from sparselt_dist.data.cleaning import Normalization, as_normalization, text_normalization
from sparselt_dist.data.corpora import Corpora, Location, open_corpora
from sparselt_dist.data.loader import evaluation_batches
from sparselt_dist.data.manifest import Manifest, read_copy
from sparselt_dist.data.tokenizer import load_for_text
from sparselt_dist.errors import CheckpointError, DataError
from sparselt_dist.evaluation.features import MAX_LENGTH
from sparselt_dist.evaluation.fine_tuning import FineTuning, fine_tune
from sparselt_dist.evaluation.heldout import heldout_means
from sparselt_dist.evaluation.labelled_tasks import read_tasks
from sparselt_dist.evaluation.last_word import PassageReader, cut_passages, heads_of, last_word_scores, read_passages
from sparselt_dist.evaluation.yardsticks import run_yardsticks
from sparselt_dist.follower import read_json
from sparselt_dist.models.assembly import build_collator
from sparselt_dist.models.backbone import Backbone, PretrainingModel
from sparselt_dist.models.exporting import export_checkpoint, longest_input
from sparselt_dist.models.loading import LoadedCheckpoint, load_checkpoint, load_exported
from sparselt_dist.models.objective_weights import MARKER
from sparselt_dist.objectives.base import Collator, TokenizerInfo, get_objective
from sparselt_dist.objectives.settings import MLMConfig

_PASSAGES = 512  # cut from held-out text
_ROWS_PER_FORWARD = 32  # of an exported model, which knows of no micro-batch


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a checkpoint with its objective, or the backbone of an exported folder."""

    folder: Path
    run_dir: Path | None  # the run it came from, where that is around it
    step: int
    backbone: Backbone
    tokenizer: TokenizerInfo
    tokenizer_sha256: str | None  # of the shards it was trained on, where that is known
    config: Config
    normalization: Normalization  # of the text it was trained on, as far as that is known
    loaded: LoadedCheckpoint | None


@dataclass(frozen=True)
class Shards:
    """Where it is evaluated."""

    train: Corpora | None
    held_out: Corpora | None
    passages: Path | None = None
    """A file of passages for task last-word; None: they are cut from held-out text."""
    fine_tuning: FineTuning | None = None
    """What task fine-tune is asked for."""

    @property
    def validation(self) -> Corpora:
        """The held-out shards. Raises DataError where there are none."""
        if self.held_out is None:
            raise DataError("evaluate: no held-out shards are known; name them by --validation")
        return self.held_out

    def training(self) -> Corpora:
        """The training shards. Raises DataError where there are none."""
        if self.train is None:
            raise DataError(
                "evaluate: the training shards are not known, which a recovered head is fitted on; name them by --data"
            )
        return self.train


def open_subject(path: Path) -> Subject:
    """A checkpoint, the newest checkpoint of a run folder, or an exported folder.

    Raises:
        CheckpointError: it is none of these, or damaged.
    """
    if (path / "config.json").is_file():
        return _open_exported(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; expected a run, a checkpoint or an exported model")
    loaded = load_checkpoint(checkpoint.find_intact(path))
    return Subject(
        folder=loaded.path,
        run_dir=loaded.run_dir,
        step=loaded.meta["step"],
        backbone=loaded.model.backbone,
        tokenizer=loaded.tokenizer,
        tokenizer_sha256=loaded.meta["tokenizer_sha256"],
        config=loaded.config,
        normalization=text_normalization(loaded.run_dir, loaded.config.prepare.normalize),
        loaded=loaded,
    )


def _open_exported(path: Path) -> Subject:
    backbone, tokenizer = load_exported(path)
    run_dir = path.resolve().parent
    resolved = run_dir / "config.resolved.yaml"
    marker = read_json(path / MARKER)
    inside_run = resolved.is_file() and bool(marker)
    config = load_config([str(resolved)], for_training=False) if inside_run else Config()
    told = as_normalization(marker.get("normalize"), config.prepare.normalize)
    normalization = text_normalization(run_dir if inside_run else None, told)
    return Subject(
        folder=path,
        run_dir=run_dir if inside_run else None,
        step=int(marker.get("step", 0)),
        backbone=backbone,
        tokenizer=tokenizer,
        tokenizer_sha256=marker.get("tokenizer_sha256"),
        config=config,
        normalization=normalization,
        loaded=None,
    )


def open_shards(
    subject: Subject,
    train: str | None,
    validation: str | None,
    passages: Path | None = None,
    fine_tuning: FineTuning | None = None,
    *,
    needed: bool = True,
) -> Shards:
    """The shards named on the command line, else those of the run; `needed`: held-out ones must be known.

    Raises:
        DataError: none are known, they are damaged, or of another tokenizer.
    """
    config = subject.config
    own_train, own_validation = _own_shards(subject)
    where: Location | None = train or own_train
    validation = validation or own_validation
    if not needed:
        return Shards(None, None, passages, fine_tuning)
    if validation is None:
        raise DataError(f"evaluate: {subject.folder} knows of no held-out shards; name them by --validation")
    train_corpora = None if where is None else open_corpora(where, config)
    shards = Shards(train_corpora, open_corpora(validation, config), passages, fine_tuning)
    for corpora in (shards.train, shards.validation):
        found = None if corpora is None else corpora.manifest.tokenizer_sha256
        if found is not None and subject.tokenizer_sha256 not in (None, found):
            raise DataError(
                f"{corpora.name if corpora else ''}: tokenized otherwise than what {subject.folder} was trained on; "
                "prepare the text with the model's own tokenizer (prepare.tokenizer=FOLDER)"
            )
    return shards


def _own_shards(subject: Subject) -> tuple[Location | None, str | None]:
    config = subject.config
    if subject.run_dir is None:
        return None, None
    if config.data.train is not None or config.prepare.validation_fraction == 0:
        return config.data.train, config.data.validation
    return str(Path(config.prepare.output_dir) / "train"), str(Path(config.prepare.output_dir) / "validation")


def run_tasks(subject: Subject, shards: Shards, names: list[str], device: torch.device) -> dict[str, float]:
    """The metrics of the named tasks.

    Raises:
        CheckpointError: a task does not fit the model.
    """
    (subject.backbone if subject.loaded is None else subject.loaded.model).to(device)  # with what the objective adds
    results: dict[str, float] = {}
    for name in names:
        results |= _TASKS[name](subject, shards, device)
    return results


def _yardsticks(subject: Subject, shards: Shards, device: torch.device) -> dict[str, float]:
    return run_yardsticks(subject.backbone, shards.training(), shards.validation, subject.tokenizer, device=device)


def _heldout(subject: Subject, shards: Shards, device: torch.device) -> dict[str, float]:
    if subject.loaded is not None:
        return {f"eval/{name}": value for name, value in _objective_means(subject.loaded, shards, device).items()}
    if not subject.backbone.has_head or subject.backbone.is_causal:
        found = type(subject.backbone.model).__name__
        raise CheckpointError(
            f"{subject.folder}: found {found}, task heldout expects a masked language model; "
            "use --tasks yardsticks, or evaluate the run's checkpoint by its own objective"
        )
    mlm = get_objective("mlm")
    model = PretrainingModel(subject.backbone, mlm.build_module(MLMConfig(), subject.backbone))
    means = _means(
        model, shards, mlm.build_collator(MLMConfig(), subject.tokenizer), subject.config, _ROWS_PER_FORWARD, device
    )
    return {f"eval/masked_{'ce' if name == 'loss' else name}": value for name, value in means.items()}


def _objective_means(loaded: LoadedCheckpoint, shards: Shards, device: torch.device) -> dict[str, float]:
    config, progress = loaded.config, loaded.meta["progress"]
    model = loaded.model.to(device)
    spent = Budget.from_section(config.budget, progress.get("prelude_seconds", 0.0)).fraction(
        steps=progress["step"], tokens=progress["tokens"], seconds=progress["seconds"]
    )
    model.set_progress(progress["step"], min(1.0, spent))
    rows = make_plan(config, loaded.meta["world_size"]).micro_batch_size
    return _means(model, shards, build_collator(config, loaded.tokenizer), config, rows, device)


def _last_word(subject: Subject, shards: Shards, device: torch.device) -> dict[str, float]:
    backbone, info = subject.backbone, subject.tokenizer
    if not backbone.is_causal:
        raise CheckpointError(
            f"{subject.folder}: found {type(backbone.model).__name__}, task last-word expects a causal model, which predicts "
            "from what stands before; name a decoder, or other --tasks"
        )
    manifest = shards.held_out.manifest if shards.held_out is not None else _own_manifest(subject)
    reader = PassageReader(
        load_for_text(subject.folder if subject.loaded is None else subject.loaded.tokenizer_dir),
        info,
        begins_behind_end=manifest is not None and manifest.kind == "rows",
        longest=longest_input(backbone.config) or MAX_LENGTH,
    )
    if shards.passages is not None:
        passages = read_passages(shards.passages, reader, subject.normalization)
    else:
        passages = cut_passages(shards.validation, reader, samples=_PASSAGES)
    if not passages:
        raise DataError(
            f"evaluate: task last-word: found no passage in {shards.validation.name}, whose rows have too few words; name a file "
            "of passages by --last-word"
        )
    objective = None if subject.loaded is None else subject.loaded.model.objective
    return last_word_scores(backbone, heads_of(backbone, objective), passages, info.pad_id, device)


def _fine_tune(subject: Subject, shards: Shards, device: torch.device) -> dict[str, float]:
    asked = shards.fine_tuning
    if asked is None:
        raise DataError("evaluate: task fine-tune has no labelled texts; name their folder by --fine-tune")
    if subject.backbone.is_causal:
        raise CheckpointError(
            f"{subject.folder}: found {type(subject.backbone.model).__name__}, task fine-tune expects an encoder; name one, or "
            "other --tasks"
        )
    tasks = read_tasks(asked.folder)
    with TemporaryDirectory(prefix="sparselt-") as scratch:
        folder = subject.folder
        if subject.loaded is not None:  # what the objective adds to the inputs is folded in, as in any export
            folder = export_checkpoint(folder, Path(scratch, "model"))
        return fine_tune(folder, tasks, subject.normalization, device, trials=asked.trials, tell=asked.tell)


def _own_manifest(subject: Subject) -> Manifest | None:
    return None if subject.run_dir is None else read_copy(subject.run_dir)


def _means(
    model: PretrainingModel, shards: Shards, collator: Collator, config: Config, rows: int, device: torch.device
) -> dict[str, float]:
    batches = evaluation_batches(
        shards.validation,
        collator,
        max_samples=config.train.evaluate_samples,
        micro_batch_size=rows,
        rank=0,
        world_size=1,
    )
    return heldout_means(model.eval(), batches, device)


_TASKS: dict[str, Callable[[Subject, Shards, torch.device], dict[str, float]]] = {
    "heldout": _heldout,
    "yardsticks": _yardsticks,
    "last-word": _last_word,
    "fine-tune": _fine_tune,
}

"""A model to a Hugging Face folder: weights as safetensors, tokenizer, pipeline settings, model card, own code.

The folder is written beside its place and renamed into it, so that it is there as a whole or not at all. A folder that
an export of the same run left is replaced; any other that is not empty is refused. `sparselt_export.json` says whose it
is; `objective.safetensors` holds parameters of the objective that no Hugging Face class has. What an objective adds to the
input embeddings is folded into them.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from sparselt_dist.data.cleaning import text_normalization
from sparselt_dist.data.manifest import Manifest, read_copy
from sparselt_dist.data.tokenizer import CONFIG_FILE, TOKENIZER_FILE, tokenizer_info
from sparselt_dist.errors import CheckpointError
from sparselt_dist.journal import Journal
from sparselt_dist.models.backbone import Backbone
from sparselt_dist.models.construction import POSITIONS_AFTER_PADDING
from sparselt_dist.models.folding import fold_inputs
from sparselt_dist.models.head_export import with_exported_head
from sparselt_dist.models.loading import LoadedCheckpoint, load_checkpoint
from sparselt_dist.models.model_card import ModelFacts, model_card
from sparselt_dist.models.objective_weights import MARKER, OBJECTIVE_FILE

CARD = "README.md"
_LOG = logging.getLogger(__name__)
_LOG = logging.getLogger(__name__)


def export_checkpoint(checkpoint: Path, output_dir: Path, *, metrics: Mapping[str, float] | None = None) -> Path:
    """Export a complete checkpoint folder; returns the folder written.

    Args:
        metrics: for the model card; None: the last ones of the run's journal up to the checkpoint's step.

    Raises:
        CheckpointError: the checkpoint cannot be used, or `output_dir` holds anything but an earlier export of the run.
    """
    check_target(output_dir, _run_id(checkpoint.resolve().parent.parent))
    loaded = load_checkpoint(checkpoint)
    is_whole = fold_inputs(loaded.model)
    if not is_whole:
        _LOG.warning(
            "export: the model in %s lacks what objective %s adds to the input embeddings, which depends on context; "
            "evaluate the run's checkpoint instead",
            output_dir,
            loaded.config.objective.name,
        )
    head = with_exported_head(loaded.model)
    if head.is_missing:
        _LOG.warning("export: %s: the recovered head is %s", output_dir, head.note)
    meta, config = loaded.meta, loaded.config
    recorded = recorded_metrics(loaded.run_dir, meta["step"]) if metrics is None else metrics
    card = model_card(
        config,
        _training_manifest(loaded.run_dir, meta["data_manifest_sha256"]),
        model_facts(head.backbone, loaded.tokenizer_dir),
        progress={"step": meta["step"], "tokens": meta["tokens"], "seconds": meta["progress"]["seconds"]},
        data_sha256=meta["data_manifest_sha256"],
        metrics=recorded,
    )
    return export_model(
        head.backbone,
        loaded.tokenizer_dir,
        output_dir,
        card + (f"\nThe recovered head is {head.note}.\n" if head.note else ""),
        run_id=_run_id(loaded.run_dir),
        objective_state=dict(loaded.model.objective.state_dict()),
        facts={**_marker_facts(loaded), "is_whole": is_whole} | ({"head": head.note} if head.note else {}),
    )


def export_model(
    backbone: Backbone,
    tokenizer_dir: Path,
    output_dir: Path,
    card: str,
    *,
    run_id: str = "",
    objective_state: Mapping[str, Tensor] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model that is in memory as a Hugging Face folder; returns the folder.

    Args:
        backbone: its `model` is saved: with its head, or bare.
        card: text of README.md.
        run_id: whose export it is; only an earlier export of the same run is replaced.
        objective_state: parameters of the objective, saved beside the model if there are any.
        facts: further entries of `sparselt_export.json`.

    Raises:
        CheckpointError: `output_dir` cannot be written, or is not empty and not an earlier export of the run.
    """
    target = output_dir.resolve()  # a link stays a link
    check_target(target, run_id)
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with no_progress_bars():
            backbone.model.save_pretrained(partial)
        _write_tokenizer(backbone, tokenizer_dir, partial)
        if objective_state:
            tensors = {name: value.detach().cpu().contiguous().clone() for name, value in objective_state.items()}
            save_file(tensors, partial / OBJECTIVE_FILE)
        (partial / CARD).write_text(card, encoding="utf-8")
        marker = json.dumps({"run_id": run_id, **(facts or {})}, indent=1)
        (partial / MARKER).write_text(marker + "\n", encoding="utf-8")
        _sync(partial)
        _replace(target, partial)
    except OSError as cause:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"export: {output_dir} cannot be written ({cause}); free space, mend permissions or name another folder"
        ) from cause
    return output_dir


def check_target(target: Path, run_id: str) -> None:
    """Raise CheckpointError unless the folder is absent, empty or an earlier export of the run."""
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"export: {target} is a file, expected a folder to write; name another")
    content = sorted(path.name for path in target.iterdir())
    if not content:
        return
    try:
        marker = json.loads((target / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        marker = None
    if not isinstance(marker, dict) or marker.get("run_id") != run_id:
        foreign = f"other files ({content[0]}, ...)"
        owner = f"an export of run {marker.get('run_id')}" if isinstance(marker, dict) else foreign
        raise CheckpointError(
            f"export: {target} holds {owner}, expected an absent or empty folder, or an earlier export of this run; "
            "name another folder, or remove it yourself"
        )


def model_facts(backbone: Backbone, tokenizer_dir: Path) -> ModelFacts:
    """What the model card says of the model."""
    model = backbone.model
    parameters = inspect.signature(type(model).__init__).parameters
    return ModelFacts(
        class_name=type(model).__name__,
        auto_class=_auto_class(backbone),
        pipeline=_pipeline(backbone),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        mask_token=_mask_token(tokenizer_dir),
        remote_code=bool(getattr(model.config, "auto_map", None)),
        load_options="" if backbone.has_head or "add_pooling_layer" not in parameters else ", add_pooling_layer=False",
    )


def recorded_metrics(run_dir: Path, step: int) -> dict[str, float]:
    """The last `eval/` and `yardstick/` values of a run's journal up to a step."""
    found: dict[str, float] = {}
    for line in Journal.read(run_dir):
        if line["step"] <= step:
            chosen = {key: value for key, value in line.items() if key.startswith(("eval/", "yardstick/"))}
            found.update({key: float(value) for key, value in chosen.items() if value is not None})
    return found


def _run_id(run_dir: Path) -> str:
    """The run folder's lasting identity; its path where it has none yet."""
    try:
        return (run_dir / "run_id").read_text(encoding="ascii").strip()
    except OSError:
        return str(run_dir)


def _marker_facts(loaded: LoadedCheckpoint) -> dict[str, Any]:
    return {
        "run": loaded.config.run.name,
        "objective": loaded.config.objective.name,
        "normalize": text_normalization(loaded.run_dir, loaded.config.prepare.normalize),
        "step": loaded.meta["step"],
        "tokens": loaded.meta["tokens"],
        "data_manifest_sha256": loaded.meta["data_manifest_sha256"],
        "tokenizer_sha256": loaded.meta["tokenizer_sha256"],
    }


def _training_manifest(run_dir: Path, sha256: str) -> Manifest | None:
    """The run's copy of its training shards' manifest, if it is of the shards that this checkpoint was trained on."""
    manifest = read_copy(run_dir)
    return manifest if manifest is not None and manifest.sha256 == sha256 else None


# --- the parts of the folder -----------------------------------------------------------------------------------------


def _auto_class(backbone: Backbone) -> str:
    if not backbone.has_head:
        return "AutoModel"
    return "AutoModelForCausalLM" if backbone.is_causal else "AutoModelForMaskedLM"


def _pipeline(backbone: Backbone) -> str:
    if not backbone.has_head:
        return "feature-extraction"
    return "text-generation" if backbone.is_causal else "fill-mask"


def _write_tokenizer(backbone: Backbone, tokenizer_dir: Path, folder: Path) -> None:
    """The tokenizer's files, with the settings that pipelines read made to fit the model."""
    for path in sorted(tokenizer_dir.iterdir()):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    path = folder / CONFIG_FILE
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    settings["model_input_names"] = _input_names(backbone.model)
    longest = longest_input(backbone.config)
    if longest is not None:
        settings["model_max_length"] = min(int(settings.get("model_max_length", longest)), longest)
    if backbone.is_causal:
        settings["padding_side"] = "left"  # a prompt is continued at its end
        _open_ended(folder)
    path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _input_names(model: PreTrainedModel) -> list[str]:
    """What the tokenizer hands to the model: token types only to a model that has a table of them."""
    typed = getattr(model.config, "type_vocab_size", 0) > 1
    return ["input_ids", *(["token_type_ids"] if typed else []), "attention_mask"]


def longest_input(config: PretrainedConfig) -> int | None:
    """Positions that a row may have, or None where the architecture sets no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    taken = config.pad_token_id + 1 if config.model_type in POSITIONS_AFTER_PADDING else 0
    return positions - taken


def _open_ended(folder: Path) -> None:
    """Take away a template that closes every text: a decoder would be asked to go on after the end of a document."""
    path = folder / TOKENIZER_FILE
    ids = Tokenizer.from_file(str(path)).encode("a").ids
    if ids and ids[-1] in tokenizer_info(folder).special_ids:
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored["post_processor"] = None
        path.write_text(json.dumps(stored, ensure_ascii=False), encoding="utf-8")


def _mask_token(tokenizer_dir: Path) -> str | None:
    mask_id = tokenizer_info(tokenizer_dir).mask_id
    if mask_id is None:
        return None
    return str(Tokenizer.from_file(str(tokenizer_dir / TOKENIZER_FILE)).id_to_token(mask_id))


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Inside, transformers shows none."""
    controls = transformers.utils.logging
    shown = controls.is_progress_bar_enabled()
    controls.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            controls.enable_progress_bar()


def _sync(folder: Path) -> None:
    """Force every file and the folder itself to disk."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace(target: Path, partial: Path) -> None:
    """Put the new folder in its place; an earlier one goes only after that."""
    old = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)

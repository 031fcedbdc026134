"""A checkpoint of a run, or an exported folder, back to a model in memory, with what belongs to it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sparselt_dist import checkpoint
from sparselt_dist.config import Config, ModelSection
from sparselt_dist.data.tokenizer import tokenizer_info
from sparselt_dist.errors import CheckpointError
from sparselt_dist.models.assembly import build_model
from sparselt_dist.models.backbone import Backbone, PretrainingModel, build_backbone
from sparselt_dist.objectives.base import TokenizerInfo

_HEADS = ("ForMaskedLM", "ForCausalLM", "LMHeadModel", "ForPreTraining")


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A run's model as it was at a checkpoint, on the CPU."""

    path: Path
    run_dir: Path
    tokenizer_dir: Path
    config: Config
    meta: dict[str, Any]
    tokenizer: TokenizerInfo
    model: PretrainingModel


def load_checkpoint(path: Path) -> LoadedCheckpoint:
    """Rebuild the model of a complete checkpoint folder and load its weights, every one of them.

    Raises:
        CheckpointError: the checkpoint is damaged, not inside its run folder, or of another model than it says.
    """
    path = path.resolve()
    meta = checkpoint.read_meta(path)
    run_dir = path.parent.parent
    tokenizer_dir = run_dir / "tokenizer"
    if not tokenizer_dir.is_dir():
        raise CheckpointError(
            f"checkpoint {path}: found no tokenizer/ in {run_dir}, expected the run's folder around checkpoints/; "
            "copy a run folder as a whole"
        )
    try:
        config = Config.model_validate(meta["config"])
    except (KeyError, ValidationError) as cause:
        raise CheckpointError(
            f"checkpoint {path}: its configuration cannot be read ({cause}); use the version that wrote it"
        ) from cause
    # The architecture as it was trained: folders that the run started from may be gone.
    section = config.model.model_copy(
        update={"architecture": str(path), "init_from": None, "init_objective": False, "config": {}}
    )
    config = config.model_copy(update={"model": section})
    tokenizer = tokenizer_info(tokenizer_dir)
    model = build_model(config, tokenizer)
    checkpoint.load_into(model, path)
    return LoadedCheckpoint(path, run_dir, tokenizer_dir, config, meta, tokenizer, model.eval())


def load_exported(folder: Path) -> tuple[Backbone, TokenizerInfo]:
    """The backbone of a Hugging Face folder, on the CPU in float32, and its tokenizer's description.

    It has a head if the folder holds a masked or causal language model.

    Raises:
        CheckpointError: no readable model in the folder.
        DataError: no fast tokenizer beside it.
    """
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = str((stored.get("architectures") or [""])[0])
    except (OSError, ValueError, AttributeError) as cause:
        raise CheckpointError(
            f"{folder}: config.json cannot be read ({cause}); expected a folder written by export"
        ) from cause
    tokenizer = tokenizer_info(folder)
    section = ModelSection(init_from=str(folder))
    backbone = build_backbone(section, tokenizer, sequence_length=None, with_head=architecture.endswith(_HEADS))
    return backbone.eval(), tokenizer

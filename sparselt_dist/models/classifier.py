"""An exported encoder with a new classification head, as fine-tuning begins.

The encoder's weights come from the folder, every one of them; pooler and classifier are new, drawn from torch's global generator.
What is pooled is the first position.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from sparselt_dist.errors import CheckpointError
from sparselt_dist.models import crammed  # its import registers crammed-bert with the Auto classes
from sparselt_dist.models.construction import quiet_transformers

_FIRST_POSITION = {
    "pooler": crammed.VARIANTS["pooler"][0],
    "classifier_pooling": "cls",
}  # of crammed-bert, of ModernBERT


def load_classifier(folder: Path, *, outputs: int, dropout: float, pad_id: int) -> PreTrainedModel:
    """The model float32 on the CPU: `outputs` scores a row.

    Args:
        dropout: of every place where the architecture has one.

    Raises:
        CheckpointError: the folder holds no encoder that transformers can classify with, or not all of its weights.
    """
    try:
        # False, not left out: else transformers asks the terminal whether to run code of the folder.
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _set_fields(config, outputs, dropout, pad_id)
        with quiet_transformers():
            loaded: tuple[PreTrainedModel, dict[str, Any]] = AutoModelForSequenceClassification.from_pretrained(
                folder, config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError) as cause:
        raise CheckpointError(
            f"{folder}: cannot be loaded for classification ({type(cause).__name__}: {cause}); task fine-tune expects an "
            "encoder that transformers has a classification model of"
        ) from cause
    model, report = loaded
    own = f"{model.base_model_prefix}."
    missing = sorted(name for name in report["missing_keys"] if name.startswith(own) and ".pooler." not in name)
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} weights of the encoder are missing, such as {missing[0]}; export it again"
        )
    return model


def _set_fields(config: PretrainedConfig, outputs: int, dropout: float, pad_id: int) -> None:
    config.num_labels = outputs
    config.pad_token_id = pad_id
    config.problem_type = "regression" if outputs == 1 else "single_label_classification"
    for name, value in _FIRST_POSITION.items():
        if hasattr(config, name):
            setattr(config, name, value)
    for name, value in config.to_dict().items():
        # a share, or None where it is that of another field
        if "dropout" in name and not isinstance(value, bool) and (value is None or isinstance(value, int | float)):
            setattr(config, name, dropout)

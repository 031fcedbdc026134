"""A configuration to a model: backbone and objective module put together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sparselt_dist.config import Config
from sparselt_dist.config_loading import objective_settings
from sparselt_dist.models.backbone import PretrainingModel, build_backbone
from sparselt_dist.models.objective_weights import load_objective_weights
from sparselt_dist.objectives import get_objective

if TYPE_CHECKING:
    from sparselt_dist.objectives.base import Collator, TokenizerInfo


def build_model(config: Config, tokenizer: TokenizerInfo) -> PretrainingModel:
    """The model that is trained, with initial weights that follow from `run.seed` alone."""
    objective = get_objective(config.objective.name)
    settings = objective_settings(config)
    torch.manual_seed(config.run.seed)
    backbone = build_backbone(
        config.model,
        tokenizer,
        sequence_length=config.data.sequence_length,
        with_head=objective.needs_lm_head(settings),
        unpad=config.train.unpad,
    )
    module = objective.build_module(settings, backbone)
    if config.model.init_objective and config.model.init_from is not None:
        load_objective_weights(module, Path(config.model.init_from), config.objective.name)
    return PretrainingModel(backbone, module)


def build_collator(config: Config, tokenizer: TokenizerInfo) -> Collator:
    """The collator of the configured objective."""
    return get_objective(config.objective.name).build_collator(objective_settings(config), tokenizer)

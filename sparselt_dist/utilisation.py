"""How well a run uses its devices: the FLOPs of a token over their peak, and their power."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from sparselt_dist.config import Config
from sparselt_dist.config_loading import objective_settings
from sparselt_dist.device import watts_of
from sparselt_dist.metrics import peak_flops
from sparselt_dist.models.workload import workload
from sparselt_dist.objectives import get_objective
from sparselt_dist.objectives.cost import flops_per_token

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

    from sparselt_dist.data.corpora import Corpora


def utilisation(
    config: Config, engine: DeepSpeedEngine, row_length: float, world_size: int
) -> Callable[[float], float]:
    """Targets a token to the MFU of one token a second: a token's FLOPs over the peak of all devices."""
    given = config.log.peak_tflops
    peak = given * 1e12 if given is not None else peak_flops(engine.device, config.train.precision)
    objective, settings = get_objective(config.objective.name), objective_settings(config)
    work = workload(
        engine.module.backbone,
        mean_length=row_length,
        targets_per_token=0.0,
        micro_batch_size=engine.train_micro_batch_size_per_gpu(),
        world_size=world_size,
        accumulation_steps=engine.gradient_accumulation_steps(),
    )

    def of_device(targets_per_token: float) -> float:
        of_step = dataclasses.replace(work, targets_per_token=targets_per_token)
        return flops_per_token(objective, settings, of_step) / (peak * world_size)

    return of_device


def device_watts(device: torch.device) -> float | None:
    """The power of a known GPU."""
    return None if device.type == "cpu" else watts_of(torch.cuda.get_device_name(device))


def row_length(corpora: Corpora) -> float:
    """Tokens a row: what attention spans."""
    return float(corpora.manifest.sequence_length or corpora.mean_length)

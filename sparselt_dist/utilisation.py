"""How well a run uses its devices: the FLOPs of a token over their peak, and their power."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
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

LOOKED_AT = 256  # samples


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


def row_length(corpora: Corpora, longest: int | None) -> float:
    """Tokens that attention spans, seen from a token: sum of squares over sum of the lengths of what is kept apart.

    Rows of running text are all of one length; documents, whole or in packed rows, are looked at in the first samples and
    are cut at `longest`.
    """
    if corpora.manifest.kind == "rows" and corpora.manifest.sequence_length is not None:
        return float(corpora.manifest.sequence_length)
    some = corpora.read(np.arange(min(corpora.num_samples, LOOKED_AT)))
    documents = [one.documents if one.documents is not None else [len(one.ids)] for one in some if one is not None]
    lengths = np.minimum(np.concatenate(documents), longest or np.inf) if documents else np.ones(1)
    return float((lengths**2).sum() / max(lengths.sum(), 1))

"""A start's engine: model, optimizer and DeepSpeed, as they were at the checkpoint that it continues from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from sparselt_dist import checkpoint, distributed, engine_state
from sparselt_dist.config import Config
from sparselt_dist.models.assembly import build_model
from sparselt_dist.optim import build_optimizer
from sparselt_dist.run_plan import RunPlan, resolve_deepspeed
from sparselt_dist.run_start import Data, Start

if TYPE_CHECKING:
    from sparselt_dist.models.backbone import PretrainingModel


def build_engine(
    config: Config,
    plan: RunPlan,
    data: Data,
    start: Start,
    ranks: distributed.Ranks,
    before: Callable[[PretrainingModel], None],
) -> DeepSpeedEngine:
    """Model, optimizer and DeepSpeed engine, continued from the start's checkpoint; `before` is handed a new model."""
    settings = distributed.agreed(ranks, lambda: resolve_deepspeed(config, plan))
    model = distributed.agreed(ranks, lambda: _loaded_model(config, data, start.checkpoint))
    if start.checkpoint is None:
        before(model)
    if config.train.compile:
        model.backbone.body.compile()
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, config.optim, encoder_lr_ratio=config.optim.encoder_lr_ratio),
        config=settings,
        dist_init_required=False,
    )
    if ranks.world_size == 1:
        reduce_nothing(engine)
    if (saved := start.checkpoint) is not None:
        distributed.agreed(ranks, lambda: _restore(engine, saved, ranks))
        engine.global_steps = start.progress.step
    return engine


def _restore(engine: DeepSpeedEngine, saved: Path, ranks: distributed.Ranks) -> None:
    meta = checkpoint.read_meta(saved)
    moments = checkpoint.open_tensors(saved, "moments", ranks.rank / ranks.world_size)
    engine_state.restore_moments(engine, moments.read_elements, meta["optimizer_steps"])
    engine_state.restore_loss_scaler(engine, meta["loss_scaler"])


def reduce_nothing(engine: DeepSpeedEngine) -> None:
    """For a rank alone: without ZeRO, DeepSpeed would copy all gradients to a buffer, sum them over it and copy them back.

    What is left of it: parameters that the step did not use get zeros for a gradient, so that one rank decays them as two do.
    """

    trained = [p for p in engine.module.parameters() if p.requires_grad]

    def only_fill(grads: object = None, elements_per_buffer: int = 0) -> None:
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    engine.buffered_allreduce_fallback = only_fill


def _loaded_model(config: Config, data: Data, source: Path | None) -> PretrainingModel:
    model = build_model(config, data.tokenizer)
    if source is not None:
        checkpoint.load_into(model, source)
    return model


def restore_rank(start: Start, ranks: distributed.Ranks, seed: int) -> None:
    """This rank's random state; after a change of the number of ranks a fresh one that follows from seed and step."""
    torch.manual_seed(((seed * 1_000_003 + start.progress.step) * 65_537 + ranks.rank) % 2**63)
    if start.checkpoint is None or checkpoint.read_meta(start.checkpoint)["world_size"] != ranks.world_size:
        return
    state = torch.load(start.checkpoint / f"rank_{ranks.rank:05d}.pt", weights_only=True)
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])

"""The sizes of a backbone and of its step that FLOPs follow from."""

from __future__ import annotations

import torch

from sparselt_dist.models.backbone import Backbone
from sparselt_dist.objectives.cost import Workload


def workload(
    backbone: Backbone,
    *,
    mean_length: float,
    targets_per_token: float,
    micro_batch_size: int,
    world_size: int,
    accumulation_steps: int,
) -> Workload:
    """The workload of a step; the backbone may lie on the meta device or be partitioned (ZeRO-3)."""
    config = backbone.config
    body = backbone.body
    tables = {id(p) for module in body.modules() if isinstance(module, torch.nn.Embedding) for p in module.parameters()}
    return Workload(
        body_parameters=sum(getattr(p, "ds_numel", p.numel()) for p in body.parameters() if id(p) not in tables),
        num_layers=int(config.num_hidden_layers),
        hidden_size=backbone.hidden_size,
        inner_size=int(getattr(config, "intermediate_size", None) or 4 * backbone.hidden_size),
        vocab_size=backbone.vocab_size,
        has_head=backbone.has_head,
        is_causal=backbone.is_causal,
        mean_length=mean_length,
        targets_per_token=targets_per_token,
        micro_batch_tokens=micro_batch_size * mean_length,
        world_size=world_size,
        micro_batches=world_size * accumulation_steps,
    )

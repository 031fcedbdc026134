"""Parameter groups and optimizers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from sparselt_dist.config import OptimSection


def is_decayed(name: str, owner: nn.Module) -> bool:
    """Whether weight decay applies: not to biases, nor to anything of a normalisation layer.

    The rule of cramming (names with "bias" or "norm"), widened by the owner's class so that it also holds where
    the layer is called `ln_1`.
    """
    lowered = name.lower()
    return not ("bias" in lowered or "norm" in lowered or "norm" in type(owner).__name__.lower())


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups, decayed and not; a tied parameter stands once. Empty groups are left out."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            (decayed if is_decayed(f"{module_name}.{name}", module) else kept).append(parameter)
    groups: list[dict[str, object]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, optim: OptimSection) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) with decay groups; the trainer sets the rate of every step."""
    return torch.optim.AdamW(
        parameter_groups(model, optim.weight_decay), lr=optim.peak_lr, betas=optim.betas, eps=optim.eps, fused=True
    )

"""Parameter groups and optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sparselt_dist.config import OptimSection


def is_decayed(name: str, owner: nn.Module) -> bool:
    """Whether weight decay applies: not to biases, nor to anything of a normalisation layer.

    The rule of cramming (names with "bias" or "norm"), widened by the owner's class so that it also holds where
    the layer is called `ln_1`; and by what the owner lists in an attribute `undecayed`.
    """
    if name.rpartition(".")[2] in getattr(owner, "undecayed", ()):
        return False
    lowered = name.lower()
    return not ("bias" in lowered or "norm" in lowered or "norm" in type(owner).__name__.lower())


def parameter_groups(
    model: nn.Module, weight_decay: float, *, encoder_lr_ratio: float = 1.0
) -> list[dict[str, object]]:
    """Groups by decay and by rate, each parameter once even if tied; empty groups are left out.

    `lr_ratio` of a group is its rate relative to the schedule's: `encoder_lr_ratio` for what stands in
    `model.backbone.body`, the tied word table included, and 1 for heads and for the objective's own parameters.
    """
    slow = _encoder_parameters(model) if encoder_lr_ratio != 1.0 else frozenset()
    split: dict[tuple[float, float], list[nn.Parameter]] = {
        (decay, ratio): [] for ratio in dict.fromkeys((1.0, encoder_lr_ratio)) for decay in (weight_decay, 0.0)
    }
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            decay = weight_decay if is_decayed(f"{module_name}.{name}", module) else 0.0
            split[decay, encoder_lr_ratio if id(parameter) in slow else 1.0].append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_ratio": ratio}
        for (decay, ratio), parameters in split.items()
        if parameters
    ]


def _encoder_parameters(model: nn.Module) -> frozenset[int]:
    return frozenset(id(parameter) for parameter in cast(Any, model).backbone.body.parameters())


class HuggingFaceAdamW(torch.optim.Optimizer):
    """AdamW as `transformers` had it up to version 4, with which BERT's heirs of those years were trained.

    theta -= lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps), and only then theta *= 1 - lr * decay. Unlike
    torch's, epsilon is added before v is corrected, so it is effectively eps / sqrt(1 - beta2^t).
    """

    def __init__(
        self,
        params: list[dict[str, object]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns what `closure` does."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        (beta1, beta2), lr, taken = group["betas"], group["lr"], int(state["step"])
        state["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = lr * math.sqrt(1 - beta2**taken) / (1 - beta1**taken)
        parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)
        parameter.mul_(1 - lr * group["weight_decay"])


_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, fused=True),
    "adamw-hf": HuggingFaceAdamW,
}


def build_optimizer(model: nn.Module, optim: OptimSection, *, encoder_lr_ratio: float = 1.0) -> torch.optim.Optimizer:
    """The optimizer of `optim.name` with decay and rate groups; the trainer sets the rate of every step.

    adamw is Loshchilov & Hutter 2019 as torch has it; adamw-hf is `HuggingFaceAdamW`.
    """
    groups = parameter_groups(model, optim.weight_decay, encoder_lr_ratio=encoder_lr_ratio)
    return _OPTIMIZERS[optim.name](groups, lr=optim.peak_lr, betas=optim.betas, eps=optim.eps)

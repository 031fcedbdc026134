"""Parameter groups and optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sparselt_dist.errors import ConfigError

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


def hidden_matrices(model: nn.Module) -> frozenset[int]:
    """The ids of the matrices inside `model.backbone.body`: of two dimensions, and no table that ids are looked up in."""
    body = cast(Any, model).backbone.body
    tables = {id(p) for part in model.modules() if isinstance(part, nn.Embedding) for p in part.parameters()}
    return frozenset(id(p) for p in body.parameters() if p.requires_grad and p.dim() == 2 and id(p) not in tables)


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


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, as torch has it) for some groups, AdamW for the others, as one optimizer.

    A matrix moves along its Nesterov momentum made orthogonal: all of its directions equally far. The step is scaled by
    0.2 sqrt(max(rows, columns)), which gives it the root mean square of AdamW's (Liu et al. 2025, arXiv 2502.16982, section
    2.2), so that one learning rate and one decay serve both. States are `momentum_buffer`, and those of AdamW.
    """

    def __init__(
        self,
        matrices: list[dict[str, object]],
        others: list[dict[str, object]],
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        self._muon = torch.optim.Muon(matrices, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        self._adamw = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, fused=True)
        # The groups are shared, not copied: whoever sets a rate here sets it there.
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})
        self._muon.state = self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns what `closure` does."""
        loss = closure() if closure is not None else None
        self._muon.step()
        self._adamw.step()
        return loss


def state_keys(group: dict[str, Any]) -> tuple[str, ...]:
    """The names of the tensors that an optimizer keeps for each parameter of a group, beside its count of steps."""
    return ("momentum_buffer",) if "ns_steps" in group else ("exp_avg", "exp_avg_sq")


def _split_groups(
    groups: list[dict[str, object]], matrices: frozenset[int]
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """The groups of the matrices and those of all else, empty ones left out."""
    chosen, others = [], []
    for group in groups:
        parameters = cast(list[nn.Parameter], group["params"])
        chosen.append({**group, "params": [p for p in parameters if id(p) in matrices]})
        others.append({**group, "params": [p for p in parameters if id(p) not in matrices]})
    return [group for group in chosen if group["params"]], [group for group in others if group["params"]]


def _muon(model: nn.Module, groups: list[dict[str, object]], optim: OptimSection) -> MuonWithAdamW:
    matrices, others = _split_groups(groups, hidden_matrices(model))
    if not matrices:
        raise ConfigError(
            "optim.name: found 'muon' with a model that has no matrix to train between its tables and its head, expected "
            "some; set optim.name=adamw"
        )
    return MuonWithAdamW(matrices, others, optim.peak_lr, optim.muon_momentum, optim.betas, optim.eps)


_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, fused=True),
    "adamw-hf": HuggingFaceAdamW,
}


def build_optimizer(model: nn.Module, optim: OptimSection, *, encoder_lr_ratio: float = 1.0) -> torch.optim.Optimizer:
    """The optimizer of `optim.name` with decay and rate groups; the trainer sets the rate of every step.

    adamw is Loshchilov & Hutter 2019 as torch has it; adamw-hf is `HuggingFaceAdamW`; muon is `MuonWithAdamW` with Muon on
    `hidden_matrices`.

    Raises:
        ConfigError: muon, and a model without such matrices.
    """
    groups = parameter_groups(model, optim.weight_decay, encoder_lr_ratio=encoder_lr_ratio)
    if optim.name == "muon":
        return _muon(model, groups, optim)
    return _OPTIMIZERS[optim.name](groups, lr=optim.peak_lr, betas=optim.betas, eps=optim.eps)

"""A fault planted in a rank of `pretrain`: a loss or gradient that is no number, or a pass that takes long."""

from __future__ import annotations

import os
import time

import torch

# rank, first micro-step, how many, and what: nan-loss | nan-gradient | slow
FAULT = "SPARSELT_TESTS_FAULT"


class _Poisoned(torch.autograd.Function):
    """The identity, whose gradient is no number."""

    @staticmethod
    def forward(ctx: object, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")


def plant() -> None:
    """Change the masked language model's loss where the environment says so; training passes alone are counted."""
    from sparselt_dist.objectives import mlm

    rank, first, count, kind = os.environ[FAULT].split(",")
    if os.environ["RANK"] != rank:
        return
    of_model = mlm.MLMModule.forward
    passes: dict[str, object] = {"seen": -1, "batch": None}

    def forward(self: torch.nn.Module, backbone: torch.nn.Module, batch: dict[str, torch.Tensor]) -> object:
        output = of_model(self, backbone, batch)  # type: ignore[arg-type]
        if not (self.training and torch.is_grad_enabled()):
            return output
        if passes["batch"] is None or not torch.equal(passes["batch"], batch["input_ids"]):  # type: ignore[arg-type]
            passes["seen"] = int(passes["seen"]) + 1  # type: ignore[call-overload]
            passes["batch"] = batch["input_ids"]
        if not int(first) <= int(passes["seen"]) < int(first) + int(count):  # type: ignore[call-overload]
            return output
        if kind == "nan-loss":
            return output._replace(loss=output.loss * float("nan"))
        if kind == "nan-gradient":
            return output._replace(loss=_Poisoned.apply(output.loss))
        time.sleep(0.02)
        return output

    mlm.MLMModule.forward = forward  # type: ignore[method-assign, assignment]

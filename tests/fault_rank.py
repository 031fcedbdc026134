"""A fault planted in a rank of `pretrain`: a loss or gradient that is no number, a pass that takes long, an error, a stop."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import torch

from sparselt_dist.errors import DataError

# rank, first micro-step, how many, and what: nan-loss | nan-gradient | slow | error; or in place of passes, at once:
# unreadable (held-out rows) | stop (while shards are prepared) | late-stop (in the yardsticks); of all ranks: small-shares (of
# what all hold, in a checkpoint)
FAULT = "SPARSELT_TESTS_FAULT"


class _Poisoned(torch.autograd.Function):
    """The identity, whose gradient is no number."""

    @staticmethod
    def forward(ctx: object, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")


def _unreadable(*_: object, **__: object) -> Iterator[object]:
    raise DataError("a held-out row that cannot be read")
    yield


def _stopped(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def plant() -> None:
    """Change the masked language model's loss where the environment says so; training passes alone are counted."""
    from sparselt_dist import held_out, run, tensor_files
    from sparselt_dist.data import preparation
    from sparselt_dist.objectives import mlm

    rank, first, count, kind = os.environ[FAULT].split(",")
    if kind == "small-shares":
        tensor_files.LEAST_SHARE_BYTES = 1
        return
    if os.environ["RANK"] != rank:
        return
    if kind == "unreadable":
        held_out.evaluation_batches = _unreadable  # type: ignore[assignment]
    if kind == "stop":
        preparation.prepare = _stopped  # type: ignore[assignment]
    if kind == "late-stop":
        run.Run._yardsticks = _stopped  # type: ignore[method-assign, assignment]
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
        if kind == "error":
            raise DataError("a row that only this rank has seen")
        if kind == "nan-loss":
            return output._replace(loss=output.loss * float("nan"))
        if kind == "nan-gradient":
            return output._replace(loss=_Poisoned.apply(output.loss))
        time.sleep(0.02)
        return output

    mlm.MLMModule.forward = forward  # type: ignore[method-assign, assignment]

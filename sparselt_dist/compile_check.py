"""`train.compile`: before the first step, a compiled pass beside an eager one on the run's own first micro-batch.

A compiler's fault does not crash a run, it trains to a wrong loss (known of cramming with GEMM autotuning). The pass has the
shape, precision and mode of training, so that what it compiles is what the steps use, and costs an eager pass besides.

Invariants: nothing is left behind in gradients or random state. A body that draws random numbers is compared without its
dropout, for compiled code draws others. Under ZeRO-3 only losses are compared: no rank holds a whole gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sparselt_dist.errors import ConfigError
from sparselt_dist.objectives.base import SharesStatistics, loss_terms

if TYPE_CHECKING:
    from sparselt_dist.data.batch import Batch
    from sparselt_dist.models.backbone import PretrainingModel

# By precision, of losses up to 10, in proportion above; and of a gradient, as a share of its norm.
ALLOWED_LOSS = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}
ALLOWED_GRADIENT = {"fp32": 1e-3, "bf16": 0.03, "fp16": 0.03}
SMALL_GRADIENT = 0.05  # of the norm of all: a parameter's own norm counts as this much at least
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FP16_SCALE = 2.0**12  # or small gradients vanish, as without a loss scaler


class Pass(NamedTuple):
    """A forward and backward pass."""

    loss: float
    gradients: list[Tensor | None]
    """Of the trained parameters, in their order; empty where none were asked for."""


class Comparison(NamedTuple):
    """How far the compiled pass is off."""

    eager_loss: float
    compiled_loss: float
    gradient_share: float
    """Of the parameter that fares worst: the norm of the difference beside its own."""
    parameter: str

    def is_within(self, precision: str) -> bool:
        """Whether rounding explains it; a NaN is never within."""
        loss_gap = abs(self.compiled_loss - self.eager_loss)
        fits = loss_gap <= ALLOWED_LOSS[precision] * max(1.0, abs(self.eager_loss) / 10)
        return fits and self.gradient_share <= ALLOWED_GRADIENT[precision]


def check(model: PretrainingModel, batch: Batch, precision: str, *, with_gradients: bool) -> str:
    """What to tell the user; `batch` lies on the model's device. Compiles what a training step of its shape runs.

    Raises:
        ConfigError: the passes disagree by more than rounding.
    """
    rows = f"{batch['input_ids'].shape[0]} rows, {precision}"
    try:
        found = compare(model, batch, precision, with_gradients=with_gradients)
    except torch.OutOfMemoryError:
        return f"train.compile: not compared with eager passes, which do not fit into the device's memory ({rows})"
    gradients = f", gradients {100 * found.gradient_share:.2g} % apart ({found.parameter})" if with_gradients else ""
    figures = f"loss {found.compiled_loss:.5f} and {found.eager_loss:.5f}{gradients}"
    if not found.is_within(precision):
        raise ConfigError(
            f"train.compile: compiled and eager passes disagree on the first micro-batch ({rows}): {figures}; expected "
            f"{ALLOWED_LOSS[precision]:g} and {100 * ALLOWED_GRADIENT[precision]:g} % at most. A run would train to a wrong "
            "loss: set train.compile=false, or use another version of torch"
        )
    return f"train.compile: compiled equals eager on the first micro-batch ({rows}): {figures}"


def compare(model: PretrainingModel, batch: Batch, precision: str, *, with_gradients: bool) -> Comparison:
    """An eager and a compiled pass over the same micro-batch."""
    device = batch["input_ids"].device
    if isinstance(model.objective, SharesStatistics) and model.objective.needs_statistics:
        model.objective.set_statistics(None)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), contextlib.ExitStack() as modes:
        before = _begin(device)
        with torch.compiler.set_stance("force_eager"):
            eager = _pass(model, batch, precision, with_gradients)
            if not torch.equal(_random_state(device), before):
                modes.enter_context(_without_dropout(model.backbone.body))
                _begin(device)
                eager = _pass(model, batch, precision, with_gradients)
        _begin(device)
        compiled = _pass(model, batch, precision, with_gradients)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    share, name = _worst(names, eager.gradients, compiled.gradients)
    return Comparison(eager.loss, compiled.loss, share, name)


def _begin(device: torch.device) -> Tensor:
    """Seed all passes alike; the state."""
    torch.manual_seed(0)
    return _random_state(device)


def _random_state(device: torch.device) -> Tensor:
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else state


@contextlib.contextmanager
def _without_dropout(body: torch.nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in body.modules()}
    body.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _pass(model: PretrainingModel, batch: Batch, precision: str, with_gradients: bool) -> Pass:
    dtype = _DTYPES.get(precision)
    with torch.set_grad_enabled(with_gradients):
        with torch.autocast(batch["input_ids"].device.type, dtype=dtype, enabled=dtype is not None):
            output = model(batch)
        loss = torch.stack(list(loss_terms(output).values())).sum()
    if not with_gradients:
        return Pass(loss.item(), [])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    scale = _FP16_SCALE if precision == "fp16" else 1.0
    # `grad` rather than `backward`: the hooks by which DeepSpeed gathers gradients do not hear of it
    return Pass(loss.item(), list(torch.autograd.grad(loss * scale, parameters, allow_unused=True)))


def _worst(names: list[str], eager: list[Tensor | None], compiled: list[Tensor | None]) -> tuple[float, str]:
    """The largest difference beside the parameter's norm, or beside a share of the norm of all if that is larger."""
    norms = [0.0 if gradient is None else float(gradient.double().norm()) for gradient in eager]
    floor = SMALL_GRADIENT * sum(norm**2 for norm in norms) ** 0.5
    worst = (0.0, "none")
    for name, norm, ours, theirs in zip(names, norms, eager, compiled, strict=False):
        apart = _distance(ours, theirs) / max(norm, floor, 1e-30)
        if not apart <= worst[0]:  # a NaN is the worst
            worst = (apart, name)
    return worst


def _distance(one: Tensor | None, other: Tensor | None) -> float:
    parts = [gradient.double() for gradient in (one, other) if gradient is not None]
    if not parts:
        return 0.0
    return float((parts[0] - parts[1]).norm() if len(parts) == 2 else parts[0].norm())

"""A loss or a gradient that is no number: the step's update is not made, on all ranks alike.

A loss is looked at before the optimizer moves (`trainer.py`), a gradient by its norm: DeepSpeed's own where a ZeRO stage
takes one, which then makes no update; without ZeRO one norm serves this check, the log and the clipping. Overflows of fp16
are its loss scaler's and no fault. What was trained on is kept in `bad_batches/`, and `train.on_non_finite` says whether the
run ends or goes on with the next step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from sparselt_dist import distributed
from sparselt_dist.config import Config
from sparselt_dist.data.batch import Batch
from sparselt_dist.errors import RunFailureError
from sparselt_dist.journal import replace_file
from sparselt_dist.objectives.base import loss_terms
from sparselt_dist.timekeeping import Progress

FOLDER = "bad_batches"
LEAST_SCALE = 2.0**-10  # of fp16: a gradient that overflows with less is no number
_SHOWN_KEYS = 8

Kind = Literal["loss", "gradient"]


class NonFiniteError(RunFailureError):
    """A loss or gradient was NaN or infinite; no update was made from it."""


# ---- the update ----------------------------------------------------------------------------------------------------


class Update(NamedTuple):
    """What became of a step's gradients."""

    norm: float | None  # before clipping
    is_made: bool


class GuardedStep:
    """The engine's step, made only with gradients that are numbers."""

    def __init__(self, engine: Any, clip_norm: float | None) -> None:
        self.engine = engine
        self.stage = engine.zero_optimization_stage()
        self.clip_norm = clip_norm
        self._parameters = list(engine.module.parameters())  # a walk through all modules takes milliseconds
        # DeepSpeed's, of fp16: at ZeRO 0 the engine has it, else the optimizer
        self.scaler = engine.torch_autocast_z0_gradscaler or getattr(
            engine.optimizer, "torch_autocast_gradscaler", None
        )
        self._norm = torch.zeros(())
        if self.stage == 0 and clip_norm is not None:
            # DeepSpeed would take the norm a second time, tensor by tensor.
            engine.clip_fp32_gradients = lambda: clip_grads_with_norm_(self._parameters, clip_norm, self._norm)

    def measure(self) -> None:
        """Ask for the norm before anything is waited for: an accelerator then takes it right after the backward pass."""
        if self.stage == 0:
            self._norm = get_total_norm([p.grad for p in self._parameters if p.grad is not None])

    def take(self) -> Update:
        """Update the weights by what was measured, or drop gradients that are no numbers. All ranks decide alike."""
        if self.stage == 0:
            return self._take_without_zero()
        scale, optimizer = self._scale(), self.engine.optimizer
        if self.scaler is not None and self.clip_norm is not None:
            optimizer.clip_grad = self.clip_norm * scale  # DeepSpeed 0.19 clips before the scaler divides
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        if self.scaler is not None and optimizer.overflow:
            # where DeepSpeed 0.19 meets an overflow it leaves before the scaler, and would meet the next one for ever
            self.scaler.update(scale * self.scaler.get_backoff_factor())
        return Update(None if norm is None else float(norm) / scale, self._is_overflow() or not optimizer.overflow)

    def _take_without_zero(self) -> Update:
        if self.scaler is not None:
            self._norm = self._norm / self._scale()
        norm = float(self._norm)
        if not (self._is_overflow() or math.isfinite(norm)):
            self.engine.zero_grad()
            return Update(norm, False)
        self.engine.step()
        return Update(norm, True)

    def _scale(self) -> float:
        """What fp16 multiplies losses by; 1 in other precisions."""
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())

    def _is_overflow(self) -> bool:
        """Whether a gradient that is no number may be one of fp16's overflows, which the scaler still has an answer to."""
        return self.scaler is not None and self._scale() >= LEAST_SCALE

    def drop(self) -> Update:
        """Drop the gradients of a step whose loss is no number, whatever they are."""
        if self.stage == 0:
            self.engine.zero_grad()
            return Update(None, False)
        # DeepSpeed frees its partitions and buffers where a norm is no number; let it see one.
        optimizer, infinite = self.engine.optimizer, torch.tensor(math.inf, device=self.engine.device)
        name, norm = ("_get_norm_groups", [infinite]) if self.stage == 3 else ("scaled_global_norm", infinite)
        setattr(optimizer, name, lambda: norm)
        try:
            self.engine.step()
        finally:
            delattr(optimizer, name)
        return Update(None, False)


# ---- what is done about it -----------------------------------------------------------------------------------------


@dataclass
class NonFinite:
    """`train.on_non_finite`: names and keeps what was trained on, then ends the run or lets it go on."""

    config: Config
    engine: Any
    ranks: distributed.Ranks
    progress: Progress
    run_dir: Path
    complain: Callable[[str], None]  # of rank 0

    def meet(self, kind: Kind, batches: Sequence[Batch], bad: Sequence[int], keys: Sequence[str]) -> None:
        """No update was made of a step; all ranks call it together.

        Args:
            batches: this rank's micro-batches of the step, in order.
            bad: the numbers of those whose loss is no number; for a gradient they are found here.
            keys: of this rank's samples, equally many a micro-batch.

        Raises:
            NonFiniteError: on all ranks alike, said by one.
        """
        step = self.progress.step + 1
        if kind == "gradient":
            bad = self._bad_gradients(batches)
        named = distributed.gather_objects(len(bad), self.ranks)
        if not any(named):  # of each micro-batch alone it is a number, or it cannot be told
            bad = range(len(batches))
        share = len(keys) // max(len(batches), 1)
        samples = [key for number in bad for key in keys[number * share : (number + 1) * share]]
        file = self._keep(step, kind, batches, bad, samples)
        reports = distributed.gather_objects((samples, file), self.ranks)
        rank, (samples, file) = next((r, report) for r, report in enumerate(reports) if report[0])
        where = f"on rank {rank}" if named[rank] else "of all ranks together, of whom rank 0 is shown,"
        shown = f"{', '.join(samples[:_SHOWN_KEYS])}{' ...' if len(samples) > _SHOWN_KEYS else ''}"
        self._decide(
            f"step {step}: the {kind} {where} is not finite; its samples are {shown}. No update was made. "
            f"The batch is kept in {file}"
        )

    def _decide(self, found: str) -> None:
        self.progress.discarded += 1
        self.progress.discarded_in_a_row += 1
        train = self.config.train
        if train.on_non_finite == "skip" and self.progress.discarded_in_a_row <= train.max_discarded_steps:
            if self.ranks.is_main:
                self.complain(f"{found}; the run goes on with the next step")
            return
        again = "" if train.on_non_finite == "stop" else f", {self.progress.discarded_in_a_row} steps in a row"
        error = NonFiniteError(
            f"{found}{again}. Lower optim.peak_lr, look at that batch (docs/operations.md says how), or go on without such "
            "steps by train.on_non_finite=skip"
        )
        error.silent = not self.ranks.is_main
        raise error

    def _bad_gradients(self, batches: Sequence[Batch]) -> list[int]:
        """Numbers of the micro-batches whose own gradient is no number, by another pass over each; ZeRO-3 cannot tell."""
        if self.engine.zero_optimization_stage() == 3:
            return []
        module, device = self.engine.module, self.engine.device
        weights = [p for p in module.parameters() if p.requires_grad]
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.config.train.precision)
        bad = []
        with torch.random.fork_rng(), torch.autocast(device.type, half, enabled=half is not None):
            for number, batch in enumerate(batches):
                output = module({key: value.to(device) for key, value in batch.items()})
                loss = torch.stack(list(loss_terms(output).values())).sum()
                gradients = torch.autograd.grad(loss, weights, allow_unused=True)
                norm = get_total_norm([gradient for gradient in gradients if gradient is not None])
                if not math.isfinite(float(norm)):
                    bad.append(number)
        return bad

    def _keep(
        self, step: int, kind: Kind, batches: Sequence[Batch], bad: Sequence[int], samples: Sequence[str]
    ) -> str | None:
        """Write this rank's bad micro-batches as `<number>/<key>`; None if it has none, or the disk takes none."""
        from safetensors.torch import save

        if not bad:
            return None
        tensors = {f"{number}/{key}": value.contiguous() for number in bad for key, value in batches[number].items()}
        about = {"step": str(step), "rank": str(self.ranks.rank), "not_finite": kind, "samples": " ".join(samples)}
        path = self.run_dir / FOLDER / f"step_{step:08d}_rank_{self.ranks.rank:05d}.safetensors"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, save(tensors, metadata=about))
        except Exception as error:  # it must not hide the fault that it is about
            return f"no file ({error})"
        return str(path)

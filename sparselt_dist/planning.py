"""The arithmetic of `plan`: memory per rank by ZeRO stage, steps, tokens, hours. Pure functions, no torch.

Memory: Rajbhandari et al. 2020 (ZeRO), with fp32 weights and DeepSpeed's own copy of them. Activations: Korthikanti
et al. 2022, eq. 1, without the attention matrix, which fused attention does not store. Estimates, not bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sparselt_dist.budget import batch_size_at
from sparselt_dist.config import Config
from sparselt_dist.run_plan import RunPlan

GIB = 2**30
USABLE_SHARE = 0.92  # of a device's memory; the rest goes to fragmentation
_SLICES = 1000  # of the budget, when the batch ramp is summed up
_ACTIVATION_BYTES = 34  # bytes per token, layer and hidden unit in 16 bits, kept for the backward pass
_LOGIT_BYTES = 12  # bytes per target and vocabulary entry: logits, their fp32 form and its gradient
_DEFAULT_BUCKET = 500_000_000  # elements; DeepSpeed's default

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Device:
    """One accelerator, or the share of a host that one CPU rank has."""

    name: str
    memory_gib: float
    peak_flops: float
    """Dense, in the precision of the run, FLOP/s."""
    utilization: float
    """Share of the peak that real tokens are assumed to reach (model FLOPs utilisation)."""
    price_per_hour: float
    overhead_gib: float
    """What the process holds before the model: context, libraries, communication buffers."""


@dataclass(frozen=True)
class ModelFacts:
    """The sizes of a model that memory and FLOPs follow from."""

    parameters: int
    backbone_parameters: int
    """Without embeddings and vocabulary head."""
    num_layers: int
    hidden_size: int
    vocab_size: int
    """0 where the objective uses no vocabulary head."""
    targets_per_token: float


@dataclass(frozen=True)
class Layout:
    """How a run is spread over ranks."""

    world_size: int
    stage: int
    offload_optimizer: bool
    offload_parameters: bool
    precision: Precision
    micro_batch_size: int
    sequence_length: float
    bucket_elements: int = _DEFAULT_BUCKET


@dataclass(frozen=True)
class Memory:
    """GiB of one rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    overhead: float
    host: float

    @property
    def total(self) -> float:
        """GiB on the device."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers + self.overhead


def estimate_memory(facts: ModelFacts, layout: Layout, overhead_gib: float) -> Memory:
    """GiB of one rank in training, by part. Weights and gradients are fp32; 16-bit precision is autocast."""
    stage, world = layout.stage, layout.world_size
    half = layout.precision != "fp32"
    parameters = facts.parameters / GIB
    weights = parameters * 4 / (world if stage == 3 else 1)
    gradients = parameters * 4 / (world if stage >= 2 else 1)
    # two fp32 moments, and from stage 1 on the optimizer's own copy of its share of the weights
    optimizer = parameters * (8 if stage == 0 else 12) / (world if stage >= 1 else 1)
    tokens = layout.micro_batch_size * layout.sequence_length
    kept = tokens * facts.hidden_size * facts.num_layers * _ACTIVATION_BYTES * (1 if half else 2)
    logits = tokens * facts.targets_per_token * facts.vocab_size * _LOGIT_BYTES
    bucket = min(layout.bucket_elements, facts.parameters) * 4
    casts = parameters * 2 if half else 0.0  # autocast keeps its 16-bit weights until the end of the forward pass
    host = (optimizer if layout.offload_optimizer else 0) + (weights if layout.offload_parameters else 0)
    return Memory(
        # offloaded weights pass through the device a layer at a time
        weights=2 * weights / max(facts.num_layers, 2) if layout.offload_parameters else weights,
        gradients=gradients,
        optimizer=0.0 if layout.offload_optimizer else optimizer,
        activations=(kept + logits) / GIB + casts,
        buffers=(2 * bucket / GIB) if stage >= 1 else 0.0,
        overhead=overhead_gib,
        host=host,
    )


def layouts(config: Config, plan: RunPlan, world_size: int, ds_values: dict[str, Any], length: float) -> list[Layout]:
    """ZeRO 0 to 3 and ZeRO-3 with full offload, and in front the configuration's own layout."""
    zero = ds_values.get("zero_optimization", {})

    def layout(stage: int, offload_optimizer: bool, offload_parameters: bool) -> Layout:
        return Layout(
            world_size=world_size,
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            precision=config.train.precision,
            micro_batch_size=plan.micro_batch_size,
            sequence_length=length,
            bucket_elements=int(zero.get("reduce_bucket_size", _DEFAULT_BUCKET)),
        )

    own = layout(plan.zero_stage, _offloads(zero, "offload_optimizer"), _offloads(zero, "offload_param"))
    return [own, *(layout(stage, False, False) for stage in range(4)), layout(3, True, True)]


def _offloads(zero: dict[str, Any], key: str) -> bool:
    section = zero.get(key)
    return isinstance(section, dict) and section.get("device") in ("cpu", "nvme")


@dataclass(frozen=True)
class Work:
    """How far a run gets, and what ends it."""

    steps: int
    tokens: float
    seconds: float
    limit: str
    """The budget that is spent first, such as `max_steps`."""


def estimate_work(config: Config, plan: RunPlan, world_size: int, length: float, tokens_per_second: float) -> Work:
    """Steps, tokens and seconds until the first budget is spent, at a constant throughput."""
    budget = config.budget
    candidates: list[Work] = []
    if budget.max_steps is not None:
        batches = [_batch_size(config, plan, world_size, (i + 0.5) / _SLICES) for i in range(_SLICES)]
        tokens = budget.max_steps * length * sum(batches) / _SLICES
        candidates.append(Work(budget.max_steps, tokens, tokens / tokens_per_second, "max_steps"))
    totals = {
        "max_tokens": budget.max_tokens,
        "max_hours": None if budget.max_hours is None else budget.max_hours * 3600 * tokens_per_second,
    }
    for name, total in totals.items():
        if total is not None:
            slices = (_batch_size(config, plan, world_size, (i + 0.5) / _SLICES) for i in range(_SLICES))
            steps = sum(total / _SLICES / (batch * length) for batch in slices)
            candidates.append(Work(round(steps), float(total), total / tokens_per_second, name))
    return min(candidates, key=lambda work: work.seconds)


def _batch_size(config: Config, plan: RunPlan, world_size: int, fraction: float) -> int:
    ramp_end = config.train.batch_ramp_end
    target = config.train.global_batch_size
    if ramp_end is None:
        return target
    return batch_size_at(
        fraction, micro_batch_size=plan.micro_batch_size * world_size, target=target, ramp_end=ramp_end
    )


def fitting_world_sizes(config: Config, largest: int = 1024) -> list[int]:
    """Numbers of ranks, powers of two and small ones, that divide the global batch."""
    micro = config.train.micro_batch_size
    unit = 1 if micro == "auto" else micro
    counts = sorted({*range(1, 9), *(2**i for i in range(4, largest.bit_length()))})
    return [count for count in counts if config.train.global_batch_size % (count * unit) == 0]

"""The arithmetic of `plan`: memory per rank by ZeRO stage, communication, seconds a step, steps and tokens. No torch.

Weights, gradients and moments are fp32 in every precision; 16 bits are autocast (Rajbhandari et al. 2020, ZeRO, with
that change). A step's peak of memory comes when the backward pass begins, with all activations held, or after it, when
gradients are joined for their reduction. docs/planning.md derives every term. Estimates, not bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparselt_dist.budget import batch_size_at
from sparselt_dist.config import Config
from sparselt_dist.device import GIB, Device, Precision
from sparselt_dist.run_plan import RunPlan

USABLE_SHARE = 0.92  # of a device's memory; the rest goes to fragmentation
_FP32 = 4
_SLICES = 1000  # of the budget, when the batch ramp is summed up
# A score of the vocabulary head: itself, its gradient, and that times the gradient of the loss.
_SCORE_BYTES = {"fp32": 12, "bf16": 6, "fp16": 8}
_CHUNK_SCORES, _CHUNK_ROWS = 2**24, 256  # a piece of the chunked cross-entropy
_FLAT_ELEMENTS = 500_000_000  # gradients that stage 0 joins for one reduction
_BUCKET, _PREFETCH = 500_000_000, 50_000_000  # elements; DeepSpeed's defaults
_UPDATE_BYTES = 40  # a weight: 28 of Adam (4 tensors read, 3 written), 4 of the norm, 8 of clipping
_HOST_GB_S = 20.0  # memory bandwidth that a rank's offloaded optimizer finds
_HIDDEN_SHARE = 2 / 3  # of a step's compute is the backward pass, behind which overlapped communication hides


@dataclass(frozen=True)
class SavedBytes:
    """What autograd keeps of a forward pass over the body."""

    fixed: float
    """Bytes whatever the rows: 16-bit copies of the weights."""
    per_row: float
    """Bytes a sequence."""
    traced: bool
    """Counted on the model itself, rather than by a formula for transformers."""


@dataclass(frozen=True)
class ModelFacts:
    """The sizes of a model that memory and communication follow from."""

    parameters: int
    backbone_parameters: int
    """Without embeddings and vocabulary head."""
    num_layers: int
    hidden_size: int
    vocab_size: int
    """0 where the objective uses no vocabulary head."""
    targets_per_token: float
    chunked_loss: bool
    saved: SavedBytes


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
    accumulation_steps: int = 1
    bucket_elements: int = _BUCKET
    prefetch_elements: int = _PREFETCH
    overlaps: bool = False
    """Gradients are reduced while the backward pass runs."""
    reduces_to_all: bool = True
    """Stages 1 and 2 reduce by all-reduce (DeepSpeed's default), rather than to each part's owner."""
    copies_checkpoints: bool = False
    """Training goes on beside a copy in memory of what a checkpoint holds."""

    @property
    def name(self) -> str:
        return f"ZeRO-{self.stage}" + (" + offload" if self.offload_optimizer or self.offload_parameters else "")


@dataclass(frozen=True)
class Memory:
    """GiB of one rank, on the device but for `host`. `total` may be less than the sum of its parts."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """With 16-bit copies of the weights, gradients of one layer's activations, and what the allocator wastes."""
    loss: float
    """Scores of the vocabulary head and their gradients."""
    buffers: float
    """DeepSpeed's; some are made only when the activations are gone."""
    overhead: float
    total: float
    host: float
    """In host memory, by offload and by the copy that a checkpoint is written from."""


def formula_saved(facts_of: tuple[int, int, int, int], precision: Precision, length: float) -> SavedBytes:
    """What a transformer saves, where its own forward pass cannot be traced.

    A layer keeps of each token, in D hidden and I inner units: norms' inputs, the inputs of four products, queries, keys,
    values, and what the activation needs: 22 D + 4 I bytes under autocast, 36 D + 8 I in fp32 (Korthikanti et al. 2022,
    section 4.1, without attention matrix and dropout). `facts_of`: body parameters, layers, D, I.
    """
    body, layers, hidden, inner = facts_of
    half = precision != "fp32"
    a_token = 22 * hidden + 4 * inner if half else 36 * hidden + 8 * inner
    return SavedBytes(2.0 * body if half else 0.0, float(length * layers * a_token), traced=False)


def loss_bytes(facts: ModelFacts, layout: Layout) -> float:
    """The largest sum of tensors that the vocabulary head's cross-entropy holds at once."""
    if not facts.vocab_size:
        return 0.0
    targets = layout.micro_batch_size * layout.sequence_length * facts.targets_per_token
    if not facts.chunked_loss:
        return targets * facts.vocab_size * _SCORE_BYTES[layout.precision]
    rows = min(targets, max(_CHUNK_ROWS, _CHUNK_SCORES // facts.vocab_size))
    # the table's gradient is summed up in the forward pass: the sum, a piece's part and their sum exist at once;
    # where gradients are left to the backward pass (ZeRO-3, fp16) there is one of them
    copies = 1 if layout.stage == 3 or layout.precision == "fp16" else 3
    table = facts.vocab_size * facts.hidden_size * _FP32
    return rows * facts.vocab_size * _SCORE_BYTES[layout.precision] + copies * table


def estimate_memory(facts: ModelFacts, layout: Layout, device: Device) -> Memory:
    """GiB of one rank at the peak of a step, and by part."""
    stage, world = layout.stage, layout.world_size
    whole = float(facts.parameters * _FP32)
    share = whole / world
    weights = share if stage == 3 else whole
    gradients = share if stage >= 2 else whole
    # two moments, and from stage 1 on the optimizer's own copy of its share of the weights
    optimizer = 2 * whole if stage == 0 else 3 * share
    host = (optimizer + share if layout.offload_optimizer else 0.0) + (weights if layout.offload_parameters else 0.0)
    if layout.copies_checkpoints:  # weights and two moments, each tensor at one of the ranks
        host += 3 * share
    if layout.offload_parameters:  # a layer and the next one are on the device
        weights *= 2 / max(facts.num_layers, 2)
    if layout.offload_optimizer:
        optimizer = 0.0
    rows = layout.micro_batch_size * facts.saved.per_row
    loss = loss_bytes(facts, layout)
    # the gradients of a layer's activations are as large as these, and come when the loss is gone
    working = device.allocator_factor * (facts.saved.fixed + rows + max(loss, rows / max(facts.num_layers, 1)))
    during, after = _buffers(facts, layout, device)
    # glibc keeps what is freed, so that on a CPU both moments count; and its own memory is what it offloads to
    peak = working + max(during, after) + host if device.kind == "cpu" else max(working + during, after)
    total = weights + gradients + optimizer + peak
    parts = (weights, gradients, optimizer, working - loss, loss, max(during, after), total, host)
    weights, gradients, optimizer, activations, loss, buffers, total, host = (part / GIB for part in parts)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        loss=loss,
        buffers=buffers,
        overhead=device.overhead_gib,
        total=total + device.overhead_gib,
        host=host,
    )


def _buffers(facts: ModelFacts, layout: Layout, device: Device) -> tuple[float, float]:
    """Bytes of DeepSpeed's buffers during the backward pass, and after it."""
    whole = float(facts.parameters * _FP32)
    if layout.stage == 0:  # a rank alone reduces nothing
        return 0.0, min(whole, _FLAT_ELEMENTS * _FP32) if layout.world_size > 1 else 0.0
    bucket, kept = float(layout.bucket_elements * _FP32), 0.0
    if device.kind == "cpu":
        # Buckets are allocated whole whatever the model, but pages that nothing writes to take no memory; the weights
        # as they were before they were joined and divided are freed, and glibc keeps them.
        bucket, kept = min(bucket, whole), whole
    buckets = bucket * (2 if layout.overlaps else 1) + kept
    if layout.stage == 3:
        gathered = min(layout.prefetch_elements * _FP32 + facts.vocab_size * facts.hidden_size * _FP32, whole)
        return buckets + gathered, buckets + gathered
    flat_gradients = whole / layout.world_size
    return (0.0 if layout.stage == 1 else buckets), buckets + flat_gradients


def layouts(config: Config, plan: RunPlan, world_size: int, ds_values: dict[str, Any], length: float) -> list[Layout]:
    """ZeRO 0 to 3 and ZeRO-3 with full offload, and in front the configuration's own layout."""
    zero, saving = ds_values.get("zero_optimization", {}), config.checkpoint
    copies = saving.asynchronous and saving.scratch_dir is None and saving.every_steps is not None

    def layout(stage: int, offload_optimizer: bool, offload_parameters: bool) -> Layout:
        return Layout(
            world_size=world_size,
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            precision=config.train.precision,
            micro_batch_size=plan.micro_batch_size,
            sequence_length=length,
            accumulation_steps=plan.accumulation_steps,
            bucket_elements=int(zero.get("reduce_bucket_size", _BUCKET)),
            prefetch_elements=int(zero.get("stage3_prefetch_bucket_size", _PREFETCH)),
            overlaps=bool(zero.get("overlap_comm", stage == 3)) and stage >= 1,
            reduces_to_all=bool(zero.get("use_multi_rank_bucket_allreduce", True)),
            copies_checkpoints=copies,
        )

    own = layout(plan.zero_stage, _offloads(zero, "offload_optimizer"), _offloads(zero, "offload_param"))
    return [own, *(layout(stage, False, False) for stage in range(4)), layout(3, True, True)]


def _offloads(zero: dict[str, Any], key: str) -> bool:
    section = zero.get(key)
    return isinstance(section, dict) and section.get("device") == "cpu"


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in an optimizer step (and receives as many)."""

    all_reduce: float
    reduce_scatter: float
    all_gather: float
    host: float
    """To and from host memory, by offload."""

    @property
    def links(self) -> float:
        return self.all_reduce + self.reduce_scatter + self.all_gather


def estimate_traffic(facts: ModelFacts, layout: Layout, micro_steps: int) -> Traffic:
    """Bytes a rank and step, by rings: an all-reduce of n bytes sends 2 (N-1)/N n, the others half of it.

    Stages 0 and 1 reduce gradients once a step; 2 and 3 do in every micro-step, for they keep only their share.
    ZeRO-3 gathers the weights for every forward and backward pass. All in fp32.
    """
    world, whole = layout.world_size, float(facts.parameters * _FP32)
    ring = whole * (world - 1) / world
    share = whole / world
    if layout.stage == 3:
        host = 2.0 * micro_steps * share if layout.offload_parameters else 0.0
        host += 2 * share if layout.offload_optimizer else 0.0
        return Traffic(0.0, micro_steps * ring, 2 * micro_steps * ring, host)
    reductions = micro_steps if layout.stage == 2 else 1
    to_all = layout.stage == 0 or layout.reduces_to_all
    return Traffic(
        all_reduce=2 * reductions * ring if to_all else 0.0,
        reduce_scatter=0.0 if to_all else reductions * ring,
        all_gather=ring if layout.stage else 0.0,
        host=2 * share if layout.offload_optimizer else 0.0,
    )


@dataclass(frozen=True)
class Machine:
    """Devices of one kind and how they stand together."""

    device: Device
    count: int
    per_node: int

    @property
    def link_gb_s(self) -> float:
        """Of the slowest link in a ring over all devices."""
        return self.device.intra_node_gb_s if self.count <= self.per_node else self.device.inter_node_gb_s


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute: float
    optimizer: float
    communication: float
    """On the links, hidden or not."""
    exposed: float
    """The part of it that the backward pass does not hide, and all copies to and from the host."""

    @property
    def total(self) -> float:
        return self.compute + self.optimizer + self.exposed


def estimate_step(
    facts: ModelFacts, layout: Layout, machine: Machine, flops_per_token: float, batch_size: int
) -> StepTime:
    """Seconds of an optimizer step over `batch_size` sequences of all ranks."""
    device = machine.device
    assert device.peak_tflops is not None
    assert device.memory_gb_s is not None
    tokens = batch_size * layout.sequence_length / layout.world_size
    rate = device.peak_tflops[layout.precision] * 1e12 * device.utilization[layout.precision]
    compute = tokens * flops_per_token / rate
    own = facts.parameters / (layout.world_size if layout.stage else 1)
    bandwidth = _HOST_GB_S if layout.offload_optimizer else device.memory_gb_s
    micro_steps = max(1, round(batch_size / (layout.world_size * layout.micro_batch_size)))
    traffic = estimate_traffic(facts, layout, micro_steps)
    communication = traffic.links / (machine.link_gb_s * 1e9)
    hidden = min(communication, compute * _HIDDEN_SHARE) if layout.overlaps else 0.0
    exposed = communication - hidden + traffic.host / (device.host_gb_s * 1e9)
    return StepTime(compute, own * _UPDATE_BYTES / (bandwidth * 1e9), communication, exposed)


@dataclass(frozen=True)
class Work:
    """How far a run gets, and what ends it."""

    steps: int
    tokens: float
    seconds: float
    limit: str
    """The budget that is spent first, such as `max_steps`."""


def estimate_work(
    config: Config, plan: RunPlan, world_size: int, length: float, step_seconds: Callable[[int], float]
) -> Work:
    """Steps, tokens and seconds until the first budget is spent; `step_seconds` of a step by its sequences."""
    budget = config.budget
    batches = [_batch_size(config, plan, world_size, (i + 0.5) / _SLICES) for i in range(_SLICES)]
    pairs = [(batch * length, step_seconds(batch)) for batch in batches]
    candidates: list[Work] = []
    if budget.max_steps is not None:
        tokens, seconds = (sum(column) * budget.max_steps / _SLICES for column in zip(*pairs, strict=True))
        candidates.append(Work(budget.max_steps, tokens, seconds, "max_steps"))
    if budget.max_tokens is not None:
        slices = [budget.max_tokens / _SLICES / tokens for tokens, _ in pairs]
        seconds = sum(count * duration for count, (_, duration) in zip(slices, pairs, strict=True))
        candidates.append(Work(round(sum(slices)), float(budget.max_tokens), seconds, "max_tokens"))
    if budget.max_hours is not None:
        slices = [budget.max_hours * 3600 / _SLICES / duration for _, duration in pairs]
        tokens = sum(count * of_step for count, (of_step, _) in zip(slices, pairs, strict=True))
        candidates.append(Work(int(sum(slices)), tokens, budget.max_hours * 3600, "max_hours"))
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
    unit = 1 if isinstance(micro, str) else micro
    counts = sorted({*range(1, 9), *(2**i for i in range(4, largest.bit_length()))})
    return [count for count in counts if config.train.global_batch_size % (count * unit) == 0]

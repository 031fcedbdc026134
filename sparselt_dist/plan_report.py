"""The text of `plan`: what a configuration needs and costs, and every assumption behind it."""

from __future__ import annotations

from dataclasses import dataclass

from sparselt_dist.config import Config
from sparselt_dist.metrics import format_count, format_duration
from sparselt_dist.planning import (
    USABLE_SHARE,
    Layout,
    Machine,
    Memory,
    ModelFacts,
    StepTime,
    Traffic,
    Work,
    fitting_world_sizes,
)

_PARTS = ("weights", "gradients", "optimizer", "activations", "loss", "buffers", "overhead", "total", "host")
_FILES = {0: "single_gpu", 1: "zero1", 2: "zero2", 3: "zero3"}


@dataclass(frozen=True)
class Prediction:
    """All that `plan` says of a configuration."""

    config: Config
    machine: Machine
    facts: ModelFacts
    layouts: list[tuple[Layout, Memory, Traffic, StepTime]]
    """The configuration's own first; of a full step."""
    flops_per_token: float
    work: Work
    data_tokens: int | None
    """In the training shards, if they are there."""
    given: frozenset[str]
    """Which of `price` and `utilization` the user gave."""

    @property
    def usable_gib(self) -> float:
        return (self.machine.device.memory_gib or 0.0) * USABLE_SHARE

    @property
    def fits(self) -> bool:
        return self.layouts[0][1].total <= self.usable_gib


def report(prediction: Prediction) -> str:
    """The whole text, for a terminal."""
    usable = f"GiB (* this configuration; {prediction.usable_gib:.1f} usable)"
    return "\n".join(
        [
            *_summary(prediction),
            f"\nmemory of a rank at the peak of a step, {usable}",
            *_memory_table(prediction),
            "\na full step: bytes that a rank sends, and seconds",
            *_step_table(prediction),
            "\nassumptions",
            *(f"- {line}" for line in _assumptions(prediction)),
        ]
    )


def _summary(prediction: Prediction) -> list[str]:
    config, facts, work, machine = prediction.config, prediction.facts, prediction.work, prediction.machine
    layout = prediction.layouts[0][0]
    device, flops, hours = machine.device, prediction.flops_per_token, prediction.work.seconds / 3600
    counts = ", ".join(map(str, fitting_world_sizes(config)))
    lines = [
        f"model        {config.model.architecture}, {facts.parameters:,} parameters "
        f"({facts.backbone_parameters:,} beside embeddings and head)",
        f"devices      {machine.count} x {device.name}, up to {machine.per_node} a node",
        f"split        {config.train.global_batch_size} sequences a step = {machine.count} ranks x "
        f"{layout.micro_batch_size} x {layout.accumulation_steps} micro-steps; ranks that divide it: {counts}",
        f"budget       ends by {work.limit}: {work.steps:,} steps, {format_count(work.tokens)} tokens",
        f"compute      {flops / 1e6:,.1f} MFLOP a token, {flops * work.tokens:.3g} FLOP in all",
        f"throughput   {format_count(work.tokens / work.seconds)} tokens/s",
        f"time         {format_duration(work.seconds)}",
        f"cost         {hours * machine.count * device.price_per_hour:,.2f} = {_devices(machine.count)} x {hours:,.2f} h x "
        f"{device.price_per_hour:g} an hour",
    ]
    if device.watts is not None:
        energy = device.watts * machine.count * hours / 1000
        lines.append(f"energy       {energy:,.1f} kWh of devices at {device.watts:g} W")
    return lines


def _devices(count: int) -> str:
    return f"{count} device{'s' if count > 1 else ''}"


def _memory_table(prediction: Prediction) -> list[str]:
    lines = [f"  {'':<18}" + "".join(f"{part:>12}" for part in _PARTS) + "   fits"]
    for mark, layout, memory, _, _ in _rows(prediction):
        cells = "".join(f"{getattr(memory, part):>12.2f}" for part in _PARTS)
        lines.append(f"{mark} {layout.name:<18}{cells}   {'yes' if memory.total <= prediction.usable_gib else 'NO'}")
    return lines


def _step_table(prediction: Prediction) -> list[str]:
    head = ("all-reduce", "scatter", "gather", "to host", "compute s", "optimizer s", "links s", "exposed s", "step s")
    lines = [f"  {'':<18}" + "".join(f"{name:>12}" for name in head)]
    for mark, layout, _, traffic, step in _rows(prediction):
        volumes = (traffic.all_reduce, traffic.reduce_scatter, traffic.all_gather, traffic.host)
        seconds = (step.compute, step.optimizer, step.communication, step.exposed, step.total)
        cells = [format_count(volume) for volume in volumes] + [f"{value:.3g}" for value in seconds]
        lines.append(f"{mark} {layout.name:<18}" + "".join(f"{cell:>12}" for cell in cells))
    return lines


def _rows(prediction: Prediction) -> list[tuple[str, Layout, Memory, Traffic, StepTime]]:
    """Every layout once, in order of stage, the configuration's own marked."""
    own, *others = prediction.layouts
    shown = others if any(row[0] == own[0] for row in others) else [own, *others]
    return [("*" if row[0] == own[0] else " ", *row) for row in shown]


def _assumptions(prediction: Prediction) -> list[str]:
    device, layout, given = prediction.machine.device, prediction.layouts[0][0], prediction.given
    peak, share = (device.peak_tflops or {})[layout.precision], device.utilization[layout.precision]
    reason = "given" if "utilization" in given else device.utilization_source
    price = "given" if "price" in given else "assumed, --price-per-device-hour says better"
    saved = "counted on the model" if prediction.facts.saved.traced else "by the formula for transformers"
    overlap = "hidden behind two thirds of the compute at most" if layout.overlaps else "not overlapped"
    lines = [
        f"peak of one {device.name} in {layout.precision}: {peak:,.4g} TFLOP/s dense; real tokens reach {share:.0%} "
        f"of it in forward and backward passes, attention and data waits included ({reason}; --utilization)",
        f"links: {device.intra_node_gb_s:g} GB/s a device within a node, {device.inter_node_gb_s:g} between nodes "
        f"({device.link_source}); rings; communication {overlap}",
        f"optimizer: 40 bytes a weight through {device.memory_gb_s:,.4g} GB/s of memory",
        f"price: {device.price_per_hour:g} a device hour ({price})",
        f"{layout.sequence_length:g} tokens a sequence; fp32 weights, gradients and moments; activations {saved}, without "
        "recomputation, which the trainer does not do, and without what train.compile saves",
        f"memory: {device.memory_gib:.1f} GiB a device, of which {USABLE_SHARE:.0%} is usable",
        "start-up, compilation, evaluation, yardsticks, checkpoints and export not counted",
    ]
    if prediction.data_tokens is None:
        lines.append("the shards are not there yet: vocabulary as prepare.vocab_size says")
    else:
        epochs = prediction.work.tokens / prediction.data_tokens
        lines.append(f"data: {format_count(prediction.data_tokens)} tokens in the shards, {epochs:.2f} epochs")
    return lines


def refusal(prediction: Prediction) -> str:
    """Why the configuration cannot run: what it needs, what there is, what to change."""
    layout, memory, *_ = prediction.layouts[0]
    return (
        f"{layout.name} with micro-batches of {layout.micro_batch_size} needs {memory.total:.1f} GiB a rank, expected at "
        f"most {prediction.usable_gib:.1f} of one {prediction.machine.device.name}; {_advice(prediction)}"
    )


def _advice(prediction: Prediction) -> str:
    own = prediction.layouts[0][0]
    last = 0 if prediction.config.optim.name == "muon" else 3  # stage, which Muon's whole matrices limit
    fitting = [
        layout
        for layout, memory, *_ in prediction.layouts[1:]
        if memory.total <= prediction.usable_gib and layout.stage <= last
    ]
    higher = [layout for layout in fitting if layout.stage > own.stage or (layout.stage == 3 and own.stage == 3)]
    smaller = f"train.micro_batch_size={max(own.micro_batch_size // 2, 1)}"
    found = next(iter([*higher, *fitting]), None)
    if found is None:
        return (
            f"use {smaller}, more devices or a smaller model"
            if own.micro_batch_size > 1
            else ("use more devices, shorter sequences or a smaller model")
        )
    name = "zero3_offload" if found.offload_optimizer else _FILES[found.stage]
    return f"use train.deepspeed_config={name}" + (f" or {smaller}" if own.micro_batch_size > 1 else "")

"""`plan`: what a run will need and cost, before it is queued. Every number comes with its assumption.

python -m sparselt_dist.plan --config base --devices 32 --device a100
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sparselt_dist import cli
from sparselt_dist.config import Config
from sparselt_dist.config_loading import load_config, make_plan, objective_settings, resolve_deepspeed
from sparselt_dist.metrics import flops_per_token, format_count, format_duration
from sparselt_dist.planning import (
    GIB,
    USABLE_SHARE,
    Device,
    Layout,
    Memory,
    ModelFacts,
    Work,
    estimate_memory,
    estimate_work,
    fitting_world_sizes,
    layouts,
)
from sparselt_dist.run_plan import RunPlan

if TYPE_CHECKING:
    from sparselt_dist.data.manifest import Manifest
    from sparselt_dist.objectives.base import TokenizerInfo

# name: memory GiB, dense 16-bit TFLOP/s, fp32 (TF32) TFLOP/s, assumed utilisation, assumed price an hour
_GPUS: dict[str, tuple[float, float, float, float, float]] = {
    "a100": (80.0, 312.0, 156.0, 0.40, 1.80),
    "h100": (80.0, 989.0, 494.0, 0.35, 3.00),
    "rtx4090": (24.0, 165.0, 82.0, 0.40, 0.45),
    "a6000": (48.0, 155.0, 77.0, 0.40, 0.80),
}
_CPU_UTILIZATION = 0.2
_CPU_CORE_PRICE = 0.04


def build_parser() -> argparse.ArgumentParser:
    """The command line of `plan`."""
    parser = cli.make_parser(
        "plan",
        "Memory per rank by ZeRO stage, steps, tokens, FLOPs, hours and cost of a configuration, before it is queued.",
        "sparselt plan --config base --devices 32 --device a100",
    )
    cli.add_config_arguments(parser)
    parser.add_argument("--devices", type=_positive_int, default=1, metavar="N", help="ranks: GPUs, or CPU processes")
    parser.add_argument("--device", choices=["cpu", *_GPUS], default="cpu", help="kind of device")
    parser.add_argument("--price", type=float, default=None, metavar="P", help="price of a device hour, else assumed")
    parser.add_argument(
        "--utilization", type=float, default=None, metavar="U", help="share of the peak reached, else assumed"
    )
    return parser


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("expected a whole number >= 1")
    return value


def _device(args: argparse.Namespace, config: Config) -> Device:
    """The device asked for; a CPU rank gets its share of this host, whose peak is measured."""
    if args.device == "cpu":
        import psutil

        from sparselt_dist.metrics import peak_flops

        memory = psutil.virtual_memory().total / GIB / args.devices
        cores = (os.cpu_count() or 1) / args.devices
        peak = peak_flops("cpu", config.train.precision) / args.devices
        device = Device("cpu", memory, peak, _CPU_UTILIZATION, _CPU_CORE_PRICE * cores, overhead_gib=1.2)
    else:
        memory, half, single, utilization, price = _GPUS[args.device]
        peak = (single if config.train.precision == "fp32" else half) * 1e12
        device = Device(args.device, memory, peak, utilization, price, overhead_gib=1.5)
    if args.price is not None:
        device = dataclasses.replace(device, price_per_hour=args.price)
    if args.utilization is not None:
        device = dataclasses.replace(device, utilization=args.utilization)
    return device


def _manifest(config: Config) -> Manifest | None:
    """The manifest of the training shards, if they are there."""
    from sparselt_dist.data.corpora import open_corpora

    where = config.data.train
    if where is None or (isinstance(where, str) and _is_missing(where)):
        return None
    return open_corpora(where, config).manifest


def _is_missing(where: str) -> bool:
    """Whether a location is a plain local path at which nothing is, yet."""
    from sparselt_dist.data.storage import is_remote

    return not (is_remote(where) or set(where) & set("{*?[") or Path(where).exists())


def _tokenizer(config: Config, manifest: Manifest | None) -> TokenizerInfo:
    """A stand-in with the vocabulary of the shards, or the one they will have."""
    from sparselt_dist.objectives.base import TokenizerInfo

    size = manifest.vocab_size if manifest is not None else config.prepare.vocab_size
    folder = Path(config.prepare.tokenizer)
    if manifest is None and (folder / "tokenizer.json").is_file():
        from sparselt_dist.data.tokenizer import tokenizer_info

        return tokenizer_info(folder)
    # the ids that a tokenizer trained by `prepare` has; sizes do not depend on them
    return TokenizerInfo(
        size, pad_id=0, bos_id=1, eos_id=2, unk_id=3, cls_id=4, sep_id=5, mask_id=6, special_ids=tuple(range(7))
    )


def model_facts(config: Config, tokenizer: TokenizerInfo) -> ModelFacts:
    """Exact sizes of the model, built without memory on torch's meta device."""
    import torch

    from sparselt_dist.models.assembly import build_model

    if config.model.init_from is not None:  # its sizes without its weights
        section = config.model.model_copy(
            update={"architecture": config.model.init_from, "init_from": None, "init_objective": False}
        )
        config = config.model_copy(update={"model": section})
    with torch.device("meta"):
        model = build_model(config, tokenizer)
    backbone = model.backbone
    embeddings = sum(p.numel() for p in backbone.get_input_embeddings().parameters())
    probability = getattr(objective_settings(config), "mlm_probability", 1.0)
    return ModelFacts(
        parameters=sum(p.numel() for p in model.parameters()),
        backbone_parameters=max(sum(p.numel() for p in backbone.parameters()) - embeddings, 0),
        num_layers=int(backbone.config.num_hidden_layers),
        hidden_size=int(backbone.config.hidden_size),
        vocab_size=int(backbone.config.vocab_size) if backbone.has_head else 0,
        targets_per_token=1.0 if backbone.is_causal else float(probability),
    )


def _mean_length(config: Config, manifest: Manifest | None) -> float:
    if config.data.sequence_length is not None:
        return float(config.data.sequence_length)
    return manifest.tokens / manifest.samples if manifest is not None and manifest.tokens else 512.0


def _token_flops(facts: ModelFacts, length: float) -> float:
    return flops_per_token(
        num_backbone_parameters=facts.backbone_parameters,
        num_layers=facts.num_layers,
        hidden_size=facts.hidden_size,
        mean_length=length,
        targets_per_token=facts.targets_per_token,
        vocab_size=facts.vocab_size,
    )


def _layout_name(layout: Layout) -> str:
    return f"ZeRO-{layout.stage}" + (" + offload" if layout.offload_optimizer or layout.offload_parameters else "")


def _memory_table(own: Layout, rows: list[tuple[Layout, Memory]], usable: float) -> list[str]:
    parts = ("weights", "gradients", "optimizer", "activations", "buffers", "overhead", "total", "host")
    lines = [f"  {'':<18}" + "".join(f"{part:>12}" for part in parts) + "   fits"]
    for layout, memory in rows:
        mark = "*" if layout == own else " "
        cells = "".join(f"{getattr(memory, part):>12.2f}" for part in parts)
        lines.append(f"{mark} {_layout_name(layout):<18}{cells}   {'yes' if memory.total <= usable else 'NO'}")
    return lines


def _advice(own: Layout, rows: list[tuple[Layout, Memory]], usable: float) -> str:
    fits = next((layout for layout, memory in rows if memory.total <= usable and layout.stage > own.stage), None)
    if fits is None:
        fits = next((layout for layout, memory in rows if memory.total <= usable), None)
    smaller = f"train.micro_batch_size={max(own.micro_batch_size // 2, 1)}"
    if fits is None:
        return f"use {smaller}, more devices or a smaller model"
    name = {0: "single_gpu", 1: "zero1", 2: "zero2"}.get(
        fits.stage, "zero3_offload" if fits.offload_optimizer else "zero3"
    )
    return f"use train.deepspeed_config={name}" + (f" or {smaller}" if own.micro_batch_size > 1 else "")


def _summary_lines(
    config: Config, plan: RunPlan, facts: ModelFacts, device: Device, world: int, work: Work, length: float
) -> list[str]:
    flops = _token_flops(facts, length)
    hours = work.seconds / 3600
    counts = ", ".join(map(str, fitting_world_sizes(config)))
    return [
        f"model        {config.model.architecture}, {facts.parameters:,} parameters "
        f"({facts.backbone_parameters:,} beside embeddings and head)",
        f"split        {config.train.global_batch_size} sequences a step = {world} ranks x {plan.micro_batch_size} "
        f"x {plan.accumulation_steps} micro-steps; ranks that divide it: {counts}",
        f"budget       ends by {work.limit}: {work.steps:,} steps, {format_count(work.tokens)} tokens",
        f"compute      {flops / 1e6:,.1f} MFLOP a token, {flops * work.tokens:.3g} FLOP in all",
        f"throughput   {format_count(work.tokens / work.seconds)} tokens/s assumed",
        f"time         {format_duration(work.seconds)}",
        f"cost         {hours * world * device.price_per_hour:,.2f} = {world} devices x {hours:,.2f} h x "
        f"{device.price_per_hour:g} an hour",
    ]


def _assumptions(device: Device, length: float, manifest: Manifest | None, work: Work) -> list[str]:
    measured = ", measured on this host" if device.name == "cpu" else ""
    lines = [
        f"{device.peak_flops / 1e12:,.2f} TFLOP/s peak a {device.name}{measured}; {device.utilization:.0%} of it for "
        "real tokens (--utilization), communication and data waits included",
        f"price {device.price_per_hour:g} a device hour (--price); prices assumed where none is given",
        f"{length:g} tokens a sequence; fused attention; no activation checkpointing",
        f"memory of one {device.name}: {device.memory_gib:.1f} GiB, of which {USABLE_SHARE:.0%} is usable",
        "evaluation, yardsticks, checkpoints and export not counted",
    ]
    if manifest is not None:
        lines.append(
            f"data: {format_count(manifest.tokens)} tokens in the shards, {work.tokens / manifest.tokens:.2f} epochs"
        )
    else:
        lines.append("the shards are not there yet: vocabulary as prepare.vocab_size says")
    return lines


def _run(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides, default_profile="quickstart")
    plan = make_plan(config, args.devices)
    manifest = _manifest(config)
    facts = model_facts(config, _tokenizer(config, manifest))
    device = _device(args, config)
    length = _mean_length(config, manifest)
    rate = args.devices * device.peak_flops * device.utilization / _token_flops(facts, length)
    work = estimate_work(config, plan, args.devices, length, rate)
    print("\n".join(_summary_lines(config, plan, facts, device, args.devices, work, length)))
    own, *others = layouts(config, plan, args.devices, resolve_deepspeed(config, plan), length)
    shown = others if own in others else [own, *others]
    rows = [(layout, estimate_memory(facts, layout, device.overhead_gib)) for layout in shown]
    usable = device.memory_gib * USABLE_SHARE
    print(f"\nmemory of a rank, GiB (* this configuration; {usable:.1f} usable)")
    print("\n".join(_memory_table(own, rows, usable)))
    print("\nassumptions\n" + "\n".join(f"- {line}" for line in _assumptions(device, length, manifest, work)))
    needed = estimate_memory(facts, own, device.overhead_gib).total
    if needed <= usable:
        return cli.EXIT_DONE
    print(
        f"\nerror: {_layout_name(own)} with micro-batches of {own.micro_batch_size} needs {needed:.1f} GiB a rank, "
        f"expected at most {usable:.1f} of a {device.name}; {_advice(own, rows, usable)}",
        file=sys.stderr,
    )
    return cli.EXIT_USER_ERROR


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 2 if the run would not fit."""
    args = cli.parse_arguments(build_parser(), argv)
    return cli.run_command(lambda: _run(args))


if __name__ == "__main__":
    sys.exit(main())

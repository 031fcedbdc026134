"""`plan`: what a run will need and cost, before it is queued. Every number comes with its assumption.

python -m sparselt_dist.plan --config base --device a100 --nodes 4 --devices-per-node 8
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparselt_dist import cli
from sparselt_dist.config import Config
from sparselt_dist.config_loading import load_config, make_plan, objective_settings, resolve_deepspeed
from sparselt_dist.device import Device, find_device, measured, shipped_devices
from sparselt_dist.errors import ConfigError
from sparselt_dist.objectives import get_objective
from sparselt_dist.objectives.cost import Workload, declared_targets, flops_per_token
from sparselt_dist.plan_report import Prediction, refusal, report
from sparselt_dist.planning import (
    Machine,
    ModelFacts,
    SavedBytes,
    estimate_memory,
    estimate_step,
    estimate_traffic,
    estimate_work,
    formula_saved,
    layouts,
)
from sparselt_dist.run_plan import RunPlan

if TYPE_CHECKING:
    from sparselt_dist.data.manifest import Manifest
    from sparselt_dist.models.backbone import PretrainingModel
    from sparselt_dist.objectives.base import TokenizerInfo

_UNKNOWN_LENGTH = 512.0  # tokens, of documents that are not there yet


def build_parser() -> argparse.ArgumentParser:
    """The command line of `plan`."""
    parser = cli.make_parser(
        "plan",
        "Memory per rank by ZeRO stage, communication, steps, tokens, FLOPs, hours and cost of a configuration, before it "
        "is queued. Exit code 2 if it cannot fit.",
        "sparselt plan --config base --device a100 --nodes 4 --devices-per-node 8",
    )
    cli.add_config_arguments(parser)
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="NAME_OR_FILE",
        help=f"{', '.join(shipped_devices())}, or a YAML file like theirs",
    )
    parser.add_argument(
        "--devices",
        type=_positive_int,
        metavar="N",
        help="ranks in all: GPUs, or CPU processes (else what follows, or 1)",
    )
    parser.add_argument("--nodes", type=_positive_int, metavar="M", help="machines that they stand in")
    parser.add_argument("--devices-per-node", type=_positive_int, metavar="K", help="devices a machine, else the usual")
    parser.add_argument(
        "--price-per-device-hour",
        "--price",
        type=_price,
        dest="price",
        metavar="P",
        help="in any currency, else assumed",
    )
    parser.add_argument(
        "--utilization", type=_share, metavar="U", help="share of the peak reached in (0, 1], else assumed"
    )
    return parser


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected a whole number from 1")
    return value


def _price(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"found {text}, expected a price from 0")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected a share above 0 and up to 1")
    return value


def place(device: Device, devices: int | None, nodes: int | None, per_node: int | None) -> Machine:
    """The devices of a run and how many stand in a node, from what was given of the three numbers.

    Raises:
        ConfigError: they contradict each other.
    """
    count = devices or (nodes or 1) * (per_node or (1 if nodes is None else device.devices_per_node))
    if per_node is None:
        alone = count if device.kind == "cpu" else device.devices_per_node
        per_node = alone if nodes is None else math.ceil(count / nodes)
    if nodes is not None and not (nodes - 1) * per_node < count <= nodes * per_node:
        raise ConfigError(
            f"--devices: found {count} on {nodes} nodes of {per_node}, expected {(nodes - 1) * per_node + 1} to "
            f"{nodes * per_node}; give two of --devices, --nodes and --devices-per-node"
        )
    return Machine(device, count, per_node)


def _machine(args: argparse.Namespace, config: Config) -> Machine:
    """The machine asked for, every number of its device known."""
    machine = place(find_device(args.device), args.devices, args.nodes, args.devices_per_node)
    device = measured(machine.device, config.train.precision, min(machine.count, machine.per_node))
    if args.price is not None:
        device = device.model_copy(update={"price_per_hour": args.price})
    if args.utilization is not None:
        device = device.model_copy(update={"utilization": {config.train.precision: args.utilization}})
    known_peak(device, config)
    return Machine(device, machine.count, machine.per_node)


def known_peak(device: Device, config: Config) -> float:
    """TFLOP/s of the device in the run's precision.

    Raises:
        ConfigError: its description says nothing of it.
    """
    precision, peaks = config.train.precision, device.peak_tflops or {}
    if precision not in peaks:
        raise ConfigError(
            f"--device {device.name}: peak_tflops has {', '.join(peaks)}, expected {precision} (train.precision); add it to "
            "the description"
        )
    return peaks[precision]


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


def sized_model(config: Config, tokenizer: TokenizerInfo) -> PretrainingModel:
    """The model of a configuration without memory, on torch's meta device: its exact sizes."""
    import torch

    from sparselt_dist.models.assembly import build_model

    if config.model.init_from is not None:  # its sizes without its weights
        section = config.model.model_copy(
            update={"architecture": config.model.init_from, "init_from": None, "init_objective": False}
        )
        config = config.model_copy(update={"model": section})
    with torch.device("meta"):
        return build_model(config, tokenizer)


def _workload(config: Config, plan: RunPlan, model: PretrainingModel, length: float, world_size: int) -> Workload:
    from sparselt_dist.models.workload import workload

    return workload(
        model.backbone,
        mean_length=length,
        targets_per_token=declared_targets(objective_settings(config), is_causal=model.backbone.is_causal),
        micro_batch_size=plan.micro_batch_size,
        world_size=world_size,
        accumulation_steps=plan.accumulation_steps,
    )


def _model_facts(config: Config, model: PretrainingModel, work: Workload, flops: float, *, on_cpu: bool) -> ModelFacts:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    saved = _saved(config, model, work, on_cpu=on_cpu)
    # an objective that computes more than one pass and one head keeps more in the same proportion
    saved = replace(saved, per_row=saved.per_row * max(flops / work.usual, 1.0))
    return ModelFacts(
        parameters=parameters,
        backbone_parameters=work.body_parameters,
        num_layers=work.num_layers,
        hidden_size=work.hidden_size,
        vocab_size=work.vocab_size if work.has_head else 0,
        targets_per_token=work.targets_per_token,
        chunked_loss=getattr(objective_settings(config), "cross_entropy", "full") == "chunked",
        saved=saved,
    )


def _saved(config: Config, model: PretrainingModel, work: Workload, *, on_cpu: bool) -> SavedBytes:
    from sparselt_dist.models.footprint import trace_saved

    precision, length = config.train.precision, math.ceil(work.mean_length)
    try:
        return trace_saved(model.backbone, length=length, precision=precision, on_cpu=on_cpu)
    except Exception:  # code of any architecture, on tensors without values
        sizes = (work.body_parameters, work.num_layers, work.hidden_size, work.inner_size)
        return formula_saved(sizes, precision, length)


def _mean_length(config: Config, manifest: Manifest | None) -> float:
    if config.data.sequence_length is not None:
        return float(config.data.sequence_length)
    return manifest.tokens / manifest.samples if manifest is not None and manifest.tokens else _UNKNOWN_LENGTH


def predict(config: Config, machine: Machine, given: frozenset[str] = frozenset()) -> Prediction:
    """All that `plan` says of a configuration on a machine whose device is fully known.

    Raises:
        ConfigError, DataError: the configuration or its shards are wrong, or the batch does not divide.
    """
    world, device = machine.count, machine.device
    plan = make_plan(config, world)
    manifest = _manifest(config)
    model = sized_model(config, _tokenizer(config, manifest))
    length = _mean_length(config, manifest)
    sizes = _workload(config, plan, model, length, world)
    flops = flops_per_token(get_objective(config.objective.name), objective_settings(config), sizes)
    facts = _model_facts(config, model, sizes, flops, on_cpu=device.kind == "cpu")
    options = layouts(config, plan, world, resolve_deepspeed(config, plan), length)
    batch = config.train.global_batch_size
    return Prediction(
        config=config,
        machine=machine,
        facts=facts,
        layouts=[
            (
                layout,
                estimate_memory(facts, layout, device),
                estimate_traffic(facts, layout, plan.accumulation_steps),
                estimate_step(facts, layout, machine, flops, batch),
            )
            for layout in options
        ],
        flops_per_token=flops,
        work=estimate_work(
            config, plan, world, length, lambda size: estimate_step(facts, options[0], machine, flops, size).total
        ),
        data_tokens=None if manifest is None else manifest.tokens,
        given=given,
    )


def _run(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides, default_profile="quickstart")
    asked: Mapping[str, float | None] = {"price": args.price, "utilization": args.utilization}
    given = frozenset(name for name, value in asked.items() if value is not None)
    prediction = predict(config, _machine(args, config), given)
    print(report(prediction))
    if prediction.fits:
        return cli.EXIT_DONE
    print(f"\nerror: {refusal(prediction)}", file=sys.stderr)
    return cli.EXIT_USER_ERROR


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 2 if the run would not fit."""
    args = cli.parse_arguments(build_parser(), argv)
    return cli.run_command(lambda: _run(args))


if __name__ == "__main__":
    sys.exit(main())

"""What follows from a configuration and a world size: the split of the global batch, and DeepSpeed's own JSON."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import Any

from sparselt_dist.config import Config
from sparselt_dist.config_layers import Faults
from sparselt_dist.ds_config import check_ds_config, clipping, file_stage, find_ds_config, read_ds_config

LARGEST_AUTO_MICRO_BATCH = 32
NO_STEPS_PER_PRINT = 2**31 - 1


@dataclass(frozen=True)
class RunPlan:
    """Values derived from a configuration and the number of ranks."""

    output_dir: str
    micro_batch_size: int
    accumulation_steps: int
    """Micro-steps of a full global step, on each rank."""
    zero_stage: int
    ds_config_path: str | None


def run_dir(config: Config) -> str:
    """The run's folder; `~` is the user's, which a shell does not fill in behind `run.output_dir=`."""
    return os.path.expanduser(config.run.output_dir or f"runs/{config.run.name}")


def make_plan(config: Config, world_size: int) -> RunPlan:
    """Split the global batch over ranks and micro-steps.

    Raises:
        ConfigError: the global batch does not divide, or the DeepSpeed file is wrong; the nearest fitting values are
            named.
    """
    faults = Faults()
    name = config.train.deepspeed_config
    values = read_ds_config(name, "train", faults)
    micro_batch_size = _micro_batch_size(config, world_size, faults)
    stage = file_stage(values)
    if config.train.micro_batch_size == "fastest" and (config.train.zero_stage or stage) == 3:
        expected = "a number or auto with ZeRO stage 3: the search holds the whole model on each device"
        faults.add("batch sizes", "train.micro_batch_size", "fastest", expected)
    faults.raise_if_any()
    path = find_ds_config(name) if name is not None else None
    return RunPlan(
        output_dir=run_dir(config),
        micro_batch_size=micro_batch_size,
        accumulation_steps=config.train.global_batch_size // (micro_batch_size * world_size),
        zero_stage=(config.train.zero_stage or 0) if stage is None else stage,
        ds_config_path=None if path is None else str(path),
    )


def _micro_batch_size(config: Config, world_size: int, faults: Faults) -> int:
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    unit = world_size if isinstance(micro, str) else world_size * micro
    if batch % unit == 0:
        share = batch // world_size
        if not isinstance(micro, str):
            return micro
        return max(d for d in range(1, min(share, LARGEST_AUTO_MICRO_BATCH) + 1) if share % d == 0)
    below, above = batch // unit * unit, (batch // unit + 1) * unit
    near = f"{below} or {above}" if below else str(above)
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
    split = ranks if isinstance(micro, str) else f"{ranks} x train.micro_batch_size {micro}"
    fix = f"nearest that fit: {near}"
    if not isinstance(micro, str) and batch % world_size == 0:
        share = batch // world_size
        fits = max(d for d in range(1, min(share, micro) + 1) if share % d == 0)
        fix += f", or train.micro_batch_size={fits}"
    faults.add("batch sizes", "train.global_batch_size", str(batch), f"a multiple of {unit} ({split})", fix)
    return 1


def resolve_deepspeed(config: Config, plan: RunPlan) -> dict[str, Any]:
    """DeepSpeed's final configuration: the chosen file, with every mathematical key set from YAML.

    Raises:
        ConfigError: a key of the file contradicts YAML.
    """
    faults = Faults()
    values = copy.deepcopy(read_ds_config(config.train.deepspeed_config, "train", faults))
    check_ds_config(config, values, faults, (plan.micro_batch_size, plan.accumulation_steps))
    faults.raise_if_any()
    zero = values.setdefault("zero_optimization", {})
    zero["stage"] = plan.zero_stage
    for key in ("optimizer", "scheduler", "bf16", "fp16"):  # checked above to say no more than YAML
        values.pop(key, None)
    precision = config.train.precision
    values |= {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "gradient_clipping": clipping(config),
        # fp32 weights and autocast in every ZeRO stage, so that a checkpoint does not depend on precision; gradients
        # are reduced in fp32 (no module is "safe" for less), so that they do not depend on the number of ranks.
        "torch_autocast": {
            "enabled": precision != "fp32",
            "dtype": {"bf16": "bfloat16", "fp16": "float16"}.get(precision, "bfloat16"),
            "lower_precision_safe_modules": [],
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    values.setdefault("wall_clock_breakdown", False)
    values.setdefault("steps_per_print", NO_STEPS_PER_PRINT)
    values.setdefault("timers", {"throughput": {"enabled": False}})  # it waits for the device at each micro-batch
    return values

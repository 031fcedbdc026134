"""What follows from a configuration and a world size: the split of the global batch, and DeepSpeed's own JSON.

One owner per quantity: YAML says what changes the mathematics, a file of `ds_configs/` how it is executed. A
mathematical key in such a file is an error unless it is "auto" or says the same.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselt_dist.config import Config
from sparselt_dist.config_layers import Faults, did_you_mean, show

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


def ds_config_folder() -> Path:
    """Where the shipped DeepSpeed files lie: inside an installed package, or beside it in a checkout."""
    installed = Path(__file__).parent / "ds_configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "ds_configs"


def list_ds_configs() -> list[str]:
    """Names of the shipped DeepSpeed files."""
    return sorted(path.stem for path in ds_config_folder().glob("*.json"))


def find_ds_config(name: str) -> Path | None:
    """A shipped file by name (with or without `.json` and folder), else the file at that path, else None."""
    shipped = ds_config_folder() / f"{Path(name).name.removesuffix('.json')}.json"
    if Path(name).is_file():
        return Path(name)
    is_shipped_name = Path(name).parent.name in {"", "ds_configs"} and shipped.is_file()
    return shipped if is_shipped_name else None


def read_ds_config(name: str | None, source: str, faults: Faults) -> dict[str, Any]:
    """The DeepSpeed file that `train.deepspeed_config` names; {} for none, or with a fault noted."""
    if name is None:
        return {}
    path = find_ds_config(name)
    key = "train.deepspeed_config"
    if path is None:
        names = list_ds_configs()
        faults.add(source, key, show(name), f"a path or one of {', '.join(names)}", did_you_mean(name, names))
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        faults.add(source, key, f"{path}: {cause}", "a readable JSON file", "mend the file")
        return {}
    if not isinstance(values, dict):
        faults.add(source, key, f"{path}: {show(values)}", "a JSON object", "mend the file")
        return {}
    return values


def file_stage(values: dict[str, Any]) -> int | None:
    """The ZeRO stage a DeepSpeed file sets, None if it leaves it open."""
    zero = values.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    return stage if isinstance(stage, int) else None


def _clipping(config: Config) -> float:
    # DeepSpeed clips at 1.0 when the key is absent; 0.0 is off
    return 0.0 if config.optim.clip_norm is None else config.optim.clip_norm


def check_ds_config(config: Config, values: dict[str, Any], faults: Faults, plan: RunPlan | None = None) -> None:
    """Note each key of a DeepSpeed file that YAML owns and that says something else than YAML."""
    name = str(config.train.deepspeed_config)
    owned: dict[str, tuple[str, Any]] = {
        "train_batch_size": ("train.global_batch_size", config.train.global_batch_size),
        "gradient_clipping": ("optim.clip_norm", _clipping(config)),
    }
    if plan is not None:
        owned["train_micro_batch_size_per_gpu"] = ("train.micro_batch_size", plan.micro_batch_size)
        owned["gradient_accumulation_steps"] = ("train.global_batch_size", plan.accumulation_steps)
    for key, (owner, ours) in owned.items():
        if key in values and values[key] not in ("auto", ours):
            faults.add(
                name, key, show(values[key]), f'{show(ours)} ({owner}) or "auto"', f"remove it; set {owner} in YAML"
            )
    for key in ("bf16", "fp16"):
        ours = config.train.precision == key
        if key in values and values[key] not in ("auto", {"enabled": ours}, {"enabled": "auto"}):
            expected = f"{show({'enabled': ours})} (train.precision: {config.train.precision})"
            faults.add(name, key, show(values[key]), expected, "remove it; set train.precision in YAML")
    for key, owner in (("optimizer", "optim"), ("scheduler", "schedule")):
        if key in values and values[key] != "auto":
            faults.add(name, key, show(values[key]), f"none: YAML's `{owner}` owns it", "remove it")
    stage, wanted = file_stage(values), config.train.zero_stage
    if stage is not None and wanted is not None and stage != wanted:
        expected = f"{wanted} (train.zero_stage)"
        faults.add(name, "zero_optimization.stage", str(stage), expected, "set only one of the two, or both alike")


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
    faults.raise_if_any()
    stage = file_stage(values)
    path = find_ds_config(name) if name is not None else None
    return RunPlan(
        output_dir=config.run.output_dir or f"runs/{config.run.name}",
        micro_batch_size=micro_batch_size,
        accumulation_steps=config.train.global_batch_size // (micro_batch_size * world_size),
        zero_stage=(config.train.zero_stage or 0) if stage is None else stage,
        ds_config_path=None if path is None else str(path),
    )


def _micro_batch_size(config: Config, world_size: int, faults: Faults) -> int:
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    unit = world_size if micro == "auto" else world_size * micro
    if batch % unit == 0:
        share = batch // world_size
        if micro != "auto":
            return micro
        return max(d for d in range(1, min(share, LARGEST_AUTO_MICRO_BATCH) + 1) if share % d == 0)
    below, above = batch // unit * unit, (batch // unit + 1) * unit
    near = f"{below} or {above}" if below else str(above)
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
    split = ranks if micro == "auto" else f"{ranks} x train.micro_batch_size {micro}"
    fix = f"nearest that fit: {near}"
    if micro != "auto" and batch % world_size == 0:
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
    check_ds_config(config, values, faults, plan)
    faults.raise_if_any()
    zero = values.setdefault("zero_optimization", {})
    zero["stage"] = plan.zero_stage
    for key in ("optimizer", "scheduler"):
        values.pop(key, None)
    precision = config.train.precision
    values |= {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "gradient_clipping": _clipping(config),
        "bf16": {"enabled": precision == "bf16"},
        # loss_scale 0 is dynamic scaling
        "fp16": {"enabled": True, "loss_scale": 0} if precision == "fp16" else {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        "steps_per_print": NO_STEPS_PER_PRINT,
    }
    return values

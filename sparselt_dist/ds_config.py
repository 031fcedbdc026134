"""The DeepSpeed files of `ds_configs/`: finding, reading and checking them against YAML.

One owner per quantity: YAML says what changes the mathematics, such a file how it is executed. A mathematical key in
it is an error unless it is "auto" or says the same.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

from sparselt_dist.config import Config
from sparselt_dist.config_layers import Faults, did_you_mean, show

# keys that YAML owns
OWNED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "torch_autocast",
    "optimizer",
    "scheduler",
)
# keys that say how a run is executed
EXECUTION_KEYS = (
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "activation_checkpointing",
    "aio",
    "checkpoint",
    "comms_logger",
    "communication_data_type",
    "data_types",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "log_level",
    "memory_breakdown",
    "prescale_gradients",
    "seq_parallel_communication_data_type",
    "steps_per_print",
    "timers",
    "wall_clock_breakdown",
)

MUON_NEEDS = "optim.name=muon needs whole matrices and their gradients on every rank"


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


def clipping(config: Config) -> float:
    """DeepSpeed's `gradient_clipping` for this configuration."""
    # DeepSpeed clips at 1.0 when the key is absent; 0.0 is off
    return 0.0 if config.optim.clip_norm is None else config.optim.clip_norm


def check_ds_config(
    config: Config, values: dict[str, Any], faults: Faults, split: tuple[int, int] | None = None
) -> None:
    """Note the keys of a DeepSpeed file that are unknown, or that YAML owns and that say something else than YAML.

    `split`: micro-batch size and accumulation steps, where the world size is known.
    """
    name = str(config.train.deepspeed_config)
    _check_numbers(name, config, values, faults, split)
    for key in ("bf16", "fp16"):
        ours = config.train.precision == key
        if key in values and values[key] not in ("auto", {"enabled": ours}, {"enabled": "auto"}):
            expected = f"{show({'enabled': ours})} (train.precision: {config.train.precision})"
            faults.add(name, key, show(values[key]), expected, "remove it; set train.precision in YAML")
    for key, owner in (("optimizer", "optim"), ("scheduler", "schedule"), ("torch_autocast", "train.precision")):
        if key in values and values[key] != "auto":
            faults.add(name, key, show(values[key]), f"none: YAML's `{owner}` owns it", "remove it")
    stage, wanted = file_stage(values), config.train.zero_stage
    if stage is not None and wanted is not None and stage != wanted:
        expected = f"{wanted} (train.zero_stage)"
        faults.add(name, "zero_optimization.stage", str(stage), expected, "set only one of the two, or both alike")
    if config.optim.name == "muon" and stage:
        fix = "choose single_gpu, or optim.name=adamw"
        faults.add(name, "zero_optimization.stage", str(stage), f"0: {MUON_NEEDS}", fix)
    _check_keys(name, values, faults)


def _check_numbers(
    name: str, config: Config, values: dict[str, Any], faults: Faults, split: tuple[int, int] | None
) -> None:
    owned: dict[str, tuple[str, Any]] = {
        "train_batch_size": ("train.global_batch_size", config.train.global_batch_size),
        "gradient_clipping": ("optim.clip_norm", clipping(config)),
    }
    if split is not None:
        owned["train_micro_batch_size_per_gpu"] = ("train.micro_batch_size", split[0])
        owned["gradient_accumulation_steps"] = ("train.global_batch_size", split[1])
    for key, (owner, ours) in owned.items():
        if key in values and values[key] not in ("auto", ours):
            expected = f'{show(ours)} ({owner}) or "auto"'
            faults.add(name, key, show(values[key]), expected, f"remove it; set {owner} in YAML")


def _check_keys(name: str, values: dict[str, Any], faults: Faults) -> None:
    """DeepSpeed ignores an unknown key without a word, and refuses one inside zero_optimization with a traceback."""
    for key in values:
        if key not in EXECUTION_KEYS and key not in OWNED_KEYS:
            hint = did_you_mean(key, EXECUTION_KEYS + OWNED_KEYS)
            faults.add(name, key, "an unknown key", "one that says how a run is executed", hint or "remove it")
    zero = values.get("zero_optimization", {})
    if not isinstance(zero, dict):
        faults.add(name, "zero_optimization", show(zero), "a JSON object", 'such as {"stage": 2}')
        return
    if "stage" in zero and zero["stage"] not in (0, 1, 2, 3):
        faults.add(name, "zero_optimization.stage", show(zero["stage"]), "0, 1, 2 or 3")
    if zero.get("zero_quantized_nontrainable_weights"):
        path = "zero_optimization.zero_quantized_nontrainable_weights"
        faults.add(name, path, "true", "false: a checkpoint holds weights as they are", "remove it")
    for key in ("offload_optimizer", "offload_param"):
        if isinstance(zero.get(key), dict) and zero[key].get("device") == "nvme":
            expected = '"cpu" or "none": a checkpoint is made of what is in memory'
            faults.add(name, f"zero_optimization.{key}.device", '"nvme"', expected, "offload to cpu")
    known = _zero_keys()
    for key in zero if known else ():
        if key not in known:
            path = f"zero_optimization.{key}"
            faults.add(name, path, "an unknown key", "a field of DeepSpeed's ZeRO", did_you_mean(key, known))


@cache
def _zero_keys() -> frozenset[str]:
    """Names and aliases of the fields of DeepSpeedZeroConfig, read from its source; empty where that is not found."""
    spec = importlib.util.find_spec("deepspeed")
    path = Path(spec.origin).parent / "runtime" / "zero" / "config.py" if spec and spec.origin else None
    if path is None or not path.is_file():
        return frozenset()
    module = ast.parse(path.read_text(encoding="utf-8"))
    body = next((n.body for n in module.body if isinstance(n, ast.ClassDef) and n.name == "DeepSpeedZeroConfig"), [])
    fields = [n for n in body if isinstance(n, ast.AnnAssign)]
    aliases = {
        keyword.value.value
        for field in fields
        if isinstance(field.value, ast.Call)
        for keyword in field.value.keywords
        if keyword.arg == "alias" and isinstance(keyword.value, ast.Constant)
    }
    return frozenset(n.target.id for n in fields if isinstance(n.target, ast.Name)) | {str(a) for a in aliases}

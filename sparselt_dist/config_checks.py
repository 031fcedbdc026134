"""Checks that need more than one field, and the fields of the model's own configuration class."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path
from typing import Any

from sparselt_dist import architectures
from sparselt_dist.architectures import Architecture
from sparselt_dist.budget import SCHEDULES
from sparselt_dist.config import Config
from sparselt_dist.config_layers import Faults, Merged, did_you_mean, show
from sparselt_dist.ds_config import MUON_NEEDS, check_ds_config, read_ds_config

_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "None": (type(None),),
}
_TYPE_WORDS = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "None": "null"}
_EXAMPLE_TYPES = "bert, roberta, modernbert, gpt_neox, llama"


def _is_folder(architecture: str) -> bool:
    return Path(architecture).is_dir() or "/" in architecture


def _find_architecture(name: str) -> Architecture | None:
    """The architecture a name or folder stands for.

    Raises:
        ValueError: a folder without a usable config.json.
    """
    return architectures.find(architectures.folder_type(name) if _is_folder(name) else name)


def prune_inherited_fields(merged: Merged) -> None:
    """Drop fields that an earlier layer set for another architecture, where the final one has none of that name.

    A folder's own config.json, of an architecture or of a checkpoint to start from, stands as given: nothing is inherited
    over it.
    """
    inherited = [path for path in merged.inherited if path.startswith("model.config.")]
    model = merged.values.get("model")
    if not inherited or not isinstance(model, dict):
        return
    name = str(model.get("architecture"))
    try:
        stands = _is_folder(name) or model.get("init_from") is not None
        architecture = None if stands else _find_architecture(name)
    except ValueError:
        architecture = None
    for path in inherited:
        if architecture is None or path.removeprefix("model.config.") not in architecture.fields:
            merged.drop(path)


def check_model(config: Config, merged: Merged, faults: Faults, *, for_training: bool = True) -> None:
    """The architecture exists, each key of `model.config` is a field of its configuration class, and the checkpoint that
    training starts from is there."""
    start = config.model.init_from
    if for_training and start is not None and not (Path(start) / "config.json").is_file():
        expected = "a local checkpoint folder with config.json"
        faults.add(
            merged.source("model.init_from"), "model.init_from", show(start), expected, "set model.init_from=FOLDER"
        )
    if config.model.init_objective and start is None:
        expected = "false, or a checkpoint in model.init_from"
        faults.add(merged.source("model.init_objective"), "model.init_objective", "true", expected)
    name = config.model.architecture
    source = merged.source("model.architecture")
    try:
        architecture = _find_architecture(name)
    except ValueError as cause:
        faults.add(source, "model.architecture", f"{show(name)}, {cause}", "a known type or a folder with config.json")
        return
    if architecture is None:
        expected = (
            f"{architectures.OWN_ARCHITECTURE}, a type of transformers ({_EXAMPLE_TYPES}, ...) or a config folder"
        )
        hint = did_you_mean(name, architectures.known_types())
        faults.add(source, "model.architecture", show(name), expected, hint)
        return
    for key, value in config.model.config.items():
        _check_model_field(key, value, architecture, merged, faults)


def _check_model_field(key: str, value: Any, architecture: Architecture, merged: Merged, faults: Faults) -> None:
    path = f"model.config.{key}"
    if architecture.fields and key not in architecture.fields:
        expected = f"a field of {architecture.model_type}'s configuration class"
        hint = did_you_mean(key, architecture.fields) or f"its fields: {', '.join(architecture.fields)}"
        faults.add(merged.source(path), path, "an unknown key", expected, hint)
        return
    names = architecture.fields.get(key)
    if names is None or any(_is_a(value, name) for name in names):
        return
    expected = " or ".join(words for name, words in _TYPE_WORDS.items() if name in names)
    faults.add(merged.source(path), path, show(value), expected)


def _is_a(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "bool"
    return isinstance(value, _PYTHON_TYPES[name])


def check_contradictions(config: Config, merged: Merged, faults: Faults, *, for_training: bool) -> None:
    """Note values that are sound alone and wrong together; a key already at fault is not reported again."""
    _check_run(config, merged, faults)
    _check_budget(config, merged, faults, for_training)
    _check_expected_loss(config, merged, faults)
    _check_data(config, merged, faults, for_training)
    _check_optimisation(config, merged, faults)
    _check_batch(config, merged, faults)
    _check_checkpoint(config, merged, faults)
    if not faults.touch("train.deepspeed_config"):
        values = read_ds_config(config.train.deepspeed_config, merged.source("train.deepspeed_config"), faults)
        if not faults.touch("train", "optim.clip_norm"):
            check_ds_config(config, values, faults)


def _check_run(config: Config, merged: Merged, faults: Faults) -> None:
    """A name that names the folder too stays inside runs/, whoever wrote the configuration."""
    name, path = config.run.name, "run.name"
    is_folder = name not in (".", "..") and not {"/", "\0"} & set(name)
    if faults.touch(path) or (name.strip() and (is_folder or config.run.output_dir is not None)):
        return
    fix = "name the folder itself in run.output_dir" if name.strip() else "set run.name=NAME"
    faults.add(merged.source(path), path, show(name), "a name that can be that of one folder in runs/", fix)


def _check_budget(config: Config, merged: Merged, faults: Faults, for_training: bool) -> None:
    limits = {key: getattr(config.budget, key) for key in ("max_steps", "max_tokens", "max_hours")}
    for key, limit in limits.items():
        path = f"budget.{key}"
        if limit is not None and limit <= 0 and not faults.touch(path):
            faults.add(merged.source(path), path, show(limit), "a number > 0, or null for no such limit")
    if for_training and not any(limit is not None for limit in limits.values()) and not faults.touch("budget"):
        expected = f"at least one of {', '.join(limits)}"
        faults.add(merged.source("budget"), "budget", "no limit", expected, "set one, such as budget.max_steps=1000")
    reserve, hours = config.budget.reserve_seconds, config.budget.max_hours
    if reserve is not None and hours is not None and 0 < hours * 3600 <= reserve:
        path, expected = "budget.reserve_seconds", f"less than budget.max_hours ({hours * 3600:g} s)"
        faults.add(merged.source(path), path, show(reserve), expected, "or null, to have it predicted")


def _check_expected_loss(config: Config, merged: Merged, faults: Faults) -> None:
    points = config.log.expected_loss
    if points is None or faults.touch("log.expected_loss"):
        return
    shares = [share for share, _, _ in points]
    rising = all(low < high for low, high in itertools.pairwise(shares))
    if len(points) < 2 or not rising or shares[0] < 0 or shares[-1] > 1 or any(sigma <= 0 for _, _, sigma in points):
        expected = "two or more [share, loss, sigma], shares rising from >= 0 to <= 1, sigmas > 0"
        faults.add(merged.source("log.expected_loss"), "log.expected_loss", show(points), expected, "or null")


def _same_place(first: str, second: str) -> bool:
    if "://" in first or "://" in second:
        return first.rstrip("/") == second.rstrip("/")
    return os.path.realpath(first) == os.path.realpath(second)


def _check_data(config: Config, merged: Merged, faults: Faults, for_training: bool) -> None:
    data, prepare = config.data, config.prepare
    parts = data.train if isinstance(data.train, list) else []
    if data.train == []:
        faults.add(merged.source("data.train"), "data.train", "[]", "at least one corpus", "name its shards")
    places = [data.train] if isinstance(data.train, str) else [part.shards for part in parts]
    if data.validation and any(_same_place(place, data.validation) for place in places):
        path = "data.validation"
        fix = "name other shards, or prepare with prepare.validation_fraction=0.01"
        faults.add(merged.source(path), path, show(data.validation), "other shards than data.train", fix)
    if (
        for_training
        and data.train is None
        and prepare.source is None
        and not faults.touch("data.train", "prepare.source")
    ):
        expected = "a shard folder, or a text source in prepare.source"
        fix = "set data.train=FOLDER, or prepare.source=embedded|FILE|FOLDER"
        faults.add(merged.source("data.train"), "data.train", "null", expected, fix)
    if prepare.max_characters is not None and prepare.max_characters < prepare.min_characters:
        path = "prepare.max_characters"
        expected = f"at least prepare.min_characters ({prepare.min_characters})"
        faults.add(merged.source(path), path, str(prepare.max_characters), expected, "no document would be left")


def _check_optimisation(config: Config, merged: Merged, faults: Faults) -> None:
    schedule, betas = config.schedule, config.optim.betas
    if schedule.name not in SCHEDULES:
        expected, hint = f"one of {', '.join(SCHEDULES)}", did_you_mean(schedule.name, SCHEDULES)
        if not faults.touch("schedule.name"):
            faults.add(merged.source("schedule.name"), "schedule.name", show(schedule.name), expected, hint)
    elif schedule.name.startswith("budget-") and schedule.warmup > 0:
        path = "schedule.warmup"
        expected = f"0: {schedule.name} is a fixed shape"
        faults.add(
            merged.source(path), path, str(schedule.warmup), expected, "set schedule.warmup=0, or another schedule"
        )
    elif schedule.min_lr_ratio > 0 and (schedule.name.startswith("budget-") or schedule.name == "constant"):
        path = "schedule.min_lr_ratio"
        expected = f"0: {schedule.name} is a fixed shape"
        fix = "set schedule.min_lr_ratio=0, or another schedule"
        faults.add(merged.source(path), path, str(schedule.min_lr_ratio), expected, fix)
    elif schedule.name == "wsd" and schedule.warmup + schedule.decay > 1:
        path = "schedule.decay"
        expected = f"at most {1 - schedule.warmup:g}, what schedule.warmup ({schedule.warmup}) leaves"
        faults.add(merged.source(path), path, str(schedule.decay), expected, "shorten one of them")
    if config.optim.name == "muon" and config.train.zero_stage and not faults.touch("train.zero_stage"):
        path, fix = "train.zero_stage", "set train.zero_stage=0, or optim.name=adamw"
        faults.add(merged.source(path), path, str(config.train.zero_stage), f"0: {MUON_NEEDS}", fix)
    if not all(0 <= beta < 1 for beta in betas):
        faults.add(merged.source("optim.betas"), "optim.betas", show(list(betas)), "two numbers >= 0 and < 1")


def _check_checkpoint(config: Config, merged: Merged, faults: Faults) -> None:
    path, upload = "checkpoint.upload", config.checkpoint.upload
    if upload is not None and not re.match("s3://[^/]", upload) and not faults.touch(path):
        faults.add(merged.source(path), path, show(upload), "an address s3://bucket/prefix, or null")


def _check_batch(config: Config, merged: Merged, faults: Faults) -> None:
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    if (
        isinstance(micro, str)
        or batch % micro == 0
        or faults.touch("train.global_batch_size", "train.micro_batch_size")
    ):
        return
    path = "train.global_batch_size"
    above = (batch // micro + 1) * micro
    near = f"{above - micro} or {above}" if batch > micro else str(above)
    fix = f"nearest that fit: {near}; or train.micro_batch_size=auto"
    faults.add(merged.source(path), path, str(batch), f"a multiple of train.micro_batch_size ({micro})", fix)

"""Load, merge, check and write configurations. All faults are found in one go and raised as one ConfigError.

Defaults < each `--config` < `key.path=value`. Checking never changes a value; derived values are in `RunPlan`.
Imports neither torch nor transformers; a plug-in objective is imported only when it is the chosen one.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from sparselt_dist.config import Config
from sparselt_dist.config_checks import check_contradictions, check_model, prune_inherited_fields
from sparselt_dist.config_layers import (
    Faults,
    Merged,
    did_you_mean,
    list_profiles,
    nearest,
    parse_yaml,
    profile_text,
    read_layer,
    read_overrides,
    show,
    write_yaml,
)
from sparselt_dist.errors import ConfigError, PluginError
from sparselt_dist.objectives.base import available, get_objective
from sparselt_dist.objectives.settings import BUILT_IN_SETTINGS, MixConfig, PartConfig
from sparselt_dist.redaction import shown_in
from sparselt_dist.run_plan import RunPlan, make_plan, resolve_deepspeed

__all__ = [
    "RunPlan",
    "dump",
    "list_profiles",
    "load_config",
    "make_plan",
    "nearest",
    "objective_settings",
    "profile_text",
    "resolve_deepspeed",
]

# What a reference loss depends on. Not on `prepare.output_dir` and the like, nor on how the work is split.
_RECIPE = (
    *(
        "data.train",
        "data.validation",
        "data.sequence_length",
        "data.shuffle_window",
        "prepare.source",
        "prepare.tokenizer",
    ),
    *(
        "prepare.vocab_size",
        "prepare.packing",
        "prepare.order",
        "model.",
        "objective.",
        "optim.",
        "schedule.",
        "budget.max_",
    ),
    *("train.global_batch_size", "train.batch_ramp_end", "train.precision"),
)


def load_config(
    names: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    default_profile: str | None = None,
    for_training: bool = True,
) -> Config:
    """Merge profiles or files and overrides over the defaults, and check the result.

    Args:
        names: `--config` values in order, later wins: names of shipped profiles or YAML files.
        overrides: `key.path=value`, values in YAML.
        default_profile: profile used when no name is given.
        for_training: whether a budget and training data must be named.

    Raises:
        ConfigError: with every fault found, one a line.
    """
    faults = Faults()
    merged = Merged()
    for name in names or ([default_profile] if default_profile else []):
        layer = read_layer(name, faults)
        if layer is not None:
            merged.add(layer)
    complete = not faults.lines  # what an unreadable layer would have set cannot be missed
    merged.add(read_overrides(overrides, _override_value, faults))
    prune_inherited_fields(merged)
    _prune_inherited_objective_keys(merged)
    _prune_inherited_warmup(merged)
    _prune_inherited_reference(merged)
    config = _validate(merged, faults)
    check_model(config, merged, faults, for_training=for_training)
    _check_objective(config, merged, faults)
    check_contradictions(config, merged, faults, for_training=for_training and complete)
    faults.raise_if_any()
    return config


def dump(config: Config) -> str:
    """The whole configuration as YAML, the objective's own defaults included; `load_config` reads it back.

    Passwords and tokens of addresses are left out, see `redaction.py`: it stays with the run and goes to MLflow.
    """
    values = config.model_dump(mode="json")
    values["objective"] |= _dumped(objective_settings(config))
    return write_yaml(shown_in(values))


def _dumped(settings: Any) -> dict[str, Any]:
    """All keys of an objective, those of a mixture's parts included."""
    own = settings.model_dump(mode="json") if isinstance(settings, BaseModel) else dataclasses.asdict(settings)
    if isinstance(settings, MixConfig):
        checked = [TypeAdapter(_config_class(part.name)).validate_python(part.own_keys()) for part in settings.parts]
        own["parts"] = [written | _dumped(part) for written, part in zip(own["parts"], checked, strict=True)]
    return own


def objective_settings(config: Config) -> Any:
    """The validated configuration object of the chosen objective.

    Raises:
        ConfigError: unknown objective, or wrong keys.
        PluginError: the plug-in fails on import.
    """
    faults = Faults()
    settings = _settings_of(config, Merged(), faults)
    faults.raise_if_any()
    return settings


# --- values of the command line ---


def _members(annotation: Any) -> list[Any]:
    """The members of a union, `Annotated` taken off; one member for anything else."""
    return [
        get_args(member)[0] if get_origin(member) is typing.Annotated else member for member in _union_of(annotation)
    ]


def _union_of(annotation: Any) -> Sequence[Any]:
    return get_args(annotation) if get_origin(annotation) in (typing.Union, types.UnionType) else [annotation]


def _field(path: str) -> FieldInfo | None:
    """The schema field at a key path, None if there is none (or it lies inside a free mapping)."""
    section, _, key = path.partition(".")
    top = Config.model_fields.get(section)
    if top is None or not key:
        return top
    return typing.cast(type[BaseModel], top.annotation).model_fields.get(key)


def _override_value(path: str, text: str) -> Any:
    """Parse a value as YAML; a text field takes the text as it stands, so that run.name=5 is a name."""
    field = _field(path)
    members = _members(field.annotation) if field else []
    if str not in members:
        return parse_yaml(text)
    try:
        value = parse_yaml(text)
    except (yaml.YAMLError, ValueError):
        return text
    if isinstance(value, str) or (value is None and type(None) in members):
        return value
    return value if isinstance(value, list) and any(get_origin(member) is list for member in members) else text


# --- the schema ---


def _validate(merged: Merged, faults: Faults) -> Config:
    """The configuration; where values are wrong, a fault is noted and their defaults stand in for further checks."""
    try:
        return Config.model_validate(merged.values)
    except ValidationError as error:
        for path in _note(error, Config, "", merged, faults):
            merged.drop(path)
    try:
        return Config.model_validate(merged.values)
    except ValidationError:  # a fault too deep to cut out; what was noted is enough to stop
        faults.raise_if_any()
        raise


def _note(error: ValidationError, model: type[Any], prefix: str, merged: Merged, faults: Faults) -> list[str]:
    """Turn pydantic's errors into fault lines, one a key path, and return the paths."""
    paths: list[str] = []
    for detail in error.errors(include_url=False):
        path, parent, field = _locate(detail, model)
        full = (prefix + path).rstrip(".")
        if full in paths:
            continue
        paths.append(full)
        if detail["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
            _note_unknown_key(full, parent, merged, faults)
        else:
            value = merged.value(full, detail["input"])
            is_missing = detail["type"] == "missing" and len(detail["loc"]) == path.count(".") + 1
            expected = _told(detail) if field is None else _expectation(field)
            hint = None if field is None else _choice_hint(field, value)
            faults.add(merged.source(full), full, "nothing" if is_missing else show(value), expected, hint)
    return paths


def _locate(detail: ErrorDetails, model: type[Any]) -> tuple[str, type[Any], FieldInfo | None]:
    """Key path of an error, the model that holds the key, and its field; pydantic's union tags are left out."""
    keys: list[str] = []
    field: FieldInfo | None = None
    parent, member = model, None  # what a list that was just entered is of
    for part in map(str, detail["loc"]):
        keys.append(part)
        if member is not None:
            parent, member, field = member, None, None
            continue
        field = _model_fields(parent).get(part)
        inner = field.annotation if field is not None else None
        member = _listed_model(inner)
        if member is not None:
            continue
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        if len(keys) < len(detail["loc"]):
            parent = inner
    return ".".join(keys), parent, field


def _listed_model(annotation: Any) -> type[Any] | None:
    """The model that `tuple[MODEL, ...]` or `list[MODEL]` is of, None for anything else."""
    first = next(iter(get_args(annotation)), None) if get_origin(annotation) in (list, tuple) else None
    return first if isinstance(first, type) and issubclass(first, BaseModel) else None


def _model_fields(model: type[Any]) -> dict[str, FieldInfo]:
    if issubclass(model, BaseModel):
        return dict(model.model_fields)
    hints = typing.get_type_hints(model)
    return {f.name: FieldInfo(annotation=hints.get(f.name, Any)) for f in dataclasses.fields(model)}


def _note_unknown_key(path: str, parent: type[Any], merged: Merged, faults: Faults) -> None:
    prefix, _, key = path.rpartition(".")
    siblings = list(_model_fields(parent))
    if path.startswith("objective.parts."):
        siblings = [*PartConfig.model_fields, *siblings]
    elsewhere = {f"{name}.{k}": k for name, field in Config.model_fields.items() for k in _section_keys(field)}
    near = next((full for full, k in elsewhere.items() if k == key), None)
    if near is None and (sibling := nearest(key, siblings)) is not None:
        near = f"{prefix}.{sibling}" if prefix else sibling
    near = near or nearest(path, elsewhere)
    choices = ", ".join(siblings) or "no key at all"
    faults.add(merged.source(path), path, "an unknown key", f"one of {choices}", near and f"did you mean {near}?")


def _section_keys(field: FieldInfo) -> list[str]:
    section = field.annotation
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []


def _told(detail: ErrorDetails) -> str:
    """What pydantic or a check of several fields expects where no single field is at fault."""
    return "a mapping" if detail["type"] == "model_type" else detail["msg"].removeprefix("Value error, ")


def _choice_hint(field: FieldInfo, found: Any) -> str | None:
    choices = [str(c) for m in _members(field.annotation) if get_origin(m) is Literal for c in get_args(m)]
    return did_you_mean(str(found), choices) if choices else None


_TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def _expectation(field: FieldInfo) -> str:
    """What a field takes, in words: type, choices, bounds."""
    parts: list[str] = []
    for member, annotated in zip(_members(field.annotation), _union_of(field.annotation), strict=True):
        inner = get_args(annotated)[1].metadata if member is not annotated else []
        bounds = _bounds([*field.metadata, *inner])
        if get_origin(member) is Literal:
            choices = get_args(member)
            parts.append(("one of " if len(choices) > 1 else "") + ", ".join(map(str, choices)))
        elif get_origin(member) is list or Ellipsis in get_args(member):
            parts.append("a list")
        elif get_origin(member) is tuple:
            parts.append(f"a list of {len(get_args(member))} numbers")
        else:
            name = _TYPE_NAMES.get(member, "a mapping")
            parts.append(f"{name} {bounds}" if bounds and member in (int, float) else name)
    return " or ".join(parts)


def _bounds(metadata: Sequence[Any]) -> str:
    pairs = [(sign, getattr(item, key)) for item in metadata for key, sign in _BOUNDS.items() if hasattr(item, key)]
    return " and ".join(f"{sign} {show(value)}" for sign, value in pairs)


# --- the objective's own keys ---


def _check_objective(config: Config, merged: Merged, faults: Faults) -> None:
    if faults.touch("objective.name"):
        return
    try:
        _settings_of(config, merged, faults)
    except PluginError as error:
        faults.add(
            merged.source("objective.name"), "objective.name", config.objective.name, f"a sound plug-in: {error}"
        )


def _config_class(name: str) -> type[Any]:
    """The configuration class of an objective; imports it only if it is a plug-in."""
    built_in = BUILT_IN_SETTINGS.get(name)
    return built_in if built_in is not None else get_objective(name).config_cls


def _settings_of(config: Config, merged: Merged, faults: Faults) -> Any:
    return _checked(config.objective.name, config.objective.own_keys(), "objective", merged, faults)


def _checked(name: str, keys: dict[str, Any], prefix: str, merged: Merged, faults: Faults) -> Any:
    """The settings of the objective of a name, whose keys lie at `prefix`; None with faults noted."""
    choices = available()
    if name not in choices:
        path, expected = f"{prefix}.name", f"one of {', '.join(choices)}"
        faults.add(merged.source(path), path, show(name), expected, did_you_mean(name, choices))
        return None
    cls = _config_class(name)
    unknown = [] if issubclass(cls, BaseModel) else [key for key in keys if key not in _model_fields(cls)]
    for key in unknown:
        _note_unknown_key(f"{prefix}.{key}", cls, merged, faults)
    settings = None
    try:
        settings = TypeAdapter(cls).validate_python({key: value for key, value in keys.items() if key not in unknown})
    except ValidationError as error:
        _note(error, cls, f"{prefix}.", merged, faults)
    if cls is MixConfig:
        _check_parts(keys.get("parts"), f"{prefix}.parts", merged, faults)
    return settings


def _check_parts(parts: Any, prefix: str, merged: Merged, faults: Faults) -> None:
    """Check each part's own keys by its own objective; a part without a name is reported as such."""
    for number, part in enumerate(parts if isinstance(parts, list | tuple) else []):
        if isinstance(part, dict) and isinstance(part.get("name"), str) and part["name"] != "mix":
            keys = {key: value for key, value in part.items() if key not in PartConfig.model_fields}
            _checked(part["name"], keys, f"{prefix}.{number}", merged, faults)


def _prune_inherited_objective_keys(merged: Merged) -> None:
    """Drop what an earlier layer set for another objective and the chosen one has no key for."""
    inherited = [path for path in merged.inherited if path.startswith("objective.")]
    section = merged.values.get("objective")
    if not inherited or not isinstance(section, dict):
        return
    try:
        known = _model_fields(_config_class(str(section.get("name"))))
    except (PluginError, ConfigError):  # reported by the check of the objective itself
        known = {}
    for path in inherited:
        if path.partition(".")[2] not in known:
            merged.drop(path)


def _prune_inherited_warmup(merged: Merged) -> None:
    """Drop a warm-up that an earlier layer set for another schedule, where the chosen one is a fixed shape."""
    section = merged.values.get("schedule")
    is_fixed = isinstance(section, dict) and str(section.get("name")).startswith("budget-")
    if is_fixed and "schedule.warmup" in merged.inherited:
        merged.drop("schedule.warmup")


def _prune_inherited_reference(merged: Merged) -> None:
    """Drop the reference loss of an earlier layer where a later one changes what is trained, on what or for how long."""
    changed = (path for path in merged.set_after("log.expected_loss") if "." in path)
    if any(path.startswith(_RECIPE) for path in changed):
        merged.drop("log.expected_loss")

"""docs/configuration.md from the configuration classes; `python tests/configuration_reference.py` writes it anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sparselt_dist.config import Config
from sparselt_dist.objectives.settings import BUILT_IN_SETTINGS, MLMConfig

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
HEAD = """# Configuration

Every key, its default without a profile, and what it means. A shipped profile (`sparselt pretrain --list-profiles`), a YAML
file and `key.path=value` on the command line set them, later ones winning; `--print-config` shows what holds. Misspelt keys,
wrong types and contradictions are refused, all together. `tests/configuration_reference.py` writes this page from the classes
that check them.
"""
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def values(annotation: Any) -> Iterator[str]:
    """What a key may be, in words of YAML."""
    if get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    elif annotation is NoneType:
        yield "null"
    elif isinstance(annotation, type) and get_origin(annotation) is None:
        names = {"str": "text", "bool": "true, false", "int": "whole number", "float": "number", "dict": "mapping"}
        yield names.get(annotation.__name__, "mapping")
    elif get_origin(annotation) in (list, tuple):
        yield "list"
    elif get_origin(annotation) is dict:
        yield "mapping"
    else:
        for part in get_args(annotation):
            if isinstance(part, type) or get_origin(part) is not None:
                yield from values(part)


def allowed(field: FieldInfo) -> str:
    found = [name for name in dict.fromkeys(values(field.annotation)) if name != "null"]
    rules = ((sign, getattr(rule, name, None)) for rule in field.metadata for name, sign in BOUNDS.items())
    bounds = "".join(f" {sign} {bound:g}" for sign, bound in rules if bound is not None)
    return ", ".join(filter(None, [", ".join(found) + bounds, "null" * ("null" in values(field.annotation))]))


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    text = yaml.safe_dump(list(default) if isinstance(default, tuple) else default, default_flow_style=True, width=1000)
    return f"`{text.strip().removesuffix('...').strip()}`"


def table(fields: dict[str, FieldInfo]) -> Iterator[str]:
    yield "| key | values | default | means |"
    yield "|---|---|---|---|"
    for name, field in fields.items():
        means = (field.description or "").replace("|", "\\|").replace("<", "&lt;")
        yield f"| `{name}` | {allowed(field)} | {default_of(field)} | {means} |"


def render() -> str:
    lines = [HEAD]
    for name, field in Config.model_fields.items():
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, BaseModel)
        lines += [f"## {name}", "", *table(section.model_fields), ""]
        if name == "objective":
            for objective, keys in BUILT_IN_SETTINGS.items():
                lines += objective_lines(objective, keys)
    return "\n".join(lines)


def objective_lines(name: str, keys: type[BaseModel]) -> list[str]:
    """Of an objective with the keys of mlm, those that it adds or changes."""
    is_mlm_with_more = issubclass(keys, MLMConfig) and keys is not MLMConfig
    known = MLMConfig.model_fields if is_mlm_with_more else {}
    own = {key: field for key, field in keys.model_fields.items() if repr(field) != repr(known.get(key))}
    note = ["Those of `mlm`, and:", ""] if is_mlm_with_more else []
    return [f"### objective.name: {name}", "", *note, *table(own), ""]


if __name__ == "__main__":
    PAGE.write_text(render())

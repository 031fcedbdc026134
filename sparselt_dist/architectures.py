"""Which architectures there are and which fields their configuration classes have, without importing them.

Importing `transformers` configuration classes costs seconds and a wrong field must be reported in less than one, so
their source is read with `ast`: annotations of the class body, arguments of `__init__`, the keys of `attribute_map`,
and the same of the base classes.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

OWN_ARCHITECTURE = "crammed-bert"
_OWN_FILE = Path(__file__).parent / "models" / "crammed.py"
_CONSTRUCTORS = {"__init__", "__post_init__"}  # both take some common fields out of **kwargs
_SIMPLE_TYPES = {"int", "float", "str", "bool", "None"}
# accepted by every configuration class beside its declared fields
_COMMON_FIELDS = ("torch_dtype", "num_labels", "attn_implementation")
_ROTARY_FIELDS = ("rope_theta", "rope_scaling", "partial_rotary_factor")

FieldTypes = dict[str, frozenset[str] | None]
"""Field name -> names of its simple types, or None where any value may stand."""


@dataclass(frozen=True)
class Architecture:
    """A model type and the fields that `model.config` may set; no fields: only its class itself can check them."""

    model_type: str
    fields: FieldTypes


def _annotation_types(node: ast.expr | None) -> frozenset[str] | None:
    """`int | None` -> {"int", "None"}; None for anything but a union of simple types."""
    if node is None:
        return None
    names = {part.strip() for part in ast.unparse(node).split("|")}
    return frozenset(names) if names <= _SIMPLE_TYPES else None


@cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _assigns(statement: ast.Assign, name: str) -> bool:
    return any(isinstance(target, ast.Name) and target.id == name for target in statement.targets)


def _own_fields(node: ast.ClassDef) -> FieldTypes:
    """The fields one class body declares."""
    fields: FieldTypes = {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            if "ClassVar" not in ast.unparse(item.annotation):
                fields[item.target.id] = _annotation_types(item.annotation)
        elif isinstance(item, ast.FunctionDef) and item.name == "__init__":
            arguments = [*item.args.args[1:], *item.args.kwonlyargs]
            fields |= {argument.arg: _annotation_types(argument.annotation) for argument in arguments}
        elif isinstance(item, ast.Assign) and isinstance(item.value, ast.Dict) and _assigns(item, "attribute_map"):
            fields |= {str(key.value): None for key in item.value.keys if isinstance(key, ast.Constant)}
    return {name: types for name, types in fields.items() if not name.startswith("_")}


def _class_fields(path: Path, class_name: str) -> FieldTypes:
    """Fields of a class and of its bases, which are looked up in the same file or through its relative imports."""
    module = _parse(path)
    node = next((n for n in module.body if isinstance(n, ast.ClassDef) and n.name == class_name), None)
    if node is None:
        return {}
    fields: FieldTypes = {}
    for base in node.bases:
        name = ast.unparse(base).rpartition(".")[2]
        if name in {"PreTrainedConfig", "PretrainedConfig"} and path.name != "configuration_utils.py":
            fields |= _base_fields()
        elif any(isinstance(n, ast.ClassDef) and n.name == name for n in module.body):
            fields |= _class_fields(path, name)
        else:
            imported = _imported_from(module, path, name)
            fields |= _class_fields(imported, name) if imported else {}
    return fields | _own_fields(node)


def _imported_from(module: ast.Module, path: Path, name: str) -> Path | None:
    for node in module.body:
        if isinstance(node, ast.ImportFrom) and node.level and name in {alias.name for alias in node.names}:
            folder = path.parents[node.level - 1]
            file = folder.joinpath(*(node.module or "").split(".")).with_suffix(".py")
            return file if file.is_file() else None
    return None


@cache
def _transformers_folder() -> Path:
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("transformers is not installed")
    return Path(spec.origin).parent


@cache
def _base_fields() -> FieldTypes:
    """Fields of transformers' PreTrainedConfig (spelt PretrainedConfig before version 5)."""
    path = _transformers_folder() / "configuration_utils.py"
    fields = _class_fields(path, "PreTrainedConfig") | _class_fields(path, "PretrainedConfig")
    starts = [n for n in ast.walk(_parse(path)) if isinstance(n, ast.FunctionDef) and n.name in _CONSTRUCTORS]
    for node in (inner for start in starts for inner in ast.walk(start)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "kwargs.pop" and node.args:
            key = node.args[0]
            if isinstance(key, ast.Constant) and isinstance(key.value, str) and not key.value.startswith("_"):
                fields.setdefault(key.value, None)
    return fields | dict.fromkeys(_COMMON_FIELDS)


@cache
def _constant_mappings(name: str) -> dict[str, str]:
    """Every literal (string, string) pair of a mapping variable of the Auto classes' modules."""
    pairs: dict[str, str] = {}
    for file in ("auto_mappings.py", "configuration_auto.py"):
        path = _transformers_folder() / "models" / "auto" / file
        if path.is_file():
            for statement in _parse(path).body:
                if _fills(statement, name):
                    pairs |= _string_pairs(statement)
    return pairs


def _fills(statement: ast.stmt, name: str) -> bool:
    """Whether a statement is `name = ...`, `name: type = ...` or `name.update(...)`."""
    if isinstance(statement, ast.Assign):
        return _assigns(statement, name)
    target: ast.expr | None = None
    if isinstance(statement, ast.AnnAssign):
        target = statement.target
    elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        function = statement.value.func
        target = function.value if isinstance(function, ast.Attribute) else None
    return isinstance(target, ast.Name) and target.id == name


def _string_pairs(statement: ast.stmt) -> dict[str, str]:
    couples: list[tuple[ast.expr | None, ast.expr]] = []
    for node in ast.walk(statement):
        if isinstance(node, ast.Tuple) and len(node.elts) == 2:
            couples.append((node.elts[0], node.elts[1]))
        elif isinstance(node, ast.Dict):
            couples += zip(node.keys, node.values, strict=True)
    constants = [
        (key.value, value.value)
        for key, value in couples
        if isinstance(key, ast.Constant) and isinstance(value, ast.Constant)
    ]
    return {key: value for key, value in constants if isinstance(key, str) and isinstance(value, str)}


def known_types() -> list[str]:
    """Every model type: our own, then those of the installed transformers."""
    return [OWN_ARCHITECTURE, *sorted(_constant_mappings("CONFIG_MAPPING_NAMES"))]


def find(model_type: str) -> Architecture | None:
    """The architecture of a model type, or None if there is none of that name."""
    if model_type == OWN_ARCHITECTURE:
        return Architecture(model_type, _class_fields(_OWN_FILE, "CrammedBertConfig"))
    class_name = _constant_mappings("CONFIG_MAPPING_NAMES").get(model_type)
    if class_name is None:
        return None
    module = _constant_mappings("SPECIAL_MODEL_TYPE_TO_MODULE_NAME").get(model_type, model_type.replace("-", "_"))
    fields: FieldTypes = {}
    for file in sorted((_transformers_folder() / "models" / module).glob("configuration_*.py")):
        fields = fields or _class_fields(file, class_name)
    if not fields and (found := next(_transformers_folder().glob(f"models/*/configuration_{module}.py"), None)):
        fields = _class_fields(found, class_name)
    if "rope_parameters" in fields:
        fields |= dict.fromkeys(_ROTARY_FIELDS)
    return Architecture(model_type, fields)


def folder_type(folder: str) -> str:
    """The `model_type` of a folder's config.json.

    Raises:
        ValueError: there is no such file, or it names no type; the message says which.
    """
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise ValueError(f"a folder without a readable config.json ({cause.strerror})") from cause
    except ValueError as cause:
        raise ValueError(f"a config.json that is no JSON ({cause})") from cause
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if isinstance(model_type, str):
        return model_type
    raise ValueError("a config.json without model_type")

"""Where a configuration comes from: profiles, YAML files and `key.path=value`, merged with the source of each key kept.

YAML is read with the number forms people write (`1e-3`, `3e9`, `1_000`), without YAML 1.1's surprises (`on`, `1:30`,
dates), and with repeated keys as an error. Nothing here knows what a key means, except that keys for one architecture,
objective or schedule are marked as inherited when a later layer names another.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sparselt_dist.config import Config
from sparselt_dist.errors import ConfigError

PROFILE_FOLDER = Path(__file__).parent / "profiles"
COMMAND_LINE = "command line"
# section, the key that names an architecture or objective, and where that one's own keys lie
_SCOPES = (
    ("model", "architecture", "model.config"),
    ("model", "init_from", "model.config"),
    ("objective", "name", "objective"),
    ("schedule", "name", "schedule"),
)


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice most like a misspelt word, or None if none is like it."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return close[0] if close else None


def did_you_mean(word: str, choices: Iterable[str]) -> str | None:
    """The hint that ends a message about an unknown name, or None."""
    near = nearest(word, choices)
    return None if near is None else f"did you mean {near}?"


def show(value: Any) -> str:
    """A value as it would stand in YAML, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True)
class Layer:
    """What one source sets."""

    source: str
    values: dict[str, Any]


@dataclass
class Faults:
    """Everything wrong with one configuration, raised together."""

    lines: list[str] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)

    def add(self, source: str, path: str, found: str, expected: str, fix: str | None = None) -> None:
        self.paths.add(path)
        place = f"{source}: {path}" if path else source
        self.lines.append(f"{place}: found {found}, expected {expected}" + (f"; {fix}" if fix else ""))

    def touch(self, *prefixes: str) -> bool:
        """Whether a fault lies at, under or above one of these paths, so that a check on them would only repeat it."""
        pairs = ((f"{path}.", f"{prefix}.") for path in self.paths for prefix in prefixes)
        return any(path.startswith(prefix) or prefix.startswith(path) for path, prefix in pairs)

    def raise_if_any(self) -> None:
        if len(self.lines) == 1:
            raise ConfigError(self.lines[0])
        if self.lines:
            raise ConfigError(f"{len(self.lines)} faults in the configuration:\n  " + "\n  ".join(self.lines))


class _Reader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 booleans, exponents without a point, and repeated keys refused."""


_Reader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag not in {f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "timestamp")}
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Reader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Reader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_Reader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


def _construct_int(loader: _Reader, node: yaml.ScalarNode) -> int:
    return int(str(loader.construct_scalar(node)).replace("_", ""))


def _construct_float(loader: _Reader, node: yaml.ScalarNode) -> int | float:
    text = str(loader.construct_scalar(node)).replace("_", "").lower()
    value = float(text.replace(".inf", "inf").replace(".nan", "nan"))
    # 3e9 tokens is a count: an exponent form with a whole value is a whole number, which number fields take too
    return int(value) if "e" in text and value.is_integer() else value


def _construct_mapping(loader: _Reader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        key = str(key_node.value)
        if key in seen and key != "<<":
            raise yaml.constructor.ConstructorError(None, None, f"the key {key} stands twice", key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return {loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value}


_Reader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Reader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_Reader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


class _Writer(yaml.SafeDumper):
    """SafeDumper that also quotes text which `_Reader`, but not YAML 1.1, would take for a number."""


_Writer.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *_Reader.yaml_implicit_resolvers.get(first, [])]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Reader.yaml_implicit_resolvers}
}


def write_yaml(values: Mapping[str, Any]) -> str:
    """YAML that `parse_yaml` and any other YAML reader read back as these values."""
    return yaml.dump(values, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=120)


def parse_yaml(text: str) -> Any:
    """Parse YAML; raises yaml.YAMLError, or ValueError for a key that cannot be one."""
    try:
        return yaml.load(text, Loader=_Reader)
    except TypeError as cause:  # an unhashable key, such as a list
        raise ValueError(str(cause)) from cause


def list_profiles() -> dict[str, str]:
    """Each shipped profile's name and its first comment line."""
    return {
        path.stem: path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()
        for path in sorted(PROFILE_FOLDER.glob("*.yaml"))
    }


def profile_text(name: str) -> str:
    """The YAML of a shipped profile.

    Raises:
        ConfigError: there is no such profile.
    """
    path = PROFILE_FOLDER / f"{name}.yaml"
    if name not in list_profiles():
        faults = Faults()
        _unknown_profile(name, faults)
        faults.raise_if_any()
    return path.read_text(encoding="utf-8")


def _unknown_profile(name: str, faults: Faults) -> None:
    names = list_profiles()
    expected = f"a YAML file or a profile ({', '.join(names)})"
    faults.add(COMMAND_LINE, "--config", name, expected, did_you_mean(name, names))


def _read_text(name: str, faults: Faults) -> tuple[str, str] | None:
    """Source label and text of a profile or file."""
    if name in list_profiles():
        return f"profile {name}", profile_text(name)
    path = Path(name)
    if not path.is_file():
        if path.suffix in {".yaml", ".yml"} or "/" in name:
            faults.add(COMMAND_LINE, "--config", name, "an existing YAML file", "check the path")
        else:
            _unknown_profile(name, faults)
        return None
    try:
        return name, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        faults.add(name, "", f"an unreadable file ({cause})", "a YAML file in UTF-8", "check the file and its rights")
        return None


def _one_line(cause: Exception) -> str:
    if isinstance(cause, yaml.MarkedYAMLError) and cause.problem_mark is not None:
        mark = cause.problem_mark
        return f"{cause.problem or 'bad syntax'} (line {mark.line + 1}, column {mark.column + 1})"
    return " ".join(str(cause).split())


def read_layer(name: str, faults: Faults) -> Layer | None:
    """The mapping of one `--config`; None, with a fault noted, if there is none to be had."""
    found = _read_text(name, faults)
    if found is None:
        return None
    source, text = found
    try:
        values = parse_yaml(text)
    except (yaml.YAMLError, ValueError) as cause:
        faults.add(source, "", f"malformed YAML: {_one_line(cause)}", "a mapping of sections", "mend the file")
        return None
    if values is None:
        return Layer(source, {})
    if not isinstance(values, dict):
        faults.add(source, "", show(values), "a mapping of sections", "write `section:` and, indented, `key: value`")
        return None
    return Layer(source, values)


def read_overrides(overrides: Sequence[str], read_value: Callable[[str, str], Any], faults: Faults) -> Layer:
    """The layer of `key.path=value` arguments; `read_value(path, text)` may raise ValueError or YAMLError."""
    values: dict[str, Any] = {}
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            faults.add(COMMAND_LINE, "", show(override), "key.path=value, such as budget.max_steps=100")
            continue
        try:
            value = read_value(".".join(keys), text)
        except (yaml.YAMLError, ValueError) as cause:
            faults.add(
                COMMAND_LINE, path, f"{text} ({_one_line(cause)})", "a YAML value", "quote it for the shell and YAML"
            )
            continue
        node = values
        for key in keys[:-1]:
            inner = node.get(key)
            if not isinstance(inner, dict):
                inner = node[key] = {}
            node = inner
        node[keys[-1]] = value
    return Layer(COMMAND_LINE, values)


@dataclass
class Merged:
    """Layers merged in order, and which of them set each key path."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    fallback: str = "defaults"
    inherited: set[str] = field(default_factory=set)
    """Keys that an earlier layer set for another architecture, objective or schedule than the final one."""
    layers: list[str] = field(default_factory=list)
    """Sources in the order they were laid."""

    def add(self, layer: Layer) -> None:
        """Lay one layer over the rest."""
        self.layers.append(layer.source)
        self._mark_inherited(layer)
        if layer.values:
            self.fallback = layer.source
        self._merge(self.values, layer.values, "", layer.source)

    def source(self, path: str) -> str:
        """The layer that set a path or its nearest parent; for what none set, the last layer."""
        while path:
            if path in self.sources:
                return self.sources[path]
            path = path.rpartition(".")[0]
        return self.fallback

    def set_after(self, path: str) -> list[str]:
        """Key paths that a later layer than the one of `path` has set."""
        if path not in self.sources:
            return []
        later = self.layers[self.layers.index(self.sources[path]) + 1 :]
        return [other for other, source in self.sources.items() if source in later]

    def value(self, path: str, default: Any) -> Any:
        """What the layers set at a path."""
        parent, last = self._parent(path)
        return parent.get(last, default)

    def drop(self, path: str) -> None:
        """Forget a value, so that its default holds."""
        parent, last = self._parent(path)
        parent.pop(last, None)

    def _parent(self, path: str) -> tuple[dict[str, Any], str]:
        """The mapping that holds the last key of a path (an empty one if there is none), and that key."""
        *parents, last = path.split(".")
        node: Any = self.values
        for key in parents:
            node = node.get(key) if isinstance(node, dict) else None
        return (node if isinstance(node, dict) else {}), last

    def _merge(self, into: dict[str, Any], values: Mapping[str, Any], prefix: str, source: str) -> None:
        for key, value in values.items():
            path = f"{prefix}{key}"
            if value is None and not prefix:  # a section whose lines are all commented out
                continue
            self.sources[path] = source
            self.inherited.discard(path)
            if isinstance(value, dict):
                inner = into.get(key)
                if not isinstance(inner, dict):
                    inner = into[key] = {}
                self._merge(inner, value, f"{path}.", source)
            else:
                into[key] = value

    def _mark_inherited(self, layer: Layer) -> None:
        """Note the keys that were meant for another architecture, objective or schedule than this layer names."""
        for section, selector, scope in _SCOPES:
            old, new = self.values.get(section), layer.values.get(section)
            if not isinstance(old, dict) or not isinstance(new, dict):
                continue
            default = Config.model_fields[section].get_default(call_default_factory=True)
            if selector not in new or new[selector] == old.get(selector, getattr(default, selector)):
                continue
            scoped = old.get("config") if scope == "model.config" else old
            if isinstance(scoped, dict):
                self.inherited |= {f"{scope}.{key}" for key in scoped if key != selector}

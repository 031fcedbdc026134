"""What the official code wrote, read without running any of it: tensors, the model's configuration, the tokenizer.

safetensors hold tensors alone. A torch pickle goes through torch's restricted reader (`weights_only`). headless-lm's
Lightning checkpoints also hold the pickled training task, which that reader refuses; they are read by one in which
every class and function but those that rebuild tensors is an inert stand-in. So nothing that a file names is ever
imported or called; a file that names anything else beside tensors is refused.
"""

from __future__ import annotations

import json
import pickle
import pickletools
import re
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sparselt_dist.data.tokenizer import CONFIG_FILE, TOKENIZER_FILE
from sparselt_dist.errors import CheckpointError

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth", "intermediate.pth")  # and any *.ckpt
CONFIG_FILES = ("model_config.json", "config.json")  # cramming's own; that of transformers
_VOCABULARIES = ("special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt")
TOKENIZER_FILES = (TOKENIZER_FILE, CONFIG_FILE, *_VOCABULARIES)


@dataclass(frozen=True)
class OfficialFiles:
    """An official checkpoint in memory, on the CPU."""

    path: Path
    """The file of the weights."""
    tensors: dict[str, Tensor]
    others: tuple[str, ...]
    """Entries of the file beside the weights: optimizer, schedule, loops and the like."""
    config: dict[str, Any]
    """The model's configuration as it was stored; empty: none was found."""
    config_source: str
    tokenizer_dir: Path | None


def read_official(source: Path, *, config: Path | None = None, tokenizer: Path | None = None) -> OfficialFiles:
    """Read a file of weights, or the one in a folder, and what lies beside it.

    Args:
        config: file or folder of the configuration; None: beside the weights, or inside a Lightning checkpoint.
        tokenizer: folder of the tokenizer; None: beside the weights, if there is one.

    Raises:
        CheckpointError: there are no weights or several, or they are damaged, or would have to be run to be read.
    """
    path = find_weights(source)
    stored = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    tensors, others = _split(stored, path)
    fields, where = _read_config(path.parent if config is None else config, is_asked_for=config is not None)
    if not fields:
        fields, where = _task_config(stored), f"the training task inside {path}"
    return OfficialFiles(path, tensors, others, fields, where, _find_tokenizer(path.parent, tokenizer))


def find_weights(source: Path) -> Path:
    """The one file of weights that a path stands for.

    Raises:
        CheckpointError: there is none, or more than one.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise CheckpointError(f"convert: found nothing at {source}, expected a file or folder of weights; name one")
    found = [source / name for name in WEIGHT_FILES if (source / name).is_file()] + sorted(source.glob("*.ckpt"))
    if len(found) == 1:
        return found[0]
    what = "several files of weights" if found else "no file of weights"
    names = ", ".join(path.name for path in found) or ", ".join(sorted(path.name for path in source.iterdir())[:6])
    raise CheckpointError(
        f"convert: {source} holds {what} ({names or 'empty'}), expected one of {', '.join(WEIGHT_FILES)} or *.ckpt; "
        "name the file itself"
    )


# --- weights ---------------------------------------------------------------------------------------------------------


def _damaged(path: Path, cause: Exception | str) -> CheckpointError:
    text = " ".join(str(cause).split())[:300]
    return CheckpointError(
        f"convert: {path} cannot be read ({text}); expected whole weights in torch's or safetensors' format; "
        "get the file again"
    )


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as cause:
        raise _damaged(path, cause) from cause


def _read_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    if is_archive:
        _check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except pickle.UnpicklingError as cause:
        if is_archive:
            return _read_inertly(path)
        names = _names_in(path.read_bytes())
        raise (_holds_code(path, names) if names else _damaged(path, cause)) from cause
    except Exception as cause:  # damaged files fail in as many ways as there are bytes
        raise _damaged(path, cause) from cause


def _check_archive(path: Path) -> None:
    """Raise CheckpointError: the archive has lost its end, or holds a program in place of a pickle."""
    if not zipfile.is_zipfile(path):
        raise _damaged(path, "the end of the archive is missing: the file was cut off")
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise CheckpointError(
                f"convert: {path} is a TorchScript program, expected weights alone; save its state_dict() and give that"
            )


class StandIn:
    """In place of an object of any class: does nothing, and keeps the state that it was given."""

    def __init__(self, *arguments: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __call__(self, *arguments: object) -> StandIn:
        return self

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None:
        """Forget it; so pickles fill lists, and by the next two longer lists and sets."""

    extend = add = append


_REBUILDERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
}
_TASKS = "engine.tasks.pretraining."  # package of headless-lm's training tasks
_RUNNERS = re.compile(
    r"(os|posix|nt|sys|subprocess|runpy|importlib|pty|ctypes|shutil|socket|code|pickle|webbrowser|pydoc)(\.|$)"
    r"|(builtins|__builtin__)\.(eval|exec|execfile|compile|__import__|open|input|breakpoint)$"
)


def _read_inertly(path: Path) -> Any:
    """An archive whose pickle names more than tensors: accepted of headless-lm, as data."""
    seen: dict[str, None] = {}

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            full = f"{module}.{name}"
            if full in _REBUILDERS:
                return _REBUILDERS[full]
            seen[full] = None
            return StandIn

    as_module: Any = types.ModuleType("inert_pickle")
    as_module.Unpickler = Reader
    try:
        # The reader above decides alone what names mean, so this runs nothing; torch adds only the tensors' storages.
        stored = torch.load(path, map_location="cpu", weights_only=False, mmap=True, pickle_module=as_module)
    except Exception as cause:  # a pickle may be wrong in any way
        raise (_holds_code(path, list(seen)) if seen else _damaged(path, cause)) from cause
    runners = [name for name in seen if _RUNNERS.match(name)]
    if runners or not any(name.startswith(_TASKS) for name in seen):
        raise _holds_code(path, runners or list(seen))
    return stored


def _names_in(content: bytes) -> list[str]:
    """Classes and functions that a bare pickle names, up to where it can be followed."""
    names: list[str] = []
    try:
        strings: list[str] = []
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name in ("GLOBAL", "INST"):
                names.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                names.append(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    except ValueError:  # torch's old format has several pickles in a row, and bytes behind them
        pass
    return names


def _holds_code(path: Path, names: list[str]) -> CheckpointError:
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return CheckpointError(
        f"convert: {path} is a pickle that names {shown}, expected tensors alone, or headless-lm's training task beside "
        "them; nothing of it was run; give a file of the official code, or its state_dict() saved as safetensors"
    )


def _split(stored: Any, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The weights, and the names of other entries: a bare state dict, Lightning's, or cramming's training checkpoint."""
    if not isinstance(stored, Mapping):
        raise CheckpointError(f"convert: {path} holds a {type(stored).__name__}, expected a dictionary of tensors")
    key = next((key for key in ("state_dict", "model") if isinstance(stored.get(key), Mapping)), None)
    state = stored if key is None else stored[key]
    odd = [str(name) for name, value in state.items() if not isinstance(value, Tensor) or not isinstance(name, str)]
    if odd or not state:
        found = ", ".join(odd[:6]) or "nothing"
        raise CheckpointError(
            f"convert: {path} holds {found} where tensors were expected: a state dict, or one under 'state_dict' "
            "(Lightning) or 'model' (cramming); save the model's state_dict() and give that"
        )
    others = () if key is None else tuple(str(name) for name in stored if name != key)
    return {name: value.detach() for name, value in state.items()}, others


# --- what lies beside ------------------------------------------------------------------------------------------------


def _read_config(path: Path, *, is_asked_for: bool) -> tuple[dict[str, Any], str]:
    """The stored fields and their file; cramming's models on the hub keep theirs under `arch`."""
    files = [path] if path.is_file() else [path / name for name in CONFIG_FILES if (path / name).is_file()]
    if not files:
        if is_asked_for:
            raise CheckpointError(
                f"convert: --model-config: found no file at {path}, expected one of {', '.join(CONFIG_FILES)}; name it"
            )
        return {}, ""
    try:
        fields = json.loads(files[0].read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise CheckpointError(
            f"convert: {files[0]} cannot be read ({cause}); expected the model's configuration as JSON; restore it"
        ) from cause
    if not isinstance(fields, dict):
        raise CheckpointError(f"convert: {files[0]} holds no JSON object, expected the model's configuration")
    arch = fields.get("arch")
    return (arch if isinstance(arch, dict) else fields), str(files[0])


def _task_config(stored: Any) -> dict[str, Any]:
    """Plain values of the model's configuration inside headless-lm's pickled task."""
    task = _state_of(stored.get("task")) if isinstance(stored, Mapping) else {}
    modules = task.get("_modules", {})
    model = next((modules[name] for name in ("mlm_model", "lm_model") if name in modules), None)
    fields = _state_of(_state_of(model).get("config"))
    return {name: value for name, value in fields.items() if _is_plain(value)}


def _state_of(value: Any) -> dict[str, Any]:
    state = value.state if isinstance(value, StandIn) else None
    return state if isinstance(state, dict) else {}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(part) for pair in value.items() for part in pair)
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)


def _find_tokenizer(beside: Path, given: Path | None) -> Path | None:
    folder = beside if given is None else given
    if (folder / TOKENIZER_FILE).is_file():
        return folder
    if given is not None:
        raise CheckpointError(
            f"convert: --tokenizer: {given} holds no {TOKENIZER_FILE}, expected a folder with a fast tokenizer; load it "
            "with AutoTokenizer and save it by save_pretrained"
        )
    return None

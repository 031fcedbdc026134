"""Every tensor of an official checkpoint to its place, or a refusal that tells all that is wrong at once.

Wrong are: a name that the layout does not have, a weight that is missing, another shape or type, a number that is not
finite, a copy of a tied weight that differs from its original, a constant of another value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sparselt_dist.errors import CheckpointError
from sparselt_dist.models.official_files import OfficialFiles
from sparselt_dist.models.official_layouts import Expected, Layout

OF_OBJECTIVE = "objective:"  # before the names of the objective's weights
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_SHOWN = 6  # names or faults listed in a message


@dataclass(frozen=True)
class TensorReport:
    """What became of one tensor of the source."""

    source: str
    shape: tuple[int, ...]
    dtype: str
    action: Literal["kept", "renamed", "dropped"]
    target: str
    """Name in the model, or in the objective behind `objective:`; empty: dropped."""
    reason: str


class Matched(NamedTuple):
    """Tensors under our names, and what became of each of the source."""

    model: dict[str, Tensor]
    objective: dict[str, Tensor]
    reports: tuple[TensorReport, ...]


class _Place(NamedTuple):
    """Where a weight goes."""

    target: str
    shape: torch.Size


def match(layout: Layout, files: OfficialFiles, expected: Expected) -> Matched:
    """Every tensor of `files` to its place in `expected`.

    Raises:
        CheckpointError: the tensors are not exactly those of the layout; every fault is told.
    """
    stored = {layout.normal(name): value for name, value in files.tensors.items()}
    originals = {name: _original(name, stored, expected.copies) for name in stored}
    places = _places(expected)
    reports = [
        _report(name, value, layout.normal(name), originals[layout.normal(name)], expected, places)
        for name, value in files.tensors.items()
    ]
    state = {row.target: files.tensors[row.source] for row in reports if row is not None and row.target}
    faults = [
        *_counted("unknown", (name for name, row in zip(files.tensors, reports, strict=True) if row is None)),
        *_counted("missing", (name for name, place in places.items() if place.target not in state)),
        *(f"{count} tensors named {name}" for name, count in _repeated(map(layout.normal, files.tensors))),
        *(fault for name in stored for fault in _value_faults(name, stored, originals, expected, places)),
    ]
    if faults:
        raise _refusal(layout, files, faults)
    return Matched(
        {name: value for name, value in state.items() if not name.startswith(OF_OBJECTIVE)},
        {name.removeprefix(OF_OBJECTIVE): value for name, value in state.items() if name.startswith(OF_OBJECTIVE)},
        tuple(row for row in reports if row is not None),
    )


def _places(expected: Expected) -> dict[str, _Place]:
    """Official name -> place, of the model's and of the objective's weights."""
    sizes = {name: value.shape for name, value in expected.model.state_dict().items()}
    places = {name: _Place(target, sizes[target]) for name, target in expected.weights.items()}
    if expected.objective is not None:
        sizes = {name: value.shape for name, value in expected.objective.state_dict().items()}
        for name, target in expected.objective_weights.items():
            places[name] = _Place(OF_OBJECTIVE + target, sizes[target])
    return places


def _original(name: str, stored: Mapping[str, Tensor], copies: Mapping[str, str]) -> str:
    """The stored name that a tied weight is taken from: its first, or where that is absent the first copy of it."""
    first = copies.get(name, name)
    if first in stored:
        return first
    return next(copy for copy in copies if copies[copy] == first and copy in stored) if name in copies else name


def _report(
    name: str, value: Tensor, normal: str, original: str, expected: Expected, places: Mapping[str, _Place]
) -> TensorReport | None:
    """What becomes of a tensor; None: it is unknown."""
    shape, dtype = tuple(value.shape), str(value.dtype).removeprefix("torch.")
    first = expected.copies.get(normal, normal)
    if normal != original:
        return TensorReport(name, shape, dtype, "dropped", "", f"tied: the same tensor as {original}")
    if first in places:
        target = places[first].target
        reason = "" if first == normal else f"the only stored copy of {first}"
        return TensorReport(name, shape, dtype, "kept" if target == name else "renamed", target, reason)
    if normal in expected.constants:
        return TensorReport(name, shape, dtype, "dropped", "", "a constant, computed anew")
    return None


# --- faults ----------------------------------------------------------------------------------------------------------


def _value_faults(
    name: str,
    stored: Mapping[str, Tensor],
    originals: Mapping[str, str],
    expected: Expected,
    places: Mapping[str, _Place],
) -> list[str]:
    value, original = stored[name], originals[name]
    if name != original:
        return [] if torch.equal(value, stored[original]) else [f"{name} differs from {original}, to which it is tied"]
    first = expected.copies.get(name, name)
    if first in places:
        return _weight_faults(name, value, places[first].shape)
    return _constant_faults(name, value, expected.constants[name]) if name in expected.constants else []


def _weight_faults(name: str, value: Tensor, shape: torch.Size) -> list[str]:
    if value.shape != shape:
        return [f"{name} has shape {tuple(value.shape)}, expected {tuple(shape)}"]
    if value.dtype not in _FLOATS:
        return [f"{name} has type {value.dtype}, expected float32, float16 or bfloat16"]
    return [] if bool(value.isfinite().all()) else [f"{name} holds numbers that are not finite"]


def _constant_faults(name: str, value: Tensor, constant: Tensor) -> list[str]:
    if value.shape != constant.shape:
        return [f"{name} has shape {tuple(value.shape)}, expected the constant's {tuple(constant.shape)}"]
    tolerance = 1e-2 if value.dtype in (torch.float16, torch.bfloat16) else 1e-6  # what the stored type can hold
    is_same = torch.allclose(value.double(), constant.double(), rtol=tolerance, atol=0)
    return [] if is_same else [f"{name} is another constant than the configuration gives"]


def _repeated(names: Iterable[str]) -> list[tuple[str, int]]:
    return [(name, count) for name, count in Counter(names).items() if count > 1]


def _counted(what: str, names: Iterable[str]) -> list[str]:
    found = list(names)
    shown = ", ".join(found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
    return [f"{len(found)} {what} ({shown})"] if found else []


def _refusal(layout: Layout, files: OfficialFiles, faults: list[str]) -> CheckpointError:
    shown = "; ".join(faults[:_SHOWN]) + (f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else "")
    return CheckpointError(
        f"convert: {files.path} is not exactly {layout.title} as {files.config_source} describes it: {shown}; expected "
        "every weight of the official model and nothing else; give its undamaged checkpoint and the configuration that "
        "belongs to it"
    )

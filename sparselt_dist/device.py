"""What `plan` knows of a device: peak, memory, bandwidths, links, price. Torch-free; a CPU may be measured on the spot.

The shipped descriptions, `devices/*.yaml`, hold dense peaks of public data sheets, never those with sparsity. A
description of one's own is a YAML file with the same fields.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sparselt_dist.errors import ConfigError
from sparselt_dist.extensions import usable_cores

if TYPE_CHECKING:
    import torch

DEVICE_FOLDER = Path(__file__).parent / "devices"
GIB = 2**30
_COPY_BYTES = 2**28
_COPIES = 3

Precision = Literal["fp32", "bf16", "fp16"]


class Device(BaseModel):
    """One accelerator, or the share of a machine that a CPU rank has. GB/s are of one direction, 1e9 bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    kind: Literal["cpu", "gpu"]
    peak_tflops: dict[Precision, Annotated[float, Field(gt=0)]] | None = Field(
        description="dense; null: measured (cpu)"
    )
    memory_gib: float | None = Field(gt=0, description="null: that of this machine (cpu)")
    memory_gb_s: float | None = Field(gt=0, description="null: measured (cpu)")
    host_gb_s: float = Field(gt=0, description="between the device and host memory, for offload")
    intra_node_gb_s: float = Field(gt=0, description="a device's link to the others of its node")
    inter_node_gb_s: float = Field(gt=0, description="a device's link to other nodes")
    link_source: str = Field(description="what the links are")
    devices_per_node: int = Field(ge=1, description="usual number, where none is given")
    utilization: dict[Precision, Annotated[float, Field(gt=0, le=1)]] = Field(
        description="share of the peak that real tokens reach"
    )
    utilization_source: str = Field(description="why this share")
    overhead_gib: float = Field(ge=0, description="what a process holds before the model")
    allocator_factor: float = Field(ge=1, description="memory taken for activations over what they need")
    watts: float | None = Field(gt=0, description="under load; null: unknown")
    price_per_hour: float = Field(ge=0, description="assumed where none is given")
    price_of: Literal["device", "core"] = "device"

    @model_validator(mode="after")
    def _only_a_cpu_is_measured(self) -> Device:
        if self.kind == "gpu" and None in (self.peak_tflops, self.memory_gib, self.memory_gb_s):
            raise ValueError("peak_tflops, memory_gib and memory_gb_s of a gpu (null is for a cpu, which is measured)")
        missing = set(self.peak_tflops or ()) - set(self.utilization)
        if missing:
            raise ValueError(
                f"utilization of every precision in peak_tflops (found none of {', '.join(sorted(missing))})"
            )
        return self


def shipped_devices() -> list[str]:
    """Names of the descriptions in the package."""
    return sorted(path.stem for path in DEVICE_FOLDER.glob("*.yaml"))


def find_device(name: str) -> Device:
    """The description of that name, of the one name that begins so (`a100`), or in the file of that path.

    Raises:
        ConfigError: no such description, or a wrong one.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        plain = _plain(name)
        exact = [known for known in shipped_devices() if _plain(known) == plain]
        found = exact or [known for known in shipped_devices() if plain and _plain(known).startswith(plain)]
        if len(found) != 1:
            raise ConfigError(
                f"--device: found {name!r}, expected one of {', '.join(shipped_devices())}, or a file *.yaml; copy one of "
                f"{DEVICE_FOLDER} for a device of your own"
            )
        path = DEVICE_FOLDER / f"{found[0]}.yaml"
    return read_device(path)


def watts_of(device_name: str) -> float | None:
    """Power under load of the shipped description that a device's own name fits (`NVIDIA A100-SXM4-80GB`); None: unknown."""
    frugal = ("PCIE", "NVL", "MIG")  # which draw less than the modules that are described
    if any(kind in device_name.upper() for kind in frugal):
        return None
    plain = _plain(device_name).replace(" ", "")
    for known in shipped_devices():
        if known != "cpu" and _plain(known.partition("-80gb")[0]) in plain:
            return read_device(DEVICE_FOLDER / f"{known}.yaml").watts
    return None


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def read_device(path: Path) -> Device:
    """A description in a YAML file.

    Raises:
        ConfigError: unreadable, or fields that are unknown, missing or wrong: all of them are named.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as cause:
        raise ConfigError(
            f"--device {path}: cannot be read ({cause}), expected the description of a device in YAML; copy one of "
            f"{DEVICE_FOLDER}"
        ) from cause
    try:
        return Device.model_validate(values)
    except ValidationError as cause:
        faults = "; ".join(_fault(error) for error in cause.errors())
        raise ConfigError(f"--device {path}: {faults}; compare it with those in {DEVICE_FOLDER}") from cause


def _fault(error: Any) -> str:
    place = ".".join(map(str, error["loc"])) or "the file"
    return f"{place}: {error['msg']}"


def measured(device: Device, precision: Precision, ranks_here: int) -> Device:
    """The description with every number: what is null is measured on this machine, of which a rank has its share."""
    if device.kind == "gpu":
        return device
    import psutil

    cores = usable_cores()
    ranks_a_core = max(ranks_here / cores, 1.0)
    values: dict[str, Any] = {"price_of": "device"}
    if device.peak_tflops is None:
        values["peak_tflops"] = {precision: _peak(max(cores // ranks_here, 1), precision) / 1e12 / ranks_a_core}
    if device.memory_gib is None:
        values["memory_gib"] = psutil.virtual_memory().total / GIB / ranks_here
    if device.memory_gb_s is None:
        values["memory_gb_s"] = _copy_gb_s() / ranks_a_core
    if device.price_of == "core":
        values["price_per_hour"] = device.price_per_hour * cores / ranks_here
    return device.model_copy(update=values)


def check_precision(precision: Precision, device: torch.device) -> None:
    """Refuse bf16 on a GPU without such arithmetic, which torch would emulate, slower than fp32. Any CPU may have it.

    Raises:
        ConfigError: it has none.
    """
    import torch

    if precision != "bf16" or device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False):
        return
    name = torch.cuda.get_device_name(device)
    raise ConfigError(
        f"train.precision: found bf16, which {name} has no arithmetic for; set train.precision=fp16 (or fp32), or take a "
        "GPU of the generation of A100 or later"
    )


def _peak(threads: int, precision: Precision) -> float:
    """FLOP/s of a rank with so many threads; OMP_NUM_THREADS says otherwise where the user has set it, as in a run."""
    import torch

    from sparselt_dist.metrics import peak_flops

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    return peak_flops("cpu", precision)


def _copy_gb_s() -> float:
    """GB/s read and written by one thread that copies; the best of a few copies."""
    import numpy as np

    source = np.ones(_COPY_BYTES, dtype=np.uint8)
    target = np.zeros_like(source)
    best = float("inf")
    for _ in range(_COPIES):
        started = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - started)
    return 2 * _COPY_BYTES / best / 1e9

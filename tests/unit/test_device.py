"""Descriptions of devices: those shipped, and how wrong ones are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from sparselt_dist import device
from sparselt_dist.device import (
    DEVICE_FOLDER,
    check_precision,
    find_device,
    measured,
    read_device,
    shipped_devices,
    watts_of,
)
from sparselt_dist.errors import ConfigError
from sparselt_dist.metrics import peak_flops

GPUS = ["a100-80gb", "a6000", "h100-80gb", "rtx-4090"]


def test_the_shipped_ones_are_complete() -> None:
    assert shipped_devices() == sorted(["cpu", *GPUS])
    for name in shipped_devices():
        found = find_device(name)
        assert found.name == name
        assert (found.peak_tflops is None) == (found.kind == "cpu")


@pytest.mark.parametrize(
    ("name", "of_torch"),
    [("a100-80gb", "NVIDIA A100-SXM4-80GB"), ("h100-80gb", "NVIDIA H100 80GB HBM3"), ("a6000", "A6000")],
)
def test_peaks_are_dense_and_those_that_a_run_divides_by(name: str, of_torch: str) -> None:
    peaks = find_device(name).peak_tflops or {}
    assert peaks["bf16"] * 1e12 == pytest.approx(peak_flops(of_torch), rel=0.002)
    assert peaks["fp16"] == peaks["bf16"] > peaks["fp32"]


@pytest.mark.parametrize(("short", "name"), [("a100", "a100-80gb"), ("RTX4090", "rtx-4090"), ("h100", "h100-80gb")])
def test_a_name_may_be_short(short: str, name: str) -> None:
    assert find_device(short).name == name


@pytest.mark.parametrize("name", ["a", "b200", ""])
def test_an_unknown_or_ambiguous_name_lists_the_choices(name: str) -> None:
    with pytest.raises(ConfigError, match="expected one of a100-80gb, a6000, cpu, h100-80gb, rtx-4090, or a file"):
        find_device(name)


def test_a_description_of_ones_own_is_read(tmp_path: Path) -> None:
    values = yaml.safe_load((DEVICE_FOLDER / "a6000.yaml").read_text())
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**values, "name": "mine", "memory_gib": 15}))
    assert find_device(str(path)).memory_gib == 15


def test_all_faults_of_a_description_are_told(tmp_path: Path) -> None:
    values = yaml.safe_load((DEVICE_FOLDER / "a6000.yaml").read_text())
    del values["host_gb_s"]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**values, "utilization": {"fp32": 40}, "wats": 1}))
    with pytest.raises(ConfigError) as caught:
        read_device(path)
    for fault in (
        "host_gb_s: Field required",
        "utilization.fp32: Input should be less than or equal to 1",
        "wats: Extra inputs",
    ):
        assert fault in str(caught.value)
    path.write_text(yaml.safe_dump({**values, "host_gb_s": 1, "memory_gib": None}))
    with pytest.raises(ConfigError, match="null is for a cpu"):
        read_device(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_device(tmp_path / "none.yaml")


def test_a_cpu_is_measured_and_shared_by_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "usable_cores", lambda: 4)
    monkeypatch.setattr(device, "_copy_gb_s", lambda: 12.0)
    asked: list[int] = []
    monkeypatch.setattr(device, "_peak", lambda threads, precision: asked.append(threads) or threads * 1e11)
    pair, crowd = (measured(find_device("cpu"), "bf16", ranks) for ranks in (2, 8))
    assert asked == [2, 1]
    assert (pair.peak_tflops, crowd.peak_tflops) == ({"bf16": pytest.approx(0.2)}, {"bf16": pytest.approx(0.05)})
    assert (pair.memory_gb_s, crowd.memory_gb_s) == (12.0, 6.0)
    assert (pair.price_per_hour, crowd.price_per_hour) == (pytest.approx(0.08), pytest.approx(0.02))
    assert (pair.memory_gib or 0) == pytest.approx(4 * (crowd.memory_gib or 0))


def test_numbers_that_are_given_are_not_measured() -> None:
    values = find_device("cpu").model_dump() | {"peak_tflops": {"bf16": 1.0}, "memory_gib": 8.0, "memory_gb_s": 9.0}
    given = device.Device.model_validate({**values, "price_of": "device"})
    assert measured(given, "bf16", 2) == given


def test_the_power_of_a_known_device_is_found_by_its_own_name() -> None:
    assert watts_of("NVIDIA A100-SXM4-80GB") == 400.0
    assert watts_of("NVIDIA H100 80GB HBM3") == 700.0
    assert watts_of("NVIDIA GeForce RTX 4090") == 450.0
    assert watts_of("NVIDIA RTX A6000") == 300.0
    assert watts_of("AMD Instinct MI300X") is None and watts_of("NVIDIA H100 PCIe") is None
    assert watts_of("NVIDIA A100-PCIE-40GB") is None and watts_of("NVIDIA H100 NVL") is None


def test_bf16_is_refused_where_a_gpu_would_emulate_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(ConfigError, match=r"bf16, which Tesla V100 has no arithmetic for; set train\.precision=fp16"):
        check_precision("bf16", gpu)
    check_precision("fp16", gpu)
    check_precision("bf16", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    check_precision("bf16", gpu)

"""Time ledger, console line, MFU arithmetic, memory."""

import contextlib
import io

import pytest

from sparselt_dist import metrics
from sparselt_dist.metrics import (
    PHASES,
    ConsoleProgress,
    TimeLedger,
    format_count,
    format_duration,
    peak_flops,
    peak_memory_gib,
    with_later,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_add_up_to_the_wall_clock() -> None:
    clock = Clock()
    ledger = TimeLedger(clock)
    clock.now += 1  # other
    with ledger.phase("forward"):
        clock.now += 2
        with ledger.phase("communication"):  # interrupts the forward pass
            clock.now += 4
        clock.now += 8
    with contextlib.suppress(KeyError), ledger.phase("data"):
        clock.now += 16
        raise KeyError
    clock.now += 32
    seconds = ledger.seconds()
    expected = {"forward": 10, "communication": 4, "data": 16, "other": 33}
    assert {name: value for name, value in seconds.items() if value} == expected
    assert set(seconds) == set(PHASES)
    assert ledger.total() == clock.now - 100


def test_a_reading_inside_a_phase_is_up_to_date() -> None:
    clock = Clock()
    ledger = TimeLedger(clock)
    with ledger.phase("log"):
        clock.now += 3
        assert ledger.metrics()["time/log_seconds"] == 3
        clock.now += 1
    assert ledger.seconds()["log"] == 4


def test_time_after_the_last_checkpoint_is_told_as_repeated_or_keeps_its_phase() -> None:
    saved = {"forward": 5.0, "export": 0.0, "repeated": 1.0}
    later = {"step": 9, "time/forward_seconds": 8.0, "time/export_seconds": 2.0, "time/repeated_seconds": 1.0}
    assert with_later(saved, True, later) == {"forward": 5.0, "export": 0.0, "repeated": 6.0}
    assert with_later(saved, False, later) == {"forward": 8.0, "export": 2.0, "repeated": 1.0}
    assert with_later(saved, True, {"step": 9}) == saved  # a line without the ledger, which a later one of its step has


def test_the_ledger_goes_on_after_a_resume_and_counts_from_its_start() -> None:
    clock = Clock()
    ledger = TimeLedger(clock, start=90.0)
    ledger.restore({"forward": 5.0, "other": 1.0})
    with ledger.phase("forward"):
        clock.now += 2
    assert ledger.seconds()["forward"] == 7
    assert ledger.seconds()["other"] == 11
    assert ledger.total() == 18


def test_an_unknown_phase_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown phase 'foward'"), TimeLedger().phase("foward"):
        pass


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_off_a_terminal_a_line_every_ten_seconds_and_the_last_state() -> None:
    clock, out = Clock(), io.StringIO()
    console = ConsoleProgress(total_steps=100, stream=out, clock=clock)
    for step in range(1, 26):
        console.update(step=step, fraction=step / 100, loss=5.0, tokens_per_second=12345.0, seconds_left=3725)
        clock.now += 1
    console.message("a checkpoint")
    console.close()
    lines = out.getvalue().splitlines()
    assert [line.split("step ")[1].split("/")[0] for line in lines if "step" in line] == ["1", "11", "21", "25"]
    assert lines[-1].endswith("25.0%  step 25/100  loss 5.0000  12.3k tokens/s  1:02:05 left")
    assert lines[-2] == "a checkpoint"


def test_on_a_terminal_one_line_is_redrawn_and_messages_stay_above(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    clock, out = Clock(), Terminal()
    console = ConsoleProgress(stream=out, clock=clock)
    for step in range(1, 4):
        console.update(step=step, fraction=0.5, loss=5.0, tokens_per_second=1e6, seconds_left=10)
        clock.now += 1
    console.message("saved")
    console.close()
    pieces = out.getvalue().split("\r\x1b[K")
    assert len(pieces) == 5
    assert pieces[4].startswith("saved\n[####")
    assert out.getvalue().count("\n") == 2
    assert all(len(piece.strip().splitlines()[-1]) < 60 for piece in pieces[1:])


def test_other_ranks_are_silent_and_a_closed_stream_does_no_harm() -> None:
    out = io.StringIO()
    console = ConsoleProgress(rank=1, stream=out)
    console.update(step=1, fraction=0.1)
    console.message("text")
    console.close()
    assert out.getvalue() == ""
    broken = io.StringIO()
    console = ConsoleProgress(rank=0, stream=broken)
    broken.close()
    console._stream = broken
    console.message("text")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A6000", 155),
        ("Tesla V100-SXM2-32GB", 125),
        ("Tesla T4", 65),
    ],
)
def test_peaks_of_known_gpus(name: str, tflops: float) -> None:
    assert peak_flops(name) == tflops * 1e12


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA RTX 6000 Ada", "NVIDIA L40"])
def test_slices_and_unknown_gpus_are_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_measured_flops", lambda device, precision: 7.0)
    assert peak_flops(name) == 7.0


def test_the_peak_of_a_cpu_is_measured_once() -> None:
    first = peak_flops("cpu", "fp32")
    assert 1e8 < first < 1e15
    assert peak_flops("cpu", "fp32") == first


def test_peak_memory_covers_what_was_held_and_freed() -> None:
    before = peak_memory_gib()
    block = bytearray(int((before + 0.1) * 2**30))
    block[::4096] = b"x" * len(block[::4096])
    del block
    assert before + 0.1 < peak_memory_gib() < 3 * before + 0.5


def test_formats() -> None:
    assert [format_count(x) for x in (0, 950, 12345, 999_900, 4.56e6, 2e9)] == [
        "0",
        "950",
        "12.3k",
        "1000k",
        "4.56M",
        "2G",
    ]
    assert [format_duration(x) for x in (0.4, 125, 3725, 273_000)] == ["0:00", "2:05", "1:02:05", "3d 03:50"]

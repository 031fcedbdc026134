"""What a run measures of itself: the time ledger, the console line, MFU, memory.

The phases of the ledger add up to the wall clock by construction. Torch is imported only where a device is asked.
The journal that the numbers go to is in `journal.py`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, TextIO

from sparselt_dist.journal import Journal, replace_file

if TYPE_CHECKING:
    import torch

__all__ = [
    "PHASES",
    "ConsoleProgress",
    "Journal",
    "TimeLedger",
    "format_count",
    "format_duration",
    "peak_flops",
    "peak_memory_gib",
    "replace_file",
]

PHASES: Final = (
    "prelude",
    "compile",
    "data",
    "forward",
    "backward",
    "optimizer",
    "communication",
    "log",
    "evaluate",
    "checkpoint",
    "yardsticks",
    "export",
    "repeated",  # of earlier starts, behind the checkpoint that was continued: what was done again
    "other",
)
_PLAIN_LINE_SECONDS: Final = 10.0
_LIVE_LINE_SECONDS: Final = 0.1
_MEASURE_SECONDS: Final = 0.3

# Dense bf16/fp16 peaks in TFLOP/s; the first pattern found in the device's name counts.
_PEAK_TFLOPS: Final = (
    (r"\bB200\b", 2250.0),
    (r"\bG?H200\b", 989.0),
    (r"\bH100\b.*\bPCIe\b", 756.0),
    (r"\bH100\b.*\bNVL\b", 835.0),
    (r"\bH100\b", 989.0),
    (r"\bL40S\b", 362.0),
    (r"\bA100\b", 312.0),
    (r"\bA6000\b", 155.0),
    (r"\bV100\b", 125.0),
    (r"\bT4\b", 65.0),
)


# ---- time ----------------------------------------------------------------------------------------------------------


class TimeLedger:
    """Wall-clock seconds by phase; at any moment one phase is running ("other" where none was named), so the phases
    add up to the wall clock. A phase opened inside another interrupts it. Not for use from several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, start: float | None = None) -> None:
        """`start`: the clock's reading the ledger counts from (default: now); the time since is "other"."""
        self._clock = clock
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._stack = ["other"]
        self._mark = clock() if start is None else start

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the block as `name`, one of PHASES."""
        if name not in self._seconds:
            raise ValueError(f"unknown phase {name!r}; one of {', '.join(PHASES)}")
        self._turn()
        self._stack.append(name)
        try:
            yield
        finally:
            self._turn()
            self._stack.pop()

    def seconds(self) -> dict[str, float]:
        """Seconds of every phase up to now, earlier starts included."""
        self._turn()
        return dict(self._seconds)

    def current(self) -> tuple[str, float]:
        """The running phase and the seconds since it began or was last marked; other threads may ask."""
        return self._stack[-1], max(self._clock() - self._mark, 0.0)

    def mark(self) -> None:
        """Say in the middle of a long phase that it goes on."""
        self._turn()

    def total(self) -> float:
        """Wall-clock seconds up to now, earlier starts included."""
        return sum(self.seconds().values())

    def metrics(self) -> dict[str, float]:
        """The journal's names: `time/<phase>_seconds`."""
        return {f"time/{name}_seconds": value for name, value in self.seconds().items()}

    def restore(self, seconds: Mapping[str, float]) -> None:
        """Add the seconds of earlier starts (what `seconds()` gave when the checkpoint was saved)."""
        for name, value in seconds.items():
            self._seconds[name if name in self._seconds else "other"] += value

    def _turn(self) -> None:
        now = self._clock()
        self._seconds[self._stack[-1]] += max(now - self._mark, 0.0)  # a clock that goes back takes nothing away
        self._mark = now


def with_later(seconds: Mapping[str, float], is_repeated: bool, last: Mapping[str, float]) -> dict[str, float]:
    """A checkpoint's ledger and what the start that made it spent after it, by the journal's last line.

    Args:
        seconds: of the checkpoint, by phase.
        is_repeated: the line is of a later step, whose work is lost; else what came after the checkpoint keeps its phase.
        last: the line, with `time/<phase>_seconds`.
    """
    told = {phase: last[name] for phase in PHASES if (name := f"time/{phase}_seconds") in last}
    if not is_repeated:
        return {phase: max(seconds.get(phase, 0.0), told.get(phase, 0.0)) for phase in {**seconds, **told}}
    lost = max(sum(told.values()) - sum(seconds.values()), 0.0)
    return {**seconds, "repeated": seconds.get("repeated", 0.0) + lost}


# ---- console -------------------------------------------------------------------------------------------------------


def format_duration(seconds: float) -> str:
    """`2:05`, `1:02:05` or `3d 04:10`."""
    whole = max(0, int(seconds + 0.5))
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, second = divmod(rest, 60)
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{second:02d}" if hours else f"{minutes}:{second:02d}"


def format_count(number: float) -> str:
    """Three digits and a unit: `950`, `12.3k`, `4.56M`."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{unit}" if abs(number) < 999.5 * limit else f"{number / limit:.0f}{unit}"
    return f"{number:.0f}"


class ConsoleProgress:
    """Rank 0's one live line: bar, step, loss, tokens/s, time left. Off a terminal: a plain line every 10 s at most."""

    def __init__(
        self,
        *,
        rank: int = 0,
        total_steps: int | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._silent = rank != 0
        self._live = not self._silent and self._stream.isatty()
        self._total_steps = total_steps
        self._clock = clock
        self._shown_at = -math.inf
        self._line = ""
        self._pending = False

    def update(
        self,
        *,
        step: int,
        fraction: float,
        loss: float | None = None,
        tokens_per_second: float | None = None,
        seconds_left: float | None = None,
    ) -> None:
        """Show where the run is; `fraction` of the budget spent, in [0, 1]."""
        if self._silent:
            return
        self._line = self._format(step, fraction, loss, tokens_per_second, seconds_left)
        self._pending = True
        if self._clock() - self._shown_at >= (_LIVE_LINE_SECONDS if self._live else _PLAIN_LINE_SECONDS):
            self._show()

    def message(self, text: str) -> None:
        """Print a line that stays, above the live line."""
        if self._silent:
            return
        self._put(f"\r\x1b[K{text}\n{self._fitted()}" if self._live else f"{text}\n")

    def close(self) -> None:
        """Show the last state and leave the cursor on a fresh line."""
        if self._silent:
            return
        if self._pending:
            self._show()
        if self._live and self._line:
            self._put("\n")
        self._line = ""

    def _format(
        self, step: int, fraction: float, loss: float | None, speed: float | None, seconds_left: float | None
    ) -> str:
        share = min(max(fraction, 0.0), 1.0)
        filled = int(share * 20)
        parts = [f"[{'#' * filled}{'-' * (20 - filled)}] {100 * share:5.1f}%"]
        parts.append(f"step {step}" + (f"/{self._total_steps}" if self._total_steps else ""))
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        if speed is not None:
            parts.append(f"{format_count(speed)} tokens/s")
        if seconds_left is not None and math.isfinite(seconds_left):
            parts.append(f"{format_duration(seconds_left)} left")
        return "  ".join(parts)

    def _fitted(self) -> str:
        return self._line[: max(shutil.get_terminal_size().columns - 1, 20)]

    def _show(self) -> None:
        self._put(f"\r\x1b[K{self._fitted()}" if self._live else f"{self._line}\n")
        self._shown_at = self._clock()
        self._pending = False

    def _put(self, text: str) -> None:
        # A closed terminal or a full pipe must not end a run.
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()


# ---- arithmetic and memory -----------------------------------------------------------------------------------------


def peak_flops(device: str | torch.device, precision: str = "bf16") -> float:
    """Peak FLOP/s of one device, the denominator of MFU: the table's for a known GPU name, else a measured matmul.

    `device` is a torch device, `cpu`, `cuda[:N]` or a GPU's name. A GPU counts with its dense bf16/fp16 peak whatever
    the precision; a CPU, an unknown GPU and a slice of a GPU (MIG) are measured in `precision`, once a process.
    """
    text = str(device)
    is_place = re.fullmatch(r"(cpu|cuda|xpu|mps)(:\d+)?", text) is not None
    name = text
    if text.startswith("cuda") and is_place:
        import torch

        name = torch.cuda.get_device_name(torch.device(text))
    if "MIG" not in name:
        for pattern, tflops in _PEAK_TFLOPS:
            if re.search(pattern, name, re.IGNORECASE):
                return tflops * 1e12
    return _measured_flops(text if is_place else "cuda", precision)


@functools.cache
def _measured_flops(device: str, precision: str) -> float:
    """FLOP/s of the best of repeated square matmuls over 0.3 s."""
    import torch

    size = 1024 if device.startswith("cpu") else 8192
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    if device.startswith("cpu") and dtype == torch.float16:
        dtype = torch.bfloat16
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best, deadline = math.inf, time.perf_counter() + _MEASURE_SECONDS
    out = left @ right
    while time.perf_counter() < deadline:
        _synchronize(device)
        begin = time.perf_counter()
        torch.matmul(left, right, out=out)
        _synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2.0 * size**3 / best if math.isfinite(best) else 1e9


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def peak_memory_gib() -> float:
    """Peak memory of this process in GiB: allocated on the GPU where one is in use, else resident in main memory."""
    torch_module = sys.modules.get("torch")
    if torch_module is not None and torch_module.cuda.is_available() and torch_module.cuda.is_initialized():
        return float(torch_module.cuda.max_memory_allocated()) / 2**30
    with contextlib.suppress(OSError, ValueError, IndexError):
        # Not getrusage where it can be helped: its peak includes that of the launcher this process was forked from.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20

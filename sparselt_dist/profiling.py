"""`train.profile=N`: where the time of N steps goes, as a trace and as a table, in the run folder's `profile/`.

The steps follow on a start's first ones, which compile, allocate and fill caches. The table's phases are those of the time
ledger, so they add up to the steps' wall clock; the operators are torch's own account of rank 0. Only rank 0 is traced.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

FOLDER = "profile"
TABLE, TRACE = "steps.txt", "trace.json"
WARM_UP_STEPS = 3
_OPERATORS = 25


class StepProfile:
    """Traces steps WARM_UP_STEPS + 1 to WARM_UP_STEPS + N of a start; told of the ledger after each step."""

    def __init__(self, folder: Path, num_steps: int) -> None:
        self._folder = folder
        self._num_steps = num_steps
        self._seen = 0
        self._profiler: profile | None = None
        self._before: dict[str, float] = {}
        self._first = 0

    def after_step(self, step: int, seconds: Mapping[str, float]) -> str | None:
        """A step has ended, with all that followed it; `seconds` by phase as the ledger has them. What to tell the user."""
        self._seen += 1
        if self._seen == WARM_UP_STEPS:
            self._start(seconds)
            self._first = step + 1
        elif self._seen == WARM_UP_STEPS + self._num_steps:
            return self.finish(seconds)
        return None

    def finish(self, seconds: Mapping[str, float]) -> str | None:
        """Write what was traced; nothing where no step was. What to tell the user."""
        profiler, self._profiler = self._profiler, None
        steps = self._seen - WARM_UP_STEPS
        if profiler is None:
            return None
        profiler.stop()
        if steps < 1:
            return None
        spent = {phase: seconds[phase] - self._before.get(phase, 0.0) for phase in seconds}
        self._folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._folder / TRACE))
        sort_by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        operators = profiler.key_averages().table(sort_by=sort_by, row_limit=_OPERATORS)
        table = phase_table(self._first, steps, spent)
        (self._folder / TABLE).write_text(f"{table}\n\n{operators}\n", encoding="utf-8")
        return f"{table}\n(operators in {self._folder / TABLE}; open {self._folder / TRACE} in a trace viewer)"

    def _start(self, seconds: Mapping[str, float]) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities, acc_events=True)
        self._profiler.start()
        self._before = dict(seconds)


def phase_table(first: int, steps: int, seconds: Mapping[str, float]) -> str:
    """Seconds by phase over some steps, largest first; they add up to the steps' wall clock."""
    total = sum(seconds.values())
    lines = [f"steps {first} to {first + steps - 1}, with tracing: {total / steps:.4f} s a step", ""]
    lines.append(f"{'phase':<14}{'s a step':>10}{'share':>9}")
    for phase, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        name = "data wait" if phase == "data" else phase
        if spent > 0 or phase in ("data", "communication", "log", "checkpoint"):
            lines.append(f"{name:<14}{spent / steps:>10.4f}{100 * spent / max(total, 1e-12):>7.1f} %")
    return "\n".join(lines)

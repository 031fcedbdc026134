"""Runs started by the command that users type, for benchmarks that disturb them: marked processes, judgement, kept results.

Every process of a case carries a mark in its environment, so that all that is left of it is found, whoever its parent is by
then. Results are JSON lines: a case that stands there is not made again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from runs import Finished, pretrain_arguments

from sparselt_dist import checkpoint
from sparselt_dist.errors import CheckpointError

MARK = "SPARSELT_TESTS_MARK"
TESTS = Path(__file__).parent
GRACE_SECONDS = 15.0  # for what a command started to end after it
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Toy:
    """The run that is disturbed: two ranks; dropout shows that random states are restored as well."""

    shards: Path
    steps: int
    every: int  # steps between checkpoints
    zero_stage: int
    micro_steps: int = 16  # of a rank in a step

    @property
    def evaluate_every(self) -> int:
        """Steps; not always those at which it saves."""
        return self.every + 1

    def arguments(self, folder: Path, *overrides: str) -> list[str]:
        """Of `pretrain`; later overrides win."""
        return pretrain_arguments(
            self.shards,
            folder,
            f"budget.max_steps={self.steps}",
            f"checkpoint.every_steps={self.every}",
            f"train.zero_stage={self.zero_stage}",
            f"train.evaluate_every_steps={self.evaluate_every}",
            f"train.global_batch_size={4 * self.micro_steps}",
            "train.micro_batch_size=2",
            "model.config.hidden_dropout_prob=0.1",
            "data.num_workers=1",
            "data.shuffle_window=2",  # so that shards are asked for during all of the run
            *overrides,
        )

    def command(self, folder: Path, *overrides: str, module: str = "sparselt_dist.pretrain") -> list[str]:
        """The line that starts it; `module` may be one that plants something first."""
        start = [sys.executable, "-m", "sparselt_dist.launch", "--num_gpus", "2", "-m", module]
        return [*start, *self.arguments(folder, *overrides)]


# ---- starts --------------------------------------------------------------------------------------------------------


class Ended(NamedTuple):
    """How a start ended."""

    code: int | None
    """None: it hung, and was killed."""
    output: str
    left: tuple[str, ...]
    """Processes that outlived it."""
    at: float
    """When the command ended, by the monotonic clock."""
    gone_at: float
    """When all that it started had ended as well, or was killed."""


def environment(**more: str) -> dict[str, str]:
    """Of a start: these tests and this package can be imported, in the ranks too."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


@contextmanager
def started(
    line: Sequence[str], output: Path, mark: str, variables: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a session of its own; nothing that carries the mark is left afterwards."""
    with output.open("ab") as file:
        process = subprocess.Popen(
            line,
            env=(variables or environment()) | {MARK: mark},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        end_all(mark)
        process.wait()


def marked(mark: str) -> list[psutil.Process]:
    """All living processes with this mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def end_all(mark: str) -> None:
    """Kill what carries the mark, and what it started meanwhile."""
    while family := marked(mark):
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(family, timeout=5)


def stop_in_order() -> None:
    """SIGTERM raises from now on, as Ctrl-C does, so that a stopped benchmark leaves no process."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)


def wait_for_end(process: subprocess.Popen[bytes], output: Path, mark: str, limit: float) -> Ended:
    """Wait so many seconds for the command, and for all that it started; a killed command's ranks get the whole limit."""
    deadline = time.monotonic() + limit
    try:
        code: int | None = process.wait(limit)
    except subprocess.TimeoutExpired:
        code = None
    at = time.monotonic()
    if code is not None and code >= 0:
        deadline = time.monotonic() + GRACE_SECONDS
    while (family := marked(mark)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    gone_at = time.monotonic()
    names = []
    for member in family:
        with contextlib.suppress(psutil.Error):
            names.append(f"{member.pid}: {' '.join(member.cmdline())[:120]}")
    end_all(mark)
    return Ended(code, output.read_text(errors="replace"), tuple(names) if code is not None else (), at, gone_at)


# ---- judgement -----------------------------------------------------------------------------------------------------


def last_step(folder: Path) -> int:
    """The last one in a run's journal, 0 before the first."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("\n")]
    return int(steps[-1]) if steps else 0


def logged_steps(folder: Path, rank: int) -> list[int]:
    """Every step that a rank has told its log, over all starts; a log is only ever added to."""
    path = folder / "logs" / f"rank_{rank:05d}.log"
    text = path.read_text(errors="replace") if path.exists() else ""
    return [int(step) for step in re.findall(rf" rank {rank} step (\d+): loss ", text)]


def most_repeated(folder: Path) -> int:
    """How many steps were taken again at the worst of all starts, by rank 0's log."""
    steps = logged_steps(folder, 0)
    return max([before - after + 1 for before, after in pairwise(steps) if after <= before], default=0)


def damaged(folder: Path) -> list[str]:
    """What is wrong with complete checkpoints, each of them verified."""
    faults = []
    for path in checkpoint.complete_checkpoints(folder):
        try:
            checkpoint.verify(path)
        except CheckpointError as error:
            faults.append(str(error))
    return faults


def undisturbed(toy: Toy, work: Path, limit: float) -> tuple[Finished, float]:
    """The run that nobody disturbs, made once, and the seconds of its command."""
    folder, note, settings = work / "undisturbed", work / "undisturbed.json", [toy.steps, toy.every, toy.zero_stage]
    if not note.exists():
        shutil.rmtree(folder, ignore_errors=True)
        begun, output = time.monotonic(), work / "undisturbed.log"
        with started(toy.command(folder), output, f"undisturbed-{os.getpid()}") as process:
            code = process.wait(limit)
        assert code == 0, f"the undisturbed run failed: see {output}"
        note.write_text(json.dumps({"seconds": time.monotonic() - begun, "settings": settings}))
    noted = json.loads(note.read_text())
    assert noted["settings"] == settings, f"{work} has a run of other settings; choose another --work-dir"
    return Finished(0, "", folder), float(noted["seconds"])


# ---- results -------------------------------------------------------------------------------------------------------


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Results by their `case`; a torn last line is none."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            result = json.loads(line)
            found[str(result["case"])] = result
    return found


def keep_result(path: Path, result: dict[str, Any]) -> None:
    """Add a line, on a line of its own even after a torn one."""
    torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a") as file:
        file.write(("\n" if torn else "") + json.dumps(result) + "\n")
        file.flush()
        os.fsync(file.fileno())


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)

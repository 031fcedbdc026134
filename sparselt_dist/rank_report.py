"""What a rank tells the launcher that started it: that it is ready for signals, and its exit code.

DeepSpeed's node launcher can lose the exit codes of its ranks (it answers 1 to a SIGTERM, 0 if a signal kills it),
so each rank leaves them in the folder that our `deepspeed` command names. Without that folder nothing is written.
"""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path

REPORT_DIR_VARIABLE = "SPARSELT_EXIT_DIR"


@dataclass(frozen=True)
class Reports:
    """What the ranks of one launch have said so far, by rank."""

    ready_pids: dict[str, int]
    exit_codes: dict[str, int]  # in the order in which the ranks ended

    @property
    def any_lost(self) -> bool:
        """Whether a rank announced itself and left no exit code."""
        return not self.ready_pids.keys() <= self.exit_codes.keys()


def announce() -> None:
    """Say that this rank's signal handlers are in place.

    Until then the `deepspeed` command holds signals back, and under `slurm/pretrain.sh` the notice is blocked.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    _write("ready", os.getpid())


def record_exit(code: int) -> None:
    """Leave the exit code of this rank; call it last, just before the process ends."""
    _write("exit", code)


def _write(kind: str, value: int) -> None:
    folder, rank = os.environ.get(REPORT_DIR_VARIABLE), os.environ.get("RANK")
    if not folder or rank is None or not os.path.isdir(folder):
        return
    path = Path(folder, f"rank_{rank}.{kind}")
    partial = path.with_suffix(".partial")  # a reader sees a whole report or none
    with contextlib.suppress(OSError):  # another user's folder, a full disk: no reason to end a rank
        partial.write_text(str(value))
        partial.replace(path)


def read_reports(folder: Path) -> Reports:
    """The reports in `folder`; an empty folder gives empty reports."""
    return Reports(_read(folder, "ready"), _read(folder, "exit"))


def _read(folder: Path, kind: str) -> dict[str, int]:
    paths = sorted(folder.glob(f"rank_*.{kind}"), key=lambda path: path.stat().st_mtime_ns)
    return {path.stem: int(path.read_text()) for path in paths}

"""Loss spikes: when a step's loss is one, and the data that is left out after going back before it.

A loss is held against the median of the losses of late and their median absolute deviation, which a few outliers do not
move. The verdict falls before the update, from a loss that all ranks have agreed on. A rewind (`train.on_spike=rewind`)
continues from the last checkpoint and leaves out the positions of the spike's steps. They are part of the run's progress and
stand in `left_out.json` too, so that the order of the data stays a function of position and a resume repeats it.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from sparselt_dist.config import TrainSection
from sparselt_dist.errors import CheckpointError
from sparselt_dist.journal import replace_file

WINDOW, LEAST = 128, 32  # losses that the next is held against, and how few of them tell nothing
MOST_REWINDS = 20  # of a run: more are no spikes of the data
FILE = "left_out.json"
_NORMAL = 1.4826  # median absolute deviation to sigma of a normal distribution
_FLOOR = 1e-3  # of the median: a sigma is not taken to be less

Ranges = Sequence[Sequence[int]]  # [from, to) of the stream, sorted, apart from each other


class RewindRun(Exception):
    """A spike: the run is to continue from the checkpoint with these positions left out; raised on all ranks alike."""

    def __init__(self, found: str, positions: tuple[int, int]) -> None:
        super().__init__(found)
        self.positions = positions


def sigmas_above(losses: Sequence[float], loss: float) -> float:
    """How many robust sigmas a loss lies above the median of those before it; 0 where they are too few."""
    if len(losses) < LEAST:
        return 0.0
    middle = _median(losses)
    sigma = _NORMAL * _median([abs(other - middle) for other in losses])
    return (loss - middle) / max(sigma, _FLOOR * abs(middle), 1e-12)


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else 0.5 * (ordered[half - 1] + ordered[half])


class SpikeWatch:
    """Looks at every step's loss, before its update."""

    def __init__(self, train: TrainSection, losses: list[float], rewinds: int) -> None:
        """`losses`: of the steps before, lengthened here."""
        self._train = train
        self._losses = losses
        self._rewinds = rewinds
        self._begins: deque[int] = deque(maxlen=train.spike_steps)  # positions where the last steps began
        self._quiet = 0

    def look(self, loss: float, step: int, begin: int, end: int, saved: Callable[[], int | None]) -> str | None:
        """What to tell the user of the step that draws the positions from `begin` to `end`.

        Args:
            saved: the position of the last checkpoint, None if there is none yet; asked by all ranks, if the run may go back.

        Raises:
            RewindRun: the run is to go back before it.
        """
        if self._train.spike_sigmas is None:
            return None
        sigmas = sigmas_above(self._losses, loss)
        self._begins.append(begin)
        self._quiet = max(self._quiet - 1, 0)
        found = (
            f"step {step}: the loss is {loss:.4f}, {sigmas:.1f} sigmas above the median of the last {len(self._losses)}"
        )
        is_spike = sigmas > self._train.spike_sigmas
        may_rewind = is_spike and self._train.on_spike == "rewind" and self._rewinds < MOST_REWINDS
        if may_rewind and (position := saved()) is not None:
            raise RewindRun(found, (max(self._begins[0], position), end))
        self._losses.append(loss)
        del self._losses[:-WINDOW]
        if not is_spike or self._quiet:
            return None
        self._quiet = LEAST
        if self._train.on_spike == "warn":
            return f"{found}; train.on_spike=rewind would go back to the last checkpoint and leave its data out"
        return f"{found}; {'there is no checkpoint to go back to' if may_rewind else 'it was gone back often enough'}"


# ---- positions that are left out -----------------------------------------------------------------------------------


def merged(ranges: Ranges) -> list[list[int]]:
    """Sorted, and joined where they touch or overlap."""
    joined: list[list[int]] = []
    for begin, end in sorted((int(begin), int(end)) for begin, end in ranges):
        if joined and begin <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([begin, end])
    return joined


def shifted(positions: np.ndarray, start: int, ranges: Ranges) -> np.ndarray:
    """Where a stream that is read on from `start` takes its samples, int64: `positions` with what is left out jumped over."""
    for begin, end in ranges:
        if begin >= start:
            positions = np.where(positions >= begin, positions + (end - begin), positions)
    return positions


def advanced(position: int, samples: int, ranges: Ranges) -> int:
    """Where the sample after so many from `position` on lies."""
    return int(shifted(np.array([position + samples]), position, ranges)[0])


def drawn_between(start: int, position: int, ranges: Ranges) -> int:
    """Samples that were drawn from `start` to before `position`."""
    return position - start - sum(end - begin for begin, end in ranges if start <= begin and end <= position)


# ---- the record ----------------------------------------------------------------------------------------------------


def write_left_out(run_dir: Path, ranges: Ranges) -> None:
    """Note the ranges in the run's folder, before anything is done on their account."""
    replace_file(run_dir / FILE, json.dumps({"positions": [list(span) for span in ranges]}).encode() + b"\n")


def read_left_out(run_dir: Path, position: int) -> list[list[int]]:
    """The noted ranges that lie at or after a checkpoint's position.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        noted = json.loads((run_dir / FILE).read_text())["positions"]
        return [[int(begin), int(end)] for begin, end in noted if begin >= position]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{run_dir / FILE}: cannot be read ({error}), expected the positions of the data left out after spikes; "
            "restore the file, or remove it to train on that data"
        ) from None

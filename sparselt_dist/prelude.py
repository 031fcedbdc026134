"""What an objective does before the first step of a new run (`objectives.base.Prelude`), over ranks and on the budget.

Rank 0 works, the others wait in short sums over ranks rather than in one long one, so that a long prelude meets no time limit of
the process group and a stop asked of any rank ends it on all within a second. Nothing is written before it is done: after a
stop or a crash the next start begins it again. Its result goes to all ranks as whole tensors, before the engine is built.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn

from sparselt_dist import distributed
from sparselt_dist.budget import Budget
from sparselt_dist.config import Config
from sparselt_dist.data.storage import is_remote
from sparselt_dist.errors import SparseltError
from sparselt_dist.evaluation.features import count_unigrams
from sparselt_dist.objectives.base import Prelude, PreludeReport, PreludeSetting, PreludeStopped

if TYPE_CHECKING:
    from sparselt_dist.data.corpora import Corpora
    from sparselt_dist.metrics import TimeLedger
    from sparselt_dist.objectives.base import TokenizerInfo
    from sparselt_dist.run_start import Start
    from sparselt_dist.timekeeping import Progress

COUNTED_TOKENS = 4_194_304
MEETING_SECONDS = 1.0  # between the sums in which a working rank 0 hears of stops


class Done(NamedTuple):
    """A prelude that ran."""

    report: PreludeReport
    seconds: float  # by rank 0's clock


def make_setting(
    config: Config, train: Corpora, tokenizer: TokenizerInfo, device: torch.device, max_seconds: float = math.inf
) -> PreludeSetting:
    """What the objective may see of the run; `max_seconds` caps what it may take, whatever the budget."""
    return PreludeSetting(
        shards=train.name,
        shard_folder=_only_folder(train),
        tokenizer=tokenizer,
        tokenizer_sha256=train.manifest.tokenizer_sha256,
        count_pieces=lambda: count_unigrams(
            train, tokenizer.vocab_size, tokenizer.special_ids, max_tokens=COUNTED_TOKENS
        ),
        seed=config.run.seed,
        device=device,
        budget_seconds=Budget.from_section(config.budget).max_seconds,
        max_seconds=max_seconds,
        keep_going=lambda: None,
        clock=time.monotonic,
    )


def _only_folder(train: Corpora) -> Path | None:
    """The folder of the shards, if they are one prepared folder of this machine, and all of it."""
    (folder, *others) = train.folders
    is_part = len(folder.shards) < len(folder.manifest.shards)
    if others or is_part or is_remote(folder.location) or folder.manifest.kind == "text":
        return None
    return Path(folder.location)


def begin(
    objective: nn.Module,
    start: Start,
    setting: PreludeSetting,
    ranks: distributed.Ranks,
    stop_flag: distributed.StopFlag,
    ledger: TimeLedger,
) -> None:
    """Run a new objective's prelude, if it has one, and note in `start` what it says and took. Raises as `run_prelude`."""
    with ledger.phase("prelude"):
        done = run_prelude(objective, setting, ranks, stop_flag)
    if done is not None:
        start.prelude = done.report
        start.progress.seconds = start.progress.prelude_seconds = done.seconds


def prelude_metrics(config: Config, report: PreludeReport | None, progress: Progress) -> dict[str, float]:
    """What the journal tells of a prelude; nothing where there was none."""
    if report is None:
        return {}
    named = {f"{config.objective.name}/{name}": value for name, value in report.metrics.items()}
    return {**named, "budget/prelude_seconds": progress.prelude_seconds}


def prelude_summary(config: Config, report: PreludeReport | None, progress: Progress) -> dict[str, Any]:
    """What the summary tells: the seconds before and from the first step on, and all that the objective said."""
    if report is None:
        return {}
    return {
        "prelude_seconds": progress.prelude_seconds,
        "training_seconds": progress.seconds - progress.prelude_seconds,
        **{f"{config.objective.name}/{name}": value for name, value in {**report.facts, **report.metrics}.items()},
    }


def run_prelude(
    objective: nn.Module, setting: PreludeSetting, ranks: distributed.Ranks, stop_flag: distributed.StopFlag
) -> Done | None:
    """Run the objective's prelude, if it has one, and leave its result in the module of every rank; all ranks call it.

    Raises:
        PreludeStopped: on all ranks alike, a stop was asked of one.
        SparseltError: on all ranks alike, it cannot run.
    """
    if not (isinstance(objective, Prelude) and objective.has_prelude):
        return None
    distributed.agreed(ranks, lambda: objective.check_prelude(setting))
    started = setting.clock()
    meet = _Meeting(stop_flag, setting.device, setting.clock)
    if ranks.is_main:
        report, fault = _work(objective, _with(setting, meet.keep_going), meet)
    else:
        report, fault = None, None
        while not meet.now(done=False):
            time.sleep(0.02)
    distributed.agreed(ranks, lambda: _raise(fault))
    _share_state(objective, setting.device)
    done = Done(cast(PreludeReport, report), setting.clock() - started)
    return distributed.on_main(ranks, lambda: done)


def _work(
    objective: Prelude, setting: PreludeSetting, meet: _Meeting
) -> tuple[PreludeReport | None, SparseltError | None]:
    """Rank 0's part: the report, or an error the user can mend; the others hear of its end."""
    report, fault = None, None
    try:
        report = objective.run_prelude(setting)
    except SparseltError as met:
        fault = met
    meet.now(done=True)
    return report, fault


def _with(setting: PreludeSetting, keep_going: Callable[[], None]) -> PreludeSetting:
    return dataclasses.replace(setting, keep_going=keep_going)


def _raise(fault: SparseltError | None) -> None:
    if fault is not None:
        raise fault


class _Meeting:
    """A sum over ranks, again and again: who asked for a stop, and whether rank 0 is done."""

    def __init__(self, stop_flag: distributed.StopFlag, device: torch.device, clock: Callable[[], float]) -> None:
        self._stop_flag, self._device, self._clock = stop_flag, device, clock
        self._met = -math.inf

    def keep_going(self) -> None:
        """Rank 0, from inside its work: meet the others if it is time. Raises PreludeStopped."""
        if self._clock() - self._met >= MEETING_SECONDS:
            self.now(done=False)

    def now(self, *, done: bool) -> bool:
        """Meet; whether rank 0 is done. Raises PreludeStopped, unless it is, for then the first step comes before a stop."""
        own = torch.tensor([float(self._stop_flag.is_set), float(done)], device=self._device)
        stops, ends = distributed.reduce_sum(own).tolist()
        self._met = self._clock()
        if stops and not ends:
            raise PreludeStopped
        return bool(ends)


@torch.no_grad()
def _share_state(objective: nn.Module, device: torch.device) -> None:
    """Rank 0's parameters and persistent buffers, whole, to all ranks."""
    for tensor in objective.state_dict().values():
        sent = tensor.to(device).contiguous()
        distributed.broadcast(sent)
        tensor.copy_(sent)

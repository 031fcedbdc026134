"""Held-out loss: on the same rows with the same masks every time, and what computing it takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING

import torch

from sparselt_dist import distributed
from sparselt_dist.config import Config
from sparselt_dist.data.batch import to_device
from sparselt_dist.data.loader import evaluation_batches
from sparselt_dist.metrics import TimeLedger
from sparselt_dist.step_sums import Sums

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

    from sparselt_dist.data.corpora import Corpora
    from sparselt_dist.objectives.base import Collator

READ_AT_ONCE = 32  # batches


class HeldOut:
    """A run's held-out rows, judged by its objective. All ranks hold one each and call it together."""

    def __init__(
        self,
        config: Config,
        rows: Corpora,
        *,
        engine: DeepSpeedEngine,
        collator: Collator,
        ranks: distributed.Ranks,
        micro_batch_size: int,
        ledger: TimeLedger,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._rows, self._engine, self._collator = config, rows, engine, collator
        self._ranks, self._micro_batch_size = ranks, micro_batch_size
        self._ledger, self._clock = ledger, clock

    def means(self, max_samples: int) -> dict[str, float]:
        """`loss` and `term/<name>`, means over the first rows, at most so many of all ranks together."""
        sums, engine = Sums(), self._engine
        engine.eval()
        batches = evaluation_batches(
            self._rows,
            self._collator,
            max_samples=max_samples,
            micro_batch_size=self._micro_batch_size,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            row_length=self._config.data.sequence_length,
        )
        with torch.no_grad():
            # a row that one rank cannot read ends all of them, none of which is then in a pass that takes all
            while some := distributed.agreed(self._ranks, lambda: list(islice(batches, READ_AT_ONCE))):
                for batch in some:
                    sums.add_output(engine(to_device(batch, engine.device)), batch)
                    self._ledger.mark()
            means = sums.means(engine.device)
        engine.train()
        return means

    def pace(self, *, first: bool) -> tuple[float, float]:
        """Seconds of a whole evaluation and of one batch's pass, judged by two batches.

        Before the first time, and then with `train.compile` for every shape, one is run untimed.
        """
        stride = self._micro_batch_size * self._ranks.world_size
        rows = min(self._config.train.evaluate_samples, self._rows.num_samples)
        if first:
            self.means(min(rows, stride))
            if self._config.train.compile and rows % stride:
                self.means(rows % stride)  # the last batch has a shape of its own
        timed = min(rows, 2 * stride)
        started = self._clock()
        self.means(timed)
        seconds = self._clock() - started
        return seconds * rows / timed, seconds * min(stride, timed) / timed

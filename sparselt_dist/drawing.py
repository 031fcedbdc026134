"""What a step trains on: the micro-batches of a rank, and the one sum over ranks that says what all drew together.

A fault that a rank meets in its data is kept until that sum, so that all ranks end alike and none waits for the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch

from sparselt_dist import distributed
from sparselt_dist.data.loader import Loader, MicroBatch
from sparselt_dist.errors import DataError, SparseltError
from sparselt_dist.metrics import TimeLedger
from sparselt_dist.objectives.base import Collator, FollowsProgress
from sparselt_dist.step_sums import Drawn

_LANES = 4  # a 64-bit digest travels as 16-bit lanes, whose sums are exact in float64


class StepDraw:
    """Draws the steps of one start, in order."""

    def __init__(
        self,
        loader: Loader,
        collator: Collator,
        *,
        counts: tuple[str, ...],
        ranks: distributed.Ranks,
        device: torch.device,
        ledger: TimeLedger,
        on_complaint: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        """`counts`: batch keys that are summed over ranks, num_targets and num_tokens among them."""
        self.counts = counts
        self.first_batch_seconds: float | None = None
        self._loader = loader
        self._collator = collator
        self._ranks = ranks
        self._device = device
        self._ledger = ledger
        self._on_complaint = on_complaint
        self._clock = clock
        self._micro_batches: Iterator[MicroBatch] = iter(())
        self._fault: SparseltError | None = None
        self._complaints: set[str] = set()

    def start(self) -> None:
        """Have the loader begin to work."""
        self._micro_batches = iter(self._loader)

    def peek(self, fraction: float) -> MicroBatch:
        """The first micro-batch, which is drawn again by the first step; all ranks call it together.

        Raises:
            SparseltError: on all ranks alike, a rank could not draw it.
        """
        with self._ledger.phase("data"):
            first = distributed.agreed(self._ranks, lambda: next(self._micro_batches))
        self._micro_batches = itertools.chain([first], self._micro_batches)
        return self._as_of([first], fraction)[0]

    def draw(self, count: int, fraction: float) -> list[MicroBatch]:
        """The next micro-batches; fewer after a fault, which `agree` raises."""
        started = self._clock()
        with self._ledger.phase("data"):
            drawn = []
            try:
                for _ in range(count):
                    drawn.append(next(self._micro_batches))
                    self._ledger.mark()  # shards that come over a network may take long, and are no hang
            except SparseltError as fault:
                self._fault, drawn = fault, []
        if self.first_batch_seconds is None:
            self.first_batch_seconds = self._clock() - started
        return self._as_of(drawn, fraction)

    def _as_of(self, drawn: list[MicroBatch], fraction: float) -> list[MicroBatch]:
        """The micro-batches as they are at this share of the budget, which the workers that made them did not know."""
        if not (isinstance(self._collator, FollowsProgress) and self._collator.follows_progress):
            return drawn
        with self._ledger.phase("data"):
            return [made._replace(batch=self._collator.at_progress(made.batch, fraction)) for made in drawn]

    def agree(self, drawn: list[MicroBatch], step: int, batch_size: int) -> Drawn:
        """Targets and tokens of the global step, and its digest: the one sum over ranks.

        Raises:
            DataError: on all ranks alike, a rank could not draw its micro-batches, or all samples were of bad shards.
        """
        digest = sum(micro_batch.digest for micro_batch in drawn) % 2**64
        self._complain(drawn)
        numbers = [
            float(self._fault is not None),
            *(float(sum(int(micro_batch.batch[key]) for micro_batch in drawn)) for key in self.counts),
            float(sum(micro_batch.batch["input_ids"].numel() for micro_batch in drawn)),
            float(sum(micro_batch.skipped for micro_batch in drawn)),
            *(float(digest >> (16 * lane) & 0xFFFF) for lane in range(_LANES)),
        ]
        with self._ledger.phase("communication"):
            summed = distributed.reduce_sum(torch.tensor(numbers, dtype=torch.float64, device=self._device)).tolist()
        faults, counts, rest = summed[0], summed[1 : 1 + len(self.counts)], summed[1 + len(self.counts) :]
        positions, skipped, *lanes = rest
        if faults:
            distributed.agreed(self._ranks, self._raise_fault)
        if skipped == batch_size:
            raise DataError(
                f"step {step}: all of its {batch_size} samples are in bad shards that data.on_bad_shard=skip "
                "leaves out; restore the shards"
            )
        joined = sum(int(lane) << (16 * number) for number, lane in enumerate(lanes)) % 2**64
        named = {key: int(count) for key, count in zip(self.counts, counts, strict=True)}
        return Drawn(named, int(positions), int(skipped), joined)

    def _complain(self, drawn: list[MicroBatch]) -> None:
        """Say once on this rank which shards were given up."""
        for complaint in (text for micro_batch in drawn for text in micro_batch.complaints):
            if complaint not in self._complaints:
                self._complaints.add(complaint)
                self._on_complaint(complaint)

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise self._fault

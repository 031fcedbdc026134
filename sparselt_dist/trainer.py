"""The training loop. After a step it makes four plain calls: evaluate, log, save, stop.

A step draws its micro-batches, agrees on their targets in ONE sum over ranks, weighs every micro-batch by its share of
all targets (so the update does not depend on ranks, accumulation or ZeRO stage), and before the optimizer moves
agrees in ONE minimum that the loss is finite everywhere, whether to stop, and on rank 0's clock. All decisions follow
from agreed numbers, so all ranks take them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from sparselt_dist import distributed
from sparselt_dist.budget import Budget, batch_size_at, lr_multiplier
from sparselt_dist.config import Config
from sparselt_dist.data.batch import Batch
from sparselt_dist.data.loader import Loader, MicroBatch, digest_hex, evaluation_batches
from sparselt_dist.errors import DataError, SparseltError
from sparselt_dist.metrics import TimeLedger, peak_memory_gib
from sparselt_dist.objectives.base import FollowsProgress, SharesStatistics, loss_terms
from sparselt_dist.step_sums import Drawn, Sums

if TYPE_CHECKING:
    from sparselt_dist.data.corpora import Corpora
    from sparselt_dist.objectives.base import Collator, LossOutput, SplitLossOutput

Outcome = Literal["finished", "stopped", "failed"]

_LANES = 4  # a 64-bit digest travels as 16-bit lanes, whose sums are exact in float64


class NonFiniteLossError(RuntimeError):
    """A loss was NaN or infinite; no update was made from it."""


@dataclass
class Progress:
    """What a run has done; with the weights, all that a resume needs."""

    step: int = 0
    tokens: int = 0
    position: int = 0  # samples drawn, over all ranks
    seconds: float = 0.0  # of the budget: prelude and training, restarts included, by rank 0's clock
    skipped: int = 0  # samples left out because their shard was bad
    step_seconds: float = 0.0  # what a step takes by rank 0's clock, evaluations and a start's first step left out
    prelude_seconds: float = 0.0  # of the objective's prelude, before the first step

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class StepResult:
    """What one step gives to the log."""

    sums: Sums
    drawn: Drawn
    lr: float
    grad_norm: float | None
    stop: bool


class Trainer:
    """Runs steps until the budget is spent or a stop is asked for. All ranks hold one each and run alike."""

    def __init__(
        self,
        config: Config,
        *,
        engine: DeepSpeedEngine,
        ranks: distributed.Ranks,
        micro_batch_size: int,
        loader: Loader,
        validation: Corpora | None,
        collator: Collator,
        progress: Progress,
        ledger: TimeLedger,
        stop_flag: distributed.StopFlag,
        on_log: Callable[[dict[str, Any]], None],
        on_save: Callable[[], None],
        on_complaint: Callable[[str], None],
        utilisation: Callable[[float], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.engine = engine
        self.ranks = ranks
        self.micro_batch_size = micro_batch_size
        self.loader = loader
        self.validation = validation
        self.collator = collator
        self.progress = progress
        self.ledger = ledger
        self.stop_flag = stop_flag
        self.on_log = on_log
        self.on_save = on_save
        self.on_complaint = on_complaint  # of this rank
        self.utilisation = utilisation  # targets a token -> MFU of one token a second
        self.clock = clock
        self.counts = ("num_targets", "num_tokens", *getattr(engine.module.objective, "counts", ()))
        self.budget = Budget.from_section(config.budget, progress.prelude_seconds)
        self.device = engine.device
        self.is_first_step = True
        self.usual_step_seconds = progress.step_seconds
        self.step_seconds = 0.0
        self.log_seconds = 0.0
        self.checkpoint_seconds = 0.0
        self.first_batch_seconds: float | None = None
        self.data_fault: SparseltError | None = None
        self.complaints: set[str] = set()

    # ---------------------------------------------------------------- the loop

    def run(self) -> Outcome:
        """Train; returns "finished" (budget spent) or "stopped" (asked for, checkpoint committed)."""
        started = self.clock() - self.progress.seconds
        micro_batches = iter(self.loader)
        while not self.spent():
            before = self.ledger.seconds()
            result = self._train_step(micro_batches, started)
            after = self.ledger.seconds()
            # A step's time runs from the last step's end, its logging included, evaluations and checkpoints not.
            self.step_seconds = sum(after.values()) - sum(before.values()) + self.log_seconds
            if not self.is_first_step:
                self.usual_step_seconds = self.step_seconds
            self.is_first_step = False
            data_seconds = after["data"] - before["data"]
            done = self.spent()
            line_due = result.stop or done or self._due(self.config.log.every_steps) or self.config.log.batch_digest
            evaluation_due = not done and self._due(self.config.train.evaluate_every_steps)
            line: dict[str, Any] = {}
            if line_due or evaluation_due:
                with self.ledger.phase("log"):
                    line = self._line(result, data_seconds)
            if evaluation_due:
                line.update(self.evaluate())
            if line:
                self.log(line)
            self.log_seconds = self.ledger.seconds()["log"] - after["log"]
            if result.stop or (not done and self._due(self.config.checkpoint.every_steps)):
                self.save()
            if result.stop:
                return "stopped" if not done else "finished"
        return "finished"

    def spent(self) -> bool:
        """Whether the budget ends here; for hours, whether the next step would end past the deadline."""
        return self.budget.spent(
            steps=self.progress.step,
            tokens=self.progress.tokens,
            seconds=self.progress.seconds,
            next_step_seconds=self.progress.step_seconds,
        )

    def fraction(self) -> float:
        """The spent share of the budget, in [0, 1]."""
        return self.budget.fraction(
            steps=self.progress.step, tokens=self.progress.tokens, seconds=self.progress.seconds
        )

    def _due(self, every: int | None) -> bool:
        return every is not None and self.progress.step % every == 0

    def _line_may_be_due(self, step: int) -> bool:
        """Whether the journal gets a line for a step, as far as it can be known before its end."""
        every = (self.config.log.every_steps, self.config.train.evaluate_every_steps)
        last = self.config.budget.max_steps == step or self.stop_flag.is_set
        return last or self.config.log.batch_digest or any(number and step % number == 0 for number in every)

    # ---------------------------------------------------------------- one step

    def _train_step(self, micro_batches: Iterator[MicroBatch], started: float) -> StepResult:
        fraction = self.fraction()
        lr = self._set_rate(fraction)
        self.engine.module.set_progress(self.progress.step, fraction)
        batch_size = self._batch_size(fraction)
        drawn = self._draw(micro_batches, batch_size // (self.micro_batch_size * self.ranks.world_size))
        drawn = self._as_of(drawn, fraction)
        total = self._agree_on_targets(drawn, batch_size)
        self._share_statistics(drawn)
        sums = Sums()
        for number, micro_batch in enumerate(drawn):
            last = number == len(drawn) - 1
            self._forward_backward(micro_batch.batch, total.counts, sums, last)
        stop, seconds, usual = self._agree_before_update(sums, started)
        with self.ledger.phase("optimizer"):
            norm = self._own_gradient_norm()
            self.engine.step()
        self.progress.step += 1
        self.progress.tokens += total.counts["num_tokens"]
        self.progress.skipped += total.skipped
        self.progress.position += batch_size
        self.progress.seconds, self.progress.step_seconds = seconds, usual
        if norm is None:
            norm = self.engine.get_global_grad_norm()
        return StepResult(sums, total, lr, None if norm is None else float(norm), stop)

    def _own_gradient_norm(self) -> torch.Tensor | None:
        """The norm before clipping where DeepSpeed keeps none (no ZeRO); only for a step that is logged."""
        if self.engine.zero_optimization_stage() > 0 or not self._line_may_be_due(self.progress.step + 1):
            return None
        scaler = self.engine.torch_autocast_z0_gradscaler
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients) / (scaler.get_scale() if scaler is not None else 1.0)

    def _set_rate(self, fraction: float) -> float:
        schedule = self.config.schedule
        lr = self.config.optim.peak_lr * lr_multiplier(
            schedule.name,
            fraction,
            warmup=schedule.warmup,
            decay=schedule.decay,
            min_lr_ratio=schedule.min_lr_ratio,
        )
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)
        return lr

    def _batch_size(self, fraction: float) -> int:
        """Sequences of this global step; the ramp counts the micro-batches of all ranks as one."""
        target = self.config.train.global_batch_size
        if self.config.train.batch_ramp_end is None:
            return target
        unit = self.micro_batch_size * self.ranks.world_size
        return batch_size_at(fraction, micro_batch_size=unit, target=target, ramp_end=self.config.train.batch_ramp_end)

    def _draw(self, micro_batches: Iterator[MicroBatch], count: int) -> list[MicroBatch]:
        started = self.clock()
        with self.ledger.phase("data"):
            try:
                drawn = [next(micro_batches) for _ in range(count)]
            except SparseltError as fault:  # raised on all ranks by `_agree_on_targets`
                self.data_fault, drawn = fault, []
        if self.first_batch_seconds is None:
            self.first_batch_seconds = self.clock() - started
        return drawn

    def _as_of(self, drawn: list[MicroBatch], fraction: float) -> list[MicroBatch]:
        """The micro-batches as they are at this share of the budget, which the workers that made them did not know."""
        if not (isinstance(self.collator, FollowsProgress) and self.collator.follows_progress):
            return drawn
        with self.ledger.phase("data"):
            return [made._replace(batch=self.collator.at_progress(made.batch, fraction)) for made in drawn]

    def _agree_on_targets(self, drawn: list[MicroBatch], batch_size: int) -> Drawn:
        """Targets and tokens of the global step, and its digest: the one sum over ranks.

        Raises:
            DataError: on all ranks alike, a rank could not draw its micro-batches, or all samples were of bad shards.
        """
        digest = sum(micro_batch.digest for micro_batch in drawn) % 2**64
        self._complain(drawn)
        numbers = [
            float(self.data_fault is not None),
            *(float(sum(int(micro_batch.batch[key]) for micro_batch in drawn)) for key in self.counts),
            float(sum(micro_batch.batch["input_ids"].numel() for micro_batch in drawn)),
            float(sum(micro_batch.skipped for micro_batch in drawn)),
            *(float(digest >> (16 * lane) & 0xFFFF) for lane in range(_LANES)),
        ]
        with self.ledger.phase("communication"):
            summed = distributed.reduce_sum(torch.tensor(numbers, dtype=torch.float64, device=self.device)).tolist()
        faults, counts, rest = summed[0], summed[1 : 1 + len(self.counts)], summed[1 + len(self.counts) :]
        positions, skipped, *lanes = rest
        if faults:
            distributed.agreed(self.ranks, self._raise_data_fault)
        if skipped == batch_size:
            raise DataError(
                f"step {self.progress.step}: all of its {batch_size} samples are in bad shards that data.on_bad_shard=skip "
                "leaves out; restore the shards"
            )
        joined = sum(int(lane) << (16 * number) for number, lane in enumerate(lanes)) % 2**64
        named = {key: int(count) for key, count in zip(self.counts, counts, strict=True)}
        return Drawn(named, int(positions), int(skipped), joined)

    def _share_statistics(self, drawn: list[MicroBatch]) -> None:
        """Sums that the objective needs of the whole step before its first loss; one forward pass a micro-batch."""
        objective = self.engine.module.objective
        if not (isinstance(objective, SharesStatistics) and objective.needs_statistics):
            return
        if len(drawn) * self.ranks.world_size == 1:
            objective.set_statistics(None)
            return
        with self.ledger.phase("forward"), torch.no_grad():
            parts = [self.engine(_to_device(micro_batch.batch, self.device), statistics=True) for micro_batch in drawn]
            total = torch.stack(parts).sum(dim=0)
        with self.ledger.phase("communication"):
            objective.set_statistics(distributed.reduce_sum(total))

    def _complain(self, drawn: list[MicroBatch]) -> None:
        """Say once on this rank which shards were given up."""
        for complaint in (text for micro_batch in drawn for text in micro_batch.complaints):
            if complaint not in self.complaints:
                self.complaints.add(complaint)
                self.on_complaint(complaint)

    def _raise_data_fault(self) -> None:
        if self.data_fault is not None:
            raise self.data_fault

    def _forward_backward(self, batch: Batch, counts: dict[str, int], sums: Sums, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        # Compilation is lazy: it happens in the first passes of a start.
        compiling = self.config.train.compile and self.is_first_step
        with self.ledger.phase("compile" if compiling else "forward"):
            output: LossOutput | SplitLossOutput = self.engine(_to_device(batch, self.device))
            sums.add_output(output, batch)
        with self.ledger.phase("compile" if compiling else "backward"):
            # DeepSpeed averages over ranks, so their number is multiplied back in.
            weighed = [
                part * (float(batch[key]) * self.ranks.world_size / max(counts[key], 1))
                for key, part in loss_terms(output).items()
            ]
            self.engine.backward(torch.stack(weighed).sum(), scale_wrt_gas=False)

    def _agree_before_update(self, sums: Sums, started: float) -> tuple[bool, float, float]:
        """All losses finite, any rank asked to stop, rank 0's clock and usual step time: the one minimum over ranks.

        Raises:
            NonFiniteLossError: on all ranks alike, before the optimizer moves.
        """
        with self.ledger.phase("communication"):
            finite = sums.loss_is_finite()
            clock = (self.clock() - started, self.usual_step_seconds) if self.ranks.is_main else (np.inf, np.inf)
            numbers = torch.tensor([float(finite), -float(self.stop_flag.is_set), *clock], dtype=torch.float64)
            all_finite, stop, seconds, usual = distributed.reduce_min(numbers.to(self.device)).tolist()
        if not all_finite:
            self._raise_non_finite(finite)
        return stop < 0, seconds, usual

    def _raise_non_finite(self, own_is_finite: bool) -> None:
        reports = distributed.gather_objects(None if own_is_finite else self._sample_keys(), self.ranks)
        rank, keys = next((rank, keys) for rank, keys in enumerate(reports) if keys is not None)
        raise NonFiniteLossError(
            f"step {self.progress.step}: the loss on rank {rank} is not finite; its samples are {', '.join(keys[:8])}"
            f"{' ...' if len(keys) > 8 else ''}. No update was made. Lower optim.peak_lr, or look at the samples with "
            "`sparselt shards inspect`"
        )

    def _sample_keys(self) -> list[str]:
        """Keys of this rank's samples in the step under way."""
        count = self._batch_size(self.fraction()) // self.ranks.world_size
        return self.loader.keys(self.progress.position, count)

    # ---------------------------------------------------------------- after a step

    def evaluate(self) -> dict[str, float]:
        """Held-out loss and terms, on the same rows with the same masks every time."""
        if self.validation is None:
            return {}
        sums = Sums()
        self.engine.eval()
        with self.ledger.phase("evaluate"), torch.no_grad():
            for batch in evaluation_batches(
                self.validation,
                self.collator,
                max_samples=self.config.train.evaluate_samples,
                micro_batch_size=self.micro_batch_size,
                rank=self.ranks.rank,
                world_size=self.ranks.world_size,
                row_length=self.config.data.sequence_length,
            ):
                sums.add_output(self.engine(_to_device(batch, self.device)), batch)
            means = sums.means(self.device)
        self.engine.train()
        return {f"eval/{name.removeprefix('term/')}": value for name, value in means.items() if name != "term/loss"}

    def _line(self, result: StepResult, data_seconds: float) -> dict[str, Any]:
        """The journal's line of a step; all ranks call it together."""
        means = result.sums.means(self.device)
        name = self.config.objective.name
        line: dict[str, Any] = {"step": self.progress.step, "train/loss": means.pop("loss", 0.0), "train/lr": result.lr}
        if result.grad_norm is not None:
            line["train/grad_norm"] = result.grad_norm
        line.update({f"{name}/{term.removeprefix('term/')}": value for term, value in means.items()})
        drawn = result.drawn
        targets, tokens = drawn.counts["num_targets"], drawn.counts["num_tokens"]
        tokens_per_second = tokens / self.step_seconds
        line.update(
            {
                "progress/tokens": self.progress.tokens,
                "progress/fraction": self.fraction(),
                "budget/elapsed_seconds": self.progress.seconds,
                "perf/tokens_per_second": tokens_per_second,
                "perf/step_seconds": self.step_seconds,
                "perf/mfu": tokens_per_second * self.utilisation(targets / max(tokens, 1)),
                "perf/fill_fraction": tokens / drawn.positions,
                "perf/data_wait_fraction": data_seconds / self.step_seconds,
                "perf/checkpoint_stall_seconds": self.checkpoint_seconds,
                "perf/memory_gib": peak_memory_gib(),
            }
        )
        if self.first_batch_seconds is not None and self.first_batch_seconds >= 0:
            line["perf/first_batch_seconds"] = self.first_batch_seconds
            self.first_batch_seconds = -1.0  # only in the first line of a start
        if self.config.log.batch_digest:
            line["batch_digest"] = digest_hex(drawn.digest)
        if self.config.data.on_bad_shard == "skip":
            line["progress/skipped_samples"] = self.progress.skipped
        return line

    def log(self, line: dict[str, Any]) -> None:
        """Hand a line, completed by the time ledger, to the run's journal."""
        with self.ledger.phase("log"):
            times = {f"time/{phase}_seconds": seconds for phase, seconds in self.ledger.seconds().items()}
            self.on_log({**line, **times})

    def save(self) -> None:
        """Have a checkpoint committed; training waits for it."""
        started = self.clock()
        with self.ledger.phase("checkpoint"):
            self.on_save()
        self.checkpoint_seconds = self.clock() - started


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}

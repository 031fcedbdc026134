"""The training loop. After a step it makes four plain calls: evaluate, log, save, stop.

A step draws its micro-batches, agrees on their targets in ONE sum over ranks, weighs every micro-batch by its share of
all targets (so the update does not depend on ranks, accumulation or ZeRO stage), and before the optimizer moves
agrees in ONE sum on the loss, whether to stop, and rank 0's clock. All decisions follow from agreed numbers, so all
ranks take them alike.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from sparselt_dist import compile_check, distributed
from sparselt_dist.budget import lr_multiplier
from sparselt_dist.config import Config
from sparselt_dist.data.batch import Batch, to_device
from sparselt_dist.data.loader import Loader, MicroBatch, digest_hex
from sparselt_dist.drawing import StepDraw
from sparselt_dist.held_out import HeldOut
from sparselt_dist.landing import TRAINING_OVER_FORWARD, NextStep
from sparselt_dist.metrics import TimeLedger, peak_memory_gib
from sparselt_dist.non_finite import GuardedStep, NonFinite
from sparselt_dist.objectives.base import SharesStatistics, loss_terms
from sparselt_dist.saving import Saving
from sparselt_dist.spikes import SpikeWatch, advanced
from sparselt_dist.step_sums import Drawn, Sums
from sparselt_dist.timekeeping import Progress, Timekeeper

if TYPE_CHECKING:
    from sparselt_dist.data.corpora import Corpora
    from sparselt_dist.objectives.base import Collator, LossOutput, SplitLossOutput

Outcome = Literal["finished", "stopped", "failed"]


@dataclass
class StepResult:
    """What one step gives to the log."""

    sums: Sums
    drawn: Drawn
    lr: float
    grad_norm: float | None
    stop: bool
    is_discarded: bool  # no update was made


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
        saving: Saving,
        on_complaint: Callable[[str], None],
        on_message: Callable[[str], None],
        on_step: Callable[[], None],
        on_non_finite: Callable[[Progress], NonFinite],
        utilisation: Callable[[float], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.engine = engine
        self.ranks = ranks
        self.micro_batch_size = micro_batch_size
        self.loader = loader
        self.progress = progress
        self.ledger = ledger
        self.stop_flag = stop_flag
        self.on_log = on_log
        self.saving = saving
        self.on_complaint = on_complaint  # of this rank
        self.on_message = on_message
        self.on_step = on_step  # after a step and all that followed it
        self.non_finite = on_non_finite(progress)
        self.spikes = SpikeWatch(config.train, progress.losses, len(progress.left_out))
        self.guarded = GuardedStep(engine, config.optim.clip_norm)
        self.utilisation = utilisation  # targets a token -> MFU of one token a second
        self.clock = clock
        self.device = engine.device
        self.held_out = None
        if validation is not None:
            self.held_out = HeldOut(
                config,
                validation,
                engine=engine,
                collator=collator,
                ranks=ranks,
                micro_batch_size=micro_batch_size,
                ledger=ledger,
                clock=clock,
            )
        self.data = StepDraw(
            loader,
            collator,
            counts=("num_targets", "num_tokens", *getattr(engine.module.objective, "counts", ())),
            ranks=ranks,
            device=engine.device,
            ledger=ledger,
            on_complaint=on_complaint,
            clock=clock,
        )
        self.time = Timekeeper(
            config, progress, ranks, micro_batch_size=micro_batch_size, device=engine.device, clock=clock
        )
        self.is_first_step = True
        self.step_seconds = 0.0
        self.log_seconds = 0.0
        self.stall_from: float | None = None  # the phase's seconds before the last save
        self.given_up = False
        self.is_timed_again = False

    # ---------------------------------------------------------------- the loop

    def run(self) -> Outcome:
        """Train; returns "finished" (budget spent) or "stopped" (asked for, checkpoint committed)."""
        self.data.start()
        self.time.start()
        if self.config.train.compile and self.time.next_step is not None:
            self._check_compilation()
        if self.time.needs_rehearsal():
            self._rehearse()
        while (step := self.time.next_step) is not None:
            before = self.ledger.seconds()
            result = self._train_step(step)
            after = self.ledger.seconds()
            # A step's time runs from the last step's end, its logging included, evaluations and checkpoints not.
            self.step_seconds = sum(after.values()) - sum(before.values()) + self.log_seconds
            self.is_first_step = False
            data_seconds = after["data"] - before["data"]
            done = self.time.next_step is None
            line_due = result.stop or done or self._due(self.config.log.every_steps) or self.config.log.batch_digest
            evaluation_due = not done and self._due(self.config.train.evaluate_every_steps, self.progress.pace.evaluate)
            line: dict[str, Any] = {}
            if line_due or evaluation_due:
                with self.ledger.phase("log"):
                    line = self._line(result, data_seconds)
            if evaluation_due:
                line.update(self.evaluate())
            if line:
                self.log(line, more_to_come=done)
            self.log_seconds = self.ledger.seconds()["log"] - after["log"]
            self._advance_save()
            if result.stop or (not done and self._due(self.config.checkpoint.every_steps, self.progress.pace.save)):
                self.save(must=result.stop)
            self.on_step()
            if not self.is_timed_again and self.time.nears_the_end():
                self._rehearse_again()
            if result.stop:
                return "stopped" if not done else "finished"
            if self._is_hopeless(line):
                break
        return "finished"

    def land(self) -> dict[str, float]:
        """The last checkpoint and held-out loss, which belong to the budget; all ranks call it after `run`."""
        limit = self.time.budget.max_seconds
        self.progress.landed_seconds = self.time.landed_seconds(self.given_up)
        reserve = {} if limit is None else {"budget/reserve_seconds": self.time.reserve()}
        self.save(must=True)
        values = {**self.evaluate(), "budget/elapsed_seconds": self.progress.seconds, **reserve}
        self._say(self.time.verdict())
        return values

    def _say(self, complaint: str | None) -> None:
        if complaint is not None and self.ranks.is_main:
            self.on_complaint(complaint)

    def _due(self, every: int | None, seconds: float = 0.0) -> bool:
        """Whether something is due that takes so long; not if training would have to end before it."""
        return every is not None and self.progress.step % every == 0 and self.time.left() > seconds

    def _is_hopeless(self, line: dict[str, Any]) -> bool:
        """Whether the loss, where one was just logged, is too high for the time that was spent."""
        limit, seconds = self.config.train.give_up_loss, self.config.train.give_up_hours * 3600
        loss = line.get("train/loss")
        if limit is None or loss is None or self.progress.seconds < seconds or loss <= limit:
            return False
        self.given_up = True
        spent = f"{loss:.3f} after {self.progress.seconds:.0f} s"
        self._say(f"the loss is {spent}, above train.give_up_loss ({limit:g}): the run ends here")
        return True

    def _check_compilation(self) -> None:
        """On the clock: compile, and see that it changed nothing. Raises ConfigError on all ranks alike if it did."""
        fraction, engine = self.time.share(self.time.next_step), self.engine
        first = self.data.peek(fraction)
        engine.module.set_progress(self.progress.step, fraction)
        whole = engine.zero_optimization_stage() < 3
        with self.ledger.phase("compile"):
            batch = to_device(first.batch, self.device)
            precision = self.config.train.precision
            told = distributed.agreed(
                self.ranks, lambda: compile_check.check(engine.module, batch, precision, with_gradients=whole)
            )
        self.on_message(told)
        self.time.meet()

    def _rehearse(self) -> None:
        """On the clock: what the last evaluation and save will take. With `train.compile` an evaluation is compiled here."""
        with self.ledger.phase("compile" if self.config.train.compile else "evaluate"):
            self._time_evaluation(first=True)
        with self.ledger.phase("checkpoint"):
            save = self.time.pace.save or distributed.agreed(self.ranks, self.saving.probe)
        self.time.pace = self.time.pace._replace(save=save)
        self.time.meet()
        self._say(self.time.complaint())

    def _rehearse_again(self) -> None:
        """Near the end: the machine may have become slower or faster since the last evaluation was timed."""
        self.is_timed_again = True
        with self.ledger.phase("evaluate"):
            self._time_evaluation(first=False)
        self.time.meet()

    def _time_evaluation(self, *, first: bool) -> None:
        if self.held_out is not None:
            evaluation, forward = self.held_out.pace(first=first)
            micro_step = self.time.pace.micro_step or TRAINING_OVER_FORWARD * forward
            self.time.pace = self.time.pace._replace(evaluate=evaluation, micro_step=micro_step)

    # ---------------------------------------------------------------- one step

    def _train_step(self, step: NextStep) -> StepResult:
        started = self.clock()
        fraction = self.time.share(step)
        lr = self._set_rate(fraction)
        self.engine.module.set_progress(self.progress.step, fraction)
        batch_size = step.micro_steps * self.time.unit
        drawn = self.data.draw(step.micro_steps, fraction)
        with self.saving.settled_first():
            total = self.data.agree(drawn, self.progress.step, batch_size)
        self._share_statistics(drawn)
        sums = Sums()
        with weights_cast_once(self.device, self.engine.zero_optimization_stage()):
            for number, micro_batch in enumerate(drawn):
                last = number == len(drawn) - 1
                self._forward_backward(micro_batch.batch, total.counts, sums, last)
        end = advanced(self.progress.position, batch_size, self.progress.left_out)
        with self.ledger.phase("backward"):  # whose end is waited for here
            self.guarded.measure()
            own_loss = sums.share(total.counts)
        loss, stop = self._agree_before_update(own_loss, started, step.micro_steps)
        if loss is not None:
            place = (self.progress.step + 1, self.progress.position, end)
            self._say(self.spikes.look(loss, *place, self.saving.saved_position))
        passed = self.clock()
        with self.ledger.phase("optimizer"):
            update = self.guarded.drop() if loss is None else self.guarded.take()
        if not update.is_made:
            self._discard("loss" if loss is None else "gradient", drawn, sums)
        else:
            self.progress.discarded_in_a_row = 0
        self.progress.step += 1
        self.progress.tokens += total.counts["num_tokens"]
        self.progress.skipped += total.skipped
        self.progress.position = end
        self.time.plan()
        self.time.pace = self.time.pace.after_update(self.clock() - passed + self.log_seconds)
        return StepResult(sums, total, lr, update.norm, stop, not update.is_made)

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

    def _share_statistics(self, drawn: list[MicroBatch]) -> None:
        """Sums that the objective needs of the whole step before its first loss; one forward pass a micro-batch."""
        objective = self.engine.module.objective
        if not (isinstance(objective, SharesStatistics) and objective.needs_statistics):
            return
        if len(drawn) * self.ranks.world_size == 1:
            objective.set_statistics(None)
            return
        with self.ledger.phase("forward"), torch.no_grad():
            parts = [self.engine(to_device(micro_batch.batch, self.device), statistics=True) for micro_batch in drawn]
            total = torch.stack(parts).sum(dim=0)
        with self.ledger.phase("communication"):
            objective.set_statistics(distributed.reduce_sum(total))

    def _forward_backward(self, batch: Batch, counts: dict[str, int], sums: Sums, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        # Compilation is lazy: it happens in the first passes of a start.
        compiling = self.config.train.compile and self.is_first_step
        with self.ledger.phase("compile" if compiling else "forward"):
            output: LossOutput | SplitLossOutput = self.engine(to_device(batch, self.device))
            sums.add_output(output, batch)
        with self.ledger.phase("compile" if compiling else "backward"):
            # DeepSpeed averages over ranks, so their number is multiplied back in.
            weighed = [
                part * (float(batch[key]) * self.ranks.world_size / max(counts[key], 1))
                for key, part in loss_terms(output).items()
            ]
            self.engine.backward(torch.stack(weighed).sum(), scale_wrt_gas=False)

    def _agree_before_update(self, own_loss: float, started: float, micro_steps: int) -> tuple[float | None, bool]:
        """The loss of all ranks, any rank asked to stop, saves written, rank 0's clock and pace: the one sum of these.

        Returns the loss, None if it is not finite on any rank, and whether to stop.
        """
        with self.ledger.phase("communication"):
            if not (self.is_first_step and self.config.train.compile):  # which is no pace
                self.time.pace = self.time.pace.after_pass(self.clock() - started, micro_steps)
            votes = [own_loss, float(self.stop_flag.is_set), float(not self.saving.is_written)]
            loss, stops, unwritten = self.time.agree(votes)
        self.saving.all_written = unwritten == 0
        return (loss if math.isfinite(loss) else None), stops > 0

    def _discard(self, kind: Literal["loss", "gradient"], drawn: list[MicroBatch], sums: Sums) -> None:
        """No update was made of this step: what the user wants then. Raises NonFiniteError on all ranks alike."""
        keys = self.loader.keys(self.progress.position, len(drawn) * self.micro_batch_size)
        with self.ledger.phase("other"), self.saving.settled_first():
            self.non_finite.meet(kind, [made.batch for made in drawn], sums.bad_losses(), keys)

    # ---------------------------------------------------------------- after a step

    def evaluate(self) -> dict[str, float]:
        """Held-out loss and terms, on the same rows with the same masks every time."""
        if self.held_out is None:
            return {}
        started = self.clock()
        with self.ledger.phase("evaluate"):
            means = self.held_out.means(self.config.train.evaluate_samples)
        self.time.pace = self.time.pace._replace(evaluate=self.clock() - started)
        self.time.meet()
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
                "progress/fraction": self.time.fraction(),
                "perf/tokens_per_second": tokens_per_second,
                "perf/step_seconds": self.step_seconds,
                "perf/mfu": tokens_per_second * self.utilisation(targets / max(tokens, 1)),
                "perf/fill_fraction": tokens / drawn.positions,
                "perf/data_wait_fraction": data_seconds / self.step_seconds,
                "perf/checkpoint_stall_seconds": self._stall(),
                "perf/memory_gib": peak_memory_gib(),
            }
        )
        if self.time.next_step is not None:  # else the last save and evaluation are still to come
            line["budget/elapsed_seconds"] = self.progress.seconds
        if self.data.first_batch_seconds is not None and self.data.first_batch_seconds >= 0:
            line["perf/first_batch_seconds"] = self.data.first_batch_seconds
            self.data.first_batch_seconds = -1.0  # only in the first line of a start
        if self.config.log.batch_digest:
            line["batch_digest"] = digest_hex(drawn.digest)
        line.update(self.saving.news())
        if self.config.data.on_bad_shard == "skip":
            line["progress/skipped_samples"] = self.progress.skipped
        if self.progress.discarded:
            line["progress/discarded_steps"] = self.progress.discarded
        if self.progress.left_out:
            line["progress/left_out_samples"] = sum(end - begin for begin, end in self.progress.left_out)
        if result.is_discarded:
            return {key: value for key, value in line.items() if not isinstance(value, float) or math.isfinite(value)}
        return line

    def log(self, line: dict[str, Any], *, more_to_come: bool = False) -> None:
        """Hand a line to the run's journal, completed by the time ledger unless the same step gets a later line."""
        with self.ledger.phase("log"):
            self.on_log(line if more_to_come else {**line, **self.ledger.metrics()})

    def save(self, *, must: bool) -> None:
        """Have a checkpoint saved; one that must be is waited for, others are written while training goes on."""
        self.time.meet()  # a resume goes on from here
        self.stall_from = self.ledger.seconds()["checkpoint"]
        with self.ledger.phase("checkpoint"):
            self.saving.save(must=must)
        self._learn_pace()
        self.time.meet()

    def _advance_save(self) -> None:
        with self.ledger.phase("checkpoint"):
            self.saving.advance()
        self._learn_pace()

    def _learn_pace(self) -> None:
        """What a save takes that is waited for, once one is committed."""
        self.time.pace = self.time.pace._replace(save=self.saving.seconds or self.time.pace.save)

    def _stall(self) -> float:
        """Seconds for which the last save held training up so far."""
        return 0.0 if self.stall_from is None else self.ledger.seconds()["checkpoint"] - self.stall_from


def weights_cast_once(device: torch.device, zero_stage: int) -> AbstractContextManager[object]:
    """Around a step's forward and backward passes: autocast casts each weight for the first and keeps that for the others.

    Autocast forgets its casts where the outermost of its contexts ends, which else is that of one forward pass. This one does
    nothing but surround them; it changes no bit. At ZeRO 3 weights are not to be kept beyond a layer.
    """
    return contextlib.nullcontext() if zero_stage == 3 else torch.autocast(device.type, enabled=False)

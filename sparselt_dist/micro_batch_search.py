"""`train.micro_batch_size=fastest`: the micro-batch that trains most sequences a second, found before the clock starts.

The real model and objective run forward and backward on real batches, in the run's precision, for every divisor of a rank's
share of the global batch (a batch ramp grows in whole micro-batches, so these are its increments too), smallest first.
The search ends where two in succession are clearly slower than the best, or one does not fit. All ranks try the same ones,
the slowest rank's time counts, and all take the same. Weights and moments of the optimizer take their room meanwhile.

Invariants: nothing is left behind in weights, gradients, data order or random state: the model of the search is thrown away.
The model is not compiled here, which costs minutes a candidate: an eager one needs more memory, so what fits here fits there.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch

from sparselt_dist import distributed
from sparselt_dist.config import Config
from sparselt_dist.data.loader import Loader
from sparselt_dist.errors import ConfigError
from sparselt_dist.metrics import peak_memory_gib
from sparselt_dist.models.assembly import build_collator, build_model
from sparselt_dist.objectives.base import SharesStatistics, loss_terms

if TYPE_CHECKING:
    from sparselt_dist.data.batch import Batch
    from sparselt_dist.data.corpora import Corpora
    from sparselt_dist.models.backbone import PretrainingModel
    from sparselt_dist.objectives.base import TokenizerInfo

TIMED_PASSES, MOST_PASSES = 3, 20
TIMED_SECONDS = 0.5  # of a candidate, at least, unless it takes the most passes
CLEARLY_SLOWER = 0.97  # of the best rate
SLOWER_IN_SUCCESSION = 2
_FREE_SHARE = 0.9  # of the main memory that is available, to be used
_MOMENTS = 2
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Tried(NamedTuple):
    """A candidate and how it fared."""

    micro_batch_size: int
    seconds: float
    """Of a forward and backward pass on the slowest rank; infinite: it does not fit."""

    @property
    def rate(self) -> float:
        """Sequences a second and rank."""
        return self.micro_batch_size / self.seconds


def divisors(share: int) -> list[int]:
    """All of them, rising."""
    return [number for number in range(1, share + 1) if share % number == 0]


def search(candidates: list[int], measure: Callable[[int], float]) -> list[Tried]:
    """Measure candidates in rising order until it is clear which is the best; `measure` gives agreed seconds."""
    tried: list[Tried] = []
    best, slower = 0.0, 0
    for candidate in candidates:
        tried.append(Tried(candidate, measure(candidate)))
        rate = tried[-1].rate
        slower = slower + 1 if rate < CLEARLY_SLOWER * best else 0
        best = max(best, rate)
        if rate == 0 or slower == SLOWER_IN_SUCCESSION:
            break
    return tried


def fastest(tried: list[Tried]) -> int:
    """The one of most sequences a second.

    Raises:
        ConfigError: not even the smallest fits.
    """
    best = max(tried, key=lambda candidate: candidate.rate)
    if best.rate == 0:
        raise ConfigError(
            f"train.micro_batch_size: fastest: not even {tried[0].micro_batch_size} sequence fits into the device's memory; "
            "make the model smaller, or shard it (train.zero_stage=3 with a train.micro_batch_size)"
        )
    return best.micro_batch_size


def report(tried: list[Tried], chosen: int) -> str:
    """What was tried, a line each."""
    lines = ["train.micro_batch_size=fastest, forward and backward of each candidate:"]
    for candidate in tried:
        size, rate = candidate.micro_batch_size, candidate.rate
        told = f"{rate:9.1f} sequences/s {1000 * candidate.seconds:9.1f} ms" if rate else " does not fit"
        lines.append(f"  {size:>6}{told}{'  <- taken' if size == chosen else ''}")
    return "\n".join(lines)


def find_fastest(
    config: Config, train: Corpora, tokenizer: TokenizerInfo, ranks: distributed.Ranks, device: torch.device
) -> tuple[int, str]:
    """The fastest micro-batch and the report; all ranks call it together.

    Raises:
        ConfigError: none fits.
    """
    share = config.train.global_batch_size // ranks.world_size
    with _without_trace(device):
        model = distributed.agreed(ranks, lambda: build_model(config, tokenizer)).to(device).train()
        model.set_progress(0, 0.0)
        # The optimizer's part, whole, as without ZeRO: what fits beside it fits.
        room = [torch.empty_like(weight) for weight in model.parameters() for _ in range(_MOMENTS)]
        trial = _Trial(config, model, train, tokenizer, ranks, device)
        tried = search(divisors(share), trial.agreed_seconds)
        del model, room, trial
    chosen = fastest(tried)
    return chosen, report(tried, chosen)


@contextlib.contextmanager
def _without_trace(device: torch.device) -> Iterator[None]:
    """Random state as before, and the account of peak memory begun anew."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    _forget_peak()


def _forget_peak() -> None:
    """Begin anew to note the peak of this process's main memory (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class _Trial:
    """One candidate after the other."""

    def __init__(
        self,
        config: Config,
        model: PretrainingModel,
        train: Corpora,
        tokenizer: TokenizerInfo,
        ranks: distributed.Ranks,
        device: torch.device,
    ) -> None:
        self._config = config
        self._model = model
        self._train = train
        self._collator = build_collator(config, tokenizer)
        self._ranks = ranks
        self._device = device
        self._base_gib = psutil.Process().memory_info().rss / 2**30
        self._gib_a_row = 0.0  # of main memory, by the last candidate

    def agreed_seconds(self, size: int) -> float:
        """The slowest rank's pass; infinite if it fits on one rank not."""
        batch = self._batch(size)  # by all ranks, before each judges for itself
        seconds = math.inf if self._would_not_fit(size) else self._seconds(size, batch)
        slowest = distributed.reduce_min(torch.tensor([-seconds], dtype=torch.float64, device=self._device))
        return -float(slowest)

    def _seconds(self, size: int, batch: Batch) -> float:
        """The best of a few passes after a first one."""
        _forget_peak()
        try:
            self._pass(batch)
            times: list[float] = []
            while len(times) < TIMED_PASSES or (sum(times) < TIMED_SECONDS and len(times) < MOST_PASSES):
                times.append(self._pass(batch))
        except RuntimeError as fault:
            if not (isinstance(fault, torch.OutOfMemoryError) or "allocate memory" in str(fault)):
                raise
            return math.inf
        finally:
            self._model.zero_grad()
        self._gib_a_row = (peak_memory_gib() - self._base_gib) / size
        return min(times)

    def _would_not_fit(self, size: int) -> bool:
        """On a CPU, where the system would end the process rather than refuse; judged by the candidate before."""
        if self._device.type != "cpu":
            return False
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self._ranks.world_size))
        process = psutil.Process().memory_info().rss / 2**30
        free = psutil.virtual_memory().available / 2**30 / here + process - self._base_gib
        return self._gib_a_row * size > _FREE_SHARE * free

    def _batch(self, size: int) -> Batch:
        """The run's first micro-batch of that size on this rank."""
        loader = Loader(
            self._train,
            self._collator,
            seed=self._config.run.seed,
            window=self._config.data.shuffle_window,
            micro_batch_size=size,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            num_workers=0,
            start_position=0,
            row_length=self._config.data.sequence_length,
        )
        made = distributed.agreed(self._ranks, lambda: next(iter(loader)))
        return {key: value.to(self._device) for key, value in made.batch.items()}

    def _pass(self, batch: Batch) -> float:
        """Seconds of forward and backward."""
        objective = self._model.objective
        if isinstance(objective, SharesStatistics) and objective.needs_statistics:
            objective.set_statistics(None)
        dtype = _DTYPES.get(self._config.train.precision)
        started = self._now()
        with torch.autocast(self._device.type, dtype=dtype, enabled=dtype is not None):
            output = self._model(batch)
        torch.stack(list(loss_terms(output).values())).sum().backward()
        return self._now() - started

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

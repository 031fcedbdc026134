"""What a run saves, and how the trainer has it saved: the engine's state and the run's progress into checkpoints.

The trainer calls `save` between steps, `advance` after every step with what all ranks have agreed on, and asks for `seconds`.
With `checkpoint.asynchronous` only a save that it must have (the last one, the one at a stop) is waited for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from sparselt_dist import committing, distributed, engine_state
from sparselt_dist.checkpoint import step_of
from sparselt_dist.checkpoint_writer import CheckpointWriter, Contents
from sparselt_dist.committing import Retention
from sparselt_dist.config import Config
from sparselt_dist.errors import RunFailureError, SparseltError
from sparselt_dist.redaction import shown_in
from sparselt_dist.snapshot import Snapshot
from sparselt_dist.tensor_files import LEAST_SHARE_BYTES
from sparselt_dist.uploading import Uploader

if TYPE_CHECKING:
    from collections.abc import Callable

    from sparselt_dist.data.manifest import Manifest
    from sparselt_dist.journal import Journal
    from sparselt_dist.metrics import TimeLedger
    from sparselt_dist.objectives.base import PreludeReport
    from sparselt_dist.timekeeping import Progress

SAVE_OVER_WRITE, SAVE_SECONDS = 1.2, 0.1  # a save copies, commits and rotates besides


class Saving:
    """The checkpoints of one start of a run; all ranks hold one and call it alike."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        ranks: distributed.Ranks,
        engine: DeepSpeedEngine,
        *,
        progress: Progress,
        is_resumed: bool,
        ledger: TimeLedger,
        manifest: Manifest,
        prelude: PreludeReport | None,
        journal: Journal | None,
        say: Callable[[str], None],
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.ranks = ranks
        self.engine = engine
        self.progress = progress
        self.ledger = ledger
        self.manifest = manifest
        self.prelude = prelude
        self.journal = journal
        section = config.checkpoint
        self.uploader = Uploader(section.upload, say) if section.upload is not None and ranks.is_main else None
        scratch = None if section.scratch_dir is None else Path(section.scratch_dir).expanduser()
        self.writer = CheckpointWriter(
            run_dir,
            ranks,
            Snapshot(pinned=engine.device.type == "cuda", scratch=scratch),
            Retention(section.keep, section.keep_every_steps),
            before=self._sync_journal,
            say=say,
            on_commit=self.uploader.offer if self.uploader is not None else lambda path: set(),
        )
        self.all_written = True  # what ranks have agreed on
        self._told = 0  # failures that the journal has
        self._resumed_position = progress.position if is_resumed else None
        self._positions: dict[int, int] = {}  # in the stream, by step saved

    @property
    def is_written(self) -> bool:
        """Whether this rank is done with its share of the save under way, or there is none."""
        return self.writer.is_written

    @property
    def seconds(self) -> float:
        """What the last save takes if it is waited for; 0 before the first. Rank 0 knows it first."""
        return self.writer.seconds

    @property
    def newest(self) -> Path | None:
        """The last checkpoint committed by this start."""
        return self.writer.newest

    def save(self, *, must: bool) -> None:
        """Save this moment.

        Args:
            must: wait until it is committed. Else a save that fails is only said, and the next one is the next try.

        Raises:
            CheckpointError: on all ranks alike, a save that must be cannot be.
        """
        contents = self._contents()
        self._positions[contents.step] = self.progress.position
        if must:
            self.writer.finish(contents)
        else:
            self.writer.begin(contents)
            if self.config.checkpoint.asynchronous:
                return
            self.writer.settle()
        self.writer.snapshot.release()

    def advance(self) -> None:
        """After a step: go on with the save under way, if all ranks have written."""
        self.writer.advance(self.all_written)

    def settle(self) -> None:
        """Wait for the save under way; all ranks together."""
        with self.ledger.phase("checkpoint"):
            self.writer.settle()

    def saved_position(self) -> int | None:
        """Where in the stream the last committed checkpoint is, once the save under way is through; None without any.

        All ranks call it together.
        """
        self.settle()
        return self._resumed_position if self.newest is None else self._positions[step_of(self.newest)]

    @contextlib.contextmanager
    def settled_first(self) -> Iterator[None]:
        """Around what ends a start on all ranks alike: the save under way is waited for before."""
        try:
            yield
        except (SparseltError, RunFailureError):
            self.settle()
            raise

    def news(self) -> dict[str, Any]:
        """What the journal should tell of saves that failed since it was last asked for."""
        if self.writer.failures == self._told:
            return {}
        self._told = self.writer.failures
        return {"checkpoint/failures": self._told, "checkpoint/error": self.writer.last_fault}

    def finish_uploads(self, timeout_seconds: float | None) -> bool:
        """Wait for copies to object storage; whether none is left."""
        return self.uploader is None or self.uploader.wait(timeout_seconds)

    def close(self) -> None:
        """Give back what saves keep in memory; after `settle`."""
        self.writer.close()

    def probe(self) -> float:
        """What a save takes, judged by writing some bytes where it will write its share."""
        whole = engine_state.num_bytes(self.engine)
        share = max(whole // self.ranks.world_size, min(whole, 2 * LEAST_SHARE_BYTES))  # of weights and of moments
        written = committing.probe_seconds(self.run_dir, share)
        return SAVE_OVER_WRITE * written + SAVE_SECONDS

    def _sync_journal(self) -> None:
        if self.journal is not None:
            self.journal.sync()  # a checkpoint must not be ahead of the record

    def _contents(self) -> Contents:
        engine, progress = self.engine, self.progress
        return Contents(
            step=progress.step,
            weights=engine_state.own_weights(engine),
            moments=engine_state.own_moments(engine),
            num_bytes=engine_state.num_bytes(engine),
            rank_state=_random_state(),
            architecture=engine.module.backbone.config.to_dict(),
            meta={
                "progress": progress.as_dict(),
                "tokens": progress.tokens,
                "loss_scaler": engine_state.loss_scaler_state(engine),
                "optimizer_steps": engine_state.optimizer_steps(engine),
                "ledger_seconds": self.ledger.seconds(),
                "objective": self.config.objective.name,
                "seed": self.config.run.seed,
                "prelude": None if self.prelude is None else self.prelude._asdict(),
                "data_manifest_sha256": self.manifest.sha256,
                "tokenizer_sha256": self.manifest.tokenizer_sha256,
                "config": shown_in(self.config.model_dump(mode="json")),
            },
        )


def _random_state() -> dict[str, Any]:
    """Of this rank."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state

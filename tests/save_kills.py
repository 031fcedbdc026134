"""Kill -9 of a real run's ranks at random points of saving, and what must hold after it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import tempfile
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple

from runs import Finished, free_port, pretrain_arguments, rank_environment, run_ranks
from warm_rank import start_rank

from sparselt_dist import checkpoint

EVERY = 4  # steps between saves
SPAN_SECONDS = 0.25  # about what a save takes, from its first file to its commit
PATIENCE_SECONDS = 240.0


class Kill(NamedTuple):
    """What a kill met."""

    point: str
    """How far the save under way was."""
    lost: int
    """Steps from the newest checkpoint to the last one in the journal."""


def options(zero_stage: int, steps: int) -> list[str]:
    """The run that is killed; dropout shows that random states are restored as well."""
    return [
        f"budget.max_steps={steps}",
        f"checkpoint.every_steps={EVERY}",
        f"train.zero_stage={zero_stage}",
        "train.micro_batch_size=2",
        "model.config.hidden_dropout_prob=0.1",
    ]


def start_and_kill(shards: Path, folder: Path, overrides: list[str], generator: random.Random) -> Kill | None:
    """Start two ranks, kill one of them during its second save or a later one, and the other a moment later.

    None: the run ended before.

    Raises:
        AssertionError: a complete checkpoint is damaged, or more than the save under way is lost.
    """
    port = free_port()
    arguments = pretrain_arguments(shards, folder, *overrides)
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [Path(scratch, str(rank)) for rank in range(2)]
        ranks = [
            start_rank(arguments, rank_environment(rank, 2, port), output, fresh=False)
            for rank, output in enumerate(outputs)
        ]
        try:
            begun = _wait_for_save(folder, ranks, generator.randrange(1, 4))
            time.sleep(generator.uniform(0, SPAN_SECONDS))
        finally:
            generator.shuffle(ranks)
            for rank in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.pid or 0, signal.SIGKILL)
                time.sleep(generator.choice((0.0, 0.05)))
            for rank in ranks:
                rank.join(PATIENCE_SECONDS)
        if begun is None:
            assert [rank.exitcode for rank in ranks] == [0, 0], "\n".join(output.read_text() for output in outputs)
            return None
    return _judge(folder, begun)


def _wait_for_save(folder: Path, ranks: list[ForkServerProcess], wanted: int) -> int | None:
    """The step of the save that a start has begun as its `wanted`-th; None: the run ended."""
    checkpoints, deadline = folder / "checkpoints", time.monotonic() + PATIENCE_SECONDS
    before = {path.name for path in checkpoints.glob("step_*")}
    seen: list[int] = []
    while all(rank.is_alive() for rank in ranks):
        assert time.monotonic() < deadline, "no save began"
        for path in checkpoints.glob("step_*"):
            step = int(path.name[5:13])
            if path.name not in before and step not in seen:
                seen.append(step)
        if len(seen) >= wanted:
            return max(seen)
        time.sleep(0.002)
    return None


def _judge(folder: Path, begun: int) -> Kill:
    """What is left after a kill; `begun` is the step of a save that had begun."""
    faults: list[str] = []
    newest = checkpoint.newest_intact(folder, faults.append)
    assert faults == [], "a complete checkpoint is damaged"
    step = checkpoint.step_of(newest) if newest is not None else 0
    assert step >= begun - EVERY, f"the save of step {begun} had begun, the newest checkpoint is of {step}"
    staged = [path for path in (folder / "checkpoints").glob("*.partial") if path.is_dir()]
    names = {entry.name for path in staged for entry in path.iterdir()}
    if not staged:
        point = "committed"
    elif "COMPLETE" in names:
        point = "before the rename"
    elif names & {"meta.json", "config.json"}:
        point = "at the commit"
    else:
        point = "writing" if names else "copying"
    lines = Finished(0, "", folder).journal if (folder / "metrics.jsonl").exists() else []
    return Kill(point, max(lines[-1]["step"] - step, 0) if lines else 0)


def finish(shards: Path, folder: Path, overrides: list[str]) -> Finished:
    """The last start, which nobody kills."""
    run = run_ranks(2, shards, folder, *overrides)
    assert run.code == 0, run.output
    left = [path.name for path in (folder / "checkpoints").iterdir() if not path.name.startswith(("step_", "latest"))]
    assert left == [] and not list((folder / "checkpoints").glob("*.partial")), "leftovers of killed runs"
    return run


def same(found: Finished, expected: Finished) -> bool:
    """Whether two runs saw and learned the same, bit by bit."""
    keys = ("step", "batch_digest", "train/loss", "train/grad_norm")
    told = [[[line[key] for key in keys] for line in run.journal] for run in (found, expected)]
    ours, theirs = found.tensors(), expected.tensors()
    return told[0] == told[1] and all(bool((ours[name] == value).all()) for name, value in theirs.items())

"""Kill -9 of a real run's ranks at random points of saving, damage to what was saved, and what must hold after it."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import tempfile
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple

import torch
from runs import Finished, free_port, pretrain_arguments, rank_environment, run_ranks
from warm_rank import start_rank

from sparselt_dist import checkpoint

EVERY = 4  # steps between saves
SPAN_SECONDS = 0.25  # about what a save takes, from its first file to its commit
PATIENCE_SECONDS = 240.0
COMMITTED = "committed"


class Kill(NamedTuple):
    """What a kill met."""

    point: str
    """How far the save under way was."""
    lost: int
    """Steps from the newest checkpoint to the last one in the journal."""

    @property
    def met_a_save(self) -> bool:
        """Whether one was under way, and not over already."""
        return self.point != COMMITTED


def options(zero_stage: int, steps: int, *, asynchronous: bool = True) -> list[str]:
    """The run that is killed; dropout shows that random states are restored as well."""
    return [
        f"budget.max_steps={steps}",
        f"checkpoint.every_steps={EVERY}",
        f"train.zero_stage={zero_stage}",
        "train.micro_batch_size=2",
        "model.config.hidden_dropout_prob=0.1",
        f"checkpoint.asynchronous={str(asynchronous).lower()}",
    ]


def start_and_kill(
    shards: Path, folder: Path, overrides: list[str], generator: random.Random, span_seconds: float = SPAN_SECONDS
) -> Kill | None:
    """Start two ranks, kill one of them within so many seconds of the beginning of a save, and the other a moment later.

    None: the run ended before.

    Raises:
        CheckpointError: a complete checkpoint is damaged.
        AssertionError: more than the save under way is lost.
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
            time.sleep(generator.uniform(0, span_seconds))
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
    deadline = time.monotonic() + PATIENCE_SECONDS
    left = _staged(folder)  # by a killed start; this one removes it before it comes to that step again
    seen: set[int] = set()
    while all(rank.is_alive() for rank in ranks):
        assert time.monotonic() < deadline, "no save began"
        staged = _staged(folder)
        left &= staged
        seen |= staged - left
        if len(seen) >= wanted:
            return max(seen)
        time.sleep(0.002)
    return None


def _staged(folder: Path) -> set[int]:
    """The steps of saves that are under way, or were when their run was killed."""
    return {int(path.name[5:13]) for path in (folder / "checkpoints").glob("step_*.partial")}


def _judge(folder: Path, begun: int) -> Kill:
    """What is left after a kill; `begun` is the step of a save that had begun."""
    complete = checkpoint.complete_checkpoints(folder)
    for path in complete:
        checkpoint.verify(path)
    step = checkpoint.step_of(complete[-1]) if complete else 0
    assert step >= begun - EVERY, f"the save of step {begun} had begun, the newest checkpoint is of {step}"
    staged = [path for path in (folder / "checkpoints").glob("*.partial") if path.is_dir()]
    names = {entry.name for path in staged for entry in path.iterdir()}
    if not staged:
        point = COMMITTED
    elif "COMPLETE" in names:
        point = "before the rename"
    elif names & {"meta.json", "config.json"}:
        point = "at the commit"
    else:
        point = "writing" if names else "copying"
    lines = Finished(0, "", folder).journal if (folder / "metrics.jsonl").exists() else []
    return Kill(point, max(lines[-1]["step"] - step, 0) if lines else 0)


def finish(shards: Path, folder: Path, overrides: list[str], aside: int = 0) -> Finished:
    """The last start, which nobody kills; so many damaged checkpoints are kept aside."""
    run = run_ranks(2, shards, folder, *overrides)
    assert run.code == 0, run.output
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    left = [name for name in names if not re.fullmatch(r"latest|step_\d{8}(\.aside-\d+)?", name)]
    assert left == [] and sum(".aside-" in name for name in names) == aside, f"leftovers of killed runs: {names}"
    return run


def damage(file: Path, generator: random.Random) -> str:
    """Flip one bit of a file or cut it short; says which."""
    content = bytearray(file.read_bytes())
    if generator.random() < 0.3:
        kept = generator.randrange(len(content))
        file.write_bytes(content[:kept])
        return f"cut to {kept} of {len(content)} bytes"
    bit = generator.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    return f"bit {bit} flipped"


def damage_every_file(folder: Path, generator: random.Random, times: int) -> int:
    """Damage each file of the newest checkpoint so often, one at a time, and mend it again; how many damages that were.

    Raises:
        AssertionError: one is not found, or not the checkpoint before is used.
    """
    *_, before, newest = checkpoint.complete_checkpoints(folder)
    files = sorted(newest.iterdir())
    assert {"COMPLETE", "config.json", "meta.json", "rank_00000.pt", "rank_00001.pt"} <= {file.name for file in files}
    for file in files:
        sound = file.read_bytes()
        for _ in range(times):
            how, said = damage(file, generator), list[str]()
            assert checkpoint.newest_intact(folder, said.append) == before, f"{file}: {how}, and not found"
            assert len(said) == 1 and newest.name in said[0]
            file.write_bytes(sound)
    checkpoint.verify(newest)
    return times * len(files)


def finish_damaged(shards: Path, folder: Path, overrides: list[str], generator: random.Random) -> Finished:
    """The last start, of a run whose newest checkpoint has a damaged file: it goes on from the one before."""
    *_, before, newest = checkpoint.complete_checkpoints(folder)
    file = generator.choice(sorted(newest.iterdir()))
    how = damage(file, generator)
    run = finish(shards, folder, overrides, aside=1)
    told = re.search(rf"checkpoint \S*{newest.name}: .*; trying the previous one", run.output)
    assert told and f"continuing from {before} " in run.output, f"{file}: {how}\n{run.output}"
    return run


def same(found: Finished, expected: Finished) -> bool:
    """Whether two runs saw and learned the same, bit by bit."""
    keys = ("step", "batch_digest", "train/loss", "train/grad_norm")
    told = [[[line[key] for key in keys] for line in run.journal] for run in (found, expected)]
    ours, theirs = found.tensors(), expected.tensors()
    if told[0] != told[1] or ours.keys() != theirs.keys():
        return False
    return all(torch.equal(ours[name], value) for name, value in theirs.items())

"""Real runs of several processes for the tests: start ranks, wait, kill the group on a timeout, read what they wrote."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from warm_rank import start_rank

from sparselt_dist import checkpoint

MODEL = [
    "model.architecture=crammed-bert",
    "model.config.hidden_size=32",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=2",
    "model.config.intermediate_size=64",
]


@dataclass(frozen=True)
class Finished:
    """A run that ended."""

    code: int  # of the rank that fared worst
    output: str
    folder: Path
    codes: tuple[int, ...] = ()  # by rank

    @property
    def journal(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def summary(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return loaded

    def weights(self) -> dict[str, torch.Tensor]:
        return checkpoint.load_weights(checkpoint.find(self.folder))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights and moments of the newest checkpoint."""
        moments = checkpoint.open_tensors(checkpoint.find(self.folder), "moments").read_all()
        return {**self.weights(), **moments}


def slow(*values: object) -> Any:
    """A case of a parametrised test that takes long and differs little from one that always runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher would set for a rank."""
    return {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def pretrain_arguments(shards: Path, folder: Path, *overrides: str) -> list[str]:
    """A small run on prepared shards; later overrides win."""
    return [
        f"data.train={shards / 'train'}",
        f"data.validation={shards / 'validation'}",
        f"run.output_dir={folder}",
        *MODEL,
        "train.global_batch_size=8",
        "train.yardsticks=false",
        "train.evaluate_samples=12",
        "schedule.name=linear",
        "optim.peak_lr=3e-3",
        "log.every_steps=1",
        "log.batch_digest=true",
        "log.mlflow_uri=null",
        *overrides,
    ]


def run_ranks(
    ranks: int,
    shards: Path,
    folder: Path,
    *overrides: str,
    flags: tuple[str, ...] = (),
    timeout: float = 240,
    fresh: bool = False,
    fault: str = "",
) -> Finished:
    """Start `ranks` processes of pretrain as a launcher would, and wait for all of them.

    `fresh`: each in an interpreter of its own, from its start to its teardown, which takes seconds longer. `fault`: what is
    planted in a rank, as `fault_rank.py` has it.
    """
    arguments = [*flags, *pretrain_arguments(shards, folder, *overrides)]
    port, deadline = free_port(), time.monotonic() + timeout
    planted = {"SPARSELT_TESTS_FAULT": fault} if fault else {}
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [Path(scratch, str(rank)) for rank in range(ranks)]
        processes = [
            start_rank(arguments, rank_environment(rank, ranks, port) | planted, output, fresh=fresh)
            for rank, output in enumerate(outputs)
        ]
        try:
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            late = [process for process in processes if process.is_alive()]
            for process in late:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid or 0, signal.SIGKILL)
        shown = "\n".join(output.read_text() for output in outputs)
    assert not late, f"{len(late)} of {ranks} ranks did not end in {timeout} s\n{shown}"
    codes = tuple(process.exitcode or 0 for process in processes)
    return Finished(max(codes, key=abs), shown, folder, codes)

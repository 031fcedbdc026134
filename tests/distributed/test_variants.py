"""The variants of crammed-bert together, under ZeRO-3 as on one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

VARIANT = ("model.config.norm_type=rms", "model.config.position_type=rope", "model.config.gate_activation=relu2")


def test_variants_do_not_depend_on_the_split(shards: Path, tmp_path: Path) -> None:
    options = ("budget.max_steps=4", *VARIANT)
    alone = run_ranks(1, shards, tmp_path / "alone", *options, "train.micro_batch_size=8")
    split = run_ranks(2, shards, tmp_path / "split", *options, "train.micro_batch_size=2", "train.zero_stage=3")
    assert (alone.code, split.code) == (0, 0), split.output
    losses = [line["train/loss"] for line in alone.journal]
    assert [line["train/loss"] for line in split.journal] == pytest.approx(losses, rel=2e-6)
    assert split.weights().keys() == alone.weights().keys()
    assert not [name for name in alone.weights() if "position" in name]

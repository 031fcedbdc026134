"""The main job small enough for a test: prepare a little English, train a toy model. Used through every launcher."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any


def main_job_arguments(folder: Path, steps: int) -> list[str]:
    """Arguments of `pretrain` for a run in `folder`; its shards are prepared by the run itself."""
    text = folder / "topics.jsonl"
    text.write_text("".join(json.dumps({"text": body}) + "\n" for _, body in sorted(topics.items())))
    return [
        f"prepare.source={text}",
        f"prepare.output_dir={folder / 'shards'}",
        "prepare.vocab_size=512",
        "prepare.num_workers=1",
        "data.sequence_length=32",
        "model.config.hidden_size=32",
        "model.config.num_hidden_layers=2",
        "model.config.num_attention_heads=2",
        "model.config.intermediate_size=64",
        "train.global_batch_size=8",
        "train.yardsticks=false",
        "train.evaluate_samples=12",
        f"run.output_dir={folder / 'run'}",
        f"budget.max_steps={steps}",
        "log.every_steps=1",
        "log.mlflow_uri=null",
    ]


def journal_steps(folder: Path) -> list[int]:
    """Steps in the run's journal, as far as it is written."""
    path = folder / "run" / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line)["step"] for line in text.splitlines(keepends=True) if line.endswith("\n")]


def summary(folder: Path) -> dict[str, Any]:
    """The run's closing summary."""
    loaded: dict[str, Any] = json.loads((folder / "run" / "summary.json").read_text())
    return loaded

"""What runs on a CPU runs on an accelerator: `pytest -m gpu` on a machine that has one; here those of
other tests run once more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import MODEL

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

STEPS = 20
VARIANTS = [
    (*MODEL, "objective.name=mlm"),
    (*MODEL, "objective.name=slt"),
    (*MODEL, "objective.name=cwt"),
    ("objective.name=cwt", "objective.prediction=causal", "model.architecture=gpt2", "model.config={}"),
    (*MODEL, "objective.name=mix", "objective.parts=[{name: mlm}, {name: slt}]"),
    (*MODEL, "objective.cross_entropy=chunked"),
    (*MODEL, "train.precision=bf16"),
    (*MODEL, "train.precision=fp16"),
    (*MODEL, "train.precision=bf16", "train.compile=true"),
    (*MODEL, "train.micro_batch_size=fastest"),
    (*MODEL, "train.unpad=true"),
    (*MODEL, "train.profile=3"),
    (*MODEL, "optim.name=muon"),
    (*MODEL, "train.zero_stage=1"),
    (*MODEL, "train.zero_stage=2"),
    (*MODEL, "train.zero_stage=3"),
    (*MODEL, "train.deepspeed_config=zero3_offload"),
]


def pretrain(shards: Path, folder: Path, *overrides: str) -> str:
    """Output of a run that must end with 0."""
    command = [sys.executable, "-m", "sparselt_dist.pretrain", "--config", "quickstart", f"run.output_dir={folder}"]
    command += [
        f"data.train={shards / 'train'}",
        f"data.validation={shards / 'validation'}",
        f"budget.max_steps={STEPS}",
    ]
    command += ["train.yardsticks=false", "log.mlflow_uri=null", "log.every_steps=1", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return done.stderr + done.stdout


def journal(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("overrides", VARIANTS, ids=lambda overrides: " ".join(overrides).removeprefix(" ".join(MODEL)))
def test_a_run_learns_without_a_complaint(overrides: tuple[str, ...], shards: Path, tmp_path: Path) -> None:
    output = pretrain(shards, tmp_path / "run", *overrides)
    lines = journal(tmp_path / "run")
    assert lines[-1]["step"] == STEPS
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    assert "UserWarning" not in output


def test_a_checkpoint_of_the_gpu_continues_on_the_cpu(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(shards, tmp_path / "run", *MODEL)
    on_gpu = journal(tmp_path / "run")[-1]["eval/loss"]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pretrain(shards, tmp_path / "run", *MODEL, f"budget.max_steps={STEPS + 1}", "optim.peak_lr=1e-12")
    assert journal(tmp_path / "run")[-1]["eval/loss"] == pytest.approx(on_gpu, abs=1e-3)

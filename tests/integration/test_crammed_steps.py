"""Three steps of cramming's optimizer on the clock, beside AdamW written out by hand (official recipe, version 2).

The reference sums the dense cross-entropy of whole steps: no gathering of targets, no micro-batches, no engine.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from runs import run_ranks

from sparselt_dist import checkpoint
from sparselt_dist.budget import lr_multiplier
from sparselt_dist.config import Config
from sparselt_dist.config_loading import load_config
from sparselt_dist.data.corpora import open_folder
from sparselt_dist.data.loader import Loader
from sparselt_dist.models.assembly import build_collator, build_model

PEAK, BETAS, EPS, CLIP = 1e-3, (0.9, 0.98), 1e-12, 0.5
DECAY = 1.0  # a hundred times the recipe's, which three steps would not show
ROWS, STEPS = 8, 3
RECIPE = (
    "budget.max_hours=0.001",
    "schedule.name=budget-triangle2",
    f"optim.peak_lr={PEAK}",
    "optim.betas=[0.9,0.98]",
    f"optim.eps={EPS}",
    f"optim.weight_decay={DECAY}",
    f"optim.clip_norm={CLIP}",
    f"train.global_batch_size={ROWS}",
    "train.micro_batch_size=2",
    "objective.mlm_probability=0.25",
    "objective.masking=exact",
    "objective.exempt_special=false",
    "data.shuffle_window=0",
    f"checkpoint.every_steps={STEPS}",
    "checkpoint.keep=1000",
)


def steps_by_hand(config: Config, rates: list[float]) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights after the steps, and the gradient's norm before clipping at each."""
    train = open_folder(config.data.train)
    tokenizer = train.check_tokenizer()
    model = build_model(config, tokenizer)
    rows = Loader(
        train,
        build_collator(config, tokenizer),
        seed=config.run.seed,
        window=0,
        micro_batch_size=ROWS,
        rank=0,
        world_size=1,
        num_workers=0,
        start_position=0,
        row_length=32,
    )
    weights = dict(model.named_parameters())
    mean = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    square = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    norms = []
    for step, (rate, made) in enumerate(zip(rates, rows, strict=False), start=1):
        labels = made.batch["labels"]
        assert (labels >= 0).sum(dim=1).tolist() == [8] * ROWS  # a quarter of 32
        logits = model.backbone.model.eval()(made.batch["input_ids"]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        norms.append(float(sum(g.square().sum() for g in gradients.values()).sqrt()))
        with torch.no_grad():
            for name, weight in weights.items():
                g = gradients[name] * min(1.0, CLIP / norms[-1])
                mean[name].mul_(BETAS[0]).add_(g, alpha=1 - BETAS[0])
                square[name].mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
                if "norm" not in name and "bias" not in name:
                    weight.mul_(1 - rate * DECAY)
                corrected = mean[name] / (1 - BETAS[0] ** step)
                weight.sub_(rate * corrected / ((square[name] / (1 - BETAS[1] ** step)).sqrt() + EPS))
    return {name: weight.detach() for name, weight in weights.items()}, norms


def test_three_steps_equal_adamw_by_hand_and_rates_follow_the_clock(shards: Path, tmp_path: Path) -> None:
    run = run_ranks(1, shards, tmp_path, *RECIPE)
    assert run.code == 0, run.output
    lines = run.journal
    rates = [line["train/lr"] for line in lines]
    shares = [0.0, *(line["progress/fraction"] for line in lines[: STEPS - 1])]
    assert rates[:STEPS] == pytest.approx([PEAK * lr_multiplier("budget-triangle2", share) for share in shares])
    assert rates[0] == 0.25 * PEAK < rates[1] < rates[2]
    expected, norms = steps_by_hand(load_config([str(tmp_path / "config.resolved.yaml")], []), rates[:STEPS])
    assert [line["train/grad_norm"] for line in lines[:STEPS]] == pytest.approx(norms, rel=1e-4)
    assert max(norms) > CLIP, "clipping is at work"
    found = checkpoint.load_weights(tmp_path / "checkpoints" / checkpoint.folder_name(STEPS))
    compared = 0
    for name, weight in found.items():
        if name in expected:
            compared += 1
            torch.testing.assert_close(
                weight, expected[name], rtol=0, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}"
            )
    assert compared == len(expected)

"""The FLOPs of a token beside those that torch counts in a real forward and backward pass.

The formula counts biases and norms, and a transform of D^2 in front of every vocabulary head; crammed-bert and gpt2 have
none. Both are small where layers and vocabulary are not toys.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparselt_dist.config import Config
from sparselt_dist.config_loading import load_config, objective_settings
from sparselt_dist.models.assembly import build_collator, build_model
from sparselt_dist.models.workload import workload
from sparselt_dist.objectives import get_objective
from sparselt_dist.objectives.base import TokenizerInfo
from sparselt_dist.objectives.cost import flops_per_token

TOKENIZER = TokenizerInfo(
    16384, pad_id=0, bos_id=1, eos_id=2, unk_id=3, cls_id=4, sep_id=5, mask_id=6, special_ids=tuple(range(7))
)
ROWS, LENGTH = 4, 64
CAUSAL = ("objective.name=cwt", "objective.prediction=causal", "objective.contrastive_weight=0")


def sizes(hidden: int, layers: int, inner: int) -> tuple[str, ...]:
    values = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": inner, "num_attention_heads": 4}
    return tuple(f"model.config.{name}={value}" for name, value in values.items())


MODELS = {
    "crammed-bert, small": ("model.architecture=crammed-bert", *sizes(128, 2, 512), "objective.mlm_probability=0.25"),
    "crammed-bert, wide": ("model.architecture=crammed-bert", *sizes(320, 3, 1280), "objective.mlm_probability=0.25"),
    "bert": ("model.architecture=bert", *sizes(192, 2, 768)),
    "roberta": ("model.architecture=roberta", *sizes(128, 3, 512)),
    "modernbert": ("model.architecture=modernbert", *sizes(128, 4, 192)),
    "gpt2": (
        "model.architecture=gpt2",
        *("model.config.n_embd=128", "model.config.n_layer=8", "model.config.n_head=4"),
        *(*CAUSAL, "objective.cross_entropy_weight=1"),
    ),
}


def counted_and_stated(config: Config) -> tuple[float, float]:
    """FLOPs of one micro-batch: torch's count, and ours."""
    model = build_model(config, TOKENIZER)
    generator = np.random.default_rng(0)
    examples = [
        {"key": str(row), "ids": generator.integers(7, 16384, LENGTH).astype(np.uint16), "seed": row}
        for row in range(ROWS)
    ]
    batch = build_collator(config, TOKENIZER)(examples)
    # Torch counts what fused attention computes twice in its backward pass; model FLOPs count it once.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch).loss.backward()
    tokens = int(batch["num_tokens"])
    work = workload(
        model.backbone,
        mean_length=LENGTH,
        targets_per_token=int(batch["num_targets"]) / tokens,
        micro_batch_size=ROWS,
        world_size=1,
        accumulation_steps=1,
    )
    cost = flops_per_token(get_objective(config.objective.name), objective_settings(config), work)
    return counter.get_total_flops(), tokens * cost


@pytest.mark.parametrize("name", MODELS)
def test_stated_flops_are_within_one_percent_of_torchs_own_count(name: str) -> None:
    torch.manual_seed(0)
    config = load_config(["quickstart"], [f"data.sequence_length={LENGTH}", *MODELS[name]])
    counted, stated = counted_and_stated(config)
    assert stated == pytest.approx(counted, rel=0.01)

"""FLOPs as objectives state them, against the formula by hand and against what torch counts in a step."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparselt_dist.config import Config, ModelSection
from sparselt_dist.config_loading import objective_settings
from sparselt_dist.data.batch import Example
from sparselt_dist.models.backbone import build_backbone
from sparselt_dist.models.workload import workload
from sparselt_dist.objectives import get_objective
from sparselt_dist.objectives.base import SharesStatistics, TokenizerInfo
from sparselt_dist.objectives.cost import Workload, expected_distinct, flops_per_token
from sparselt_dist.objectives.mix import computed_share
from sparselt_dist.objectives.settings import MixConfig

VOCAB, ROWS, LENGTH = 2000, 8, 64
TOKENIZER = TokenizerInfo(vocab_size=VOCAB, pad_id=0, mask_id=4, cls_id=2, sep_id=3, special_ids=(0, 1, 2, 3, 4))
WORK = Workload(
    body_parameters=0,
    num_layers=2,
    hidden_size=4,
    inner_size=16,
    vocab_size=10,
    has_head=True,
    is_causal=False,
    mean_length=8.0,
    targets_per_token=0.5,
    micro_batch_tokens=80.0,
    world_size=1,
    micro_batches=1,
)


def test_flops_of_bert_base_at_128_tokens() -> None:
    """546 MFLOP a token: 12 layers of 768, 15 % targets, vocabulary 30522."""
    sizes = {"num_layers": 12, "hidden_size": 768, "vocab_size": 30522, "mean_length": 128, "targets_per_token": 0.15}
    body = 12 * (4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768)
    assert dataclasses.replace(WORK, body_parameters=body, **sizes).usual == pytest.approx(546e6, rel=0.005)


def test_flops_by_part() -> None:
    assert WORK.usual == 12 * 2 * 4 * 8 + 6 * 0.5 * (40 + 16)
    assert dataclasses.replace(WORK, has_head=False).usual == 12 * 2 * 4 * 8
    assert flops_per_token(object(), None, WORK) == WORK.usual  # a plug-in that states nothing


def zipf_examples() -> list[Example]:
    generator = np.random.default_rng(0)
    frequency = 1 / np.arange(1, VOCAB - 4)
    ids = 5 + generator.choice(VOCAB - 5, (ROWS, LENGTH), p=frequency / frequency.sum())
    return [{"key": f"s/{row}", "ids": ids[row].astype(np.uint16), "seed": row} for row in range(ROWS)]


def counted_and_stated(architecture: str, objective: dict[str, Any]) -> tuple[float, float]:
    """FLOPs of one micro-batch of several, as torch counts its products, and as the objective states them."""
    config = Config.model_validate({"objective": objective})
    plug_in, settings = get_objective(config.objective.name), objective_settings(config)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    section = ModelSection(architecture=architecture, config={**sizes, "attn_implementation": "eager"})
    torch.manual_seed(0)
    has_head = plug_in.needs_lm_head(settings)
    backbone = build_backbone(section, TOKENIZER, sequence_length=LENGTH, with_head=has_head)
    module: Any = plug_in.build_module(settings, backbone)
    batch = plug_in.build_collator(settings, TOKENIZER)(zipf_examples())
    module.set_progress(0, 0.0)
    with FlopCounterMode(display=False) as counter:
        if isinstance(module, SharesStatistics) and module.needs_statistics:
            with torch.no_grad():
                module.statistics(backbone, batch)
        module(backbone, batch).loss.backward()
    work = workload(
        backbone,
        mean_length=LENGTH,
        targets_per_token=float(batch["num_targets"]) / float(batch["num_tokens"]),
        micro_batch_size=ROWS,
        world_size=1,
        accumulation_steps=2,
    )
    return counter.get_total_flops() / float(batch["num_tokens"]), flops_per_token(plug_in, settings, work)


@pytest.mark.parametrize(
    ("architecture", "objective"),
    [
        ("bert", {"name": "mlm"}),
        ("bert", {"name": "cwt"}),
        ("bert", {"name": "cwt", "form": "full", "cross_entropy_weight": 1.0}),
        ("gpt_neox", {"name": "cwt", "prediction": "causal"}),
        ("bert", {"name": "slt"}),
        ("bert", {"name": "slt", "regularizer_scope": "micro-batch"}),
        ("bert", {"name": "mix", "parts": [{"name": "mlm"}, {"name": "slt", "weight": 0.5}, {"name": "cwt"}]}),
    ],
)
def test_stated_flops_are_what_a_step_computes(architecture: str, objective: dict[str, Any]) -> None:
    counted, stated = counted_and_stated(architecture, objective)
    assert stated == pytest.approx(counted, rel=0.03)


def test_a_recovered_head_costs_its_share_of_the_budget() -> None:
    cwt = get_objective("cwt")
    costs = [
        flops_per_token(cwt, cwt.config_cls(recover_from=share), WORK) - flops_per_token(cwt, cwt.config_cls(), WORK)
        for share in (0.5, 0.75)
    ]
    assert costs[0] == pytest.approx(2 * costs[1]) and costs[0] > 0


def test_a_resting_part_costs_nothing() -> None:
    parts = [{"name": "mlm", "weight": [[0.0, 1.0], [0.8, 1.0], [0.8, 0.0]]}, {"name": "mlm", "weight": 3}]
    assert computed_share(MixConfig(parts=parts), 0) == pytest.approx(0.8)
    assert computed_share(MixConfig(parts=parts, sharing="alternate"), 1) == pytest.approx(0.8 * 0.75 + 0.2)


def test_distinct_ids_among_zipf_draws() -> None:
    generator = np.random.default_rng(1)
    frequency = 1 / np.arange(1, 501)
    drawn = [len(np.unique(generator.choice(500, 300, p=frequency / frequency.sum()))) for _ in range(200)]
    assert expected_distinct(300, 500) == pytest.approx(np.mean(drawn), rel=0.01)

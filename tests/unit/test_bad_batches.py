"""Batches at the edge, through each objective's own collator: no target, one target, one row, states that are no numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparselt_dist.data.batch import IGNORE_INDEX, Batch, Example
from sparselt_dist.objectives import get_objective
from sparselt_dist.objectives.base import LossOutput, SplitLossOutput, loss_terms
from sparselt_dist.objectives.contract import TINY_TOKENIZER, TinyBackbone

NOWHERE = {"mlm_probability": 1e-9, "masking": "bernoulli"}
ONCE = {"mlm_probability": 0.05, "masking": "exact"}  # one of twenty
OFTEN = {"mlm_probability": 0.4}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlm": ("mlm", {}),
    "mlm-chunked": ("mlm", {"cross_entropy": "chunked"}),
    "mlm-whole-word": ("mlm", {"whole_word": True}),
    "cwt": ("cwt", {}),
    "cwt-full": ("cwt", {"form": "full"}),
    "cwt-global": ("cwt", {"negatives": "global"}),
    "cwt-with-head": ("cwt", {"cross_entropy_weight": 1.0}),
    "cwt-recovering": ("cwt", {"recover_from": 0.5}),
    "cwt-recovering-copy": ("cwt", {"recover_from": 0.5, "recovered_table": "copy", "recovered_bias": "none"}),
    "cwt-causal": ("cwt", {"prediction": "causal"}),
    "cwt-causal-full": ("cwt", {"prediction": "causal", "form": "full"}),
    "cwt-causal-baseline": ("cwt", {"prediction": "causal", "contrastive_weight": 0.0, "cross_entropy_weight": 1.0}),
    "slt": ("slt", {}),
    "slt-chunked": ("slt", {"cross_entropy": "chunked", "draw": "straight-through", "sparsity_form": "mean-log"}),
}
CAUSAL = [name for name in VARIANTS if "causal" in name]
CROSS_ENTROPY = [
    name for name in VARIANTS if "mlm" in name or "head" in name or "recovering" in name or "baseline" in name
]


def examples(*lengths: int) -> list[Example]:
    ids = np.random.default_rng(3).integers(5, 97, (len(lengths), max(lengths))).astype(np.uint16)
    return [{"key": f"s/{row}", "ids": ids[row, :length], "seed": row} for row, length in enumerate(lengths)]


class Case:
    """An objective on the tiny backbone, past the point where a recovery begins."""

    def __init__(self, variant: str, masking: dict[str, Any], rows: list[Example]) -> None:
        name, keys = VARIANTS[variant]
        objective = get_objective(name)
        cfg = objective.config_cls(**{**masking, **keys})
        torch.manual_seed(0)
        self.backbone = TinyBackbone(is_causal=variant in CAUSAL, has_head=objective.needs_lm_head(cfg))
        self.module: Any = objective.build_module(cfg, self.backbone)
        self.module.set_progress(3, 0.6)
        self.batch: Batch = objective.build_collator(cfg, TINY_TOKENIZER)(rows)

    def run(self) -> tuple[LossOutput | SplitLossOutput, list[Tensor]]:
        """The loss, and the gradient of every parameter."""
        output: LossOutput | SplitLossOutput = self.module(self.backbone, self.batch)
        parameters = [*self.backbone.parameters(), *self.module.parameters()]
        found = torch.autograd.grad(output.loss, parameters, allow_unused=True)
        return output, [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_target(variant: str) -> None:
    """Nothing is learned from targets; what does not need them is learned all the same."""
    rows = examples(1, 1) if variant in CAUSAL else examples(20, 9)
    case = Case(variant, NOWHERE, rows)
    assert int(case.batch["num_targets"]) == 0 and bool((case.batch["labels"] == IGNORE_INDEX).all())
    output, gradients = case.run()
    assert float(loss_terms(output)["num_targets"].detach()) == 0.0
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    is_typing = variant.startswith("slt")
    assert (float(output.loss.detach()) > 0) == is_typing
    assert any(bool(gradient.any()) for gradient in gradients) == is_typing


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_target(variant: str) -> None:
    """Cross-entropy is learned; a contrast has nothing to tell the target from."""
    case = Case(variant, ONCE, examples(2 if variant in CAUSAL else 20))
    assert int(case.batch["num_targets"]) == 1
    output, gradients = case.run()
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    of_targets = float(loss_terms(output)["num_targets"].detach())
    assert of_targets > 1 if variant in CROSS_ENTROPY or variant.startswith("slt") else of_targets == 0.0


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_row(variant: str) -> None:
    """With several targets it is a batch like any other."""
    case = Case(variant, OFTEN, examples(20))
    output, gradients = case.run()
    assert int(case.batch["num_targets"]) > 2 and float(output.loss.detach()) > 0.5
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert any(bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_that_is_no_number_reaches_the_loss(variant: str, wrong: float) -> None:
    """So that the run stops before the optimizer moves, whatever maxima, clamps and counts lie between."""
    case = Case(variant, OFTEN, examples(20, 12))
    with torch.no_grad():
        case.backbone.norm.weight[0] = wrong
    assert not bool(case.module(case.backbone, case.batch).loss.isfinite())


@pytest.mark.parametrize("sharing", ["batch", "alternate"])
def test_mixtures(sharing: str) -> None:
    parts = [{"name": name, **keys} for name, keys in (VARIANTS["mlm"], VARIANTS["cwt-full"], VARIANTS["slt"])]
    mix = get_objective("mix")

    def built(masking: dict[str, Any], rows: list[Example]) -> tuple[nn.Module, TinyBackbone, Batch]:
        cfg = mix.config_cls(parts=[{**masking, **part} for part in parts], sharing=sharing)
        torch.manual_seed(0)
        backbone = TinyBackbone()
        return mix.build_module(cfg, backbone), backbone, mix.build_collator(cfg, TINY_TOKENIZER)(rows)

    for masking, rows in ((NOWHERE, examples(20, 9)), (ONCE, examples(20)), (OFTEN, examples(20))):
        module, backbone, batch = built(masking, rows)
        for step in range(3):
            module.set_progress(step, 0.1)
            loss = module(backbone, batch).loss
            gradients = torch.autograd.grad(loss, [*backbone.parameters(), *module.parameters()], allow_unused=True)
            assert all(g is None or bool(g.isfinite().all()) for g in (loss, *gradients))
    with torch.no_grad():
        backbone.norm.weight[0] = torch.nan
    assert not bool(module(backbone, batch).loss.isfinite())

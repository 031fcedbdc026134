"""What a forward pass saves, counted without computing: beside the formula, and beside a real pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparselt_dist.config_loading import load_config
from sparselt_dist.models.footprint import trace_saved
from sparselt_dist.objectives.base import TokenizerInfo
from sparselt_dist.plan import sized_model
from sparselt_dist.planning import formula_saved

TOKENIZER = TokenizerInfo(
    512, pad_id=0, bos_id=1, eos_id=2, unk_id=3, cls_id=4, sep_id=5, mask_id=6, special_ids=tuple(range(7))
)
SIZES = ("hidden_size=64", "num_hidden_layers=4", "num_attention_heads=4", "intermediate_size=256")
LENGTH = 32


def sized(architecture: str) -> object:
    overrides = [f"model.architecture={architecture}", *(f"model.config.{size}" for size in SIZES)]
    return sized_model(load_config(["quickstart"], [*overrides, f"data.sequence_length={LENGTH}"]), TOKENIZER).backbone


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_crammed_bert_saves_what_the_formula_says(precision: str) -> None:
    traced = trace_saved(sized("crammed-bert"), length=LENGTH, precision=precision, on_cpu=False)  # type: ignore[arg-type]
    expected = formula_saved((4 * (4 * 64 * 64 + 64 * 256 + 64 * 128), 4, 64, 256), precision, LENGTH)  # type: ignore[arg-type]
    assert traced.per_row == pytest.approx(expected.per_row, rel=0.06)  # embedding and last norm are not in the formula
    assert traced.fixed == pytest.approx(expected.fixed, abs=LENGTH * 64 * 4 + 2000)


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_the_count_is_that_of_a_real_pass(architecture: str) -> None:
    traced = trace_saved(sized(architecture), length=LENGTH, precision="fp32", on_cpu=True)  # type: ignore[arg-type]
    overrides = [f"model.architecture={architecture}", *(f"model.config.{size}" for size in SIZES)]
    from sparselt_dist.models.assembly import build_model

    model = build_model(load_config(["quickstart"], [*overrides, f"data.sequence_length={LENGTH}"]), TOKENIZER).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.backbone(torch.zeros(3, LENGTH, dtype=torch.int64))
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert traced.fixed + 3 * traced.per_row == pytest.approx(real, rel=0.001)


@pytest.mark.parametrize("architecture", ["bert", "crammed-bert"])
def test_accelerators_keep_no_attention_matrix(architecture: str) -> None:
    cpu, gpu = (
        trace_saved(sized(architecture), length=LENGTH, precision="bf16", on_cpu=on_cpu).per_row  # type: ignore[arg-type]
        for on_cpu in (True, False)
    )
    assert gpu < cpu - 4 * 4 * LENGTH * LENGTH  # layers x heads x L x L, a byte or more of each

"""How training with sparse latent typing behaves on a toy language: its regularisers decide how many tokens are null.

The bands are those seen with the official code on tiny models: about a quarter of the probability is null at the default
weights, none without sparsity, all with ten times as much or without diversity.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_run import LENGTH, VOCABULARY, markov_rows

from sparselt_dist.config import ModelSection
from sparselt_dist.data.batch import Batch, Example
from sparselt_dist.models.backbone import Backbone, build_backbone
from sparselt_dist.objectives.base import TokenizerInfo
from sparselt_dist.objectives.latent_typing import TyperOutput
from sparselt_dist.objectives.settings import SLTConfig
from sparselt_dist.objectives.slt import SLT, SLTModule

TOKENIZER = TokenizerInfo(
    vocab_size=VOCABULARY, pad_id=0, unk_id=1, cls_id=2, sep_id=3, mask_id=4, special_ids=(0, 1, 2, 3, 4)
)
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
ROWS, PEAK_LR = 8, 6e-3


class Trained(NamedTuple):
    """A model after its run, the held-out batch and what evaluation says of it."""

    backbone: Backbone
    module: SLTModule
    heldout: Batch
    means: dict[str, float]


@cache
def trained(steps: int = 250, **settings: Any) -> Trained:
    """A run of some seconds; the temperature falls over its budget."""
    torch.manual_seed(0)
    section = ModelSection(architecture="bert", config=SIZES)
    backbone = build_backbone(section, TOKENIZER, sequence_length=LENGTH, with_head=True)
    cfg = SLTConfig(temperature_schedule="budget", **settings)
    module, collator = SLT().build_module(cfg, backbone), SLT().build_collator(cfg, TOKENIZER)
    assert isinstance(module, SLTModule)
    parameters = [*backbone.parameters(), *module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LR)
    corpus = markov_rows(steps * ROWS + 256, 1)

    def batch(first: int, count: int) -> Batch:
        examples: list[Example] = [
            {"key": f"s/{number}", "ids": corpus[number], "seed": number} for number in range(first, first + count)
        ]
        return collator(examples)

    for step in range(steps):
        module.set_progress(step, step / steps)
        optimizer.param_groups[0]["lr"] = PEAK_LR * min(1, (step + 1) / 50) * (1 - step / steps)
        optimizer.zero_grad()
        module(backbone, batch(step * ROWS, ROWS)).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    heldout = batch(steps * ROWS, 256)
    return Trained(backbone.eval(), module.eval(), heldout, _means(backbone, module, heldout))


@torch.no_grad()
def _means(backbone: Backbone, module: SLTModule, batch: Batch) -> dict[str, float]:
    return {name: float(total / count) for name, (total, count) in module(backbone, batch).metrics.items() if count}


def test_default_weights_select_some_tokens() -> None:
    means = trained().means
    assert 0.2 < means["null_probability"] < 0.35
    assert 25 < means["type_perplexity"] < 50
    assert means["null_share"] > means["null_probability"] + 0.2  # the null type beats its rivals one at a time
    assert means["mlm_loss"] < np.log(VOCABULARY) - 1


def test_without_sparsity_no_token_is_null_and_all_types_are_in_use() -> None:
    means = trained(sparsity_weight=0.0).means
    assert means["null_share"] == 0 and abs(means["null_probability"] - 1 / 64) < 0.01
    assert means["type_perplexity"] > 63 and means["types_used"] > 50


@pytest.mark.parametrize("settings", [{"sparsity_weight": 0.5}, {"diversity_weight": 0.0}])
def test_too_much_sparsity_or_no_diversity_collapses_to_the_null_type(settings: dict[str, float]) -> None:
    means = trained(**settings).means
    assert means["null_probability"] > 0.85 and means["null_share"] > 0.85
    assert means["diversity_loss"] > 0.95 and means["type_perplexity"] < 2.5
    if settings.get("sparsity_weight"):
        assert means["null_share"] == 1 and means["types_used"] == 0


def test_more_diversity_leaves_little_null_probability() -> None:
    means = trained(diversity_weight=1.0).means
    assert 0.02 < means["null_probability"] < 0.08 and means["type_perplexity"] > 60
    assert means["null_share"] > 0.3  # and yet it is often the likeliest type


def test_reconstruction_reads_the_states_through_their_types() -> None:
    """Held-out reconstruction is best with each token's own type, worse with another's, worst without any."""
    run = trained(600, sparsity_weight=0.0, reconstruction_weight=1.0, decoder_layer_drop=0.0)

    def with_vectors(change: Callable[[TyperOutput], Tensor]) -> float:
        hook = run.module.typer.register_forward_hook(lambda *call: call[2]._replace(type_vectors=change(call[2])))
        loss = _means(run.backbone, run.module, run.heldout)["reconstruction_loss"]
        hook.remove()
        return loss

    vectors = run.module.typer.type_vectors.detach()
    generator = torch.Generator().manual_seed(0)
    renamed = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(63, generator=generator)])
    own = run.means["reconstruction_loss"]
    others = with_vectors(lambda typed: vectors[renamed[typed.types]])
    mixed = with_vectors(
        lambda typed: vectors[typed.types.flatten()[torch.randperm(typed.types.numel(), generator=generator)]].view_as(
            typed.type_vectors
        )
    )
    ungated = with_vectors(lambda typed: torch.ones_like(typed.type_vectors))
    nothing = with_vectors(lambda typed: torch.zeros_like(typed.type_vectors))
    assert own + 0.005 < min(others, mixed) < nothing
    assert ungated > own + 0.5

"""The worked example of an objective of one's own keeps the interface and does what its paper says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rtd_plugin import NUM_JUDGED_KEY, RTD, TARGETS_KEY, UNIFORM_KEY, WEIGHTS_KEY, RTDConfig, RTDModule, draw
from torch import Tensor

from sparselt_dist.data.batch import IGNORE_INDEX, Batch, Example
from sparselt_dist.objectives.contract import TINY_TOKENIZER, TinyBackbone, check_objective, tiny_examples


def _model(**settings: Any) -> tuple[TinyBackbone, RTDModule]:
    torch.manual_seed(0)
    backbone = TinyBackbone(has_head=False)
    module = RTD().build_module(RTDConfig(**settings), backbone)
    assert isinstance(module, RTDModule)
    return backbone, module


def _batch(examples: list[Example] | None = None, **settings: Any) -> Batch:
    return RTD().build_collator(RTDConfig(**settings), TINY_TOKENIZER)(
        tiny_examples() if examples is None else examples
    )


@pytest.mark.parametrize("settings", [{}, {"target_weight": 0.3, "generator_layers": 2, "masking": "exact"}])
def test_the_plug_in_keeps_the_contract(settings: dict[str, Any]) -> None:
    check_objective(RTD(), RTDConfig(**settings))


def test_every_token_but_special_ones_has_a_weight() -> None:
    examples = tiny_examples()
    examples[0]["ids"][:2] = [2, 3]
    batch = _batch(examples, target_weight=0.5)
    is_target = batch["labels"] != IGNORE_INDEX
    assert set(batch[WEIGHTS_KEY][is_target].tolist()) == {0.5}
    judged = (batch["attention_mask"] == 1) & ~is_target
    judged[0, :2] = False
    assert torch.equal(batch[WEIGHTS_KEY] * ~is_target, judged.float())
    assert int(batch[NUM_JUDGED_KEY]) == sum(len(example["ids"]) for example in examples) - 2


def test_draws_follow_the_generators_distribution() -> None:
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3])
    uniform = torch.tensor([0.0, 0.0999, 0.1001, 0.6999, 0.7001, 1 - 1e-12], dtype=torch.float64)
    assert draw(probabilities.log().expand(6, -1), uniform).tolist() == [0, 0, 2, 2, 3, 3]
    many = torch.from_numpy(np.random.default_rng(0).random(20_000))
    drawn = draw(probabilities.log().expand(20_000, -1), many)
    assert torch.allclose(torch.bincount(drawn, minlength=4) / 20_000, probabilities, atol=0.01)


def test_the_loss_is_that_of_the_paper() -> None:
    backbone, module = _model(target_weight=0.3)
    batch = _batch(target_weight=0.3)
    scores = module.generator(backbone.embedding(batch["input_ids"]), batch)
    places = batch[TARGETS_KEY]
    labels = batch["labels"].flatten()[places]
    seen = batch["original_ids"].flatten().clone()
    seen[places] = draw(scores, batch[UNIFORM_KEY])
    replaced = (seen != batch["original_ids"].flatten()).float()
    assert 0 < int(replaced.sum()) <= len(places)
    said = module.judge(backbone(seen.view(8, -1), batch["attention_mask"])).flatten()
    weights = batch[WEIGHTS_KEY].flatten()
    judged = F.binary_cross_entropy_with_logits(said, replaced, weights, reduction="sum") / batch[NUM_JUDGED_KEY]
    output = module(backbone, batch)
    expected = F.cross_entropy(scores, labels) + 50 * judged
    assert float(output.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    means = {name: float(total / count) for name, (total, count) in output.metrics.items()}
    assert means["discriminator_loss"] == pytest.approx(float(judged.detach()), rel=1e-5)
    assert means["replaced_share"] == pytest.approx(float(replaced.sum() / batch[NUM_JUDGED_KEY]))


def test_no_gradient_passes_from_the_discriminator_through_the_draws() -> None:
    def of_generator(weight: float) -> list[Tensor]:
        backbone, module = _model(discriminator_weight=weight)
        return list(torch.autograd.grad(module(backbone, _batch()).loss, list(module.generator.parameters())))

    for without, with_discriminator in zip(of_generator(0.0), of_generator(50.0), strict=True):
        assert torch.equal(without, with_discriminator)


def test_documents_of_a_packed_row_are_kept_apart() -> None:
    backbone, module = _model()
    example = tiny_examples()[0]
    batch = _batch([example], mlm_probability=0.5)
    segments, places = torch.ones(1, 24, dtype=torch.int64), torch.arange(24)[None].clone()
    segments[:, 10:] = 2
    places[:, 10:] -= 10
    packed = {**batch, "segment_ids": segments, "position_ids": places}
    with torch.no_grad():
        together = module.generator(backbone.embedding(batch["input_ids"]), packed)
        changed = batch["input_ids"].clone()
        changed[:, 10:] = 7
        apart = module.generator(backbone.embedding(changed), packed)
    first = batch[TARGETS_KEY] < 10
    assert 0 < int(first.sum()) < len(first)
    assert torch.allclose(together[first], apart[first], atol=1e-6)
    assert float((together[~first] - apart[~first]).abs().max()) > 1e-3

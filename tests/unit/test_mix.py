"""Mixtures: their batches and losses are those of the parts, whatever the split; schedules, turns, rest; bad input."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from rtd_plugin import RTD
from torch import Tensor, nn

from sparselt_dist.config_loading import dump, load_config, objective_settings
from sparselt_dist.data.batch import IGNORE_INDEX, Batch, Example
from sparselt_dist.data.collation import without_targets
from sparselt_dist.errors import ConfigError
from sparselt_dist.objectives import base, get_objective
from sparselt_dist.objectives.base import loss_terms
from sparselt_dist.objectives.contract import TINY_TOKENIZER, TinyBackbone, check_objective, tiny_examples
from sparselt_dist.objectives.mix import Mix, MixModule, parts_of, turn_of
from sparselt_dist.objectives.settings import MixConfig, PartConfig

MLM: dict[str, Any] = {"name": "mlm", "mlm_probability": 0.3}
SLT: dict[str, Any] = {"name": "slt", "decoder_dropout": 0.0, "decoder_layer_drop": 0.0, "mlm_probability": 0.2}
CWT: dict[str, Any] = {"name": "cwt", "mlm_probability": 0.4}
RTD_PART: dict[str, Any] = {"name": "rtd", "generator_width": 8}


@pytest.fixture(autouse=True)
def _rtd_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(base._registered, "rtd", RTD())


def mixture(*parts: dict[str, Any], **keys: Any) -> MixConfig:
    return MixConfig.model_validate({"parts": list(parts), **keys})


def built(cfg: MixConfig, **backbone: Any) -> tuple[TinyBackbone, MixModule]:
    torch.manual_seed(0)
    tiny = TinyBackbone(has_head=Mix().needs_lm_head(cfg), **backbone).double()
    module = Mix().build_module(cfg, tiny).double()
    assert isinstance(module, MixModule)
    module.set_progress(100, 0.1)
    return tiny, module


def collated(cfg: MixConfig, examples: list[Example] | None = None) -> Batch:
    return Mix().build_collator(cfg, TINY_TOKENIZER)(tiny_examples() if examples is None else examples)


def gradients(backbone: nn.Module, module: nn.Module, loss: Tensor) -> list[Tensor]:
    """Of every parameter; one that the loss is not attached to raises."""
    parameters = [p for part in (backbone, module) for p in part.parameters()]
    return list(torch.autograd.grad(loss, parameters))


# ---------------------------------------------------------------- the interface


@pytest.mark.parametrize(
    ("parts", "composes"),
    [
        ([MLM], True),
        ([MLM, {**MLM, "weight": 0.5, "masking": "exact"}], True),
        ([MLM, {**SLT, "weight": [[0.0, 0.0], [0.5, 1.0]]}], True),
        ([SLT, MLM, {**SLT, "num_types": 8}], True),
        ([RTD_PART, MLM], True),
        ([CWT, MLM], False),
        ([{**CWT, "weight": 2, "cross_entropy_weight": 0.5}, SLT, MLM], False),
    ],
)
@pytest.mark.parametrize("sharing", ["batch", "alternate"])
def test_mixtures_keep_the_contract(parts: list[dict[str, Any]], composes: bool, sharing: str) -> None:
    check_objective(get_objective("mix"), mixture(*parts, sharing=sharing), composes=composes)


def test_the_vocabulary_head_is_there_if_a_part_needs_it() -> None:
    assert not Mix().needs_lm_head(mixture(CWT, RTD_PART))
    assert Mix().needs_lm_head(mixture(CWT, MLM))


def test_a_backbone_that_cannot_serve_a_part_names_it() -> None:
    cfg = mixture({**CWT, "prediction": "causal"}, MLM)
    with pytest.raises(ConfigError, match=r"^objective\.parts\.1 \(mlm\): objective\.name: found 'mlm' with a causal"):
        Mix().build_module(cfg, TinyBackbone(is_causal=True))


# ---------------------------------------------------------------- batches


def test_each_part_has_its_own_batch_of_the_same_examples() -> None:
    cfg = mixture(MLM, SLT, MLM)
    batch, parts = collated(cfg), parts_of(cfg)
    assert [part.label for part in parts] == ["mlm", "slt", "mlm-2"]
    for part, section in zip(parts, cfg.parts, strict=True):
        objective = get_objective(section.name)
        alone = objective.build_collator(objective.config_cls(**section.own_keys()), TINY_TOKENIZER)
        expected, own = alone(part.examples(tiny_examples())), part.batch(batch)
        assert own.keys() == expected.keys()
        assert all(torch.equal(own[key], expected[key]) for key in expected)
    first, again = parts[0].batch(batch), parts[2].batch(batch)
    assert torch.equal(first["attention_mask"], again["attention_mask"])
    both = int(((first["labels"] != IGNORE_INDEX) & (again["labels"] != IGNORE_INDEX)).sum())
    assert 0 < both < 0.5 * int(first["num_targets"])  # as often as chance has it: 0.3 of them


def test_the_parts_learn_nothing_from_a_batch_that_counts_nothing() -> None:
    cfg = mixture(MLM, SLT, CWT, RTD_PART)
    backbone, module = built(cfg)
    output = module(backbone, without_targets(collated(cfg)))
    assert torch.isfinite(output.loss)
    counts = {name: float(count) for name, (_, count) in output.metrics.items() if not name.endswith("/weight")}
    assert set(counts.values()) == {0.0}


def test_parts_see_that_rows_are_packed() -> None:
    cfg = mixture(MLM, SLT)
    batch = collated(cfg)
    segments = 1 + (torch.arange(24) >= 5).long().expand(8, -1)
    packed = {**batch, "segment_ids": segments, "position_ids": torch.arange(24).expand(8, -1)}
    for part in parts_of(cfg):
        assert part.batch(packed)["segment_ids"] is segments
        assert "segment_ids" not in part.batch(batch)


# ---------------------------------------------------------------- the loss


def test_the_loss_is_the_weighted_sum_of_the_parts() -> None:
    cfg = mixture({**MLM, "weight": 0.5}, {**SLT, "weight": 2}, {**MLM, "weight": [[0.0, 0.0], [0.2, 6.0]]})
    backbone, module = built(cfg)
    batch = collated(cfg)
    output = module(backbone, batch)
    alone = [part(backbone, place.batch(batch)) for part, place in zip(module.parts, parts_of(cfg), strict=True)]
    expected = 0.5 * alone[0].loss + 2 * alone[1].loss + 3 * alone[2].loss  # at a tenth of the budget
    assert float(output.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    means = {name: float(total / count) for name, (total, count) in output.metrics.items()}
    assert [means[f"{label}/weight"] for label in ("mlm", "slt", "mlm-2")] == pytest.approx([0.5, 2, 3])
    assert means["mlm-2/loss"] == pytest.approx(float(alone[2].loss.detach()))
    assert {"slt/sparsity_loss", "slt/types_used", "mlm/accuracy", "loss"} <= set(means)
    assert set(output.terms) == {
        "num_targets",
        "mix/slt/num_targets",
        "mix/slt/slt/num_predicted",
        "mix/slt/num_tokens",
        "mix/mlm-2/num_targets",
    }
    assert set(output.terms) - {"num_targets"} <= set(module.counts) <= set(batch)


@pytest.mark.parametrize("bounds", [[4], [1, 2, 5]])
@pytest.mark.parametrize("sharing", ["batch", "alternate"])
def test_a_step_does_not_depend_on_how_it_is_split(bounds: list[int], sharing: str) -> None:
    cfg = mixture({**MLM, "masking": "exact"}, SLT, {**RTD_PART, "weight": 0.3}, sharing=sharing)
    backbone, module = built(cfg)
    examples = tiny_examples()
    for step in range(3):
        module.set_progress(step, 0.1)
        module.set_statistics(None)
        expected = gradients(backbone, module, module(backbone, collated(cfg, examples)).loss)
        cuts = [0, *bounds, len(examples)]
        batches = [collated(cfg, examples[start:end]) for start, end in pairwise(cuts)]
        if module.needs_statistics:
            with torch.no_grad():
                module.set_statistics(cast(Tensor, sum(module.statistics(backbone, batch) for batch in batches)))
        loss = torch.stack(
            [
                term * (float(batch[key]) / sum(float(other[key]) for other in batches))
                for batch in batches
                for key, term in loss_terms(module(backbone, batch)).items()
            ]
        ).sum()
        for found, wanted in zip(gradients(backbone, module, loss), expected, strict=True):
            # an objective may round its loss to float32
            assert float((found - wanted).abs().max()) < 1e-9 + 1e-6 * float(wanted.abs().max())


# ---------------------------------------------------------------- rest and turns


def _calls(backbone: nn.Module) -> list[int]:
    seen: list[int] = []
    backbone.register_forward_hook(lambda *call: seen.append(1))
    return seen


@pytest.mark.parametrize("resting", [MLM, SLT, {**CWT, "recover_from": 0.9, "recovered_table": "copy"}, RTD_PART])
def test_a_part_without_weight_costs_no_pass_and_its_parameters_get_zeros(resting: dict[str, Any]) -> None:
    cfg = mixture(CWT, {**resting, "weight": [[0.1, 0.0], [0.2, 1.0]]})
    backbone, module = built(cfg)
    batch, calls = collated(cfg), _calls(backbone)
    with torch.no_grad():
        for parameter in module.parts[1].parameters():
            parameter.fill_(torch.nan)  # nothing of it may be read
    output = module(backbone, batch)
    found = gradients(backbone, module, output.loss)
    own = list(module.parts[1].parameters())
    assert all(float(gradient.abs().max()) == 0 for gradient in found[len(found) - len(own) :])
    label = parts_of(cfg)[1].label
    assert len(calls) == 1
    assert [name for name in output.metrics if name.startswith(f"{label}/")] == [f"{label}/weight"]
    assert not any("forward" in vars(lent) for lent in module.modules())
    module.set_progress(500, 0.15)
    if resting["name"] != "slt":  # whose two passes are one of twice the rows
        module(backbone, batch)
        assert len(calls) == 3


def test_the_head_of_a_resting_part_gets_zeros() -> None:
    class Headed(TinyBackbone):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Linear(16, self.vocab_size)

        def logits(self, hidden_ND: Tensor) -> Tensor:
            return cast(Tensor, self.decoder(hidden_ND))

    cfg = mixture(CWT, {**MLM, "weight": [[0.5, 0.0], [0.5, 1.0]]})
    backbone = Headed()
    module = Mix().build_module(cfg, backbone)
    found = gradients(backbone, module, module(backbone, collated(cfg)).loss)
    names = [name for name, _ in backbone.named_parameters()]
    assert float(found[names.index("decoder.weight")].abs().max()) == 0
    cast(Any, module).set_progress(9, 0.5)
    found = gradients(backbone, module, module(backbone, collated(cfg)).loss)
    assert float(found[names.index("decoder.weight")].abs().max()) > 0


def test_turns_come_as_often_as_weights_say_and_evenly() -> None:
    weights = [0.5, 0.0, 1.5, 2.0]
    turns = np.array([turn_of(step, weights) for step in range(4000)])
    for steps in (40, 400, 4000):
        counts = np.bincount(turns[:steps], minlength=4)
        assert np.abs(counts - steps * np.array(weights) / 4).max() < 4
    assert [turn_of(step, [1.0]) for step in range(3)] == [0, 0, 0]
    halves = [turn_of(step, [1.0, 1.0]) for step in range(1000)]
    assert max(len(run) for run in "".join(map(str, halves)).split("0")) <= 2
    assert 490 <= sum(turn_of(10**12 + step, [1.0, 1.0]) for step in range(1000)) <= 510


def test_turns_add_up_to_the_sum_of_the_parts() -> None:
    parts = ({**MLM, "weight": 0.5}, {**CWT, "weight": 1.5})
    backbone, module = built(mixture(*parts, sharing="alternate"))
    whole = built(mixture(*parts))[1]
    batch = collated(mixture(*parts))
    seen = {}
    for step in range(8):
        module.set_progress(step, 0.0)
        output = module(backbone, batch)
        (turn,) = [label for label in ("mlm", "cwt") if f"{label}/loss" in output.metrics]
        seen[turn] = float(output.loss.detach())
        assert {"mlm/weight", "cwt/weight"} <= set(output.metrics)
    expected = float(whole(backbone, batch).loss.detach())
    assert 0.25 * seen["mlm"] + 0.75 * seen["cwt"] == pytest.approx(expected, rel=1e-6)
    module.eval()
    assert float(module(backbone, batch).loss.detach()) == pytest.approx(expected, rel=1e-6)


def test_a_weight_follows_its_points() -> None:
    section = PartConfig.model_validate({"name": "mlm", "weight": [[0.2, 1], [0.4, 2], [0.4, 5], [0.8, 0]]})
    places = [0.0, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0]
    assert [section.weight_at(place) for place in places] == pytest.approx([1, 1, 1.5, 5, 2.5, 0, 0])
    assert PartConfig.model_validate({"name": "mlm", "weight": 2}).weight_at(0.7) == 2


# ---------------------------------------------------------------- configuration


def load(parts: str, *overrides: str) -> Any:
    keys = ["budget.max_steps=10", "data.train=shards", "objective.name=mix", f"objective.parts={parts}", *overrides]
    return load_config([], keys)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (
            "[{name: mlm, mlm_probabilty: 0.2}]",
            [
                "objective.parts.0.mlm_probabilty: found an unknown key",
                "did you mean objective.parts.0.mlm_probability?",
            ],
        ),
        ("[{name: mlm, wieght: 2}]", ["did you mean objective.parts.0.weight?"]),
        (
            "[{name: mlm}, {name: cwt, temperature: 0}]",
            ["objective.parts.1.temperature: found 0, expected a number > 0"],
        ),
        ("[{name: mlmm}]", ['objective.parts.0.name: found "mlmm"', "did you mean mlm?"]),
        ("[{weight: 1}]", ["objective.parts.0.name: found nothing, expected text"]),
        ("[5]", ["objective.parts.0: found 5, expected a mapping"]),
        ("[{name: mlm, weight: -1}]", ["objective.parts.0.weight: found -1, expected a number >= 0 or a list"]),
        ("[{name: mlm, weight: [[0.1]]}]", ["objective.parts.0.weight: found [[0.1]]"]),
        ("[{name: mlm, weight: [[0.5, 1], [0.2, 1]]}]", ["objective.parts.0: found", "shares rise"]),
        ("[{name: mlm, weight: [[0, 1], [2, 1]]}]", ["shares rise from 0 to at most 1"]),
        ("[{name: mlm, weight: [[0, 1], [1, -1]]}]", ["factors are not below 0"]),
        (
            "[{name: mlm, mask_share: 0.9, random_share: 0.5}]",
            ["objective.parts.0: found", "at most 1 (found 0.9 + 0.5)"],
        ),
        ("[]", ["objectives, one at least"]),
        ("[{name: mix, parts: [{name: mlm}]}]", ["no mixtures themselves"]),
        ("{name: mlm}", ["objective.parts: found", "expected a list"]),
        ("[{name: mlm, weight: 0}]", ["all are 0 at 0 of the budget"]),
        ("[{name: mlm, weight: [[0, 1], [0.5, 0]]}, {name: mlm, weight: [[0.5, 0], [1, 1]]}]", ["all are 0 at 0.5 of"]),
        ("[{name: mlm, weight: 1}, {name: rtd, generator_width: 9}]", ["objective.parts.1.generator_width: found 9"]),
    ],
)
def test_faults_of_parts_are_found_at_their_places(parts: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(parts)
    assert all(text in str(caught.value) for text in expected), str(caught.value)


def test_all_faults_of_all_parts_are_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        load("[{name: mlm, weight: -1, masking: exakt}, {name: slt, num_types: 1}, 5]", "objective.sharing=both")
    message = str(caught.value)
    assert message.startswith("5 faults")
    places = ("parts.0.weight", "parts.0.masking", "parts.1.num_types", "parts.2", "sharing")
    assert all(f"objective.{place}: found" in message for place in places)


def test_the_dumped_configuration_holds_the_parts_defaults_and_reads_back(tmp_path: Path) -> None:
    config = load("[{name: mlm, mlm_probability: 0.2}, {name: cwt, weight: [[0, 0], [0.5, 1]]}]")
    text = dump(config)
    path = tmp_path / "config.yaml"
    path.write_text(text)
    again = load_config([str(path)])
    assert dump(again) == text and "contrastive_weight: 1.0" in text
    settings = objective_settings(again)
    assert isinstance(settings, MixConfig)
    assert [part.points() for part in settings.parts] == [((0.0, 1.0),), ((0.0, 0.0), (0.5, 1.0))]
    assert settings.parts[0].own_keys()["mlm_probability"] == 0.2

"""The SLT plug-in on a tiny backbone: its batches, its independence of the split, its switches, and bad input."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparselt_dist.data.batch import IGNORE_INDEX, Batch, Example
from sparselt_dist.errors import ConfigError
from sparselt_dist.objectives import get_objective
from sparselt_dist.objectives.base import LossOutput, SharesStatistics
from sparselt_dist.objectives.contract import TINY_TOKENIZER, TinyBackbone, check_objective, tiny_examples
from sparselt_dist.objectives.mlm import MLM
from sparselt_dist.objectives.settings import MLMConfig, SLTConfig
from sparselt_dist.objectives.slt import NUM_PREDICTED_KEY, PREDICTED_KEY, SEEDS_KEY, SLT, SLTCollator, SLTModule

PLAIN: dict[str, Any] = {"decoder_dropout": 0.0, "decoder_layer_drop": 0.0}


def _model(**settings: Any) -> tuple[TinyBackbone, SLTModule]:
    torch.manual_seed(0)
    backbone = TinyBackbone()
    module = SLT().build_module(SLTConfig(**{**PLAIN, **settings}), backbone)
    assert isinstance(module, SLTModule)
    module.set_progress(100, 0.1)
    return backbone, module


def _batch(examples: list[Example] | None = None, **settings: Any) -> Batch:
    return SLTCollator(SLTConfig(**settings), TINY_TOKENIZER)(tiny_examples() if examples is None else examples)


def _gradients(backbone: nn.Module, module: nn.Module, loss: Tensor) -> list[Tensor]:
    parameters = [*backbone.parameters(), *module.parameters()]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


# ---------------------------------------------------------------- the interface


class _WholeLoss(SLT):
    """The same with its loss in one piece, as objectives whose terms share one count return it."""

    def build_module(self, cfg: SLTConfig, backbone: nn.Module) -> nn.Module:
        class Whole(SLTModule):
            def forward(self, backbone: nn.Module, batch: Batch) -> LossOutput:  # type: ignore[override]
                output = super().forward(backbone, batch)
                return LossOutput(output.loss, output.metrics)

        return Whole(cfg, backbone)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"draw": "straight-through", "sparsity_form": "mean-log", "diversity_form": "kl"},
        {"regularizer_scope": "micro-batch", "decoder_embedding_passes": 1, "temperature_schedule": "budget"},
        {"masking": "exact", "exempt_special": False, "num_types": 2},
    ],
)
def test_the_plug_in_keeps_the_contract(settings: dict[str, Any]) -> None:
    assert isinstance(get_objective("slt"), SLT)
    check_objective(_WholeLoss(), SLTConfig(**settings), composes=False)


def test_a_batch_holds_both_versions_of_the_rows() -> None:
    examples = tiny_examples()
    batch = _batch(examples)
    masked = MLM().build_collator(MLMConfig(), TINY_TOKENIZER)(examples)
    for key in ("input_ids", "attention_mask", "labels", "num_targets", "num_tokens"):
        assert torch.equal(batch[key], masked[key])  # the masks of masked language modelling
    for row, example in enumerate(examples):
        ids = torch.from_numpy(example["ids"].astype(np.int64))
        assert torch.equal(batch["original_ids"][row, : len(ids)], ids)
        assert bool((batch["original_ids"][row, len(ids) :] == TINY_TOKENIZER.pad_id).all())
    assert batch[NUM_PREDICTED_KEY] == sum(len(example["ids"]) - 1 for example in examples)
    assert batch[SEEDS_KEY].tolist() == [example["seed"] for example in examples]


def test_the_decoder_predicts_the_next_token_inside_its_document() -> None:
    example: Example = {
        "key": "s/0",
        "ids": np.arange(10, 18).astype(np.uint16),
        "seed": 2**64 - 3,
        "documents": np.array([3, 4, 1]),
    }
    batch = _batch([example, tiny_examples()[7]])
    places = batch[PREDICTED_KEY]
    assert places[places < 12].tolist() == [0, 1, 3, 4, 5]  # not 2 -> 3 nor 6 -> 7, which begin documents
    assert batch[SEEDS_KEY].numpy().view(np.uint64)[0] == 2**64 - 3


def test_the_journal_tells_each_term() -> None:
    backbone, module = _model()
    batch = _batch()
    output = module(backbone, batch)
    means = {name: float(total / count) for name, (total, count) in output.metrics.items()}
    cfg = SLTConfig()
    whole = means["mlm_loss"] + cfg.reconstruction_weight * means["reconstruction_loss"]
    whole += cfg.sparsity_weight * means["sparsity_loss"] + cfg.diversity_weight * means["diversity_loss"]
    assert means["loss"] == pytest.approx(whole, rel=1e-6)
    assert float(sum(output.terms.values()).detach()) == pytest.approx(float(output.loss.detach()), rel=1e-6)
    assert set(output.terms) == {"num_targets", NUM_PREDICTED_KEY, "num_tokens"} <= set(batch)
    assert means["temperature"] == pytest.approx(5 * 0.99997**99)
    assert means["sparsity_loss"] == pytest.approx(-np.log(means["null_probability"]), rel=1e-5)
    assert 1 < means["type_perplexity"] <= 64 and means["diversity_loss"] == pytest.approx(
        1 - means["type_perplexity"] / 64
    )
    assert 1 <= means["types_used"] <= 63 and 0 <= means["null_share"] < 1
    assert output.metrics["reconstruction_loss"][1] == batch[NUM_PREDICTED_KEY]


# ---------------------------------------------------------------- independence of the split


def _composed(
    backbone: nn.Module, module: SLTModule, parts: list[Batch]
) -> tuple[float, list[Tensor], dict[str, float]]:
    """What a step of several micro-batches does: statistics, each term by its own share, sums of the metrics."""
    with torch.no_grad():
        module.set_statistics(cast(Tensor, sum(module.statistics(backbone, part) for part in parts)))
    outputs = [module(backbone, part) for part in parts]
    counts = {key: sum(float(part[key]) for part in parts) for key in outputs[0].terms}
    loss = cast(
        Tensor,
        sum(
            term * float(part[key]) / counts[key]
            for output, part in zip(outputs, parts, strict=True)
            for key, term in output.terms.items()
        ),
    )
    pairs = {
        name: [cast(Tensor, sum(output.metrics[name][side] for output in outputs)) for side in (0, 1)]
        for name in outputs[0].metrics
    }
    metrics = {name: float(total / count) for name, (total, count) in pairs.items() if name != "loss"}
    return float(loss.detach()), _gradients(backbone, module, loss), metrics


@pytest.mark.parametrize("settings", [{}, {"sparsity_form": "mean-log", "diversity_form": "kl"}])
@pytest.mark.parametrize("bounds", [[4], [1, 2, 5], [3, 7]])
def test_a_step_does_not_depend_on_how_it_is_split(settings: dict[str, Any], bounds: list[int]) -> None:
    backbone, module = (part.double() for part in _model(**settings))
    assert isinstance(module, SLTModule)
    examples = tiny_examples()
    assert isinstance(module, SharesStatistics) and module.needs_statistics
    whole = _batch(examples)
    output = module(backbone, whole)
    expected = _gradients(backbone, module, output.loss)
    cuts = [0, *bounds, len(examples)]
    parts = [_batch(examples[start:end]) for start, end in pairwise(cuts)]
    loss, found, metrics = _composed(backbone, module, parts)
    assert loss == pytest.approx(float(output.loss.detach()), rel=1e-9)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).abs().max()) < 1e-12 + 1e-9 * float(other.abs().max())
    means = {name: float(total / count) for name, (total, count) in output.metrics.items()}
    assert metrics == {name: pytest.approx(means[name], rel=1e-9) for name in metrics}


def test_regularisers_of_each_micro_batch_do_depend_on_it() -> None:
    """The official scope: with one micro-batch a step the same numbers, with more another loss."""
    backbone, module = _model(regularizer_scope="micro-batch")
    examples = tiny_examples()
    assert not module.needs_statistics
    whole = float(module(backbone, _batch(examples)).loss.detach())
    assert _model()[1](backbone, _batch(examples)).loss.item() == pytest.approx(whole, rel=1e-6)
    loss, _, _ = _composed(backbone, module, [_batch(examples[:2]), _batch(examples[2:])])
    assert abs(loss - whole) > 1e-4


def test_a_step_of_one_micro_batch_is_its_own_whole() -> None:
    backbone, module = _model()
    batch = _batch()
    alone = _gradients(backbone, module, module(backbone, batch).loss)
    with torch.no_grad():
        module.set_statistics(module.statistics(backbone, batch))
    assert all(
        torch.allclose(one, other, atol=1e-7)
        for one, other in zip(_gradients(backbone, module, module(backbone, batch).loss), alone, strict=True)
    )
    module.set_statistics(None)
    again = _gradients(backbone, module, module(backbone, batch).loss)
    assert all(torch.equal(one, other) for one, other in zip(again, alone, strict=True))


def test_evaluation_does_not_look_at_a_training_step() -> None:
    backbone, module = _model()
    module.eval()
    batch = _batch()
    before = module(backbone, batch)
    module.set_statistics(torch.rand(129, dtype=torch.float64) * 100)
    assert torch.equal(module(backbone, batch).loss, before.loss)


def test_chunked_heads_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparselt_dist.objectives.reconstruction.rows_at_once", lambda classes: 7)
    monkeypatch.setattr("sparselt_dist.objectives.linear_cross_entropy.rows_at_once", lambda classes: 7)
    batch, found = _batch(), []
    for form in ("full", "chunked"):
        backbone, module = _model(cross_entropy=form)
        output = module(backbone, batch)
        found.append([output.loss, *_gradients(backbone, module, output.loss)])
    for full, chunked in zip(*found, strict=True):
        assert torch.allclose(full, chunked, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------- the step: temperature, LayerDrop, noise


def test_temperature_and_layer_drop_follow_the_step_alone() -> None:
    _, module = _model(decoder_layer_drop=0.1)
    seen = {}
    for step in range(2000):
        module.set_progress(step, step / 2000)
        seen[step] = (module.temperature, module.keep_layer)
    dropped = [step for step, (_, kept) in seen.items() if not kept]
    assert abs(len(dropped) - 200) < 45  # binomial, 3.3 sigma
    _, resumed = _model(decoder_layer_drop=0.1)  # of the same seed
    for step in (1999, 0, 700, *dropped[:3]):
        resumed.set_progress(step, 0.0)
        assert (resumed.temperature, resumed.keep_layer) == seen[step]
    torch.manual_seed(1)
    other = SLTModule(SLTConfig(decoder_layer_drop=0.1), TinyBackbone())
    others = []
    for step in range(300):
        other.set_progress(step, 0.0)
        others.append(other.keep_layer)
    assert others != [seen[step][1] for step in range(300)]


def test_the_temperature_may_follow_the_budget() -> None:
    _, module = _model(temperature_schedule="budget", temperature_decay_share=0.5)
    found = []
    for step, progress in ((0, 0.0), (1, 0.0), (7, 0.25), (9, 0.5), (10, 1.0)):
        module.set_progress(step, progress)
        found.append(module.temperature)
    assert found == pytest.approx([0.5, 5.0, (5 * 0.5) ** 0.5, 0.5, 0.5])
    _, module = _model(temperature_schedule="budget", first_step_at_floor=False)
    module.set_progress(0, 0.0)
    assert module.temperature == 5.0


def test_training_noise_follows_from_the_examples() -> None:
    backbone, module = _model()
    examples = tiny_examples()
    first = module(backbone, _batch(examples)).metrics["reconstruction_loss"][0]
    torch.manual_seed(123)
    assert torch.equal(module(backbone, _batch(examples)).metrics["reconstruction_loss"][0], first)
    reseeded = cast("list[Example]", [{**example, "seed": example["seed"] + 1} for example in examples])
    batch = {**_batch(examples), SEEDS_KEY: _batch(reseeded)[SEEDS_KEY]}
    assert not torch.equal(module(backbone, batch).metrics["reconstruction_loss"][0], first)
    del batch[SEEDS_KEY]
    assert bool(module(backbone, batch).loss.isfinite())  # a batch made elsewhere: torch's own generator


# ---------------------------------------------------------------- what each term sees


def _terms(module: SLTModule, backbone: nn.Module, batch: Batch) -> dict[str, float]:
    metrics = module(backbone, batch).metrics
    return {name: float(metrics[f"{name}_loss"][0]) for name in ("mlm", "reconstruction", "sparsity", "diversity")}


def test_mlm_reads_the_corrupted_ids_and_all_else_the_clean_ones() -> None:
    backbone, module = _model()
    batch = _batch()
    before = _terms(module, backbone, batch)
    other = torch.where(batch["labels"] != IGNORE_INDEX, 50, batch["input_ids"])
    corrupted = _terms(module, backbone, {**batch, "input_ids": other})
    clean = _terms(module, backbone, {**batch, "original_ids": batch["original_ids"].roll(1, 0)})
    assert corrupted.pop("mlm") != before["mlm"] and clean.pop("mlm") == before.pop("mlm")
    assert corrupted == before
    assert all(clean[name] != before[name] for name in clean)


def test_regularisers_see_neither_temperature_nor_noise_nor_decoder() -> None:
    backbone, module = _model()
    batch = _batch()
    before = _terms(module, backbone, batch)
    module.set_progress(90_000, 0.9)
    with torch.no_grad():
        for parameter in [module.typer.type_vectors, *module.decoder.parameters()]:
            parameter.add_(1.0)
    after = _terms(module, backbone, {**batch, SEEDS_KEY: batch[SEEDS_KEY] + 1})
    assert after["reconstruction"] != before["reconstruction"]
    for name in ("mlm", "sparsity", "diversity"):
        assert after[name] == before[name]


def _decoder_states(module: SLTModule, backbone: nn.Module, ids: Tensor, memory: Tensor) -> Tensor:
    ones = torch.ones(memory.shape[:2], dtype=torch.int64)
    with torch.no_grad():
        states: Tensor = module.decoder(backbone, ids, memory, ones)
    return states


def test_the_decoder_is_causal_in_its_input_and_sees_all_of_the_memory() -> None:
    backbone, module = _model()
    torch.manual_seed(1)
    ids, memory = torch.randint(5, 97, (2, 7)), torch.randn(2, 8, 16)
    before = _decoder_states(module, backbone, ids, memory)
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 90
    after = _decoder_states(module, backbone, changed, memory)
    assert torch.equal(after[:, :4], before[:, :4]) and bool((after[:, 4:] != before[:, 4:]).any(-1).all())
    other = memory.clone()
    other[:, 7] += 1
    assert bool((_decoder_states(module, backbone, ids, other) != before).any(-1).all())


def test_an_all_null_source_says_nothing_but_a_constant() -> None:
    """Its memory is zero, so cross-attention gives one vector whatever the source and its length."""
    backbone, module = _model()
    ids = torch.randint(5, 97, (2, 7))
    long, short = (_decoder_states(module, backbone, ids, torch.zeros(2, length, 16)) for length in (12, 8))
    assert torch.allclose(long, short, atol=1e-6)
    with torch.no_grad():
        module.typer.classifier.weight.zero_()
    module.eval()
    metrics = module(backbone, _batch()).metrics
    assert metrics["null_share"][0] == metrics["null_share"][1] and metrics["types_used"][0] == 0


def test_longer_padding_changes_no_term_in_evaluation() -> None:
    backbone, module = _model()
    module.eval()
    examples = tiny_examples()[2:4]
    alone = [_terms(module, backbone, _batch([example])) for example in examples]
    padded = {
        key: torch.nn.functional.pad(value, (0, 9), value=IGNORE_INDEX if key == "labels" else 0)
        if value.ndim == 2
        else value
        for key, value in _batch(examples[:1]).items()
        if key not in ("slt/targets", PREDICTED_KEY)  # places in rows of the old length
    }
    assert _terms(module, backbone, padded) == pytest.approx(alone[0], rel=5e-5)  # sums in another order


def test_packed_documents_do_not_see_each_other() -> None:
    backbone, module = _model()
    module.eval()
    first, second = tiny_examples()[4]["ids"], tiny_examples()[7]["ids"]
    row: Example = {
        "key": "s/0",
        "ids": np.concatenate([first, second]),
        "seed": 1,
        "documents": np.array([len(first), len(second)]),
    }
    ids = [torch.arange(len(part)) for part in (first, second)]
    packed = {
        **_batch([row]),
        "segment_ids": torch.cat([torch.full_like(part, number + 1) for number, part in enumerate(ids)])[None],
        "position_ids": torch.cat(ids)[None],
    }
    metrics = module(backbone, packed).metrics
    parts = [
        module(backbone, _batch([{"key": f"s/{number}", "ids": part, "seed": number}])).metrics
        for number, part in enumerate((first, second))
    ]
    for side in (0, 1):
        apart = sum(float(part["reconstruction_loss"][side]) for part in parts)
        assert float(metrics["reconstruction_loss"][side]) == pytest.approx(apart, rel=1e-5)
    listed = module(backbone, {key: value for key, value in packed.items() if key != PREDICTED_KEY}).metrics
    assert torch.equal(listed["reconstruction_loss"][0], metrics["reconstruction_loss"][0])


# ---------------------------------------------------------------- bad input


def _edited(edit: Callable[[Batch], dict[str, Tensor]], examples: list[Example] | None = None) -> Batch:
    batch = _batch(examples)
    return {**{key: value for key, value in batch.items() if key != "slt/targets"}, **edit(batch)}


@pytest.mark.parametrize("kept", [0, 1])
def test_no_masked_target_or_one_leaves_the_other_terms(kept: int) -> None:
    def edit(batch: Batch) -> dict[str, Tensor]:
        labels = batch["labels"].flatten().clone()
        labels[torch.nonzero(labels != IGNORE_INDEX).squeeze(1)[kept:]] = IGNORE_INDEX
        return {"labels": labels.view_as(batch["labels"]), "num_targets": torch.tensor(kept)}

    backbone, module = _model()
    output = module(backbone, _edited(edit))
    assert output.metrics["mlm_loss"][1] == kept and (output.metrics["mlm_loss"][0] > 0) == bool(kept)
    assert float(output.terms["num_targets"].detach()) == float(output.metrics["mlm_loss"][0])
    assert all(bool(gradient.isfinite().all()) for gradient in _gradients(backbone, module, output.loss))
    typed = torch.autograd.grad(module(backbone, _edited(edit)).loss, module.typer.classifier.weight)[0]
    assert bool((typed[1:] != 0).all())


def test_a_batch_of_one_row_and_of_one_token() -> None:
    backbone, module = _model()
    for length in (2, 1):
        example: Example = {"key": "s/0", "ids": np.arange(10, 10 + length).astype(np.uint16), "seed": 1}
        output = module(backbone, _batch([example]))
        assert output.metrics["reconstruction_loss"][1] == length - 1
        gradients = _gradients(backbone, module, output.loss)
        assert bool(output.loss.isfinite()) and all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_a_batch_that_counts_no_token_teaches_nothing() -> None:
    backbone, module = _model()
    zero = torch.zeros((), dtype=torch.int64)
    nothing = {"num_targets": zero, "num_tokens": zero}
    output = module(
        backbone, _edited(lambda batch: {"labels": torch.full_like(batch["labels"], IGNORE_INDEX), **nothing})
    )
    assert float(output.loss.detach()) == 0.0
    assert all(bool((gradient == 0).all()) for gradient in _gradients(backbone, module, output.loss))
    assert not any(float(count) for _, count in output.metrics.values())


def test_what_cannot_be_typed_is_refused() -> None:
    cfg = SLTConfig()
    with pytest.raises(ConfigError, match="a causal model, whose states say nothing of what follows"):
        SLT().build_module(cfg, TinyBackbone(is_causal=True))
    narrow = TinyBackbone()
    narrow.embedding = nn.Embedding(97, 8)
    with pytest.raises(ConfigError, match="word vectors of 8 and hidden states of 16"):
        SLT().build_module(cfg, narrow)
    odd = TinyBackbone()
    odd.body = nn.Module()
    odd.body.embeddings = nn.Embedding(97, 16)
    with pytest.raises(ConfigError, match="Embedding, which takes no word vectors in place of ids"):
        SLT().build_module(cfg, odd)


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match=r"temperature_floor of at most temperature_start \(found 2.0 above 1.0\)"):
        SLTConfig(temperature_start=1.0, temperature_floor=2.0)
    with pytest.raises(ValueError, match="mask_share"):
        SLTConfig(mask_share=0.9, random_share=0.3)

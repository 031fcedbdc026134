"""The objective: batches, metrics, mixing, ignored positions, recovery of a head, bad input."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel, ElectraConfig, ElectraModel

from sparselt_dist.data.batch import IGNORE_INDEX, Batch, Example
from sparselt_dist.errors import ConfigError
from sparselt_dist.models.backbone import Backbone, PretrainingModel
from sparselt_dist.objectives.base import LossOutput, TokenizerInfo
from sparselt_dist.objectives.contract import TINY_TOKENIZER, TinyBackbone, check_objective, tiny_examples
from sparselt_dist.objectives.cwt import CWT, CWTModule, contrastive_weight_tying_loss
from sparselt_dist.objectives.cwt_head import RecoveredHead, head_logits
from sparselt_dist.objectives.mlm import MLM
from sparselt_dist.objectives.settings import CWTConfig, MLMConfig

VOCAB = 1000
TOKENIZER = TokenizerInfo(vocab_size=VOCAB, pad_id=0, mask_id=4, cls_id=2, sep_id=3, special_ids=(0, 1, 2, 3, 4))
SIZES = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
RECOVER = {"recover_from": 0.5}


def config(**settings: Any) -> CWTConfig:
    return CWTConfig(**{"mlm_probability": 0.4, **settings})


def built(**settings: Any) -> tuple[TinyBackbone, CWTModule, Batch]:
    """The tiny backbone in float64, the module, and the batch of the tiny examples."""
    cfg = config(**settings)
    torch.manual_seed(0)
    backbone = TinyBackbone(is_causal=cfg.prediction == "causal", has_head=CWT().needs_lm_head(cfg)).double()
    module = cast(CWTModule, CWT().build_module(cfg, backbone).double())
    return backbone, module, CWT().build_collator(cfg, TINY_TOKENIZER)(tiny_examples())


def gradients(backbone: nn.Module, loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(backbone.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(backbone.parameters(), found, strict=True)]


def hidden_and_labels(backbone: TinyBackbone, batch: Batch) -> tuple[Tensor, Tensor]:
    """At the targets, by indexing with a mask."""
    chosen = batch["labels"] != IGNORE_INDEX
    return backbone(batch["input_ids"], attention_mask=batch["attention_mask"])[chosen], batch["labels"][chosen]


def mean(output: LossOutput, name: str) -> float:
    total, count = output.metrics[name]
    return float(total) / float(count)


@pytest.mark.parametrize(
    "settings",
    [
        {"form": "full"},
        {"negatives": "global"},
        {"cross_entropy_weight": 0.5, "cross_entropy": "chunked"},
        {"prediction": "causal"},
        {"corruption": "headless"},
        {"corruption": "headless", "cross_entropy_weight": 1.0, "labels_after_random_step": True},
        {"whole_word": True},
        RECOVER,
        {**RECOVER, "recovered_table": "copy"},
        {**RECOVER, "recovered_table": "copy", "recovered_bias": "none"},
        {**RECOVER, "recovered_bias": "none", "prediction": "causal"},
    ],
)
def test_every_form_passes_the_contract(settings: dict[str, Any]) -> None:
    cfg = CWTConfig(**settings)
    check_objective(CWT(), cfg, causal=cfg.prediction == "causal", composes=False)


@pytest.mark.parametrize("prediction", ["masked", "causal"])
def test_cross_entropy_alone_composes(prediction: str) -> None:
    cfg = config(contrastive_weight=0, cross_entropy_weight=1, prediction=prediction)
    check_objective(CWT(), cfg, causal=prediction == "causal", composes=True)


# ---------------------------------------------------------------- batches


def rows(count: int, length: int = 128) -> list[Example]:
    generator = np.random.default_rng(1)
    return [
        {"key": f"s/{row}", "ids": generator.integers(5, VOCAB, length).astype(np.uint16), "seed": row}
        for row in range(count)
    ]


def test_next_tokens_are_the_targets_of_all_but_the_last_position() -> None:
    examples = tiny_examples()
    batch = CWT().build_collator(config(prediction="causal"), TINY_TOKENIZER)(examples)
    for row, example in enumerate(examples):
        ids = example["ids"].tolist()
        expected = ids[1:] + [IGNORE_INDEX] * (batch["labels"].shape[1] - len(ids) + 1)
        assert batch["labels"][row].tolist() == expected
        assert batch["input_ids"][row, : len(ids)].tolist() == ids
    assert int(batch["num_targets"]) == sum(len(example["ids"]) - 1 for example in examples)


def test_bert_corruption_is_that_of_mlm() -> None:
    ours = CWT().build_collator(config(), TOKENIZER)(rows(8))
    theirs = MLM().build_collator(MLMConfig(mlm_probability=0.4, masking="exact"), TOKENIZER)(rows(8))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_published_corruption_has_its_shares_and_clean_targets() -> None:
    examples = rows(400)
    batch = CWT().build_collator(CWTConfig(corruption="headless"), TOKENIZER)(examples)
    ids = torch.from_numpy(np.stack([example["ids"].astype(np.int64) for example in examples]))
    seen, chosen = batch["input_ids"], batch["labels"] != IGNORE_INDEX
    assert (chosen.sum(dim=1) == 20).all()  # ceil(0.15 * 128), whatever the batch
    assert torch.equal(batch["labels"][chosen], ids[chosen])  # original ids: never the mask
    assert (seen[~chosen] != ids[~chosen]).double().mean().item() == pytest.approx(0.1, abs=0.005)
    assert not (seen[~chosen] == 4).any()
    assert (seen[chosen] == 4).double().mean().item() == pytest.approx(0.8, abs=0.015)
    assert (seen[chosen] == ids[chosen]).double().mean().item() == pytest.approx(0.18, abs=0.015)


def test_labels_of_the_published_baseline_are_noisy_and_contrast_is_not() -> None:
    settings = {"corruption": "headless", "cross_entropy_weight": 1.0, "labels_after_random_step": True}
    batch = CWT().build_collator(CWTConfig(**settings), TOKENIZER)(rows(400))
    chosen = batch["labels"] != IGNORE_INDEX
    wrong = batch["labels"][chosen] != batch["original_ids"][chosen]
    assert wrong.double().mean().item() == pytest.approx(0.1, abs=0.01)
    backbone, module, batch = built(**settings)
    output = module(backbone, batch)
    chosen = batch["labels"] != IGNORE_INDEX
    hidden, labels = hidden_and_labels(backbone, batch)
    clean = contrastive_weight_tying_loss(hidden, backbone.embedding(batch["original_ids"][chosen]))
    assert mean(output, "contrastive") == pytest.approx(clean.item(), rel=1e-12)
    noisy = F.cross_entropy(backbone.logits(hidden), labels)
    assert mean(output, "cross_entropy") == pytest.approx(noisy.item(), rel=1e-12)


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("form", ["full", "deduplicated"])
@pytest.mark.parametrize("prediction", ["masked", "causal"])
def test_loss_and_all_gradients_equal_the_plain_form(form: str, prediction: str) -> None:
    backbone, module, batch = built(form=form, prediction=prediction)
    output = module(backbone, batch)
    hidden, labels = hidden_and_labels(backbone, batch)
    expected = contrastive_weight_tying_loss(hidden, backbone.embedding(labels))
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(gradients(backbone, output.loss), gradients(backbone, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_the_table_gets_the_gradients_of_both_its_uses() -> None:
    backbone, module, batch = built()
    total = gradients(backbone, module(backbone, batch).loss)[0]
    hidden, labels = hidden_and_labels(backbone, batch)
    rows_KD = backbone.embedding(labels)
    of_input = gradients(backbone, contrastive_weight_tying_loss(hidden, rows_KD.detach()))[0]
    of_target = gradients(backbone, contrastive_weight_tying_loss(hidden.detach(), rows_KD))[0]
    torch.testing.assert_close(total, of_input + of_target, rtol=0, atol=1e-12)
    assert set(of_target.abs().sum(dim=1).nonzero().flatten().tolist()) == set(labels.tolist())


def test_a_padding_row_takes_part_and_gets_no_gradient() -> None:
    backbone, module, batch = built(prediction="causal")
    backbone.embedding.padding_idx = 7
    batch["labels"][0, :5] = 7
    hidden, labels = hidden_and_labels(backbone, batch)
    output = module(backbone, batch)
    assert output.loss.item() == pytest.approx(
        contrastive_weight_tying_loss(hidden, backbone.embedding.weight[labels]).item(), rel=1e-6
    )
    of_table = gradients(backbone, output.loss)[0]
    assert not of_table[7].any() and of_table[labels[-1]].any()


@pytest.mark.parametrize("form", ["full", "deduplicated"])
def test_ignored_positions_are_neither_targets_nor_negatives(form: str) -> None:
    backbone, module, batch = built(prediction="causal", form=form)
    batch["labels"][:, 5:9] = IGNORE_INDEX
    output = module(backbone, batch)
    hidden, labels = hidden_and_labels(backbone, batch)
    expected = contrastive_weight_tying_loss(hidden, backbone.embedding(labels))
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    # ids that stand behind ignored places alone: their rows get a gradient as inputs, none as negatives
    elsewhere = {**batch, "original_ids": torch.where(batch["labels"] == IGNORE_INDEX, 50, batch["labels"])}
    again = module(backbone, elsewhere)
    assert torch.equal(again.loss, output.loss)
    for ours, theirs in zip(gradients(backbone, again.loss), gradients(backbone, output.loss), strict=True):
        assert torch.equal(ours, theirs)


def test_terms_are_mixed_by_their_weights() -> None:
    weights = {"contrastive_weight": 0.7, "cross_entropy_weight": 0.3}
    backbone, module, batch = built(**weights)
    output = module(backbone, batch)
    hidden, labels = hidden_and_labels(backbone, batch)
    contrast = contrastive_weight_tying_loss(hidden, backbone.embedding(labels))
    entropy = F.cross_entropy(backbone.logits(hidden), labels)
    assert mean(output, "contrastive") == pytest.approx(contrast.item(), rel=1e-12)
    assert mean(output, "cross_entropy") == pytest.approx(entropy.item(), rel=1e-12)
    expected = 0.7 * contrast + 0.3 * entropy
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(gradients(backbone, output.loss), gradients(backbone, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)  # 0.7 in float32 weights the terms' sum


def test_metrics_describe_the_contrast() -> None:
    backbone, module, batch = built(prediction="causal")
    output = module(backbone, batch)
    hidden, labels = hidden_and_labels(backbone, batch)
    distinct = labels.unique()
    logits = hidden @ backbone.embedding.weight[distinct].T + labels.bincount()[distinct].double().log()
    expected = F.cross_entropy(logits, torch.searchsorted(distinct, labels))
    assert mean(output, "in_batch_cross_entropy") == pytest.approx(expected.item(), rel=1e-9)
    log_counts = labels.bincount()[labels].double().log().mean().item()
    assert mean(output, "contrastive") - mean(output, "in_batch_cross_entropy") == pytest.approx(log_counts, rel=1e-6)
    assert mean(output, "targets") == len(labels) and mean(output, "columns") == len(distinct)
    assert mean(output, "largest_score") == pytest.approx(logits.max().item(), rel=1e-9)


@pytest.mark.parametrize(
    "settings", [{}, {"cross_entropy_weight": 1.0}, RECOVER, {**RECOVER, "recovered_table": "copy"}]
)
@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("recovering", [False, True])
def test_no_target_or_one(settings: dict[str, Any], kept: int, recovering: bool) -> None:
    backbone, module, batch = built(**settings)
    module.set_progress(9, 0.9 if recovering else 0.1)
    places = (batch["labels"] != IGNORE_INDEX).flatten().nonzero().flatten()
    batch["labels"].view(-1)[places[kept:]] = IGNORE_INDEX
    output = module(backbone, batch)
    parameters = [*backbone.parameters(), *module.parameters()]
    found = torch.autograd.grad(output.loss, parameters, allow_unused=True)
    assert all(gradient is None or bool(gradient.isfinite().all()) for gradient in found)
    if not (kept and (settings.get("cross_entropy_weight") or (recovering and settings))):
        assert output.loss.item() == 0.0  # one target is all there is to choose from
    else:
        assert output.loss.item() > 1


def test_a_batch_of_one_row() -> None:
    backbone, module, _ = built()
    batch = CWT().build_collator(config(), TINY_TOKENIZER)(tiny_examples()[:1])
    output = module(backbone, batch)
    hidden, labels = hidden_and_labels(backbone, batch)
    expected = contrastive_weight_tying_loss(hidden, backbone.embedding(labels))
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_hidden_state_that_is_no_number_shows_in_the_loss() -> None:
    backbone, module, batch = built()
    backbone.norm.weight.data[0] = float("nan")
    assert not bool(torch.isfinite(module(backbone, batch).loss))


# ---------------------------------------------------------------- models


def test_a_headless_model_has_no_parameters_of_a_head_and_its_weights_fit_one_that_has() -> None:
    cfg = config()
    assert not CWT().needs_lm_head(cfg) and CWT().needs_lm_head(config(cross_entropy_weight=0.1))
    backbone = Backbone(BertModel(BertConfig(**SIZES), add_pooling_layer=False), has_head=False)
    trained = PretrainingModel(backbone, CWT().build_module(cfg, backbone))
    assert all(name.startswith(("embeddings.", "encoder.")) for name in backbone.model.state_dict())
    assert not dict(trained.objective.named_parameters()) and not dict(trained.objective.named_buffers())
    whole = BertForMaskedLM(BertConfig(**SIZES))
    report = whole.bert.load_state_dict(backbone.model.state_dict())
    assert not report.missing_keys and not report.unexpected_keys
    assert torch.equal(whole.get_output_embeddings().weight, backbone.get_input_embeddings().weight)


def test_faults_of_models_and_settings() -> None:
    with pytest.raises(ConfigError, match=r"prediction: found 'masked' with a causal model.*prediction=causal"):
        CWT().build_module(config(), TinyBackbone(is_causal=True))
    with pytest.raises(ConfigError, match=r"prediction: found 'causal' with an encoder.*prediction=masked"):
        CWT().build_module(config(prediction="causal"), TinyBackbone())
    narrow = Backbone(ElectraModel(ElectraConfig(**SIZES, embedding_size=8)), has_head=False)
    with pytest.raises(ConfigError, match=r"input table of width 8 under hidden states of 16"):
        CWT().build_module(config(), narrow)
    maskless = TokenizerInfo(vocab_size=10, pad_id=0, mask_id=None)
    for corruption in ("bert", "headless"):
        with pytest.raises(ConfigError, match="the tokenizer has no mask token"):
            CWT().build_collator(config(corruption=corruption), maskless)
    assert CWT().build_collator(config(prediction="causal"), maskless)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"contrastive_weight": 0}, "above 0"),
        ({"recover_from": 0.5, "cross_entropy_weight": 1}, "needs no recovery"),
        ({"recover_from": 1.0}, "less than 1"),
        ({"corruption": "headless", "prediction": "causal"}, "corruption=headless with"),
        ({"corruption": "headless", "whole_word": True}, "corruption=headless with"),
        ({"labels_after_random_step": True, "cross_entropy_weight": 1}, "labels_after_random_step with"),
        ({"temperature": 0}, "greater than 0"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CWTConfig(**settings)


# ---------------------------------------------------------------- recovery


def train_once(backbone: TinyBackbone, module: CWTModule, batch: Batch, *, rate: float = 0.1) -> LossOutput:
    """One step of gradient descent."""
    parameters = [*backbone.parameters(), *module.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=rate)
    output = cast(LossOutput, module(backbone, batch))
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return output


@pytest.mark.parametrize("table", ["tied", "copy"])
@pytest.mark.parametrize("bias", ["none", "log_unigram"])
def test_a_recovered_head_starts_as_the_table(table: str, bias: str) -> None:
    """And a copy is a tensor of its own from then on."""
    backbone, module, batch = built(**RECOVER, recovered_table=table, recovered_bias=bias)
    module.set_progress(0, 0.0)
    train_once(backbone, module, batch)
    module.set_progress(1, 0.5)
    hidden, labels = hidden_and_labels(backbone, batch)
    start = backbone.embedding.weight.detach().clone()
    logits = hidden @ start.T
    if bias == "log_unigram":
        logits = logits + ((torch.bincount(labels, minlength=97) + 1) / (len(labels) + 97)).log()
    output = train_once(backbone, module, batch)
    assert output.loss.item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert "contrastive" not in output.metrics and "accuracy" in output.metrics
    head = cast(RecoveredHead, module.head)
    matrix, _ = head.table_and_bias(backbone.embedding)
    moved = backbone.embedding.weight
    assert not torch.equal(moved, start) and not torch.equal(matrix, start)
    assert torch.equal(matrix, moved) == (table == "tied")
    train_once(backbone, module, batch)  # the start is taken once
    if table == "copy":
        torch.testing.assert_close(head.copied_table, start)


def test_the_copy_gets_gradients_that_the_table_does_not() -> None:
    backbone, module, batch = built(**RECOVER, recovered_table="copy", recovered_bias="none")
    module.set_progress(1, 0.5)
    output = module(backbone, batch)
    hidden, labels = hidden_and_labels(backbone, batch)
    copy = backbone.embedding.weight.detach().clone().requires_grad_()
    expected = F.cross_entropy(hidden @ copy.T, labels)
    head = cast(RecoveredHead, module.head)
    (of_change,) = torch.autograd.grad(output.loss, [head.table_change.weight], retain_graph=True)
    (of_copy,) = torch.autograd.grad(expected, [copy], retain_graph=True)
    torch.testing.assert_close(of_change.double(), of_copy, rtol=1e-5, atol=1e-8)
    for ours, theirs in zip(gradients(backbone, output.loss), gradients(backbone, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_a_saved_recovery_goes_on_where_it_was() -> None:
    """Whether in training or in evaluation, and unigrams count targets of training before the change alone."""
    backbone, module, batch = built(**RECOVER)
    module.eval()
    module(backbone, batch)
    head = cast(RecoveredHead, module.head)
    assert int(head.token_counts.sum()) == 0
    module.train()
    module.set_progress(0, 0.1)
    module(backbone, batch)
    assert int(head.token_counts.sum()) == int(batch["num_targets"])
    module.set_progress(1, 0.6)
    recovering = module(backbone, batch)
    assert int(head.token_counts.sum()) == int(batch["num_targets"])
    _, fresh, _ = built(**RECOVER)
    fresh.eval()
    assert "contrastive" in fresh(backbone, batch).metrics
    fresh.load_state_dict(module.state_dict())
    assert fresh(backbone, batch).loss.item() == recovering.loss.item()


def test_held_out_loss_asks_no_other_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, module, batch = built(negatives="global", **RECOVER)
    asked: list[int] = []
    monkeypatch.setattr("sparselt_dist.objectives.cwt.gather_ids", lambda ids: asked.append(len(ids)) or (ids, 0))
    module(backbone, batch)
    module.eval()
    module(backbone, batch)
    assert asked == [int(batch["num_targets"])]


def test_logits_of_a_head_add_the_bias_in_float32() -> None:
    hidden, table, bias = torch.randn(3, 4), torch.randn(5, 4), torch.full((5,), -11.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head_logits(hidden, table, bias)
        product = F.linear(hidden, table)
    assert product.dtype == torch.bfloat16 and torch.equal(found, product.float() + bias)

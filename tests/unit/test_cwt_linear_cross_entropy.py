"""Chunked cross-entropy: the plain one's loss and gradients, for plain products and for heads of real models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, GPTNeoXConfig, GPTNeoXForCausalLM

from sparselt_dist.data.batch import IGNORE_INDEX
from sparselt_dist.models.backbone import Backbone
from sparselt_dist.objectives import linear_cross_entropy
from sparselt_dist.objectives.contract import TINY_TOKENIZER, TinyBackbone, tiny_examples
from sparselt_dist.objectives.linear_cross_entropy import (
    chunked_cross_entropy,
    count_correct,
    full_cross_entropy,
    head_cross_entropy,
)
from sparselt_dist.objectives.mlm import MLM
from sparselt_dist.objectives.settings import MLMConfig

SIZES = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def inputs(dtype: torch.dtype, count: int = 50) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states [N, 8], weight [97, 8], bias [97], labels [N] of which some are ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (count, 97))
    bias = torch.randn(97, generator=generator, dtype=torch.float64)
    labels = torch.randint(97, (count,), generator=generator)
    labels[1::2] = F.linear(hidden, weight, bias).argmax(dim=1)[1::2]  # some are right
    labels[::7] = IGNORE_INDEX
    wide = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, bias)]
    return wide[0], wide[1], wide[2], labels


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 50, 1000])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_equal_to_plain_cross_entropy(dtype: torch.dtype, close: float, rows: int, recompute: bool) -> None:
    hidden, weight, bias, labels = inputs(dtype)
    plain = F.cross_entropy(F.linear(hidden, weight, bias), labels, ignore_index=IGNORE_INDEX, reduction="sum")
    expected = torch.autograd.grad(plain * 0.02, [hidden, weight, bias])
    found = chunked_cross_entropy(
        lambda piece: F.linear(piece, weight, bias),
        *(hidden, labels),
        shared=[weight, bias],
        rows=rows,
        recompute=recompute,
    )
    assert found.total.dtype == dtype and found.total.item() == pytest.approx(plain.item(), rel=close)
    for ours, theirs in zip(torch.autograd.grad(found.total * 0.02, [hidden, weight, bias]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=close, atol=close)
    whole = full_cross_entropy(lambda piece: F.linear(piece, weight, bias), hidden, labels)
    assert int(found.correct) == int(whole.correct) == 21
    torch.testing.assert_close(found.largest, whole.largest)


def test_gradients_go_where_they_are_asked_for() -> None:
    hidden, weight, bias, labels = inputs(torch.float64)
    frozen = bias.detach()
    found = chunked_cross_entropy(
        lambda piece: F.linear(piece, weight, frozen), hidden.detach(), labels, shared=[weight, frozen], rows=20
    )
    plain = F.cross_entropy(F.linear(hidden.detach(), weight, frozen), labels, reduction="sum")
    (ours,), (theirs,) = torch.autograd.grad(found.total, [weight]), torch.autograd.grad(plain, [weight])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        silent = chunked_cross_entropy(lambda piece: F.linear(piece, weight, bias), hidden, labels, shared=[], rows=20)
    assert not silent.total.requires_grad
    nothing = chunked_cross_entropy(
        lambda piece: F.linear(piece, weight, bias), hidden[:0], labels[:0], shared=[weight, bias], rows=20
    )
    assert nothing.total.item() == 0 and int(nothing.correct) == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(nothing.total, [hidden, weight, bias]))


def bert() -> Backbone:
    return Backbone(BertForMaskedLM(BertConfig(**SIZES)), has_head=True)


def gpt() -> Backbone:
    return Backbone(GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, tie_word_embeddings=False)), has_head=True)


def _use_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 8 targets."""
    monkeypatch.setattr(linear_cross_entropy, "_FEWEST_ROWS", 8)
    monkeypatch.setattr(linear_cross_entropy, "_SCORES_AT_ONCE", 1)


@pytest.mark.parametrize("build", [bert, gpt, TinyBackbone])
@pytest.mark.parametrize("path", ["in the forward pass", "recomputed", "autocast"])
def test_heads_of_models(build: Callable[[], nn.Module], path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tied or not, with a transform or without: every parameter's gradient, those of the body included."""
    torch.manual_seed(0)
    backbone = build().eval()  # without dropout
    ids = torch.randint(5, 97, (3, 12))
    labels = torch.randint(5, 97, (36,))
    if path == "recomputed":
        next(backbone.parameters()).ds_id = 0  # as a parameter that ZeRO-3 has partitioned
    _use_pieces(monkeypatch)
    found = {}
    for chunked in (False, True):
        backbone.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=path == "autocast"):
            hidden = backbone(ids).flatten(0, 1)
            loss = head_cross_entropy(backbone, hidden, labels, chunked=chunked).total / 36
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}
        found[chunked] = loss.item(), gradients
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-6)
    assert found[True][1].keys() == found[False][1].keys()
    tolerance = 2e-3 if path == "autocast" else 1e-6
    for name, gradient in found[False][1].items():
        torch.testing.assert_close(found[True][1][name], gradient, rtol=tolerance, atol=tolerance, msg=name)


def test_fp16_recomputes_since_its_gradients_must_be_scaled_first(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    backbone, labels = TinyBackbone(), torch.randint(5, 97, (36,))
    hidden = torch.randn(36, 16)
    _use_pieces(monkeypatch)
    passes: list[bool] = []
    monkeypatch.setattr(backbone, "logits", lambda h: passes.append(True) or F.linear(h, backbone.embedding.weight))
    with torch.autocast("cpu", dtype=torch.float16):
        total = head_cross_entropy(backbone, hidden, labels, chunked=True).total
        before = len(passes)
        total.backward()
    assert before == 6 and len(passes) == 11  # one look at the number of classes and five pieces, then these again


def test_masked_language_modelling_with_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    _use_pieces(monkeypatch)
    batch = MLM().build_collator(MLMConfig(mlm_probability=0.4), TINY_TOKENIZER)(tiny_examples())
    outputs = []
    for form in ("full", "chunked"):
        torch.manual_seed(0)
        backbone = TinyBackbone()
        cfg = MLMConfig(mlm_probability=0.4, cross_entropy=form)  # type: ignore[arg-type]
        output = MLM().build_module(cfg, backbone)(backbone, batch)
        output.loss.backward()
        outputs.append((output, backbone.embedding.weight.grad))
    (full, of_full), (chunked, of_chunked) = outputs
    assert chunked.loss.item() == pytest.approx(full.loss.item(), rel=1e-6)
    assert chunked.metrics["accuracy"] == full.metrics["accuracy"]
    torch.testing.assert_close(of_chunked, of_full, rtol=1e-5, atol=1e-7)


def test_half_precision_scores_give_the_rounded_gradient() -> None:
    """Computed in float32 from bf16 scores; the factor from above is not rounded before it is applied."""
    scores = torch.randn(40, 97, generator=torch.Generator().manual_seed(1)).mul(4).bfloat16().requires_grad_()
    labels = inputs(torch.float32, 40)[3]
    found = full_cross_entropy(lambda hidden: hidden, scores, labels)
    plain = F.cross_entropy(scores.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")
    assert found.total.dtype == torch.float32 and found.total.item() == pytest.approx(plain.item(), rel=1e-6)
    (ours,), (theirs,) = (torch.autograd.grad(total * 1.003, [scores]) for total in (found.total, plain))
    assert ours.dtype == torch.bfloat16
    bias = (ours.float() / theirs.float())[theirs != 0].mean().item()
    assert bias == pytest.approx(1, abs=2e-4)  # 1.003 in bf16 is 1.0
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0)


def test_small_gradients_of_float16_scores_survive_until_the_loss_is_scaled() -> None:
    scores = torch.tensor([[20.0, 0.0]], dtype=torch.float16, requires_grad=True)
    found = full_cross_entropy(lambda hidden: hidden, scores, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(found.total * 2.0**16, [scores])
    assert gradient[0, 1].item() == pytest.approx(2.0**16 * 2.06115e-9, rel=1e-2)


def test_of_equal_scores_the_first_is_the_guess() -> None:
    scores = torch.zeros(3, 5)
    found = full_cross_entropy(lambda hidden: hidden, scores, torch.tensor([0, 4, 2]))
    assert int(found.correct) == 1 and found.total.item() == pytest.approx(3 * 1.6094379)


def test_a_score_that_is_not_a_number_reaches_the_loss() -> None:
    scores = torch.zeros(2, 5).index_fill(0, torch.tensor([1]), float("nan"))
    found = full_cross_entropy(lambda hidden: hidden, scores, torch.tensor([0, 1]))
    assert found.total.isnan() and found.largest.isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rows_that_are_picked_on_a_cpu_count_as_all_rows_do_on_an_accelerator(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randint(0, 4, (500, 7), generator=generator).to(dtype)  # many ties
    labels = torch.randint(0, 7, (500,), generator=generator)
    labels[::5] = IGNORE_INDEX
    own = scores.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    expected = (scores.argmax(dim=1) == labels).sum()
    assert 0 < expected < (own == scores.amax(dim=1)).sum()
    assert count_correct(scores, labels, own == scores.amax(dim=1)) == expected

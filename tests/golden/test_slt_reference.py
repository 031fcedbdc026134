"""The whole SLT step against an independent numpy form in float64: every term, and every gradient by central differences.

The reference reads the encoder's states from Hugging Face's own BERT and writes all else down again: type scores, draw,
gate, the decoder's double embedding pass, its layer, both heads, all four losses and their weights.

B rows, T positions, S decoder positions, D hidden size, K types, V vocabulary, H heads.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from sparselt_dist.data.batch import Batch
from sparselt_dist.models.backbone import Backbone
from sparselt_dist.objectives.contract import TINY_TOKENIZER, tiny_examples
from sparselt_dist.objectives.gumbel import gumbel_noise
from sparselt_dist.objectives.settings import SLTConfig
from sparselt_dist.objectives.slt import SEEDS_KEY, SLT, SLTModule, temperature_at

SIZES: dict[str, Any] = {
    "vocab_size": TINY_TOKENIZER.vocab_size,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "attn_implementation": "sdpa",
}
TYPES = 6
# Weights that make every term as large as the others, so that none hides in rounding.
WEIGHTS = {"reconstruction_weight": 0.7, "sparsity_weight": 1.3, "diversity_weight": 2.1}
TERMS = ("mlm_loss", "reconstruction_loss", "sparsity_loss", "diversity_loss")
Parameters = dict[str, np.ndarray]


def _model(dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[Backbone, SLTModule]:
    """A tiny BERT and the objective, all weights moved away from their initial ones and zeros."""
    torch.manual_seed(0)
    backbone = Backbone(BertForMaskedLM(BertConfig(**SIZES)), has_head=True)
    module = SLT().build_module(SLTConfig(num_types=TYPES, **{**WEIGHTS, **settings}), backbone)
    assert isinstance(module, SLTModule)
    with torch.no_grad():
        for parameter in [*backbone.parameters(), *module.parameters()]:
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return backbone.to(dtype), module.to(dtype)


def _batch() -> Batch:
    return SLT().build_collator(SLTConfig(), TINY_TOKENIZER)(tiny_examples()[:5])


# ---------------------------------------------------------------- the reference


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def _gelu(values: np.ndarray) -> np.ndarray:
    return np.asarray(values * 0.5 * (1 + np.vectorize(math.erf)(values / math.sqrt(2))))


def _norm(values: np.ndarray, weights: Parameters, name: str, epsilon: float) -> np.ndarray:
    centred = values - values.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return np.asarray(scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"])


def _linear(values: np.ndarray, weights: Parameters, name: str) -> np.ndarray:
    return np.asarray(values @ weights[f"{name}.weight"].T + weights[f"{name}.bias"])


def _attention(
    states: np.ndarray, memory: np.ndarray, weights: Parameters, name: str, allowed: np.ndarray
) -> np.ndarray:
    heads, width = SIZES["num_attention_heads"], SIZES["hidden_size"]
    size = width // heads
    query, key, value = (
        _linear(source, weights, f"{name}.{part}")
        for part, source in (("query", states), ("key", memory), ("value", memory))
    )
    mixed = np.zeros_like(query)
    for row in range(len(states)):
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            scores = query[row, :, own] @ key[row, :, own].T * size**-0.5
            mixed[row, :, own] = _softmax(np.where(allowed[row], scores, -1e30)) @ value[row, :, own]
    return _linear(mixed, weights, f"{name}.output")


def _embedded(words: np.ndarray, weights: Parameters) -> np.ndarray:
    name = "backbone.model.bert.embeddings"
    positions = weights[f"{name}.position_embeddings.weight"][: words.shape[1]]
    kinds = weights[f"{name}.token_type_embeddings.weight"][0]
    return _norm(words + positions + kinds, weights, f"{name}.LayerNorm", 1e-12)


def _decoded(ids: np.ndarray, memory: np.ndarray, mask: np.ndarray, weights: Parameters) -> np.ndarray:
    """Decoder states [B, S, D]."""
    name = "objective.decoder"
    states = weights["backbone.model.bert.embeddings.word_embeddings.weight"][ids]
    states = _embedded(_embedded(states, weights), weights)
    states = _norm(states, weights, f"{name}.embedding_norm", 1e-5)
    length = ids.shape[1]
    visible = np.repeat(mask[:, None, :] == 1, length, axis=1)
    causal = visible[:, :, :length] & np.tril(np.ones((length, length), dtype=bool))
    layer = f"{name}.layer"
    seen = _attention(states, states, weights, f"{layer}.self_attention", causal)
    states = _norm(states + seen, weights, f"{layer}.self_attention_norm", 1e-5)
    seen = _attention(states, memory, weights, f"{layer}.cross_attention", visible)
    states = _norm(states + seen, weights, f"{layer}.cross_attention_norm", 1e-5)
    inner = _gelu(_linear(states, weights, f"{layer}.inner"))
    return _norm(states + _linear(inner, weights, f"{layer}.outer"), weights, f"{layer}.output_norm", 1e-5)


def _cross_entropy(scores: np.ndarray, labels: np.ndarray) -> float:
    """The mean over labels that are not -100, one at a time."""
    losses = [
        math.log(np.exp(row - row.max()).sum()) + row.max() - row[label]
        for row, label in zip(scores.reshape(-1, scores.shape[-1]), labels.reshape(-1), strict=True)
        if label != -100
    ]
    return sum(losses) / len(losses) if losses else 0.0


def _types(clean: np.ndarray, mask: np.ndarray, weights: Parameters) -> np.ndarray:
    scores = clean @ weights["objective.typer.classifier.weight"].T
    scores[..., 0] = 0
    scores[mask == 0] = 0
    return np.asarray(scores)


def _reference(
    weights: Parameters, corrupted: np.ndarray, clean: np.ndarray, batch: Batch, temperature: float
) -> dict[str, float]:
    """All terms from the encoder's states of both passes."""
    ids, mask, labels = (batch[key].numpy() for key in ("original_ids", "attention_mask", "labels"))
    table = weights["backbone.model.bert.embeddings.word_embeddings.weight"]
    scores = _types(clean, mask, weights)
    noise = gumbel_noise(batch[SEEDS_KEY], ids.shape[1], TYPES).numpy().astype(np.float64)
    draw = _softmax((scores + noise) / temperature)
    vectors = weights["objective.typer.type_vectors"].copy()
    vectors[0] = 0
    states = _decoded(ids[:, :-1], clean * (draw @ vectors), mask, weights)
    following = np.where(mask[:, 1:] == 1, ids[:, 1:], -100)
    head = "backbone.model.cls.predictions"
    transformed = _gelu(_linear(corrupted, weights, f"{head}.transform.dense"))
    transformed = _norm(transformed, weights, f"{head}.transform.LayerNorm", 1e-12)
    mean = _softmax(scores)[mask == 1].mean(axis=0)
    perplexity = math.exp(-(mean * np.log(mean + 1e-7)).sum())
    terms = {
        "mlm_loss": _cross_entropy(transformed @ table.T + weights[f"{head}.bias"], labels),
        "reconstruction_loss": _cross_entropy(states @ table.T + weights["objective.decoder.head.bias"], following),
        "sparsity_loss": -math.log(mean[0]),
        "diversity_loss": (TYPES - perplexity) / TYPES,
    }
    alpha, beta, gamma = WEIGHTS.values()
    total = np.dot([1, alpha, beta, gamma], list(terms.values()))
    return {**terms, "loss": float(total)}


def _weights(backbone: nn.Module, module: nn.Module) -> Parameters:
    both = {"backbone": backbone, "objective": module}
    return {
        f"{part}.{name}": value.detach().numpy()
        for part, owner in both.items()
        for name, value in owner.named_parameters()
    }


@torch.no_grad()
def _reference_of(backbone: Backbone, module: SLTModule, batch: Batch, temperature: float) -> dict[str, float]:
    encoder = backbone.model.bert
    corrupted, clean = (
        encoder(input_ids=batch[key], attention_mask=batch["attention_mask"])[0].numpy()
        for key in ("input_ids", "original_ids")
    )
    return _reference(_weights(backbone, module), corrupted, clean, batch, temperature)


def _found(module: SLTModule, backbone: Backbone, batch: Batch) -> dict[str, float]:
    output = module(backbone, batch)
    means = {name: float(total / count) for name, (total, count) in output.metrics.items() if name in TERMS}
    return {**means, "loss": float(output.loss.detach())}


# ---------------------------------------------------------------- terms and gradients


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("step", [0, 1000, 80_000])
def test_every_term_equals_the_equations(dtype: torch.dtype, tolerance: float, step: int) -> None:
    backbone, module = _model(decoder_layer_drop=0.0)
    batch = _batch()
    expected = _reference_of(backbone, module, batch, temperature_at(step))
    backbone, module = backbone.to(dtype), module.to(dtype)
    module.set_progress(step, 0.5)
    found = _found(module, backbone, batch)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=tolerance), name


def test_every_gradient_equals_central_differences_of_the_equations() -> None:
    """Each parameter along a random direction; the encoder's are reached through its states, tied tables once."""
    backbone, module = _model(decoder_layer_drop=0.0)
    batch = _batch()
    module.set_progress(1000, 0.5)
    module(backbone, batch).loss.backward()
    generator = torch.Generator().manual_seed(9)
    checked = 0
    for name, parameter in [*backbone.named_parameters(), *module.named_parameters()]:
        direction = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
        assert parameter.grad is not None, name
        slope = float((parameter.grad * direction).sum())
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 1e-5 * direction)
            values.append(_reference_of(backbone, module, batch, module.temperature)["loss"])
            with torch.no_grad():
                parameter.sub_(sign * 1e-5 * direction)
        expected = (values[0] - values[1]) / 2e-5
        assert slope == pytest.approx(expected, rel=1e-5, abs=1e-7), name
        checked += 1
    assert checked == 2 * 16 + 3 + 2 + 5 + 2 + 2 + 26 + 1  # layers, embeddings, their norm, MLM head, typer, decoder


def test_a_skipped_layer_leaves_the_source_out_of_the_reconstruction() -> None:
    backbone, module = _model(decoder_layer_drop=0.5)
    batch = _batch()
    dropped = next(step for step in range(99) if (module.set_progress(step, 0.0), not module.keep_layer)[1])  # type: ignore[func-returns-value]
    module.set_progress(dropped, 0.0)
    output = module(backbone, batch)
    total, count = output.metrics["reconstruction_loss"]
    weights, ids = _weights(backbone, module), batch["original_ids"].numpy()
    table = weights["backbone.model.bert.embeddings.word_embeddings.weight"]
    states = _embedded(_embedded(table[ids[:, :-1]], weights), weights)
    states = _norm(states, weights, "objective.decoder.embedding_norm", 1e-5)
    labels = np.where(batch["attention_mask"].numpy()[:, 1:] == 1, ids[:, 1:], -100)
    expected = _cross_entropy(states @ table.T + weights["objective.decoder.head.bias"], labels)
    assert float(total / count) == pytest.approx(expected, rel=1e-12)
    output.terms["slt/num_predicted"].backward()
    moved = {
        name for name, value in _named(backbone, module) if value.grad is not None and bool((value.grad != 0).any())
    }
    assert moved == {
        *(f"backbone.model.bert.embeddings.{name}" for name in _EMBEDDINGS),
        "objective.decoder.embedding_norm.weight",
        "objective.decoder.embedding_norm.bias",
        "objective.decoder.head.bias",
    }
    module.eval()
    assert _found(module, backbone, batch)["reconstruction_loss"] != pytest.approx(expected)  # never in evaluation


_EMBEDDINGS = [
    "word_embeddings.weight",
    "position_embeddings.weight",
    "token_type_embeddings.weight",
    "LayerNorm.weight",
    "LayerNorm.bias",
]


def _named(backbone: nn.Module, module: nn.Module) -> list[tuple[str, Tensor]]:
    both = {"backbone": backbone, "objective": module}
    return [(f"{part}.{name}", value) for part, owner in both.items() for name, value in owner.named_parameters()]


@pytest.mark.parametrize(
    ("term", "absent"),
    [
        ("num_targets", ("objective.typer", "objective.decoder")),
        ("slt/num_predicted", ("backbone.model.cls",)),
        ("num_tokens", ("objective.typer.type_vectors", "objective.decoder", "backbone.model.cls")),
    ],
)
def test_which_term_moves_what(term: str, absent: tuple[str, ...]) -> None:
    """MLM leaves typer and decoder alone; reconstruction the MLM head; the regularisers all but classifier and encoder."""
    backbone, module = _model(decoder_layer_drop=0.0)
    module.set_progress(1000, 0.5)
    module(backbone, _batch()).terms[term].backward()
    for name, value in _named(backbone, module):
        size = 0.0 if value.grad is None else float(value.grad.abs().max())
        if name.startswith(absent):
            assert size == 0.0, name
        elif ".key.bias" in name:  # exactly zero in exact arithmetic: softmax does not see a shift
            assert size < 1e-6, name
        else:
            assert size > 1e-12, name
    for table in (module.typer.classifier.weight, module.typer.type_vectors):
        assert table.grad is None or bool((table.grad[0] == 0).all())


def test_the_padding_row_learns_from_the_tied_heads_only() -> None:
    backbone, module = _model(decoder_layer_drop=0.0)
    table = backbone.get_input_embeddings().weight
    for term, moves in (("num_targets", True), ("slt/num_predicted", True), ("num_tokens", False)):
        table.grad = None
        module(backbone, _batch()).terms[term].backward()
        assert isinstance(table.grad, Tensor) and bool((table.grad[0] != 0).any()) == moves

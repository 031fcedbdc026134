"""The switches of crammed-bert that leave the official model: RMS norm, rotary positions, other gates."""

import math

import pytest
import torch
import torch.nn.functional as F

from sparselt_dist.config import ModelSection
from sparselt_dist.errors import CheckpointError, ConfigError
from sparselt_dist.models.backbone import Backbone
from sparselt_dist.models.construction import make_config, make_model
from sparselt_dist.models.crammed import CrammedBertConfig, CrammedBertForMaskedLM, rotate, rotation_at
from sparselt_dist.objectives.base import TokenizerInfo

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 12,
}
VOCABULARY = 53
NEW = {"norm_type": "rms", "position_type": "rope", "gate_activation": "relu2"}
TOKENIZER = TokenizerInfo(vocab_size=VOCABULARY, pad_id=0, mask_id=4)


def tiny(**fields):
    torch.manual_seed(0)
    model = CrammedBertForMaskedLM(CrammedBertConfig(vocab_size=VOCABULARY, **{**SIZES, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def ids(rows=3, length=10):
    return torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def naive_rms(hidden, norm, eps):
    return hidden / (hidden.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight


def naive_attention(attention, hidden, heads, theta):
    """Pair by pair and position by position, as complex numbers turned by exp(i p theta^(-2j/E))."""
    rows, length, width = hidden.shape
    size = width // heads
    fused = (hidden @ attention.qkv.weight.T).view(rows, length, heads, 3, size)
    turns = [[p * theta ** (-2 * j / size) for j in range(size // 2)] for p in range(length)]
    angles = torch.tensor(turns, dtype=torch.float64)
    spins = torch.polar(torch.ones_like(angles), angles)[None, :, None]
    half = size // 2
    query, key = (torch.complex(fused[..., n, :half], fused[..., n, half:]) * spins for n in (0, 1))
    scores = torch.einsum("bqhe,bkhe->bhqk", query, key.conj()).real / math.sqrt(size)
    mixed = torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1), fused[..., 2, :])
    return mixed.reshape(rows, length, width) @ attention.output.weight.T


@pytest.mark.parametrize(
    ("gate", "formula"),
    [("silu", lambda g: g * torch.sigmoid(g)), ("relu2", lambda g: g.clamp(min=0) ** 2), ("gelu", F.gelu)],
)
def test_all_variants_together_follow_the_formulas(gate, formula):
    model = tiny(**{**NEW, "gate_activation": gate}, rope_theta=500.0).double()
    encoder, eps = model.encoder, model.config.layer_norm_eps
    hidden = naive_rms(encoder.embeddings.word_embeddings.weight[ids()], encoder.embeddings.norm, eps)
    for layer in encoder.layers:
        normed = naive_rms(hidden, layer.attention_norm, eps)
        hidden = hidden + naive_attention(layer.attention, normed, 3, 500.0)
        values, gates = (naive_rms(hidden, layer.ffn_norm, eps) @ layer.ffn.input.weight.T).chunk(2, -1)
        hidden = hidden + (values * formula(gates)) @ layer.ffn.output.weight.T
    expected = naive_rms(hidden, encoder.final_norm, eps) @ encoder.embeddings.word_embeddings.weight.T
    torch.testing.assert_close(model(ids()).logits, expected, rtol=0, atol=1e-11)


def test_rotated_products_depend_on_the_distance_alone():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def product(first, second):
        at = [rotation_at(torch.tensor([[place]]), 8, 10000.0, torch.float64) for place in (first, second)]
        return (rotate(query, at[0]) * rotate(key, at[1])).sum()

    torch.testing.assert_close(product(3, 1), product(103, 101), rtol=1e-12, atol=0)
    assert abs(product(3, 1) - product(3, 2)) > 1e-3
    assert abs(product(3, 1) - product(1, 3)) > 1e-3  # before and after differ
    whole = rotate(query, rotation_at(torch.tensor([[7]]), 8, 10000.0, torch.float64))
    torch.testing.assert_close(whole.norm(), query.norm())


def test_rotary_model_has_no_position_weights_and_no_longest_row():
    model = tiny(**NEW)
    names = dict(model.named_parameters())
    assert not [name for name in names if "position" in name or name.endswith("bias")]
    assert not list(model.buffers())
    assert torch.isfinite(model(ids(1, 40)).logits).all()
    moved = ids(1, 10)
    shifted = model(moved, position_ids=torch.arange(10)[None] + 5).logits
    torch.testing.assert_close(shifted, model(moved).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(moved.flip(1)).logits.flip(1), shifted, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_of_a_packed_row_are_as_they_are_alone(dtype):
    backbone = Backbone(tiny(**NEW), has_head=True)
    first, second = ids(2, 6)[0], ids(2, 6)[1][:4]
    row = torch.cat((first, second))[None]
    segments = torch.tensor([[1] * 6 + [2] * 4])
    positions = torch.tensor([[*range(6), *range(4)]])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        packed = backbone(row, segment_ids=segments, position_ids=positions)
        alone = torch.cat((backbone(first[None]), backbone(second[None])), dim=1)
    tolerance = 1e-5 if dtype is torch.float32 else 5e-2
    torch.testing.assert_close(packed.float(), alone.float(), rtol=tolerance, atol=tolerance)


def test_rows_without_their_padding_give_the_same_states():
    backbone = Backbone(tiny(**NEW), has_head=True, unpad=True)
    plain = Backbone(tiny(**NEW), has_head=True)
    mask = (torch.arange(10) < torch.tensor([[10], [3], [4]])).long()
    unpadded, padded = backbone(ids(), mask), plain(ids(), mask)
    torch.testing.assert_close(unpadded[mask.bool()], padded[mask.bool()], rtol=1e-4, atol=1e-5)


def test_initial_norms_are_one_and_gradients_reach_everything():
    torch.manual_seed(0)
    model = CrammedBertForMaskedLM(CrammedBertConfig(vocab_size=VOCABULARY, **SIZES, **NEW))
    assert all((p == 1).all() for name, p in model.named_parameters() if "norm" in name)
    model(ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_saved_and_loaded_is_the_same_model(tmp_path):
    model = tiny(**NEW)
    model.save_pretrained(tmp_path)
    again = CrammedBertForMaskedLM.from_pretrained(tmp_path)
    assert again.config.position_type == "rope" and again.config.rope_theta == 10000.0
    assert torch.equal(again(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize(
    ("field", "value"), [("norm_type", "batch"), ("position_type", "alibi"), ("gate_activation", "tanh")]
)
def test_unknown_variants_are_refused(field, value):
    section = ModelSection(config={**SIZES, field: value})
    with pytest.raises(ConfigError, match=field):
        make_config(section, TOKENIZER, 12)


def test_rope_needs_heads_of_even_width():
    fields = {**SIZES, "hidden_size": 30, "num_attention_heads": 6, "position_type": "rope"}
    with pytest.raises(ConfigError, match="multiple of 12"):
        make_config(ModelSection(config=fields), TOKENIZER, 12)


@pytest.mark.parametrize("field", sorted(NEW))
def test_weights_of_another_variant_are_refused(tmp_path, field):
    tiny().save_pretrained(tmp_path)
    section = ModelSection(init_from=str(tmp_path), config={field: NEW[field]})
    with pytest.raises(CheckpointError, match=f"was trained with {field}"):
        make_model(section, TOKENIZER, sequence_length=12, with_head=True)

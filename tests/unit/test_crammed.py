"""crammed-bert against the formulas of its specification, and as a well-behaved transformers model."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from sparselt_dist.models.crammed import (
    CrammedBertConfig,
    CrammedBertForMaskedLM,
    CrammedBertForSequenceClassification,
    CrammedBertModel,
    attend,
    attend_by_products,
    convert_official_state_dict,
)

TINY = {
    "vocab_size": 53,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 12,
}


def tiny(cls=CrammedBertForMaskedLM, seed=0, **fields):
    """A tiny model, far from its initial weights so that every term shows."""
    torch.manual_seed(seed)
    model = cls(CrammedBertConfig(**{**TINY, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def ids(rows=3, length=10, seed=1):
    return torch.randint(0, TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def some_labels(input_ids, count):
    labels = torch.full_like(input_ids, -100)
    labels[:, :count] = (input_ids[:, :count] * 7 + 1) % TINY["vocab_size"]
    return labels


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


def test_full_size_has_the_published_parameters():
    with torch.device("meta"):
        model = CrammedBertForMaskedLM(CrammedBertConfig())
    layers, embeddings = model.encoder.layers, model.encoder.embeddings
    assert model.decoder.weight is embeddings.word_embeddings.weight
    assert {
        "total": count(model.parameters()),
        "word": count(embeddings.word_embeddings.parameters()),
        "scale": embeddings.position_scale.numel(),
        "embedding norm": count(embeddings.norm.parameters()),
        "qkv": sum(count(layer.attention.qkv.parameters()) for layer in layers),
        "attention out": sum(count(layer.attention.output.parameters()) for layer in layers),
        "ffn in": sum(count(layer.ffn.input.parameters()) for layer in layers),
        "ffn out": sum(count(layer.ffn.output.parameters()) for layer in layers),
        "norms": sum(count([*layer.attention_norm.parameters(), *layer.ffn_norm.parameters()]) for layer in layers),
        "final norm": count(model.encoder.final_norm.parameters()),
    } == {
        "total": 119_589_889,
        "word": 25_165_824,
        "scale": 1,
        "embedding norm": 1_536,
        "qkv": 28_311_552,
        "attention out": 9_437_184,
        "ffn in": 37_748_736,
        "ffn out": 18_874_368,
        "norms": 49_152,
        "final norm": 1_536,
    }
    decayed = count(p for name, p in model.named_parameters() if "norm" not in name and "bias" not in name)
    assert decayed == 119_537_665


def test_full_size_classifier_has_the_published_parameters():
    with torch.device("meta"):
        model = CrammedBertForSequenceClassification(CrammedBertConfig(num_labels=2))
    assert count(model.parameters()) == 120_379_395


def reference_states(model, input_ids, mask=None, weights=None):
    """The specification's forward pass in float64: the embedding and the state after each layer."""
    weights = weights or {name: value.double() for name, value in model.state_dict().items()}
    length = input_ids.shape[1]
    width, heads = model.config.hidden_size, model.config.num_attention_heads
    depth = width // heads

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-12)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    table = torch.tensor(
        [
            [(math.sin, math.cos)[c % 2](p * 10000.0 ** (-2 * (c // 2) / width)) for c in range(width)]
            for p in range(length)
        ],
        dtype=torch.float64,
    )
    table_VD = weights["encoder.embeddings.word_embeddings.weight"]
    learns = torch.arange(len(table_VD))[:, None] != 0  # the padding row's lookup sends no gradient
    words = torch.where(learns, table_VD, table_VD.detach())[input_ids]
    h = norm(words + weights["encoder.embeddings.position_scale"] * table, "encoder.embeddings.norm")
    states = [h]
    for i in range(model.config.num_hidden_layers):
        at = f"encoder.layers.{i}"
        projected = norm(h, f"{at}.attention_norm") @ weights[f"{at}.attention.qkv.weight"].T
        mixed = torch.zeros_like(h)
        for k in range(heads):
            part = projected[..., 3 * k * depth : 3 * (k + 1) * depth]
            query, key, value = part.split(depth, dim=-1)
            scores = query @ key.transpose(1, 2) / math.sqrt(depth)
            if mask is not None:
                scores = scores + (1 - mask.double())[:, None, :] * -10000.0
            exponents = torch.exp(scores - scores.amax(-1, keepdim=True))
            mixed[..., k * depth : (k + 1) * depth] = exponents / exponents.sum(-1, keepdim=True) @ value
        h = h + mixed @ weights[f"{at}.attention.output.weight"].T
        values, gate = (norm(h, f"{at}.ffn_norm") @ weights[f"{at}.ffn.input.weight"].T).chunk(2, dim=-1)
        gelu = 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2)))
        h = h + (gelu * values) @ weights[f"{at}.ffn.output.weight"].T
        states.append(h)
    return [*states[:-1], norm(h, "encoder.final_norm")]


@pytest.mark.parametrize("masked", [False, True])
def test_logits_and_states_follow_the_specification(masked):
    model, input_ids = tiny().double(), ids()
    mask = (torch.arange(10) < torch.tensor([[10], [6], [3]])).long() if masked else None
    expected = reference_states(model, input_ids, mask)
    output = model(input_ids, attention_mask=mask, output_hidden_states=True)
    for ours, theirs in zip(output.hidden_states, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # the table is float32, as the official one
    assert output.logits.dtype == torch.float64
    word = model.encoder.embeddings.word_embeddings.weight
    torch.testing.assert_close(output.logits, expected[-1] @ word.T, rtol=0, atol=1e-5)


def test_gradients_follow_the_specification():
    model, input_ids = tiny().double(), ids(4, 12)
    input_ids[:, 3] = 0
    labels = some_labels(input_ids, 3)
    names = [name for name, _ in model.named_parameters()]
    weights = {name: value.detach().clone().requires_grad_() for name, value in model.state_dict().items()}
    word = weights["encoder.embeddings.word_embeddings.weight"]
    logits = reference_states(model, input_ids, weights=weights)[-1] @ word.T
    chosen = labels >= 0
    loss = -torch.log_softmax(logits[chosen], -1).gather(1, labels[chosen][:, None]).mean()
    expected = torch.autograd.grad(loss, [weights[name] for name in names])
    ours = model(input_ids, labels=labels).loss
    torch.testing.assert_close(ours, loss, rtol=0, atol=1e-5)
    for name, found, wanted in zip(names, torch.autograd.grad(ours, model.parameters()), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("masked", [False, True])
def test_attention_by_products_equals_the_fused_one(masked):
    query, key, value, upstream = torch.randn(4, 2, 3, 7, 8, dtype=torch.float64).unbind(0)
    hidden_keys = torch.zeros(2, 1, 1, 7, dtype=torch.float64)
    hidden_keys[1, :, :, 5:] = -10000.0
    found = []
    for form in (attend, attend_by_products):
        inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        mixed = form(*inputs, hidden_keys if masked else None, 0.0)
        found.append([mixed, *torch.autograd.grad(mixed, inputs, upstream)])
    for fused, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, fused, rtol=1e-12, atol=1e-12)


def test_attention_in_bfloat16_on_a_cpu_stays_near_float32():
    model, input_ids = tiny(), ids()
    exact = model(input_ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(input_ids).logits.float()
    assert 0 < (rounded - exact).abs().max() < 0.02 * exact.abs().max()


def test_dropped_attention_weights_keep_their_mean():
    query, key, value = torch.zeros(3, 64, 2, 7, 8).unbind(0)
    mixed = attend_by_products(query, key, torch.ones_like(value), None, 0.5)
    assert mixed.mean().item() == pytest.approx(1.0, abs=0.05) and mixed.std() > 0.1


def test_gathered_loss_and_gradients_equal_the_dense_ones():
    input_ids = ids(4, 12)
    labels = some_labels(input_ids, 3)
    dense, sparse = tiny().double(), tiny().double()
    dense_loss = F.cross_entropy(dense(input_ids).logits.flatten(0, 1), labels.flatten())
    output = sparse(input_ids, labels=labels)
    dense_loss.backward()
    output.loss.backward()
    assert output.logits.shape == (12, TINY["vocab_size"])
    torch.testing.assert_close(output.loss, dense_loss)
    for (name, ours), (_, theirs) in zip(sparse.named_parameters(), dense.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_rows_without_labels_do_not_dilute_the_loss():
    model, input_ids = tiny(), ids(4, 12)
    labels = some_labels(input_ids, 3)
    fewer = labels.clone()
    fewer[1:] = -100
    alone = model(input_ids[:1], labels=labels[:1]).loss
    torch.testing.assert_close(model(input_ids, labels=fewer).loss, alone)


def test_no_label_gives_a_zero_loss_that_backward_accepts():
    model, input_ids = tiny(), ids()
    loss = model(input_ids, labels=torch.full_like(input_ids, -100)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert model.encoder.layers[0].attention.qkv.weight.grad.abs().sum() == 0


def test_padding_row_starts_non_zero_and_learns_only_through_the_head():
    model = CrammedBertForMaskedLM(CrammedBertConfig(**{**TINY, "hidden_size": 768}))
    table = model.encoder.embeddings.word_embeddings.weight
    assert 0.45 < table[0].norm() < 0.65
    zeros = torch.zeros(2, 6, dtype=torch.long)
    model.encoder(zeros).last_hidden_state.square().sum().backward()
    assert table.grad is None or table.grad[0].abs().sum() == 0
    model(zeros, labels=zeros + 5).loss.backward()
    assert table.grad[0].abs().sum() > 0


def test_initial_weights_have_the_stated_spread():
    torch.manual_seed(0)
    model = CrammedBertForMaskedLM(CrammedBertConfig(**{**TINY, "vocab_size": 4000, "num_hidden_layers": 6}))
    for name, value in model.named_parameters():
        if "norm" in name:
            assert torch.equal(value, torch.ones_like(value) if name.endswith("weight") else torch.zeros_like(value))
        elif name.endswith("position_scale"):
            assert value.item() == pytest.approx(24**-0.5)
        else:
            assert value.std().item() == pytest.approx(0.02, rel=0.12), name


def test_saving_and_loading_keeps_every_logit(tmp_path):
    model, input_ids = tiny(), ids()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(loaded) is CrammedBertForMaskedLM
    assert loaded.decoder.weight is loaded.encoder.embeddings.word_embeddings.weight
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
    bare = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(bare(input_ids).last_hidden_state, model.encoder(input_ids).last_hidden_state)
    assert not any("table" in name for name in model.state_dict())


def test_a_saved_model_loads_and_runs_in_bfloat16(tmp_path):
    model, input_ids = tiny(), ids()
    model.save_pretrained(tmp_path)
    rounded = CrammedBertForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16)(input_ids).logits
    exact = model(input_ids).logits
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_model_made_on_the_meta_device_is_whole_after_its_weights_are_loaded():
    model, input_ids = tiny(), ids()
    with torch.device("meta"):
        empty = CrammedBertForMaskedLM(model.config)
    empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty.eval()(input_ids).logits, model(input_ids).logits)


def test_position_table_survives_a_cast_and_back():
    model = tiny()
    before = model.encoder.embeddings.position_table_TD.clone()
    model.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(model.encoder.embeddings.position_table_TD, before)


def test_masks_of_two_three_and_four_dimensions_agree():
    model, input_ids = tiny(), ids()
    mask = (torch.arange(10) < torch.tensor([[10], [6], [3]])).long()
    square = mask[:, None, :].expand(-1, 10, -1)
    expected = model(input_ids, attention_mask=mask).logits
    for other in (mask.bool(), square, square.bool()[:, None], (1.0 - square[:, None]) * -10000.0):
        torch.testing.assert_close(model(input_ids, attention_mask=other).logits, expected)
    short = model(input_ids[1:2, :6]).logits
    torch.testing.assert_close(expected[1:2, :6], short, rtol=1e-4, atol=1e-5)


def test_a_row_whose_keys_are_all_hidden_stays_finite():
    model, input_ids = tiny(), ids()
    mask = torch.ones_like(input_ids)
    mask[1] = 0
    assert model(input_ids, attention_mask=mask).logits.isfinite().all()


def test_inputs_that_tokenizers_and_trainers_send_are_accepted():
    model, input_ids = tiny(), ids()
    plain = model(input_ids).logits
    assert torch.equal(model(input_ids, token_type_ids=torch.ones_like(input_ids)).logits, plain)
    positions = torch.arange(10).expand(3, -1)
    assert torch.equal(model(input_ids, position_ids=positions).logits, plain)
    embedded = model.get_input_embeddings()(input_ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, plain)
    (as_tuple,) = model(input_ids, return_dict=False)
    assert torch.equal(as_tuple, plain)


def test_shifted_positions_change_the_result():
    model, input_ids = tiny(), ids()
    moved = model(input_ids, position_ids=torch.arange(2, 12).expand(3, -1)).logits
    assert (moved - model(input_ids).logits).abs().max() > 1e-3


def test_dropout_is_off_by_default_and_on_when_configured():
    input_ids = ids()
    still = tiny().train()
    assert torch.equal(still(input_ids).logits, still(input_ids).logits)
    for field in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        noisy = tiny(**{field: 0.1}).train()
        assert not torch.equal(noisy(input_ids).logits, noisy(input_ids).logits)
        noisy.eval()
        assert torch.equal(noisy(input_ids).logits, noisy(input_ids).logits)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pad_token_id": 3}, "pad_token_id is 3, expected 0"),
        ({"pad_token_id": None}, "pad_token_id is None, expected 0"),
        ({"num_attention_heads": 5}, "a multiple of num_attention_heads 5"),
        ({"intermediate_size": 41}, "expected even numbers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a whole number from 1"),
        ({"pooler": "max"}, "pooler is 'max'"),
    ],
)
def test_impossible_configurations_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        CrammedBertModel(CrammedBertConfig(**{**TINY, **fields}))


def test_rows_longer_than_the_table_are_refused():
    with pytest.raises(ValueError, match="rows of 13 positions, expected at most 12"):
        tiny()(ids(1, 13))


@pytest.mark.parametrize("pooler", ["zero_index", "avg"])
def test_classifier_logits_for_both_poolers(pooler):
    model = tiny(CrammedBertForSequenceClassification, num_labels=3, pooler=pooler).double()
    input_ids = ids()
    hidden = model.encoder(input_ids).last_hidden_state
    pooled = hidden[:, 0] if pooler == "zero_index" else hidden.sum(1) / 10
    w = model.state_dict()
    expected = torch.tanh(pooled @ w["pooler.weight"].T + w["pooler.bias"]) @ w["head.weight"].T + w["head.bias"]
    labels = torch.tensor([2, 0, 1])
    output = model(input_ids, labels=labels)
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(output.loss, F.cross_entropy(expected, labels))


def test_classifier_losses_of_regression_and_of_several_labels():
    input_ids = ids()
    regressor = tiny(CrammedBertForSequenceClassification, num_labels=1)
    targets = torch.tensor([0.5, 2.0, 4.0])
    output = regressor(input_ids, labels=targets)
    torch.testing.assert_close(output.loss, ((output.logits[:, 0] - targets) ** 2).mean())
    several = tiny(CrammedBertForSequenceClassification, num_labels=4)
    wanted = torch.tensor([[1.0, 0, 0, 1]] * 3)
    output = several(input_ids, labels=wanted)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, wanted))


def test_auto_classes_know_the_model():
    config = AutoConfig.for_model("crammed-bert", **TINY)
    assert type(config) is CrammedBertConfig
    assert type(AutoModel.from_config(config)) is CrammedBertModel
    assert type(AutoModelForMaskedLM.from_config(config)) is CrammedBertForMaskedLM
    assert type(AutoModelForSequenceClassification.from_config(config)) is CrammedBertForSequenceClassification


def official_name(ours):
    """Written from the official code's module names, the other way round than the product does it."""
    for mine, theirs in (
        ("embeddings.word_embeddings", "embedding.word_embedding"),
        ("embeddings.position_scale", "embedding.pos_embedding.scale_factor"),
        ("embeddings.norm", "embedding.norm"),
        ("attention_norm", "norm1"),
        ("ffn_norm", "norm2"),
        ("attention.qkv", "attn.self_attention.query_key_value"),
        ("attention.output", "attn.dense"),
        ("ffn.input", "ffn.dense_in"),
        ("ffn.output", "ffn.dense_out"),
    ):
        ours = ours.replace(mine, theirs)
    return ours


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_official_states_load_whole(prefix):
    source, target, input_ids = tiny(), tiny(seed=9), ids()
    official = {prefix + official_name(name): value for name, value in source.state_dict().items()}
    official[f"{prefix}encoder.layers.0.attn.self_attention.norm_factor"] = torch.tensor(0.35)
    converted = convert_official_state_dict(official)
    assert set(converted) == set(source.state_dict())
    report = target.load_state_dict(converted, strict=False)
    assert (report.missing_keys, report.unexpected_keys) == ([], [])
    assert torch.equal(target(input_ids).logits, source(input_ids).logits)


def test_official_states_of_the_bare_encoder_of_gradients_and_of_the_classifier_are_named():
    model = tiny()
    bare = {official_name(name).removeprefix("encoder."): v for name, v in model.encoder.state_dict().items()}
    report = tiny(seed=9).load_state_dict(convert_official_state_dict(bare), strict=False)
    assert (report.missing_keys, report.unexpected_keys) == (["decoder.weight"], [])  # tied: it is in, under one name
    model(ids(), labels=ids()).loss.backward()
    gradients = convert_official_state_dict({official_name(n): p.grad for n, p in model.named_parameters()})
    assert all(gradients[name] is parameter.grad for name, parameter in model.named_parameters())
    classifier = tiny(CrammedBertForSequenceClassification)
    official = {official_name(n).replace("pooler", "pooler.dense"): v for n, v in classifier.state_dict().items()}
    assert set(convert_official_state_dict(official)) == set(classifier.state_dict())


def test_foreign_states_are_refused():
    with pytest.raises(
        ValueError, match=r"2 of 3 names are not of crammed-bert v2: prediction_head.dense.weight, optim"
    ):
        convert_official_state_dict({"decoder.weight": 1, "prediction_head.dense.weight": 2, "optim": 3})
    with pytest.raises(ValueError, match="a second time"):
        convert_official_state_dict({"decoder.weight": 1, "module.decoder.weight": 2})


def test_copies_are_independent():
    model, input_ids = tiny(), ids()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.encoder.final_norm.weight.mul_(2)
    assert not torch.equal(twin(input_ids).logits, model(input_ids).logits)
    assert twin.decoder.weight is twin.encoder.embeddings.word_embeddings.weight

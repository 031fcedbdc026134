"""Backbones of many architectures: the model's own head, packed rows, and models from configuration or checkpoint."""

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification, BertConfig

from sparselt_dist.config import ModelSection
from sparselt_dist.data.batch import to_device
from sparselt_dist.errors import CheckpointError, ConfigError
from sparselt_dist.models.backbone import Backbone, PretrainingModel, build_backbone
from sparselt_dist.models.construction import make_config
from sparselt_dist.objectives.base import LossOutput, TokenizerInfo

TOKENIZER = TokenizerInfo(vocab_size=96, pad_id=0, mask_id=6, unk_id=3, cls_id=4, sep_id=5, bos_id=1, eos_id=2)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ARCHITECTURES = {
    "crammed-bert": SMALL,
    "bert": SMALL,
    "roberta": SMALL,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "electra": {**SMALL, "embedding_size": 16},
    "modernbert": {**SMALL, "num_hidden_layers": 4, "local_attention": 4},
    "gpt_neox": SMALL,
    "gpt2": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "llama": {**SMALL, "num_key_value_heads": 2},
    "mistral": {**SMALL, "num_key_value_heads": 2, "sliding_window": 3},
    "qwen2": {**SMALL, "num_key_value_heads": 2},
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48},
}
CAUSAL = {"gpt_neox", "gpt2", "llama", "mistral", "qwen2", "opt"}


def section(architecture="bert", init_from=None, **fields):
    return ModelSection(
        architecture=architecture, init_from=init_from, config={**ARCHITECTURES.get(architecture, {}), **fields}
    )


def backbone(architecture="bert", with_head=True, length=16, seed=0, **fields):
    torch.manual_seed(seed)
    made = build_backbone(section(architecture, **fields), TOKENIZER, sequence_length=length, with_head=with_head)
    return made.eval()


def padded_ids(rows=3, length=12):
    ids = torch.randint(7, 96, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return ids.masked_fill(mask == 0, 0), mask


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_gradients_are_those_of_the_whole_model(architecture):
    split, ids_and_mask = backbone(architecture), padded_ids()
    whole = copy.deepcopy(split.model)
    ids, mask = ids_and_mask
    chosen = mask.bool() & (ids % 3 == 0)
    ours = split.logits(split(ids, mask)[chosen])
    theirs = whole(input_ids=ids, attention_mask=mask).logits[chosen]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert (split.is_causal, ours.shape[1]) == (architecture in CAUSAL, split.vocab_size)
    F.cross_entropy(ours, ids[chosen]).backward()
    F.cross_entropy(theirs, ids[chosen]).backward()
    expected = gradients(whole)
    assert gradients(split.model).keys() == expected.keys()
    for name, gradient in gradients(split.model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_positions_give_no_logits_and_touch_every_weight(architecture):
    split, (ids, mask) = backbone(architecture), padded_ids()
    hidden = split(ids, mask)
    logits = split.logits(hidden[:0, 0])
    assert logits.shape == (0, 96)
    (logits.sum() + hidden.sum() * 0).backward()
    assert all(not gradient.any() for gradient in gradients(split).values())
    assert len(gradients(split)) == len(list(split.parameters()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_row_equals_its_documents_one_by_one(architecture):
    split, (ids, _) = backbone(architecture), padded_ids()
    row = ids[:1].clone()
    row[:, 11:] = 0
    segments = torch.tensor([[1] * 4 + [2] * 7 + [0]])
    positions = torch.tensor([[*range(4), *range(7), 0]])
    packed = split(row, (segments > 0).long(), segments, positions)
    torch.testing.assert_close(packed[:, :4], split(row[:, :4]), rtol=0, atol=1e-5)
    torch.testing.assert_close(packed[:, 4:11], split(row[:, 4:11]), rtol=0, atol=1e-5)
    assert packed.isfinite().all()
    unpacked = split(row, position_ids=positions if architecture not in CAUSAL else None)
    assert (packed[:, 4:11] - unpacked[:, 4:11]).abs().max() > 1e-4


def test_packed_rows_are_refused_where_attention_cannot_be_cut():
    split, (ids, _) = backbone("fnet", hidden_size=32, num_hidden_layers=2, intermediate_size=48), padded_ids()
    with pytest.raises(ConfigError, match=r"found fnet .* cannot keep the documents of a packed row apart"):
        split(ids, segment_ids=torch.ones_like(ids), position_ids=torch.zeros_like(ids))


def test_packed_rows_are_refused_without_sdpa():
    split, (ids, _) = backbone("bert"), padded_ids()
    split.model.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match="attention eager"):
        split(ids, segment_ids=torch.ones_like(ids))


@pytest.mark.parametrize("architecture", ["bert", "crammed-bert"])
def test_loss_on_gathered_targets_equals_hugging_faces_own(architecture):
    split, (ids, mask) = backbone(architecture).double(), padded_ids()
    whole = copy.deepcopy(split.model)
    labels = torch.where((ids % 4 == 1) & mask.bool(), ids, -100)
    targets = labels != -100
    ours = F.cross_entropy(split.logits(split(ids, mask)[targets]), labels[targets])
    theirs = whole(input_ids=ids, attention_mask=mask, labels=labels).loss
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs)
    expected = gradients(whole)
    for name, gradient in gradients(split.model).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_an_all_ones_mask_is_left_out_and_a_real_one_is_not():
    split, (ids, mask) = backbone("crammed-bert"), padded_ids()
    seen = []
    split.body.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    split(ids, torch.ones_like(ids))
    split(ids, mask)
    assert seen[0] is None
    assert seen[1] is mask


def test_on_an_accelerator_the_count_of_tokens_tells_that_a_mask_is_all_ones():
    class Objective(nn.Module):
        def forward(self, split, batch):
            return LossOutput(split(batch["input_ids"], attention_mask=batch["attention_mask"]).sum(), {})

    split, (ids, mask) = backbone("crammed-bert").to("meta"), padded_ids()  # a look at a tensor there is an error
    model, seen = PretrainingModel(split, Objective()), []
    split.body.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    for one in (torch.ones_like(mask), mask):
        batch = to_device({"input_ids": ids, "attention_mask": one, "num_tokens": one.sum()}, torch.device("meta"))
        model(batch)
    assert seen[0] is None
    assert seen[1] is batch["attention_mask"]


def test_padding_does_not_leak_into_a_row():
    split, (ids, mask) = backbone("bert"), padded_ids()
    torch.testing.assert_close(split(ids, mask)[1, :7], split(ids[1:2, :7])[0], rtol=0, atol=1e-5)


def test_every_parameter_stands_once():
    split = backbone("bert")
    split.logits(torch.zeros(1, 32))
    assert [name.removeprefix("model.") for name in split.state_dict()] == list(split.model.state_dict())
    assert sum(p.numel() for p in split.parameters()) == sum(p.numel() for p in split.model.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_use_their_own_weights(copied):
    split, (ids, mask) = backbone("bert"), padded_ids()
    twin = copied(split)
    with torch.no_grad():
        split.get_input_embeddings().weight.zero_()
    hidden = twin(ids, mask)[0]
    expected = twin.model(input_ids=ids, attention_mask=mask).logits[0]
    torch.testing.assert_close(twin.logits(hidden), expected, rtol=0, atol=1e-6)
    assert not torch.equal(split.logits(hidden), expected)


def test_a_headless_backbone_has_neither_head_nor_pooler():
    bare = backbone("bert", with_head=False)
    assert not [name for name in bare.state_dict() if "pooler" in name or "cls" in name]
    assert bare(*padded_ids()).shape == (3, 12, 32)
    assert bare.hidden_size == 32
    with pytest.raises(ConfigError, match="built without its head"):
        bare.logits(torch.zeros(1, 32))


class CountTargets(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen = None

    def forward(self, backbone, batch):
        return LossOutput(backbone(batch["input_ids"]).square().mean() * self.scale, {})

    def set_progress(self, step, progress):
        self.seen = (step, progress)


def test_pretraining_model_joins_backbone_and_objective():
    model = PretrainingModel(backbone("bert", with_head=False), CountTargets())
    output = model({"input_ids": padded_ids()[0]})
    output.loss.backward()
    assert model.objective.scale.grad is not None
    assert model.backbone.get_input_embeddings().weight.grad is not None
    model.set_progress(7, 0.25)
    assert model.objective.seen == (7, 0.25)


def test_vocabulary_special_ids_and_positions_follow_tokenizer_and_rows():
    config = make_config(section("bert"), TOKENIZER, 700)
    assert (config.vocab_size, config.pad_token_id, config.max_position_embeddings) == (96, 0, 700)
    assert make_config(section("bert"), TOKENIZER, 16).max_position_embeddings == 512
    assert make_config(section("crammed-bert"), TOKENIZER, 256).max_position_embeddings == 256
    assert make_config(section("crammed-bert"), TOKENIZER, None).max_position_embeddings == 128
    config = make_config(section("modernbert"), TOKENIZER, 16)
    assert (config.cls_token_id, config.sep_token_id, config.bos_token_id, config.eos_token_id) == (4, 5, 1, 2)
    plain = TokenizerInfo(vocab_size=96, pad_id=0, mask_id=6, cls_id=4, sep_id=5)
    config = make_config(section("modernbert"), plain, 16)
    assert (config.bos_token_id, config.eos_token_id) == (4, 5)
    assert make_config(section("gpt2"), TOKENIZER, 2000).n_positions == 2000


def test_roberta_gets_room_for_its_offset():
    shifted = TokenizerInfo(vocab_size=96, pad_id=1, mask_id=6)
    torch.manual_seed(0)
    model = build_backbone(section("roberta"), shifted, sequence_length=512, with_head=False)
    assert model.config.max_position_embeddings == 514
    assert model(torch.randint(7, 96, (1, 512))).shape == (1, 512, 32)


def test_fields_that_only_the_constructor_knows_take_effect():
    assert make_config(section("llama", rope_theta=500.0), TOKENIZER, 16).rope_parameters["rope_theta"] == 500.0
    assert backbone("bert", attn_implementation="eager").config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match="rope_theta"):
        make_config(section("bert", rope_theta=500.0), TOKENIZER, 16)


def test_types_are_found_in_either_spelling():
    assert make_config(section("gpt-neox"), TOKENIZER, 16).model_type == "gpt_neox"
    assert make_config(section("crammed_bert"), TOKENIZER, 16).model_type == "crammed-bert"


def test_a_config_folder_stands_as_given(tmp_path):
    BertConfig(**SMALL, vocab_size=30000, hidden_dropout_prob=0.3, max_position_embeddings=64).save_pretrained(tmp_path)
    config = make_config(ModelSection(architecture=str(tmp_path)), TOKENIZER, 64)
    assert (config.hidden_dropout_prob, config.hidden_size, config.vocab_size) == (0.3, 32, 96)
    overridden = ModelSection(architecture=str(tmp_path), config={"num_hidden_layers": 1})
    assert make_config(overridden, TOKENIZER, 64).num_hidden_layers == 1
    with pytest.raises(ConfigError, match=r"max_position_embeddings: found 64 .*config.json.*at least 65"):
        make_config(ModelSection(architecture=str(tmp_path)), TOKENIZER, 65)


@pytest.mark.parametrize(
    ("architecture", "fields", "words"),
    [
        ("brt", {}, "model.architecture: found 'brt', expected crammed-bert.*did you mean 'bert'"),
        ("t5", {}, "model.architecture: found 't5'"),
        ("vit", {}, "model.architecture: found 'vit'"),
        ("bert", {"hiden_size": 3}, "model.config.hiden_size: found a field that bert does not.*'hidden_size'"),
        ("bert", {"hidden_size": "wide"}, "model.config: bert refuses its fields: .*hidden_size.*expected int"),
        ("bert", {"hidden_size": 33}, "bert cannot be built as configured: .*mend model.config"),
        ("bert", {"vocab_size": 50}, "model.config.vocab_size: found 50, expected at least the 96 entries"),
        ("bert", {"pad_token_id": 9}, "model.config.pad_token_id: found 9, expected 0.*remove the field"),
        ("bert", {"max_position_embeddings": 8}, "max_position_embeddings: found 8 .*at least 16"),
        ("crammed-bert", {"hidden_size": 34}, "crammed-bert refuses.*a multiple of num_attention_heads 4"),
    ],
)
def test_impossible_models_are_refused(architecture, fields, words):
    with pytest.raises(ConfigError, match=words):
        build_backbone(section(architecture, **fields), TOKENIZER, sequence_length=16, with_head=True)


def test_all_unknown_fields_are_named_together():
    with pytest.raises(ConfigError) as caught:
        make_config(section("bert", hiden_size=1, layers=2), TOKENIZER, 16)
    assert "hiden_size" in str(caught.value)
    assert "model.config.layers" in str(caught.value)


def test_crammed_bert_refuses_a_tokenizer_that_pads_elsewhere():
    with pytest.raises(ConfigError, match="pad_token_id is 1, expected 0"):
        make_config(section("crammed-bert"), TokenizerInfo(vocab_size=96, pad_id=1, mask_id=6), 16)


@pytest.mark.parametrize("architecture", ["crammed-bert", "bert", "gpt_neox", "modernbert"])
@pytest.mark.parametrize("with_head", [True, False])
def test_a_checkpoint_starts_the_model(architecture, with_head, tmp_path):
    source, (ids, mask) = backbone(architecture), padded_ids()
    source.model.to(torch.bfloat16).save_pretrained(tmp_path)
    source.model.to(torch.float32)
    given = ModelSection(architecture=architecture, init_from=str(tmp_path))
    loaded = build_backbone(given, TOKENIZER, sequence_length=16, with_head=with_head).eval()
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded(ids, mask), source(ids, mask))
    if with_head:
        hidden = loaded(ids, mask)[0]
        torch.testing.assert_close(loaded.logits(hidden), source.logits(hidden))


def test_a_checkpoint_names_its_own_architecture_unless_told(tmp_path):
    backbone("bert").model.save_pretrained(tmp_path)
    loaded = build_backbone(ModelSection(init_from=str(tmp_path)), TOKENIZER, sequence_length=16, with_head=True)
    assert loaded.config.model_type == "bert"
    with pytest.raises(CheckpointError, match=r"holds a bert model, expected roberta.*set model.architecture=bert"):
        build_backbone(section("roberta", str(tmp_path)), TOKENIZER, sequence_length=16, with_head=True)


def test_model_config_changes_a_loaded_checkpoints_dropout(tmp_path):
    backbone("bert").model.save_pretrained(tmp_path)
    changed = ModelSection(init_from=str(tmp_path), config={"hidden_dropout_prob": 0.0})
    loaded = build_backbone(changed, TOKENIZER, sequence_length=16, with_head=True)
    assert loaded.model.bert.embeddings.dropout.p == 0.0


def test_a_loaded_checkpoint_drops_out_as_a_new_model_does(tmp_path):
    backbone("bert").model.save_pretrained(tmp_path)
    loaded = build_backbone(ModelSection(init_from=str(tmp_path)), TOKENIZER, sequence_length=16, with_head=True)
    assert all(module.training for module in loaded.modules())


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    good, bare, classifier = tmp_path / "good", tmp_path / "bare", tmp_path / "classifier"
    backbone("bert").model.save_pretrained(good)
    backbone("bert", with_head=False).model.save_pretrained(bare)
    config = AutoModelForMaskedLM.from_pretrained(good).config
    AutoModelForSequenceClassification.from_config(config).save_pretrained(classifier)

    def refused(words, folder, tokenizer=TOKENIZER, length=16, error=CheckpointError, **fields):
        with pytest.raises(error, match=words):
            build_backbone(
                ModelSection(init_from=str(folder), config=fields), tokenizer, sequence_length=length, with_head=True
            )

    refused("found no folder at", tmp_path / "absent")
    refused("found a folder without config.json", tmp_path)
    refused(r"not a checkpoint of BertForMaskedLM: \d+ weights missing \(cls.predictions", bare)
    refused(r"weights missing \(cls.predictions", classifier)
    refused("vocabulary of 96, expected the 97 entries", good, vocabulary(97))
    refused("pads with id 0, expected 3", good, TokenizerInfo(vocab_size=96, pad_id=3, mask_id=6))
    refused("do not fit its configuration", good, hidden_size=64)
    refused("at least 513", good, length=513, error=ConfigError)
    (good / "model.safetensors").write_bytes(b"not weights")
    refused("do not fit its configuration", good)
    (good / "config.json").write_text("{")
    refused("config.json cannot be read", good)
    (good / "config.json").write_text(json.dumps({"model_type": "brt"}))
    refused("model_type 'brt', expected one.*did you mean 'bert'", good)


def vocabulary(size):
    return TokenizerInfo(vocab_size=size, pad_id=0, mask_id=6)


def test_a_padded_table_is_accepted_and_a_foreign_one_is_not(tmp_path):
    torch.manual_seed(0)
    backbone("bert", vocab_size=128).model.save_pretrained(tmp_path)
    given = ModelSection(init_from=str(tmp_path))
    assert build_backbone(given, TOKENIZER, sequence_length=16, with_head=True).vocab_size == 128
    backbone("bert", vocab_size=96 + 512).model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="vocabulary of 608"):
        build_backbone(given, TOKENIZER, sequence_length=16, with_head=True)


def test_the_callers_seed_decides_the_weights():
    first, again, other = (backbone("bert", seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_saved_backbone_is_a_plain_transformers_checkpoint(tmp_path):
    split, (ids, mask) = backbone("gpt_neox"), padded_ids()
    split.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    expected = loaded(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(split.logits(split(ids, mask).flatten(0, 1)), expected.flatten(0, 1))
    assert isinstance(split, Backbone)

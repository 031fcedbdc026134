"""SLT on every kind of encoder: the shared embedding module, gradients, packed rows, continuing a checkpoint, full size."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from sparselt_dist.config import Config, ModelSection
from sparselt_dist.data.batch import IGNORE_INDEX, Batch, Example
from sparselt_dist.errors import ConfigError
from sparselt_dist.models.assembly import build_collator, build_model
from sparselt_dist.models.backbone import Backbone, build_backbone
from sparselt_dist.objectives.contract import TINY_TOKENIZER, tiny_examples
from sparselt_dist.objectives.reconstruction import embed
from sparselt_dist.objectives.settings import SLTConfig
from sparselt_dist.objectives.slt import SLT, SLTModule
from sparselt_dist.optim import parameter_groups

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
NO_DROPOUT: dict[str, dict[str, Any]] = {
    kind: {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} for kind in ("bert", "roberta", "electra")
}
KINDS = ["crammed-bert", "bert", "roberta", "modernbert", "electra", "distilbert", "deberta-v2"]


def _backbone(kind: str) -> Backbone:
    torch.manual_seed(0)
    sizes = {**SIZES, **NO_DROPOUT.get(kind, {}), **({"embedding_size": 16} if kind == "electra" else {})}
    if kind == "distilbert":
        sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "dropout": 0.0, "attention_dropout": 0.0}
    section = ModelSection(architecture=kind, config=sizes)
    return build_backbone(section, TINY_TOKENIZER, sequence_length=24, with_head=True)


def _module(backbone: Backbone, **settings: Any) -> SLTModule:
    module = SLT().build_module(SLTConfig(**{"decoder_dropout": 0.0, "decoder_layer_drop": 0.0, **settings}), backbone)
    assert isinstance(module, SLTModule)
    return module


def _batch(examples: list[Example] | None = None) -> Batch:
    return SLT().build_collator(SLTConfig(), TINY_TOKENIZER)(examples or tiny_examples())


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_through_the_embeddings_is_the_encoders_own(kind: str) -> None:
    """The states that enter the first layer, positions included; and the second pass goes on from them."""
    backbone = _backbone(kind).eval()
    ids = torch.from_numpy(np.stack([example["ids"] for example in tiny_examples()[:2]]).astype(np.int64))
    with torch.no_grad():
        expected = backbone.body(input_ids=ids, output_hidden_states=True).hidden_states[0]
        once, twice = (embed(backbone, ids, None, passes) for passes in (1, 2))
        placed = embed(backbone, ids, torch.arange(ids.shape[1]).expand_as(ids), 1)
    assert torch.allclose(once, expected, atol=1e-6) and torch.equal(placed, once)
    assert not torch.allclose(twice, once, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_every_encoder_learns_from_every_term(kind: str) -> None:
    backbone = _backbone(kind)
    module = _module(backbone)
    module.set_progress(50_000, 0.5)
    output = module(backbone, _batch())
    output.loss.backward()
    assert bool(output.loss.isfinite())
    still = [
        name
        for name, parameter in [*backbone.named_parameters(), *module.named_parameters()]
        if parameter.requires_grad and parameter.grad is None
    ]
    assert still == []
    module.eval()
    backbone.eval()
    assert bool(module(backbone, _batch()).loss.isfinite())


@pytest.mark.parametrize("kind", ["crammed-bert", "bert", "roberta", "modernbert"])
def test_documents_of_a_packed_row_give_what_they_give_alone(kind: str) -> None:
    backbone = _backbone(kind).eval()
    module = _module(backbone).eval()
    first, second = tiny_examples()[4]["ids"], tiny_examples()[7]["ids"]
    lengths = [len(first), len(second)]
    row: Example = {"key": "s", "ids": np.concatenate([first, second]), "seed": 1, "documents": np.array(lengths)}
    packed = {
        **_batch([row]),
        "segment_ids": torch.repeat_interleave(torch.tensor([1, 2]), torch.tensor(lengths))[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
    }
    with torch.no_grad():
        together = module(backbone, packed).metrics
        apart = [module(backbone, _batch([{"key": "s", "ids": ids, "seed": 1}])).metrics for ids in (first, second)]
    for name in ("reconstruction_loss", "null_probability", "null_share"):
        for side in (0, 1):
            assert float(together[name][side]) == pytest.approx(
                sum(float(part[name][side]) for part in apart), rel=1e-4
            )


def test_narrow_word_vectors_are_refused() -> None:
    section = ModelSection(architecture="electra", config={**SIZES, "embedding_size": 8})
    backbone = build_backbone(section, TINY_TOKENIZER, sequence_length=24, with_head=True)
    with pytest.raises(ConfigError, match=r"word vectors of 8 and hidden states of 16.*model\.config\.embedding_size"):
        _module(backbone)


def test_dropout_and_sizes_follow_the_encoders_configuration() -> None:
    section = ModelSection(architecture="bert", config={**SIZES, "hidden_dropout_prob": 0.2})
    decoder = _module(build_backbone(section, TINY_TOKENIZER, sequence_length=24, with_head=True), decoder_dropout=None)
    layer = decoder.decoder.layer
    assert (layer.dropout.p, layer.self_attention.dropout.p, decoder.decoder.dropout.p) == (0.2, 0.1, 0.2)
    assert (layer.self_attention.num_heads, layer.inner.out_features) == (2, 32)
    assert {norm.eps for norm in decoder.modules() if isinstance(norm, nn.LayerNorm)} == {1e-5}
    given = _module(_backbone("crammed-bert"), decoder_dropout=0.3)
    rates = {part.p for part in given.modules() if isinstance(part, nn.Dropout)}
    assert rates == {0.3}


def test_the_decoder_layer_starts_from_the_frameworks_own_values() -> None:
    layer = _module(_backbone("bert")).decoder.layer
    for linear in (part for part in layer.modules() if isinstance(part, nn.Linear)):
        bound = linear.in_features**-0.5
        assert 0.8 * bound < float(linear.weight.detach().abs().max()) <= bound
        assert 0 < float(linear.bias.detach().abs().max()) <= bound  # not zero, as BERT's would be


def _config(root: Path, **objective: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"seed": 3},
            "data": {"sequence_length": 24},
            "model": {"init_from": str(root)},
            "objective": {"name": "slt", **objective},
        }
    )


def test_a_checkpoint_is_continued_with_its_own_weights_and_head(tmp_path: Path) -> None:
    torch.manual_seed(7)
    source = BertForMaskedLM(BertConfig(**SIZES, vocab_size=TINY_TOKENIZER.vocab_size, pad_token_id=0))
    source.save_pretrained(tmp_path)
    config = _config(tmp_path, num_types=8)
    model = build_model(config, TINY_TOKENIZER)
    theirs = source.state_dict()
    for name, value in model.backbone.model.named_parameters():
        assert torch.equal(value, theirs[name])
    again = build_model(config, TINY_TOKENIZER)
    for (name, one), other in zip(model.objective.named_parameters(), again.objective.parameters(), strict=True):
        assert torch.equal(one, other), name  # the run's seed alone
    table = model.backbone.get_input_embeddings().weight
    assert model.backbone.model.get_output_embeddings().weight is table  # with the decoder's head, one storage
    names = [name for name, _ in model.named_parameters()]
    assert sum(parameter.shape == table.shape for parameter in model.parameters()) == 1
    assert "objective.decoder.head.bias" in names and "backbone.model.cls.predictions.bias" in names
    batch = build_collator(config, TINY_TOKENIZER)(tiny_examples())
    model.set_progress(0, 0.0)
    assert bool(model(batch).loss.isfinite())


def test_parameters_and_groups_of_the_published_size() -> None:
    """119,096,436 parameters; the decoder-embedding norm, decayed there by accident of its name, is not decayed here."""
    with torch.device("meta"):
        model = BertForMaskedLM(BertConfig(vocab_size=30522))
        backbone = Backbone(model, has_head=True)
        whole = nn.Module()
        whole.backbone, whole.objective = backbone, SLTModule(SLTConfig(), backbone)
    assert sum(parameter.numel() for parameter in whole.parameters()) == 119_096_436
    assert sum(parameter.numel() for parameter in whole.objective.decoder.parameters()) == 9_453_312 + 30_522
    groups = parameter_groups(whole, 0.01, encoder_lr_ratio=0.1)
    found = {
        (group["weight_decay"], group["lr_ratio"]): (len(parameters), sum(value.numel() for value in parameters))
        for group in groups
        for parameters in [_parameters(group)]
    }
    assert found == {
        (0.01, 1.0): (14 - 1, 10_126_080 - 768),
        (0.01, 0.1): (75, 108_770_304),
        (0.0, 0.1): (122, 121_344),
        (0.0, 1.0): (22 + 1, 78_708 + 768),
    }


def _parameters(group: dict[str, object]) -> list[Tensor]:
    values = group["params"]
    assert isinstance(values, list)
    return values


def test_bf16_autocast_leaves_typing_in_float32() -> None:
    backbone = _backbone("bert")
    module = _module(backbone)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(backbone, _batch())
    assert output.loss.dtype == torch.float32
    output.loss.backward()
    exact = module(backbone, _batch()).loss
    assert float(output.loss.detach()) == pytest.approx(float(exact.detach()), rel=0.02)
    assert bool((_batch()["labels"] != IGNORE_INDEX).any())

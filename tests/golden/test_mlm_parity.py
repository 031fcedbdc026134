"""MLM's loss and gradients equal those of Hugging Face's own model with labels, on the same batch."""

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from sparselt_dist.models.backbone import Backbone
from sparselt_dist.objectives.contract import TINY_TOKENIZER, tiny_examples
from sparselt_dist.objectives.mlm import MLM
from sparselt_dist.objectives.settings import MLMConfig

SIZES: dict[str, Any] = {
    "vocab_size": TINY_TOKENIZER.vocab_size,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "attn_implementation": "sdpa",
}
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "bert":
        return BertForMaskedLM(BertConfig(**SIZES, **DROPOUT))
    if kind == "roberta":
        return RobertaForMaskedLM(RobertaConfig(**SIZES, **DROPOUT))
    return ModernBertForMaskedLM(
        ModernBertConfig(**SIZES, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3)
    )


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
@pytest.mark.parametrize("settings", [{}, {"masking": "exact", "mlm_probability": 0.25, "exempt_special": False}])
def test_loss_and_gradients_equal_hugging_face(kind: str, settings: dict[str, Any]) -> None:
    model = _model(kind)
    cfg = MLMConfig(**settings)
    batch = MLM().build_collator(cfg, TINY_TOKENIZER)(tiny_examples())

    theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    theirs.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    backbone = Backbone(model, has_head=True)
    ours = MLM().build_module(cfg, backbone)(backbone, batch).loss
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-4, atol=1e-7), name

"""DAC's term folded into models of several architectures, saved and read again by Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import slow
from transformers import AutoModelForMaskedLM

from sparselt_dist.config import ModelSection
from sparselt_dist.models.backbone import PretrainingModel, build_backbone
from sparselt_dist.models.folding import fold_inputs
from sparselt_dist.objectives.base import TokenizerInfo
from sparselt_dist.objectives.dac import DAC, DACModule
from sparselt_dist.objectives.settings import DACConfig

TOKENIZER = TokenizerInfo(vocab_size=50, pad_id=0, mask_id=4, unk_id=1, cls_id=2, sep_id=3, special_ids=(0, 1, 2, 3, 4))
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 56}
ARCHITECTURES: list[Any] = [
    ("crammed-bert", SIZES),
    ("bert", SIZES),  # its head has a bias under two names
    ("modernbert", SIZES),
    ("electra", SIZES | {"embedding_size": 8}),  # word embeddings of another width than the model
    slow("roberta", SIZES),
    slow("albert", SIZES | {"embedding_size": 8}),
    slow("distilbert", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 56}),
    slow("deberta-v2", SIZES),
]


@pytest.mark.parametrize(("architecture", "sizes"), ARCHITECTURES)
def test_a_saved_model_gives_what_the_run_did(tmp_path: Path, architecture: str, sizes: dict[str, int]) -> None:
    torch.manual_seed(0)
    section = ModelSection(architecture=architecture, config=sizes)
    backbone = build_backbone(section, TOKENIZER, sequence_length=12, with_head=True)
    module = DAC().build_module(DACConfig(table_width=8), backbone)
    assert isinstance(module, DACModule)
    with torch.no_grad():
        module.agreement.tables_VRM[5:50].normal_()
    model = PretrainingModel(backbone, module).eval()
    ids = torch.randint(5, 50, (2, 12))
    with torch.no_grad():
        expected = backbone.model(input_ids=ids).logits
        assert fold_inputs(model)
        backbone.model.save_pretrained(tmp_path)
        loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-5, rtol=0)
    words, head = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
    assert torch.equal(words[50:], head[50:])  # rows beyond the tokenizer's vocabulary have no term
    assert not torch.equal(words[5:50], head[5:50])

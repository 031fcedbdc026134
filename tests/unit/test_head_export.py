"""A recovered head inside the Hugging Face class of each kind of architecture: the same predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from sparselt_dist.config import ModelSection
from sparselt_dist.errors import CheckpointError
from sparselt_dist.models.backbone import PretrainingModel, build_backbone
from sparselt_dist.models.head_export import ExportedHead, with_exported_head
from sparselt_dist.objectives import get_objective
from sparselt_dist.objectives.base import TokenizerInfo
from sparselt_dist.objectives.settings import MixConfig

VOCAB = 120
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
TOKENIZER = TokenizerInfo(
    vocab_size=VOCAB, pad_id=0, unk_id=1, cls_id=2, sep_id=3, bos_id=2, eos_id=3, mask_id=4, special_ids=(0, 1, 2, 3, 4)
)


def model_with_head(architecture: str, *, is_started: bool = True, **settings: str) -> PretrainingModel:
    """Moved away from initial values, in which some parts of a head are 0 or 1."""
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 2} if architecture == "gpt2" else SIZES
    torch.manual_seed(0)
    section = ModelSection(architecture=architecture, config=sizes)
    backbone = build_backbone(section, TOKENIZER, sequence_length=16, with_head=False)
    cwt = get_objective("cwt")
    prediction = "causal" if backbone.is_causal else "masked"
    cfg = cwt.config_cls(prediction=prediction, recover_from=0.5, **settings)
    module: Any = cwt.build_module(cfg, backbone)
    with torch.no_grad():
        for parameter in [*backbone.parameters(), *module.parameters()]:
            parameter += 0.05 * torch.randn_like(parameter)
        if module.head.has_bias:
            module.head.token_counts += (1000 / torch.arange(1, VOCAB + 1)).long()
        if is_started:
            module.head.start(backbone.get_input_embeddings())
    return PretrainingModel(backbone, module).eval()


IDS = torch.randint(5, VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def expected(model: PretrainingModel) -> Tensor:
    """Log-probabilities of the run's own head."""
    head: Any = model.objective.head
    table_VD, bias_V = head.table_and_bias(model.backbone.get_input_embeddings())
    return F.linear(model.backbone(IDS), table_VD, bias_V).log_softmax(dim=-1)


def predicted(exported: ExportedHead, folder: Path) -> Tensor:
    """The same of the stored folder."""
    exported.backbone.model.save_pretrained(folder)
    auto = AutoModelForCausalLM if exported.backbone.is_causal else AutoModelForMaskedLM
    loaded, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        logits: Tensor = loaded.eval()(input_ids=IDS).logits
    return logits.log_softmax(dim=-1)


@pytest.mark.parametrize(
    ("architecture", "settings", "how"),
    [
        ("crammed-bert", {}, "as its own weights"),
        ("crammed-bert", {"recovered_table": "copy"}, "as its own weights"),
        ("bert", {}, "behind a transform that changes nothing"),
        ("bert", {"recovered_table": "copy", "recovered_bias": "none"}, "behind a transform that changes nothing"),
        ("roberta", {}, "behind a transform that changes nothing"),
        ("gpt2", {"recovered_bias": "none"}, "as its own weights"),
        ("gpt_neox", {"recovered_table": "copy", "recovered_bias": "none"}, "as its own weights"),
        ("gpt_neox", {}, "its bias inside its matrix"),
    ],
)
def test_the_stored_model_predicts_as_the_run(
    tmp_path: Path, architecture: str, settings: dict[str, str], how: str
) -> None:
    model = model_with_head(architecture, **settings)
    before = expected(model)
    exported = with_exported_head(model)
    assert how in exported.note and not exported.is_missing
    torch.testing.assert_close(predicted(exported, tmp_path), before, rtol=0, atol=1e-3)
    torch.testing.assert_close(expected(model), before, rtol=0, atol=0)  # the run's model stays as it is
    is_tied = settings.get("recovered_table") != "copy" and "matrix" not in how
    table = exported.backbone.get_input_embeddings().weight
    assert (exported.backbone.model.get_output_embeddings().weight is table) == is_tied
    body = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(body(input_ids=IDS)[0], model.backbone(IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("llama", "LlamaForCausalLM has no bias of the decoder to hold the head's"),
        ("modernbert", "ModernBertForMaskedLM predicts otherwise, through what stands in front of its decoder"),
    ],
)
def test_where_there_is_no_place_the_reason_is_told(architecture: str, reason: str) -> None:
    model = model_with_head(architecture)
    exported = with_exported_head(model)
    assert exported.is_missing and exported.backbone is model.backbone
    assert reason in exported.note and "objective.safetensors" in exported.note


def test_without_a_recovered_head_nothing_is_added() -> None:
    model = model_with_head("bert", is_started=False)
    assert with_exported_head(model) == ExportedHead(model.backbone, "", is_missing=False)
    torch.manual_seed(0)
    backbone = build_backbone(
        ModelSection(architecture="bert", config=SIZES), TOKENIZER, sequence_length=16, with_head=True
    )
    mlm = get_objective("mlm")
    with_head = PretrainingModel(backbone, mlm.build_module(mlm.config_cls(), backbone))
    assert with_exported_head(with_head).backbone is backbone


def test_the_part_of_a_mixture_that_recovered_a_head_exports_it() -> None:
    model = model_with_head("bert")
    mix = get_objective("mix")
    cfg = MixConfig(parts=[{"name": "cwt"}, {"name": "cwt", "recover_from": 0.5}])
    module: Any = mix.build_module(cfg, model.backbone)
    assert with_exported_head(PretrainingModel(model.backbone, module)).note == ""
    module.parts[1].load_state_dict(model.objective.state_dict())
    assert with_exported_head(PretrainingModel(model.backbone, module)).note.startswith("in the model")


def test_a_headless_folder_starts_a_run_that_recovers_a_head(tmp_path: Path) -> None:
    """Not one that needs the head's weights from the beginning: its refusal says how."""
    model = model_with_head("bert", is_started=False)
    with_exported_head(model).backbone.model.save_pretrained(tmp_path)
    section = ModelSection(init_from=str(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"weights missing .* objective.name=cwt with objective.recover_from=0.01"
    ):
        build_backbone(section, TOKENIZER, sequence_length=16, with_head=True)
    backbone = build_backbone(section, TOKENIZER, sequence_length=16, with_head=False)
    cwt = get_objective("cwt")
    cfg = cwt.config_cls(recover_from=0.01, recovered_table="copy")
    module: Any = cwt.build_module(cfg, backbone)
    module.set_progress(5, 0.01)
    batch = cwt.build_collator(cfg, TOKENIZER)([{"key": "s/0", "ids": IDS[0].numpy().astype("uint16"), "seed": 1}])
    assert "contrastive" not in module(backbone, batch).metrics
    assert torch.equal(module.head.copied_table, model.backbone.get_input_embeddings().weight)

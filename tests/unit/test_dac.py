"""DAC stage 2: the agreement term, what it leaves alone, its training and its folding."""

import numpy as np
import pytest
import torch
from torch import Tensor

from sparselt_dist.errors import ConfigError
from sparselt_dist.models.backbone import Backbone, PretrainingModel
from sparselt_dist.models.crammed import CrammedBertConfig, CrammedBertForMaskedLM
from sparselt_dist.models.folding import fold_inputs
from sparselt_dist.objectives.base import TokenizerInfo
from sparselt_dist.objectives.contract import check_objective
from sparselt_dist.objectives.dac import DAC, DACModule
from sparselt_dist.objectives.dac_embedding import AgreementEmbedding
from sparselt_dist.objectives.dac_tables import AgreementTable
from sparselt_dist.objectives.mlm import MLMModule
from sparselt_dist.objectives.settings import DACConfig, MLMConfig
from sparselt_dist.optim import parameter_groups

VOCAB, WIDTH = 50, 8
TOKENIZER = TokenizerInfo(vocab_size=VOCAB, pad_id=0, mask_id=4, special_ids=(0, 1, 2, 3, 4))
CONFIG = DACConfig(table_width=WIDTH, mlm_probability=0.3)


def backbone() -> Backbone:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = CrammedBertForMaskedLM(CrammedBertConfig(vocab_size=VOCAB, max_position_embeddings=16, **sizes))
    return Backbone(model.double(), has_head=True)


def tables(scale: float = 1.0) -> list[AgreementTable]:
    rows = [torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(r)) * scale for r in range(4)]
    for table in rows:
        table[list(TOKENIZER.special_ids)] = 0
    return [AgreementTable(table.to(torch.float16), 1.0) for table in rows]


def dac_model(**changes: object) -> tuple[Backbone, DACModule]:
    body = backbone()
    torch.manual_seed(1)
    module = DAC().build_module(CONFIG.model_copy(update=changes), body)
    assert isinstance(module, DACModule)
    module.agreement.load(tables())
    return body, module.double()


def batch(seed: int = 0, ids: np.ndarray | None = None) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    rows = rng.integers(5, VOCAB, (4, 12)) if ids is None else ids
    examples = [{"key": f"s/{n}", "ids": row.astype(np.uint16), "seed": n} for n, row in enumerate(rows)]
    return DAC().build_collator(CONFIG, TOKENIZER)(examples)  # type: ignore[arg-type]


def test_term_equals_the_plain_form() -> None:
    torch.manual_seed(2)
    agreement = AgreementEmbedding(VOCAB, 16, families=4, width=WIDTH).double()
    agreement.load(tables())
    with torch.no_grad():
        agreement.gains_R.copy_(torch.tensor([0.5, 1.0, -2.0, 3.0]))
    ids = torch.tensor([[5, 9], [0, 49]])
    gains, weight = agreement.gains_R.detach().numpy(), agreement.weight_DC.detach().numpy()
    plain = [table.table_VM.double().numpy() for table in tables()]
    for row, column in np.ndindex(2, 2):
        joined = np.concatenate([gain * table[ids[row, column]] for gain, table in zip(gains, plain, strict=True)])
        np.testing.assert_allclose(agreement(ids)[row, column].detach().numpy(), weight @ joined, atol=1e-12)


def test_without_gains_it_is_masked_language_modelling() -> None:
    plain_body, (body, module) = backbone(), dac_model()
    with torch.no_grad():
        module.agreement.gains_R.zero_()
    plain = MLMModule()(plain_body, batch())
    ours = module(body, batch())
    assert torch.equal(plain.loss, ours.loss)
    plain.loss.backward()
    ours.loss.backward()
    for (name, expected), found in zip(plain_body.named_parameters(), body.parameters(), strict=True):
        assert torch.equal(expected.grad, found.grad), name  # type: ignore[arg-type]


@pytest.mark.parametrize("combination", ["gated", "concatenate"])
def test_other_combinations_start_as_the_sum_and_are_trained(combination: str) -> None:
    (body, summed), (other_body, other) = dac_model(), dac_model(combination=combination)
    loss = other(other_body, batch()).loss
    torch.testing.assert_close(loss, summed(body, batch()).loss, rtol=1e-12, atol=0)
    loss.backward()
    (weight,) = other.agreement.combination.parameters()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_gains_are_not_decayed() -> None:
    _, module = dac_model(combination="gated")
    decay = {id(p): group["weight_decay"] for group in parameter_groups(module, 0.1) for p in group["params"]}  # type: ignore[attr-defined]
    agreement = module.agreement
    assert decay[id(agreement.gains_R)] == 0
    assert decay[id(agreement.weight_DC)] == decay[id(agreement.combination.weight_D)] == 0.1


def test_term_changes_the_loss_and_is_trained() -> None:
    body, module = dac_model()
    loss = module(body, batch()).loss
    assert not torch.equal(loss, MLMModule()(backbone(), batch()).loss)
    loss.backward()
    for parameter in (module.agreement.weight_DC, module.agreement.gains_R):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_original_ids_under_masks_do_not_leak() -> None:
    body, module = dac_model()
    first = batch()
    masked = (first["input_ids"] == TOKENIZER.mask_id).numpy()
    assert masked.any()
    originals = np.where(first["labels"].numpy() >= 0, first["labels"].numpy(), first["input_ids"].numpy())
    other = np.where(masked, 5 + (originals - 4) % (VOCAB - 5), originals)
    second = batch(ids=other)
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert not torch.equal(first["labels"], second["labels"])
    hidden = [body(b["input_ids"], attention_mask=b["attention_mask"]) for b in (first, second)]
    assert torch.equal(*hidden)
    mask = torch.tensor([TOKENIZER.mask_id])
    assert (module.agreement(mask) == 0).all()


def test_tables_stay_as_they_are() -> None:
    body, module = dac_model()
    parameters = [*body.parameters(), *module.parameters()]
    assert all(parameter is not module.agreement.tables_VRM for parameter in parameters)
    before = module.agreement.tables_VRM.clone()
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
    module(body, batch()).loss.backward()
    optimizer.step()
    assert torch.equal(module.agreement.tables_VRM, before)


def test_tables_train_where_asked_to() -> None:
    body = backbone()
    module = DACModule(CONFIG.model_copy(update={"trainable_tables": True}), body).double()
    module.agreement.load(tables())
    module(body, batch()).loss.backward()
    assert isinstance(module.agreement.tables_VRM, torch.nn.Parameter)
    assert module.agreement.tables_VRM.grad is not None


def test_head_stays_tied_to_the_words_alone() -> None:
    body, _ = dac_model()
    assert body.model.decoder.weight is body.get_input_embeddings().weight
    hidden = torch.randn(3, 16, dtype=torch.float64)
    torch.testing.assert_close(body.logits(hidden), hidden @ body.get_input_embeddings().weight.T)


def test_sizes_of_the_full_model() -> None:
    with torch.device("meta"):
        model = CrammedBertForMaskedLM(CrammedBertConfig())
        agreement = AgreementEmbedding(32768, 768, families=4, width=64)
    trained = sum(p.numel() for p in [*model.parameters(), *agreement.parameters()])
    assert trained == 119_786_501
    assert sum(b.numel() for b in agreement.buffers()) == 8_388_608


def test_projection_starts_at_half_the_size_of_a_word() -> None:
    torch.manual_seed(0)
    agreement = AgreementEmbedding(1000, 256, families=4, width=64)
    agreement.load([AgreementTable((torch.randn(1000, 64) * 0.02).half(), 1.0) for _ in range(4)])
    assert agreement(torch.arange(1000)).std().item() == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize("combination", ["add", "gated", "concatenate"])
def test_folding_reproduces_the_outputs(combination: str) -> None:
    body, module = dac_model(combination=combination)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    given = batch()["input_ids"]
    words_VD = body.get_input_embeddings().weight.detach().clone()
    expected = body.logits(body(given)[0])
    assert fold_inputs(PretrainingModel(body, module))
    torch.testing.assert_close(body.logits(body(given)[0]), expected, atol=1e-10, rtol=0)
    assert torch.equal(body.model.decoder.weight, words_VD)  # the head's own now
    assert not torch.equal(body.get_input_embeddings().weight, words_VD)
    assert not module.state_dict() and not body.config.tie_word_embeddings
    assert torch.equal(body.get_input_embeddings().weight[TOKENIZER.mask_id], words_VD[TOKENIZER.mask_id]) == (
        combination != "concatenate"  # which changes words without a term as well
    )


def test_tables_of_other_shards_are_refused() -> None:
    agreement = AgreementEmbedding(VOCAB, 16, families=4, width=WIDTH)
    with pytest.raises(ConfigError, match=r"sizes \[\(50, 8\)\], expected \[\(50, 8\), .*objective\.families"):
        agreement.load(tables()[:1])
    with pytest.raises(ConfigError, match=r"\(49, 8\)"):
        agreement.load([AgreementTable(table.table_VM[1:], 1.0) for table in tables()])


@pytest.mark.parametrize(
    "changes", [{}, {"combination": "gated"}, {"combination": "concatenate"}, {"variant": "contextual"}]
)
def test_plug_in_keeps_the_contract(changes: dict[str, str]) -> None:
    check_objective(DAC(), DACConfig(**changes))


@pytest.mark.parametrize("changes", [{"tables": "window"}, {"sides": "words"}, {"trainable_tables": True}])
def test_what_the_contextual_variant_has_not_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="variant=contextual with tables=trained or random"):
        DACConfig(variant="contextual", **changes)


def test_a_term_of_context_is_not_folded() -> None:
    body = backbone()
    module = DAC().build_module(CONFIG.model_copy(update={"variant": "contextual"}), body)
    names = set(module.state_dict())
    assert not fold_inputs(PretrainingModel(body, module))
    assert set(module.state_dict()) == names and body.config.tie_word_embeddings


def test_families_are_named_once() -> None:
    with pytest.raises(ValueError, match="families that differ"):
        DACConfig(families=("A1", "A1"))
    assert issubclass(DACConfig, MLMConfig)

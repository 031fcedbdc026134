"""DAC: the submodels' losses against plain numpy, export of tables, the agreement term and its folding."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sparselt_dist.errors import ConfigError, DataError
from sparselt_dist.models.backbone import Backbone, PretrainingModel
from sparselt_dist.models.crammed import CrammedBertConfig, CrammedBertForMaskedLM
from sparselt_dist.models.folding import fold_inputs
from sparselt_dist.objectives.base import TokenizerInfo
from sparselt_dist.objectives.contract import check_objective
from sparselt_dist.objectives.dac import DAC, DACModule
from sparselt_dist.objectives.dac_embedding import AgreementEmbedding
from sparselt_dist.objectives.dac_fit import rate_at
from sparselt_dist.objectives.dac_submodels import (
    Pairs,
    Sides,
    Submodel,
    SubmodelLoss,
    contrastive_loss,
    fit_submodel,
)
from sparselt_dist.objectives.dac_tables import AgreementTable, export_table, permuted_rows, random_rows
from sparselt_dist.objectives.mlm import MLMModule
from sparselt_dist.objectives.settings import DACConfig, MLMConfig
from sparselt_dist.optim import parameter_groups

VOCAB, WIDTH = 50, 8


def sides(rows: list[list[int]], weights: list[list[float]] | None = None) -> Sides:
    width = max(map(len, rows), default=1)
    given = weights or [[1.0] * len(row) for row in rows]
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int64).view(len(rows), width)
    padded = torch.tensor([row + [0.0] * (width - len(row)) for row in given]).view(len(rows), width)
    return Sides(ids, padded)


def some_pairs(count: int, seed: int = 0, flips: bool = True) -> Pairs:
    """Random pairs of 1 to 3 pieces a side, the first piece a root; every third pair has a flipped copy."""
    rng = np.random.default_rng(seed)

    def draw(number: int) -> Sides:
        rows = [rng.integers(5, VOCAB, rng.integers(1, 4)).tolist() for _ in range(number)]
        return sides(rows, [[2.0] + [1.0] * (len(row) - 1) for row in rows])

    flipped = torch.arange(0, count, 3) if flips else torch.zeros(0, dtype=torch.int64)
    labels = torch.from_numpy(rng.integers(0, 4, count))
    return Pairs(draw(count), draw(count), labels, flipped, draw(len(flipped)), draw(len(flipped)))


# --- stage 1: losses -------------------------------------------------------------------------------------------------


def reference_loss(submodel: Submodel, pairs: Pairs) -> tuple[float, float]:
    """Contrast and label loss, pair by pair in float64."""
    state = {name: value.detach().double().numpy() for name, value in submodel.state_dict().items()}
    table, temperature = state["table.weight"], math.exp(state["log_temperature"])

    def vector(side: Sides, row: int) -> np.ndarray:
        weights = side.weights_NS[row].double().numpy()
        return (table[side.ids_NS[row].numpy()] * weights[:, None]).sum(0) / weights.sum()

    def pieces(side: Sides, row: int) -> tuple[int, ...]:
        return tuple(int(i) for i, w in zip(side.ids_NS[row], side.weights_NS[row], strict=True) if w > 0)

    def score(head: np.ndarray, dependent: np.ndarray) -> float:
        u, d = state["head_map.weight"] @ head, state["dependent_map.weight"] @ dependent
        return float(u @ d / np.linalg.norm(u) / np.linalg.norm(d) / temperature)

    n = len(pairs)
    heads = [vector(pairs.heads, row) for row in range(n)]
    dependents = [vector(pairs.dependents, row) for row in range(n)]
    flipped = {
        int(row): score(vector(pairs.flipped_heads, k), vector(pairs.flipped_dependents, k))
        for k, row in enumerate(pairs.flipped_F)
    }
    contrast = label = 0.0
    for i in range(n):
        true = score(heads[i], dependents[i])
        extra = [flipped[i]] if i in flipped else []
        other_dependents = [j for j in range(n) if pieces(pairs.dependents, j) != pieces(pairs.dependents, i)]
        other_heads = [j for j in range(n) if pieces(pairs.heads, j) != pieces(pairs.heads, i)]
        for rivals in (
            [score(heads[i], dependents[j]) for j in other_dependents],
            [score(heads[j], dependents[i]) for j in other_heads],
        ):
            contrast += 0.5 * (math.log(sum(map(math.exp, [true, *rivals, *extra]))) - true) / n
        u, d = state["head_map.weight"] @ heads[i], state["dependent_map.weight"] @ dependents[i]
        logits = state["label_classifier.weight"] @ np.concatenate([u, d, u * d]) + state["label_classifier.bias"]
        label += (math.log(np.exp(logits).sum()) - logits[int(pairs.labels_N[i])]) / n
    return contrast, label


def trained_looking(seed: int = 0) -> Submodel:
    torch.manual_seed(seed)
    submodel = Submodel(VOCAB, num_labels=4, width=WIDTH, label_weight=0.3).double()
    with torch.no_grad():
        for parameter in (submodel.head_map.weight, submodel.dependent_map.weight):
            parameter.add_(0.3 * torch.randn_like(parameter))
        submodel.log_temperature.fill_(math.log(0.5))
    return submodel


def test_loss_equals_the_plain_form() -> None:
    submodel, pairs = trained_looking(), some_pairs(13)
    # a repeated dependent and a repeated head, which are no rivals of each other
    pairs.dependents.ids_NS[4], pairs.dependents.weights_NS[4] = (
        pairs.dependents.ids_NS[1],
        pairs.dependents.weights_NS[1],
    )
    pairs.heads.ids_NS[7], pairs.heads.weights_NS[7] = pairs.heads.ids_NS[2], pairs.heads.weights_NS[2]
    contrast, label = reference_loss(submodel, pairs)
    loss = submodel(pairs.batch(torch.arange(13)))
    # scores are compared in float32
    assert loss.contrast.item() == pytest.approx(contrast, rel=1e-5)
    assert loss.label.item() == pytest.approx(label, rel=1e-5)
    assert loss.total.item() == pytest.approx(contrast + 0.3 * label, rel=1e-5)


def test_root_pieces_weigh_double() -> None:
    submodel = trained_looking()
    (vector,) = submodel.vectors(sides([[7, 9]], [[2.0, 1.0]]))
    rows = submodel.table.weight
    torch.testing.assert_close(vector, (2 * rows[7] + rows[9]) / 3)


def test_flipped_copy_raises_the_loss_of_its_row_alone() -> None:
    scores = torch.zeros(3, 3)
    none = torch.full((3,), -torch.inf)
    one = none.clone()
    one[1] = 0.0
    different = torch.eye(3, dtype=torch.bool)
    assert float(contrastive_loss(scores, different, none)) == pytest.approx(math.log(3))
    assert float(contrastive_loss(scores, different, one)) == pytest.approx((2 * math.log(3) + math.log(4)) / 3)


def test_one_pair_has_no_rival() -> None:
    loss = Submodel(VOCAB, 4, WIDTH)(some_pairs(1, flips=False))
    assert loss.contrast.item() == 0.0
    loss.total.backward()


def test_fresh_submodel_guesses() -> None:
    torch.manual_seed(1)
    submodel = Submodel(VOCAB, num_labels=4, width=64)
    with torch.no_grad():
        submodel.log_temperature.fill_(0.0)
    pairs = some_pairs(256, flips=False)
    scores = torch.rand(256, 256) * 0.0  # no score at all: exactly ln N
    assert float(contrastive_loss(scores, torch.eye(256, dtype=torch.bool), torch.full((256,), -torch.inf))) == (
        pytest.approx(math.log(256))
    )
    assert submodel(pairs).contrast.item() == pytest.approx(math.log(256), rel=0.05)


def test_temperature_stays_in_its_range() -> None:
    submodel = Submodel(VOCAB, 4, WIDTH)
    assert submodel.log_temperature.exp().item() == pytest.approx(0.07)
    for wild, kept in ((5.0, 1.0), (-9.0, 0.01)):
        with torch.no_grad():
            submodel.log_temperature.fill_(wild)
        submodel.keep_temperature_in_range()
        assert submodel.log_temperature.exp().item() == pytest.approx(kept)


def test_batches_keep_copies_with_their_pairs() -> None:
    pairs = some_pairs(10)
    batch = pairs.batch(torch.tensor([9, 4, 3]))
    assert batch.flipped_F.tolist() == [0, 2]
    assert torch.equal(batch.heads.ids_NS, pairs.heads.ids_NS[[9, 4, 3]])
    assert torch.equal(batch.flipped_heads.ids_NS, pairs.flipped_heads.ids_NS[[3, 1]])


def test_shuffled_pairs_keep_both_sides_and_no_copy() -> None:
    pairs = some_pairs(40)
    shuffled = pairs.shuffled(seed=3)
    assert torch.equal(shuffled.heads.ids_NS, pairs.heads.ids_NS)
    assert sorted(map(tuple, shuffled.dependents.ids_NS.tolist())) == sorted(
        map(tuple, pairs.dependents.ids_NS.tolist())
    )
    assert not torch.equal(shuffled.dependents.ids_NS, pairs.dependents.ids_NS)
    assert len(shuffled.flipped_F) == 0
    assert torch.isfinite(Submodel(VOCAB, 4, WIDTH)(shuffled).total)


# --- stage 1: training -----------------------------------------------------------------------------------------------


def fitted(seed: int, **settings: object) -> Submodel:
    torch.manual_seed(seed)
    submodel = Submodel(VOCAB, 4, WIDTH)
    fit_submodel(
        submodel, some_pairs(64), DACConfig(stage1_pairs_per_step=16, **settings), seed=seed, clock=lambda: 0.0
    )
    return submodel


def test_same_seed_same_table() -> None:
    first, again, other = fitted(5), fitted(5), fitted(6)
    assert torch.equal(first.table.weight, again.table.weight)
    assert not torch.equal(first.table.weight, other.table.weight)


def test_passes_end_the_training() -> None:
    submodel = Submodel(VOCAB, 4, WIDTH)
    cfg = DACConfig(stage1_pairs_per_step=16, stage1_max_passes=2)
    report = fit_submodel(submodel, some_pairs(70), cfg, seed=0, clock=lambda: 0.0)
    assert report.steps == 2 * (70 // 16)
    assert math.isfinite(report.loss)


def test_clock_ends_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now, forward = [0.0], Submodel.forward

    def slow(submodel: Submodel, pairs: Pairs) -> SubmodelLoss:
        now[0] += 4.0
        return forward(submodel, pairs)

    monkeypatch.setattr(Submodel, "forward", slow)
    cfg = DACConfig(stage1_pairs_per_step=2, stage1_max_passes=100, stage1_max_minutes=0.5)
    report = fit_submodel(Submodel(VOCAB, 4, WIDTH), some_pairs(64), cfg, seed=0, clock=lambda: now[0])
    assert (report.steps, report.seconds) == (7, 28.0)  # an eighth step would end past the 30 seconds
    report = fit_submodel(Submodel(VOCAB, 4, WIDTH), some_pairs(64), cfg, seed=0, max_seconds=9.0, clock=lambda: now[0])
    assert report.steps == 2


def test_no_pair_is_an_error() -> None:
    with pytest.raises(DataError, match=r"has no pair.*objective\.families"):
        fit_submodel(Submodel(VOCAB, 4, WIDTH), some_pairs(0, flips=False), DACConfig(), seed=0)


def test_rate_warms_up_and_falls_to_zero() -> None:
    assert rate_at(0.0) == 0.0
    assert rate_at(0.01) == pytest.approx(0.5)
    assert rate_at(0.02) == pytest.approx(1.0)
    assert rate_at(0.51) == pytest.approx(0.5)
    assert rate_at(1.0) == pytest.approx(0.0)


# --- export ----------------------------------------------------------------------------------------------------------

FREQUENCIES = torch.from_numpy(np.random.default_rng(0).integers(1, 1000, VOCAB))
USED = torch.tensor([4] * 12 + [5] * (VOCAB - 12))
SPECIAL = (0, 1, 2, 3, 49)


def exported() -> AgreementTable:
    rows = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0)) + 3.0
    return export_table(rows, FREQUENCIES, USED.clone(), SPECIAL, "A1")


def test_exported_table() -> None:
    table = exported()
    rows, weights = table.table_VM.double().numpy(), FREQUENCIES.double().numpy()
    zero = np.array([row in SPECIAL or row < 12 for row in range(VOCAB)])
    assert (rows[zero] == 0).all()
    assert (np.abs(rows[~zero]).max(axis=1) > 0).all()
    share = np.where(zero, 0, weights) / weights[~zero].sum()
    np.testing.assert_allclose(share @ rows, 0, atol=1e-5)  # float16 rounds
    assert math.sqrt((share @ rows**2).mean()) == pytest.approx(0.02, rel=1e-3)
    assert table.table_VM.dtype == torch.float16
    assert table.coverage == pytest.approx(weights[~zero].sum() / weights.sum())


def test_hash_of_a_table() -> None:
    table = exported()
    assert table.sha256 == exported().sha256
    changed = table.table_VM.clone()
    changed[20, 0] += 0.01
    assert AgreementTable(changed, table.coverage).sha256 != table.sha256


def test_table_without_rows_is_an_error() -> None:
    with pytest.raises(DataError, match="family A3: no piece"):
        export_table(torch.randn(VOCAB, WIDTH), FREQUENCIES, torch.full((VOCAB,), 4), SPECIAL, "A3")


def test_random_control_keeps_norms() -> None:
    table = exported()
    control = random_rows(table, seed=1)
    norms = table.table_VM.float().norm(dim=1)
    torch.testing.assert_close(control.table_VM.float().norm(dim=1), norms, rtol=2e-3, atol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(control.table_VM.float(), table.table_VM.float())
    assert cosine.abs().max() < 0.99


def test_permuted_control_keeps_rows_within_bands() -> None:
    table = exported()
    control = permuted_rows(table, FREQUENCIES, seed=1).table_VM
    used = torch.nonzero(table.table_VM.abs().sum(1)).squeeze(1)
    order = used[torch.argsort(FREQUENCIES[used], descending=True, stable=True)]
    for band in order.tensor_split(10):
        assert sorted(map(tuple, control[band].tolist())) == sorted(map(tuple, table.table_VM[band].tolist()))
    assert not torch.equal(control, table.table_VM)
    assert (control[0] == 0).all()


# --- stage 2 ---------------------------------------------------------------------------------------------------------

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

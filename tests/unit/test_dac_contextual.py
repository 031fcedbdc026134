"""DAC's contextual variant: submodels against plain numpy, what they may see, their scale, and the term on a backbone."""

import copy
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparselt_dist.data.batch import IGNORE_INDEX
from sparselt_dist.errors import ConfigError, DataError
from sparselt_dist.models.backbone import Backbone, PretrainingModel
from sparselt_dist.models.crammed import CrammedBertConfig, CrammedBertForMaskedLM
from sparselt_dist.objectives.base import TokenizerInfo
from sparselt_dist.objectives.dac import DAC
from sparselt_dist.objectives.dac_contextual import (
    Annotated,
    ContextualSubmodel,
    contextual_states,
    present_pieces,
)
from sparselt_dist.objectives.dac_contextual_embedding import ContextualAgreement
from sparselt_dist.objectives.dac_contextual_stage1 import (
    AnnotatedText,
    ContextualStage1,
    fit_contextual,
    make_submodels,
)
from sparselt_dist.objectives.dac_embedding import Added
from sparselt_dist.objectives.settings import DACConfig

VOCAB, WIDTH, PAD, MASK, CLS, SEP = 40, 8, 0, 4, 2, 3
TOKENIZER = TokenizerInfo(vocab_size=VOCAB, pad_id=PAD, mask_id=MASK, special_ids=(0, 1, 2, 3, 4))
CONFIG = DACConfig(table_width=WIDTH, mlm_probability=0.2, families=("A1", "A3"), stage1_max_passes=2)
PRESENT = present_pieces(TOKENIZER)
REACH = 8


def text_arrays(
    sentences: int = 60, longest: int = 40, families: tuple[str, ...] = CONFIG.families
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, longest + 1, sentences)
    total = int(lengths.sum())
    arrays = {"ids": rng.integers(5, VOCAB - 1, total).astype(np.uint16), "ends": np.cumsum(lengths)}
    arrays["begins"] = rng.random(total) < 0.4
    for family in families:
        arrays[f"roles_{family}"] = rng.integers(0, 3, total).astype(np.uint8)
        arrays[f"distances_{family}"] = rng.integers(0, 10, total).astype(np.uint8)
    return arrays


def stage1(seed: int = 3, **changes: object) -> ContextualStage1:
    return make_submodels(
        text_arrays(),
        CONFIG.model_copy(update=changes),
        TOKENIZER,
        seed=seed,
        max_seconds=math.inf,
        device=torch.device("cpu"),
        clock=lambda: 0.0,
    )


@pytest.fixture(scope="module")
def made() -> ContextualStage1:
    return stage1()


@pytest.fixture
def agreement(made: ContextualStage1) -> ContextualAgreement:
    torch.manual_seed(1)
    module = ContextualAgreement(VOCAB, 16, families=2, width=WIDTH, combination=Added())
    module.load(made.submodels, made.present_V)
    return module.double()


def some_ids(rows: int = 3, length: int = 30, seed: int = 0) -> Tensor:
    return torch.randint(5, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


# --- submodels -------------------------------------------------------------------------------------------------------


def plain_states(rows: np.ndarray, filters: np.ndarray, present: np.ndarray) -> np.ndarray:
    """One row of one submodel, place by place: [L, M]."""
    erf = np.vectorize(math.erf)
    states = rows * present[:, None]
    for layer in filters:
        centred = states - states.mean(1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
        inputs = 0.5 * normed * (1 + erf(normed / math.sqrt(2)))
        sums = np.zeros_like(states)
        for place in np.flatnonzero(present):
            for tap in range(9):
                if 0 <= place + tap - 4 < len(states):
                    sums[place] += inputs[place + tap - 4] @ layer[tap]
        states = states + sums
    return states


def test_states_equal_the_plain_form() -> None:
    torch.manual_seed(0)
    rows, filters = torch.randn(2, 15, 3, WIDTH).double(), torch.randn(2, 9, 3, WIDTH, WIDTH).double()
    present = torch.rand(2, 15) < 0.8
    states = contextual_states(rows, filters, present).numpy()
    for row, family in np.ndindex(2, 3):
        expected = plain_states(rows[row, :, family].numpy(), filters[:, :, family].numpy(), present[row].numpy())
        np.testing.assert_allclose(states[row, :, family], expected, atol=1e-9)


def test_scores_and_losses_of_a_batch() -> None:
    torch.manual_seed(0)
    submodel = ContextualSubmodel(PRESENT, WIDTH)
    ids = some_ids()
    ids[0, 5], ids[1, 20:] = CLS, PAD
    classes = torch.stack([torch.randint(0, n, ids.shape) for n in (2, 3, 10)], dim=-1)
    classes[1, 20:] = IGNORE_INDEX
    loss = submodel(Annotated(ids, classes))
    told = ids >= 4
    for term, scores, wanted in zip(loss[1:], submodel.scores(ids), classes.unbind(-1), strict=True):
        chances = scores[told].log_softmax(-1).gather(1, wanted[told][:, None])
        torch.testing.assert_close(term, -chances.mean())
    torch.testing.assert_close(loss.total, loss.boundary + loss.role + loss.distance)


def test_special_tokens_but_the_mask_are_absent() -> None:
    assert torch.nonzero(~PRESENT).flatten().tolist() == [0, 1, 2, 3]


# --- training --------------------------------------------------------------------------------------------------------


def test_rows_are_whole_sentences_in_order() -> None:
    arrays = text_arrays(longest=200)
    text = AnnotatedText(arrays, "A1", CONFIG.model_copy(update={"mlm_probability": 1e-9}), TOKENIZER)
    batch = text.batch(np.arange(len(text)), np.zeros(len(text), dtype=np.uint64))
    filled = batch.classes_BL3[..., 0] != IGNORE_INDEX
    assert torch.equal(batch.ids_BL[filled], torch.from_numpy(arrays["ids"].astype(np.int64)))
    for number, name in enumerate(("begins", "roles_A1", "distances_A1")):
        assert torch.equal(batch.classes_BL3[filled][:, number], torch.from_numpy(arrays[name].astype(np.int64)))
    assert (batch.ids_BL[~filled] == PAD).all()
    lengths = filled.sum(1).tolist()
    assert max(lengths) <= 128
    ends = set(arrays["ends"].tolist())
    for stop, length in zip(np.cumsum(lengths).tolist(), lengths, strict=True):
        assert stop in ends or length == 128


def test_masks_are_those_of_pretraining_and_new_in_every_pass() -> None:
    text = AnnotatedText(text_arrays(), "A1", CONFIG, TOKENIZER)
    batches = list(text.steps(len(text), passes=2, seed=7))
    assert len(batches) == 2
    for batch in batches:
        filled = batch.classes_BL3[..., 0] != IGNORE_INDEX
        share = float((batch.ids_BL[filled] == MASK).double().mean())
        assert share == pytest.approx(0.2 * 0.8, abs=0.04)
    alone = AnnotatedText(text_arrays(sentences=1, longest=90), "A1", CONFIG, TOKENIZER)
    first, second = (batch.ids_BL for batch in alone.steps(1, passes=2, seed=7))
    assert first.shape[1] > 20
    assert not torch.equal(first, second)


def test_the_clock_ends_the_training() -> None:
    ticks: Iterator[float] = iter(range(1000))
    text = AnnotatedText(text_arrays(), "A1", CONFIG, TOKENIZER)
    fit = fit_contextual(
        ContextualSubmodel(PRESENT, WIDTH),
        text,
        CONFIG,
        seed=0,
        max_seconds=4.5,
        clock=lambda: next(ticks),
        rows_per_step=2,
    )
    assert fit.steps == 3


def test_no_text_is_an_error() -> None:
    arrays = {name: values[:0] for name, values in text_arrays().items()}
    with pytest.raises(DataError, match=r"text is empty.*objective\.variant"):
        AnnotatedText(arrays, "A1", CONFIG, TOKENIZER)


def test_the_result_follows_from_the_seed_and_leaves_global_randomness_alone(made: ContextualStage1) -> None:
    torch.manual_seed(1)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    again = stage1()
    assert torch.equal(drawn, torch.rand(1))
    hashes = [submodel.sha256 for submodel in made.submodels]
    assert [submodel.sha256 for submodel in again.submodels] == hashes
    assert not set(hashes) & {submodel.sha256 for submodel in stage1(seed=4).submodels}
    assert set(made.metrics()) == {"stage1_seconds", *(f"{f}/{m}" for f in ("A1", "A3") for m in ("steps", "loss"))}


def test_random_control_is_not_trained(made: ContextualStage1) -> None:
    control = stage1(tables="random")
    assert control.reports == {}
    assert control.submodels[0].sha256 != made.submodels[0].sha256
    torch.manual_seed(3)
    fresh = ContextualSubmodel(PRESENT, WIDTH)
    assert torch.equal(control.submodels[0].filters_KTMM, fresh.filters_KTMM)


# --- stage 2 ---------------------------------------------------------------------------------------------------------


def test_states_over_text_are_centred_and_of_the_scale(agreement: ContextualAgreement) -> None:
    text = AnnotatedText(text_arrays(), "A1", CONFIG, TOKENIZER)
    ids = text.batch(np.arange(len(text)), np.arange(len(text), dtype=np.uint64)).ids_BL
    states = agreement.states(ids)[PRESENT[ids]]
    torch.testing.assert_close(states.square().mean((0, 2)).sqrt(), torch.full((2,), 0.02).double(), rtol=0.03, atol=0)
    assert states.mean(0).abs().max() < 0.003  # masks differ from those of the measure


def test_pieces_seen_too_rarely_have_no_row(made: ContextualStage1) -> None:
    assert VOCAB - 1 not in text_arrays()["ids"]
    table = made.submodels[0].table_VM
    assert (table[VOCAB - 1] == 0).all()
    assert (table[[MASK, 5, 20]] != 0).any(dim=1).all()


def test_term_equals_the_plain_form(agreement: ContextualAgreement, made: ContextualStage1) -> None:
    with torch.no_grad():
        agreement.gains_R.copy_(torch.tensor([0.5, -2.0]))
    ids = some_ids(2, 12)
    ids[0, 3] = SEP
    joined = []
    for submodel, gain in zip(made.submodels, (0.5, -2.0), strict=True):
        table, filters = submodel.table_VM.double(), submodel.filters_KTMM.double()
        states = contextual_states(table[ids].unsqueeze(2), filters.unsqueeze(2), PRESENT[ids]).squeeze(2)
        scaled = (states - submodel.mean_M.double()) * float(np.float32(submodel.scale))
        joined.append(gain * scaled * PRESENT[ids][..., None])
    expected = torch.cat(joined, dim=-1) @ agreement.weight_DC.T
    torch.testing.assert_close(agreement(ids), expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(agreement(ids[1]), expected[1], atol=1e-10, rtol=0)  # one row alone


def test_special_tokens_have_no_term_and_masks_have_that_of_their_context(agreement: ContextualAgreement) -> None:
    ids = some_ids(1)
    ids[0, 0], ids[0, 10], ids[0, 15], ids[0, 20:] = CLS, MASK, SEP, PAD
    term = agreement(ids)
    assert (term[~PRESENT[ids]] == 0).all()
    assert (term[0, 10] != 0).any()
    other = ids.clone()
    other[0, 9] = 5 + (ids[0, 9] - 4) % (VOCAB - 5)
    assert not torch.equal(agreement(other)[0, 10], term[0, 10])


def test_a_term_depends_on_eight_pieces_on_either_side(agreement: ContextualAgreement) -> None:
    ids, place = some_ids(1, 40), 20
    changed = ids.clone()
    changed[0, place] = 5 + (ids[0, place] - 4) % (VOCAB - 5)
    touched = (agreement(ids) != agreement(changed)).any(-1)[0]
    assert torch.nonzero(touched).flatten().tolist() == list(range(place - REACH, place + REACH + 1))


def test_padding_changes_no_term(agreement: ContextualAgreement) -> None:
    ids = some_ids(2, 20)
    padded = torch.cat([torch.full((2, 3), PAD), ids, torch.full((2, 6), PAD)], dim=1)
    torch.testing.assert_close(agreement(padded)[:, 3:23], agreement(ids), atol=1e-12, rtol=0)


def test_documents_of_a_packed_row_do_not_see_each_other(agreement: ContextualAgreement) -> None:
    documents = [some_ids(1, length, seed=length)[0] for length in (1, 3, 12, 2, 20)]
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
    term = agreement(torch.cat(documents)[None], positions)[0]
    for found, document in zip(term.split([len(d) for d in documents]), documents, strict=True):
        torch.testing.assert_close(found, agreement(document), atol=1e-12, rtol=0)


def test_frozen_parts_are_buffers_that_a_checkpoint_holds(
    agreement: ContextualAgreement, made: ContextualStage1
) -> None:
    assert {name for name, _ in agreement.named_parameters()} == {"gains_R", "weight_DC"}
    agreement(some_ids()).sum().backward()
    for parameter in agreement.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    fresh = ContextualAgreement(VOCAB, 16, families=2, width=WIDTH, combination=Added()).double()
    assert (fresh(some_ids()) == 0).all()
    fresh.load_state_dict(agreement.state_dict())
    assert torch.equal(fresh(some_ids()), agreement(some_ids()))


def test_a_larger_vocabulary_has_empty_rows_and_other_submodels_are_refused(made: ContextualStage1) -> None:
    larger = ContextualAgreement(VOCAB + 8, 16, families=2, width=WIDTH, combination=Added())
    larger.load(made.submodels, made.present_V)
    assert (larger(torch.tensor([[VOCAB, VOCAB + 7]])) == 0).all()
    with pytest.raises(ConfigError, match=r"sizes \[\(40, 8\)\], expected \[\(40, 8\), .*objective\.families"):
        larger.load(made.submodels[:1], made.present_V)


# --- on a backbone ---------------------------------------------------------------------------------------------------


def model_with(agreement: ContextualAgreement, *, unpad: bool = False) -> Backbone:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    bert = CrammedBertForMaskedLM(CrammedBertConfig(vocab_size=VOCAB, max_position_embeddings=32, **sizes))
    body = Backbone(bert.double(), has_head=True, unpad=unpad)
    agreement.attach(body.get_input_embeddings())
    agreement.follow_positions(body.body)
    return body


def padded_batch() -> tuple[Tensor, Tensor]:
    ids, mask = some_ids(4, 24), torch.ones(4, 24, dtype=torch.int64)
    for row, length in enumerate((24, 9, 3, 11)):
        ids[row, length:], mask[row, length:] = PAD, 0
    return ids, mask


def test_rows_without_padding_have_the_states_of_padded_rows(agreement: ContextualAgreement) -> None:
    ids, mask = padded_batch()
    expected = model_with(agreement)(ids, attention_mask=mask)[mask.bool()]
    found = model_with(copy.deepcopy(agreement), unpad=True)(ids, attention_mask=mask)[mask.bool()]
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


class Asks(nn.Module):
    """An objective that does not pass on where documents lie."""

    def forward(self, backbone: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        hidden: Tensor = backbone(batch["input_ids"], attention_mask=batch["attention_mask"])
        return hidden


def test_original_ids_under_masks_do_not_leak(agreement: ContextualAgreement) -> None:
    collate = DAC().build_collator(CONFIG.model_copy(update={"mask_share": 1.0, "random_share": 0.0}), TOKENIZER)
    body, originals = model_with(agreement), some_ids().numpy().astype(np.uint16)

    def batch() -> dict[str, Tensor]:
        return collate([{"key": str(row), "ids": ids, "seed": row} for row, ids in enumerate(originals)])

    first = batch()
    masked = (first["input_ids"] == MASK).numpy()
    assert masked.any()
    originals = np.where(masked, 5 + (originals - 4) % (VOCAB - 5), originals)
    second = batch()
    assert not torch.equal(first["labels"], second["labels"])
    hidden = [body(b["input_ids"], attention_mask=b["attention_mask"]) for b in (first, second)]
    assert torch.equal(*hidden)


def test_packed_rows_have_the_states_of_their_documents(agreement: ContextualAgreement) -> None:
    body = model_with(agreement)
    documents = [some_ids(1, length, seed=length)[0] for length in (7, 14, 3)]
    numbers = [torch.full((len(d),), number + 1) for number, d in enumerate(documents)]
    batch = {
        "input_ids": torch.cat(documents)[None],
        "attention_mask": torch.ones(1, 24, dtype=torch.int64),
        "segment_ids": torch.cat(numbers)[None],
        "position_ids": torch.cat([torch.arange(len(d)) for d in documents])[None],
    }
    hidden = PretrainingModel(body, Asks())(batch)
    for found, document in zip(hidden[0].split([7, 14, 3]), documents, strict=True):
        torch.testing.assert_close(found, body(document[None])[0], atol=1e-10, rtol=0)


@pytest.mark.slow
def test_a_compiled_body_gives_the_same(agreement: ContextualAgreement) -> None:
    body, (ids, mask) = model_with(agreement), padded_batch()
    positions = torch.arange(24).expand(4, 24) % 5
    calls = ({"attention_mask": mask}, {"segment_ids": torch.arange(24).expand(4, 24) // 5, "position_ids": positions})
    expected = [body(ids, **call) for call in calls]
    body.body.compile(backend="eager", fullgraph=True)
    for call, want in zip(calls, expected, strict=True):
        torch.testing.assert_close(body(ids, **call), want, atol=1e-12, rtol=0)

"""Share of targets and row length that follow the budget: exact, and functions of sample and spent share alone."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from sparselt_dist.data.batch import IGNORE_INDEX, cut_rows
from sparselt_dist.data.collation import without_targets
from sparselt_dist.errors import ConfigError
from sparselt_dist.objectives.base import FollowsProgress, TokenizerInfo
from sparselt_dist.objectives.cost import declared_targets
from sparselt_dist.objectives.mix import Mix
from sparselt_dist.objectives.mlm import POSITIONS_KEY, SEEDS_KEY, MLMCollator
from sparselt_dist.objectives.settings import CWTConfig, MixConfig, MLMConfig

TOKENIZER = TokenizerInfo(vocab_size=200, pad_id=0, mask_id=4, special_ids=(0, 1, 2, 3, 4))
FALLING = ((0.0, 0.5), (0.5, 0.25))


def examples(rows=4, length=32):
    draw = np.random.default_rng(3)
    return [
        {"key": str(row), "ids": draw.integers(5, 200, length).astype(np.uint16), "seed": 2**63 + row}
        for row in range(rows)
    ]


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize("masking", ["exact", "bernoulli"])
@pytest.mark.parametrize(("progress", "rate"), [(0.0, 0.5), (0.25, 0.375), (0.5, 0.25), (1.0, 0.25)])
def test_a_batch_is_masked_as_by_the_rate_of_its_time(masking, progress, rate):
    scheduled = MLMCollator(MLMConfig(mlm_probability=FALLING, masking=masking), TOKENIZER)
    fixed = MLMCollator(MLMConfig(mlm_probability=rate, masking=masking), TOKENIZER)
    assert isinstance(scheduled, FollowsProgress) and scheduled.follows_progress and not fixed.follows_progress
    same(scheduled.at_progress(scheduled(examples()), progress), fixed(examples()))


def test_held_out_batches_have_the_last_rate():
    scheduled = MLMCollator(MLMConfig(mlm_probability=FALLING), TOKENIZER)
    batch = scheduled(examples())
    assert batch.pop(SEEDS_KEY).shape == (4,)
    same(batch, MLMCollator(MLMConfig(mlm_probability=0.25), TOKENIZER)(examples()))


def test_a_batch_that_does_not_count_stays_so():
    scheduled = MLMCollator(MLMConfig(mlm_probability=FALLING, row_lengths=((0.0, 8),)), TOKENIZER)
    batch = scheduled.at_progress(without_targets(scheduled(examples())), 0.0)
    assert (batch["labels"] == IGNORE_INDEX).all()
    assert batch["num_targets"] == batch["num_tokens"] == 0


def test_cut_rows_hold_the_same_tokens_and_targets():
    collator = MLMCollator(MLMConfig(row_lengths=((0.0, 8), (0.5, 32)), masking="exact"), TOKENIZER)
    whole = collator(examples())
    cut = collator.at_progress(whole, 0.2)
    assert cut["input_ids"].shape == cut["labels"].shape == cut["attention_mask"].shape == (16, 8)
    for key in ("input_ids", "labels"):
        assert torch.equal(cut[key].flatten(), whole[key].flatten())
    for key in ("num_targets", "num_tokens", POSITIONS_KEY):
        assert torch.equal(cut[key], whole[key])
    same(collator.at_progress(whole, 0.5), whole)


def test_rows_that_do_not_divide_are_padded_and_pieces_of_padding_left_out():
    collator = MLMCollator(MLMConfig(row_lengths=((0.0, 12),), mlm_probability=0.4), TOKENIZER)
    short, long = examples(2, 32)
    short["ids"] = short["ids"][:10]
    cut = collator.at_progress(collator([short, long]), 0.0)
    assert cut["attention_mask"].sum(1).tolist() == [10, 12, 12, 8]
    assert (cut["input_ids"][cut["attention_mask"] == 0] == 0).all()
    labelled = cut["labels"].flatten() != IGNORE_INDEX
    assert torch.equal(cut[POSITIONS_KEY], labelled.nonzero().squeeze(1))
    assert int(labelled.sum()) == int(cut["num_targets"]) > 0


def test_positions_of_a_document_begin_anew_at_a_cut():
    row = torch.arange(5, 15)[None]
    batch = {
        "input_ids": row,
        "attention_mask": torch.ones_like(row),
        "labels": row,
        "segment_ids": torch.tensor([[1, 1, 1, 1, 1, 1, 2, 2, 2, 0]]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 0]]),
    }
    batch["attention_mask"][0, -1] = 0
    cut = cut_rows(batch, 4, 0)
    assert cut["segment_ids"].tolist() == [[1, 1, 1, 1], [1, 1, 2, 2], [2, 0, 0, 0]]
    assert cut["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 1], [0, 0, 0, 0]]


def test_the_plan_counts_the_mean_rate():
    cfg = MLMConfig(mlm_probability=((0.2, 0.5), (0.7, 0.1)))
    assert declared_targets(cfg, is_causal=False) == pytest.approx(0.2 * 0.5 + 0.5 * 0.3 + 0.3 * 0.1)
    assert declared_targets(MLMConfig(), is_causal=False) == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mlm_probability": ((0.5, 0.2), (0.1, 0.2))}, "whose first shares rise from 0"),
        ({"mlm_probability": ((0.0, 1.2),)}, "whose second lie between 0 and 1"),
        ({"mlm_probability": 1.5}, "less than 1"),
        ({"row_lengths": ((0.5, 16), (1.5, 32))}, "row_lengths with shares of the budget that rise"),
        ({"row_lengths": ((0.0, 0),)}, "greater than or equal to 1"),
    ],
)
def test_bad_points_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        MLMConfig(**fields)


def test_other_objectives_take_one_rate():
    with pytest.raises(ValidationError, match="mlm_probability"):
        CWTConfig(mlm_probability=FALLING)
    parts = ({"name": "mlm", "mlm_probability": FALLING},)
    with pytest.raises(ConfigError, match=r"objective\.parts\.0: found a share of targets"):
        Mix().build_collator(MixConfig(parts=parts), TOKENIZER)

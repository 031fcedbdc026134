"""Masking counts and shares, and the MLM loss against an independent numpy form."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from sparselt_dist.data.batch import IGNORE_INDEX, Batch, Example
from sparselt_dist.errors import ConfigError, PluginError
from sparselt_dist.objectives import base, get_objective
from sparselt_dist.objectives.base import LossOutput, TokenizerInfo
from sparselt_dist.objectives.contract import TINY_TOKENIZER, TinyBackbone, check_objective, tiny_examples
from sparselt_dist.objectives.mlm import MLM, POSITIONS_KEY, MLMCollator, MLMModule
from sparselt_dist.objectives.settings import MLMConfig

VOCAB = 1000
TOKENIZER = TokenizerInfo(
    vocab_size=VOCAB, pad_id=0, mask_id=4, special_ids=(0, 1, 2, 3, 4), continues_word_V=np.arange(VOCAB) % 3 == 0
)
EXACT = {"masking": "exact", "mlm_probability": 0.25, "exempt_special": False}


def _rows(count: int, length: int = 128, low: int = 5, first_seed: int = 0) -> list[Example]:
    generator = np.random.default_rng(1)
    return [
        {"key": f"s/{row}", "ids": generator.integers(low, VOCAB, length).astype(np.uint16), "seed": first_seed + row}
        for row in range(count)
    ]


def _collate(examples: list[Example], **settings: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Original ids, corrupted ids and targets, each [B, L]."""
    batch = MLMCollator(MLMConfig(**settings), TOKENIZER)(examples)
    targets = (batch["labels"] != IGNORE_INDEX).numpy()
    corrupted = batch["input_ids"].numpy()
    return np.where(targets, batch["labels"].numpy(), corrupted), corrupted, targets


def _word_numbers(ids: np.ndarray) -> np.ndarray:
    """Independent, slow: the word that each position of a row belongs to; a special token is a word of its own."""
    numbers, current = [], -1
    for place, token in enumerate(ids.tolist()):
        apart = token < 5 or (place > 0 and ids[place - 1] < 5)
        if place == 0 or apart or token % 3 != 0:
            current += 1
        numbers.append(current)
    return np.array(numbers)


# ---------------------------------------------------------------- masking


def test_bernoulli_shares_are_80_10_10() -> None:
    ids, corrupted, targets = _collate(_rows(2000))
    assert np.array_equal(np.where(targets, corrupted, ids), corrupted)  # nothing but targets is touched
    assert abs(targets.mean() - 0.15) < 0.003
    assert np.abs(targets.mean(axis=0) - 0.15).max() < 0.04  # at every position
    masked, kept = (corrupted == 4)[targets].mean(), (corrupted == ids)[targets].mean()
    assert abs(masked - 0.8) < 0.01 and abs(kept - 0.1) < 0.01
    replaced = corrupted[targets & (corrupted != 4) & (corrupted != ids)]
    assert replaced.min() < 10 and replaced.max() > VOCAB - 10  # uniform over all ids
    assert abs(replaced.mean() - VOCAB / 2) < 20


def test_exact_counts_are_those_of_cramming() -> None:
    ids, corrupted, targets = _collate(_rows(400, low=5), **EXACT)
    assert (targets.sum(axis=1) == 32).all()
    masked = (targets & (corrupted == 4)).sum(axis=1)
    kept = (targets & (corrupted == ids)).sum(axis=1)
    # 26 masked and 3 kept of 32; a random id may by chance be the mask or the original
    assert masked.min() == 26 and masked.max() <= 27 and kept.min() == 3 and kept.max() <= 4
    assert (masked == 26).mean() > 0.98 and (kept == 3).mean() > 0.98
    inclusion = targets.mean(axis=0)
    assert np.abs(inclusion - 0.25).max() < 0.09 and abs(inclusion.mean() - 0.25) < 1e-12


@pytest.mark.parametrize(("probability", "expected"), [(0.15, 19), (0.25, 32), (0.4, 51)])
def test_exact_count_of_a_row_of_128(probability: float, expected: int) -> None:
    _, _, targets = _collate(_rows(3), masking="exact", mlm_probability=probability, exempt_special=False)
    assert (targets.sum(axis=1) == expected).all()


def test_exact_counts_follow_each_rows_own_length() -> None:
    examples = [_rows(1, length)[0] for length in (128, 40, 2, 9)]
    _, _, targets = _collate(examples, **EXACT)
    assert targets.sum(axis=1).tolist() == [32, 10, 0, 2]
    assert not targets[1, 40:].any()


@pytest.mark.parametrize("masking", ["bernoulli", "exact"])
@pytest.mark.parametrize("whole_word", [False, True])
def test_special_tokens_and_padding_are_exempt(masking: str, whole_word: bool) -> None:
    examples = [_rows(1, length, low=0, first_seed=length)[0] for length in range(20, 120)]
    for example in examples:
        example["ids"][::4] = 2
    ids, _, targets = _collate(examples, masking=masking, whole_word=whole_word, mlm_probability=0.4)
    assert targets.any() and not (ids[targets] < 5).any()
    ids, _, targets = _collate(examples, masking=masking, whole_word=whole_word, exempt_special=False)
    assert (ids[targets] == 2).any()
    for row, length in enumerate(range(20, 120)):
        assert not targets[row, length:].any()


def test_every_special_id_may_be_a_target_in_cramming() -> None:
    ids, _, targets = _collate(_rows(200, low=0), **EXACT)
    assert set(range(5)) <= set(ids[targets].tolist())


def test_whole_words_are_chosen_as_a_whole_with_the_right_share() -> None:
    ids, _, targets = _collate(_rows(1000, low=0), whole_word=True)
    for row in range(1000):
        words = _word_numbers(ids[row])
        chosen = np.unique(words[targets[row]])
        eligible = ids[row] >= 5
        assert np.array_equal(targets[row], np.isin(words, chosen) & eligible)
    assert abs(targets.sum() / (ids >= 5).sum() - 0.15) < 0.004


def test_whole_words_meet_an_exact_count_as_nearly_as_words_allow() -> None:
    ids, corrupted, targets = _collate(_rows(300), masking="exact", mlm_probability=0.25, whole_word=True)
    counts = targets.sum(axis=1)
    assert abs(counts.mean() - 32) < 0.1
    for row in range(300):
        words = _word_numbers(ids[row])
        chosen = np.unique(words[targets[row]])
        assert np.array_equal(targets[row], np.isin(words, chosen))
        longest = np.bincount(words).max()
        assert 2 * abs(counts[row] - 32) <= longest
        masked = (targets[row] & (corrupted[row] == 4)).sum()
        assert masked in (round(0.8 * counts[row]), round(0.8 * counts[row]) + 1)  # one may be a random id


def test_shares_may_leave_nothing_or_everything() -> None:
    for masking in ("bernoulli", "exact"):
        ids, corrupted, targets = _collate(_rows(20), masking=masking, mask_share=0.0, random_share=0.0)
        assert targets.any() and np.array_equal(ids, corrupted)
        _, corrupted, targets = _collate(_rows(20), masking=masking, mask_share=1.0, random_share=0.0)
        assert (corrupted[targets] == 4).all()
        _, corrupted, targets = _collate(_rows(20), masking=masking, mask_share=0.5, random_share=0.5)
        assert targets.any()


@pytest.mark.parametrize("settings", [{}, EXACT, {"whole_word": True}, {"whole_word": True, "masking": "exact"}])
def test_masks_depend_on_the_examples_seed_alone(settings: dict[str, Any]) -> None:
    examples = _rows(6)
    _, corrupted, targets = _collate(examples, **settings)
    for row, example in enumerate(examples):
        _, alone, own = _collate([example], **settings)
        assert np.array_equal(alone[0], corrupted[row]) and np.array_equal(own[0], targets[row])
    reseeded = [{**example, "seed": example["seed"] + 100} for example in examples]
    assert not np.array_equal(_collate(reseeded, **settings)[2], targets)  # type: ignore[arg-type]


def test_collator_faults_are_configuration_errors() -> None:
    with pytest.raises(ConfigError, match=r"has no mask token.*prepare the shards"):
        MLMCollator(MLMConfig(), TokenizerInfo(vocab_size=10, pad_id=0, mask_id=None))
    with pytest.raises(ConfigError, match=r"whole_word.*does not mark where words begin"):
        MLMCollator(MLMConfig(whole_word=True), TokenizerInfo(vocab_size=10, pad_id=0, mask_id=4))


# ---------------------------------------------------------------- loss


def _numpy_loss(logits_NV: np.ndarray, labels_N: np.ndarray) -> float:
    """Mean negative log-likelihood, in float64."""
    logits_NV = logits_NV.astype(np.float64)
    top_N = logits_NV.max(axis=1)
    log_norm_N = top_N + np.log(np.exp(logits_NV - top_N[:, None]).sum(axis=1))
    return float((log_norm_N - logits_NV[np.arange(len(labels_N)), labels_N]).mean())


def _batch() -> Batch:
    return MLMCollator(MLMConfig(mlm_probability=0.3), TINY_TOKENIZER)(tiny_examples())


def _forward(batch: Batch, backbone: TinyBackbone) -> LossOutput:
    output: LossOutput = MLMModule()(backbone, batch)
    return output


def test_loss_and_accuracy_equal_numpy() -> None:
    torch.manual_seed(0)
    backbone, batch = TinyBackbone(), _batch()
    output = _forward(batch, backbone)
    with torch.no_grad():
        hidden = backbone(batch["input_ids"], attention_mask=batch["attention_mask"])
        logits = backbone.logits(hidden.flatten(0, 1)).numpy()
    labels = batch["labels"].flatten().numpy()
    chosen = labels != IGNORE_INDEX
    assert output.loss.item() == pytest.approx(_numpy_loss(logits[chosen], labels[chosen]), rel=1e-6)
    total, count = output.metrics["loss"]
    assert int(count) == int(batch["num_targets"]) == chosen.sum()
    assert total.item() / int(count) == pytest.approx(output.loss.item(), rel=1e-6)
    correct, count = output.metrics["accuracy"]
    assert int(correct) == (logits[chosen].argmax(axis=1) == labels[chosen]).sum() and int(count) == chosen.sum()


def test_batches_made_elsewhere_need_labels_alone() -> None:
    torch.manual_seed(0)
    backbone, batch = TinyBackbone(), _batch()
    bare = {key: value for key, value in batch.items() if key != POSITIONS_KEY}
    assert torch.equal(_forward(batch, backbone).loss, _forward(bare, backbone).loss)


@pytest.mark.parametrize("keep_positions", [True, False])
def test_no_target_gives_zero_attached_to_every_parameter(keep_positions: bool) -> None:
    backbone, batch = TinyBackbone(), _batch()
    batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
    if not keep_positions:
        batch[POSITIONS_KEY] = torch.zeros(0, dtype=torch.int64)
    output = _forward(batch, backbone)
    output.loss.backward()
    assert output.loss.item() == 0 and int(output.metrics["loss"][1]) == 0
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_half_precision_gives_a_float32_loss() -> None:
    backbone, batch = TinyBackbone(), _batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _forward(batch, backbone).loss.dtype == torch.float32


def test_packed_rows_reach_the_backbone() -> None:
    torch.manual_seed(0)
    backbone, batch = TinyBackbone(), _batch()
    segments = torch.ones_like(batch["input_ids"])
    segments[:, 8:] = 2
    packed = {**batch, "segment_ids": segments, "position_ids": torch.arange(segments.shape[1]).expand_as(segments) % 8}
    assert _forward(packed, backbone).loss != _forward(batch, backbone).loss


def test_a_causal_backbone_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"causal model.*set model.architecture to crammed-bert"):
        MLM().build_module(MLMConfig(), TinyBackbone(is_causal=True))


# ---------------------------------------------------------------- the interface's own checks


@pytest.mark.parametrize("name", sorted(base.BUILT_IN.keys() - {"mix"}))  # which has no default: test_mix.py
def test_built_in_objectives_pass_the_contract(name: str) -> None:
    check_objective(get_objective(name), composes=name != "cwt")  # whose targets are each other's negatives


@pytest.mark.parametrize("settings", [EXACT, {"whole_word": True}, {"whole_word": True, "masking": "exact"}])
def test_mlm_passes_the_contract_in_every_form(settings: dict[str, Any]) -> None:
    check_objective(MLM(), MLMConfig(**settings))


def test_collator_is_small_when_pickled() -> None:
    assert len(pickle.dumps(MLMCollator(MLMConfig(), TOKENIZER))) < 4 * VOCAB + 2000


class Faulty(MLM):
    """MLM with one fault."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def build_collator(self, cfg: MLMConfig, tokenizer: TokenizerInfo) -> Any:
        return FaultyCollator(cfg, tokenizer, self.fault)

    def build_module(self, cfg: MLMConfig, backbone: torch.nn.Module) -> torch.nn.Module:
        return FaultyModule(self.fault)


class FaultyCollator(MLMCollator):
    def __init__(self, cfg: MLMConfig, tokenizer: TokenizerInfo, fault: str) -> None:
        super().__init__(cfg, tokenizer)
        self.fault = fault
        if fault == "unpicklable":
            self.hook = lambda: None

    def __call__(self, examples: list[Example]) -> Batch:
        if self.fault == "global generator":
            np.random.rand()
        if self.fault == "changes examples":
            examples[0]["ids"][0] += 1
        if self.fault == "seed of the batch":
            examples = [{**example, "seed": row} for row, example in enumerate(examples)]
        if self.fault == "seed of the longest":
            longest = max(len(example["ids"]) for example in examples)
            examples = [{**example, "seed": example["seed"] + longest} for example in examples]
        batch = super().__call__(examples)
        if self.fault == "count":
            batch["num_targets"] = batch["num_targets"] + 1
        if self.fault == "dtype":
            batch["labels"] = batch["labels"].int()
        if self.fault == "key":
            batch["other/key"] = batch["labels"]
        if self.fault == "missing":
            del batch["num_tokens"]
        return batch


class FaultyModule(MLMModule):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, backbone: torch.nn.Module, batch: Batch) -> LossOutput:
        loss, metrics = super().forward(backbone, batch)
        count = metrics["loss"][1]
        if self.fault == "sum":
            return LossOutput(loss * count, metrics)
        if self.fault == "not a number":
            return LossOutput(loss * count / count, metrics)
        if self.fault == "detached":
            return LossOutput(loss.detach(), metrics)
        if self.fault == "float64":
            return LossOutput(loss.double(), metrics)
        if self.fault == "graph":
            return LossOutput(loss, {"loss": (loss, count)})
        return LossOutput(loss, metrics)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("global generator", "draws from a global generator"),
        ("changes examples", "changes the examples"),
        ("unpicklable", "cannot be pickled"),
        ("seed of the batch", "changes with the order of the examples"),
        ("seed of the longest", "when its example is collated alone"),
        ("count", "num_targets is"),
        ("dtype", "'labels' is torch.int32"),
        ("key", "has the key 'other/key'"),
        ("missing", "lacks num_tokens"),
        ("sum", "weighted by num_targets differ"),
        ("not a number", "the loss is nan"),
        ("detached", "detached from the graph"),
        ("float64", "torch.float64"),
        ("graph", "'loss' holds the graph"),
    ],
)
def test_the_contract_finds_every_fault(fault: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        check_objective(Faulty(fault))


def test_the_contract_wants_the_whole_interface() -> None:
    with pytest.raises(PluginError, match="not an objective"):
        check_objective(object())  # type: ignore[arg-type]

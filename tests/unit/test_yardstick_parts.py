"""Replaced tokens, the linear probe and the recovered head, apart from any model."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselt_dist.data.batch import Example
from sparselt_dist.evaluation.features import Corrupted, documents_of, evaluation_mode, hidden_at
from sparselt_dist.evaluation.head_recovery import RecoveredHead, _choose_start, recover_head
from sparselt_dist.evaluation.probe import _other_ids, probe_accuracy, replaced_rows
from sparselt_dist.models.backbone import Backbone
from sparselt_dist.models.crammed import CrammedBertConfig, CrammedBertForMaskedLM

UNIGRAM_V = np.array([0.0, 0.0, 8.0, 4.0, 2.0, 1.0, 1.0])


def _rows(count: int, length: int) -> list[Example]:
    ids = np.random.default_rng(0).integers(2, 7, (count, length)).astype(np.uint16)
    return [{"key": f"shard-000000/{row}", "ids": ids[row], "seed": row} for row in range(count)]


def test_replacements_follow_the_unigrams_given_that_they_differ() -> None:
    own = np.full((1, 200_000), 3)
    uniform = np.random.default_rng(0).random(own.shape)
    drawn = np.bincount(_other_ids(own, uniform, UNIGRAM_V)[0], minlength=7) / own.size
    expected = np.where(np.arange(7) == 3, 0.0, UNIGRAM_V) / 12
    assert np.allclose(drawn, expected, atol=0.005)


def test_replacements_stay_inside_the_vocabulary_at_both_ends_of_the_draw() -> None:
    own = np.array([[2, 6, 2, 6]])
    drawn = _other_ids(own, np.array([[0.0, 0.0, np.nextafter(1, 0), np.nextafter(1, 0)]]), UNIGRAM_V)
    assert drawn.tolist() == [[3, 2, 6, 5]]


def test_documents_of_a_packed_row_are_read_apart() -> None:
    torch.manual_seed(0)
    config = CrammedBertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    backbone = Backbone(CrammedBertForMaskedLM(config), has_head=True)
    ids = torch.randint(5, 32, (1, 12))
    packed: Example = {"key": "shard-000000/0", "ids": ids[0].numpy(), "seed": 0, "documents": np.array([5, 7])}
    everywhere, nowhere = torch.arange(12), torch.zeros(12, dtype=torch.int64)

    def states(rows: Tensor, documents: dict[str, Tensor]) -> Tensor:
        one = Corrupted(rows, torch.ones_like(rows), everywhere[: rows.numel()], nowhere[: rows.numel()], documents)
        return hidden_at(backbone, [one], torch.device("cpu"))[0]

    apart = states(ids, documents_of(ids, [packed]))
    assert torch.allclose(apart[:5], states(ids[:, :5], {}), atol=1e-5)
    assert torch.allclose(apart[5:], states(ids[:, 5:], {}), atol=1e-5)
    assert not torch.allclose(apart[5:], states(ids, {})[5:], atol=1e-2)


def test_probe_rows_are_balanced_and_say_what_was_replaced() -> None:
    examples = _rows(40, 50)
    examples[0]["ids"] = examples[0]["ids"][:9].copy()  # a short row, padded
    examples[1]["ids"][:10] = 1  # special ids are neither replaced nor looked at
    originals = {row: example["ids"] for row, example in enumerate(examples)}
    (rows,) = replaced_rows(examples, UNIGRAM_V, special_ids=(0, 1), pad_id=0)
    assert rows.answers_N.double().mean() == 0.5
    ids = rows.input_ids_BL.flatten()
    for place, answer in zip(rows.places_N.tolist(), rows.answers_N.tolist(), strict=True):
        original = int(originals[place // 50][place % 50])
        assert original not in (0, 1)
        assert (int(ids[place]) != original) == bool(answer)
    changed = sum(int((rows.input_ids_BL[row, : len(own)].numpy() != own).sum()) for row, own in originals.items())
    assert changed == int(rows.answers_N.sum()) == 1 + 6 + 38 * round(0.15 * 50 + 1e-9)


def test_probe_finds_a_linear_rule_and_nothing_where_there_is_none() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3000, 20, generator=generator) * 100 + 50
    answers = (features[:, 3] - features[:, 7] > 0).long()
    accuracy, majority = probe_accuracy((features[:2000], answers[:2000]), (features[2000:], answers[2000:]))
    assert accuracy > 0.97
    assert 0.5 <= majority < 0.56
    coin = (torch.rand(3000, generator=generator) < 0.5).long()
    accuracy, _ = probe_accuracy((features[:2000], coin[:2000]), (features[2000:], coin[2000:]))
    assert abs(accuracy - 0.5) < 0.06


def _contrastive(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Hidden states whose product with the table is log p(v|context) - log p(v), and the entropy of p(v|context)."""
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(50, 16, generator=generator)
    unigram = (1 / torch.arange(1, 51)).div((1 / torch.arange(1, 51)).sum())
    hidden = 0.6 * torch.randn(count, 16, generator=generator)
    log_p = F.log_softmax(hidden @ table.T + unigram.log(), dim=1)
    targets = torch.multinomial(log_p.exp(), 1, generator=generator).squeeze(1)
    return hidden, targets, table, unigram.log(), -float((log_p.exp() * log_p).sum(dim=1).mean())


def test_recovered_head_adds_the_unigrams_that_a_contrastive_objective_leaves_out() -> None:
    hidden, targets, table, log_unigram, entropy = _contrastive(8000)
    head = recover_head(hidden[:6000], targets[:6000], table, log_unigram, steps=100, seed=0)
    recovered = head.score(hidden[6000:], targets[6000:])
    raw = F.cross_entropy(hidden[6000:] @ table.T, targets[6000:]).item()
    assert recovered.cross_entropy < entropy + 0.1
    assert raw > entropy + 0.3


def test_recovered_head_starts_without_unigrams_where_the_logits_have_them() -> None:
    generator = torch.Generator().manual_seed(4)
    table, hidden = torch.randn(50, 16, generator=generator), torch.randn(2000, 16, generator=generator)
    targets = torch.multinomial((hidden @ table.T / 4).softmax(dim=1), 1, generator=generator).squeeze(1)
    skewed = torch.linspace(0, -5, 50).log_softmax(dim=0)
    head = RecoveredHead.start(16, table, skewed)
    _choose_start(head, hidden, targets)
    assert head.unigram_weight.item() == 0.0
    assert head.log_scale.exp().item() == 0.25


def test_recovering_a_head_is_repeatable_and_draws_nothing_global() -> None:
    hidden, targets, table, log_unigram, _ = _contrastive(900)
    before = torch.get_rng_state()
    heads = [recover_head(hidden, targets, table, log_unigram, steps=10, seed=1) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(heads[0].matrix_ED, heads[1].matrix_ED)
    other = recover_head(hidden, targets, table, log_unigram, steps=10, seed=2)
    assert not torch.equal(heads[0].matrix_ED, other.matrix_ED)


def test_a_head_fits_embeddings_of_another_width_than_the_hidden_states() -> None:
    table = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
    head = recover_head(hidden, torch.arange(64) % 30, table, torch.zeros(30), steps=2, seed=0)
    assert head.logits(hidden).shape == (64, 30)


def test_evaluation_mode_gives_every_part_its_own_mode_back() -> None:
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    module[1].eval()
    with evaluation_mode(module):
        assert not any(part.training for part in module.modules())
    assert [part.training for part in module.modules()] == [True, True, False, False]

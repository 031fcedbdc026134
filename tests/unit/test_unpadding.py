"""Rows without padding: the same hidden states and gradients, on fewer positions."""

import numpy as np
import pytest
import torch

from sparselt_dist.config import ModelSection
from sparselt_dist.errors import ConfigError
from sparselt_dist.models.backbone import PretrainingModel, build_backbone
from sparselt_dist.models.unpadding import find_layout
from sparselt_dist.objectives.base import LossOutput, TokenizerInfo

TOKENIZER = TokenizerInfo(vocab_size=96, pad_id=0, mask_id=6, cls_id=4, sep_id=5, bos_id=1, eos_id=2)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LENGTHS = [12, 3, 0, 7, 5, 1, 8, 4]


def backbone(architecture: str, unpad: bool):
    torch.manual_seed(0)
    section = ModelSection(architecture=architecture, config=SMALL)
    return build_backbone(section, TOKENIZER, sequence_length=16, with_head=False, unpad=unpad).eval()


def padded(lengths=LENGTHS, width=14):
    ids = torch.randint(7, 96, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


@pytest.mark.parametrize("architecture", ["crammed-bert", "bert", "roberta", "modernbert", "gpt_neox"])
def test_hidden_states_and_gradients_are_those_with_padding(architecture):
    ids, mask = padded()
    results = []
    for unpad in (False, True):
        model = backbone(architecture, unpad)
        hidden = model(ids, mask)
        kept = hidden[mask.bool()]
        kept.pow(2).sum().backward()
        results.append((kept.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=1e-5)
    assert len(results[0][1]) == len(results[1][1]) > 5
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_fewer_positions_are_computed():
    ids, mask = padded()
    model, seen = backbone("crammed-bert", True), []
    model.body.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    model(ids, mask)
    assert seen == [(4, 12)]  # 12, 8 + 4, 7 + 5, 3 + 1: 40 tokens in 48 places where padding takes 112


def test_each_token_has_one_place_and_its_own_position():
    ids, mask = padded()
    layout = find_layout(mask)
    assert layout is not None
    packed = layout.pack(ids)
    assert torch.equal(packed.flatten()[layout.packed_T], ids[mask.bool()][_order(layout, mask)])
    assert len(set(layout.packed_T.tolist())) == sum(LENGTHS) == int((layout.segment_ids_RW > 0).sum())
    back = layout.unpack(packed.unsqueeze(-1).float(), *ids.shape).squeeze(-1)
    assert torch.equal(back, ids.float())


def _order(layout, mask):
    """Ranks of the layout's tokens among all tokens in reading order."""
    rank = torch.cumsum(mask.flatten(), 0) - 1
    return rank[layout.padded_T]


def test_nothing_to_save_or_another_mask_is_left_alone():
    assert find_layout(torch.ones(3, 5, dtype=torch.int64)) is None
    assert find_layout(torch.zeros(3, 5, dtype=torch.int64)) is None
    inside = torch.ones(3, 5, dtype=torch.int64)
    inside[:, 1] = 0
    assert find_layout(inside) is None


def test_an_architecture_that_cannot_keep_samples_apart_is_refused():
    torch.manual_seed(0)
    section = ModelSection(architecture="fnet", config={key: SMALL[key] for key in SMALL if "heads" not in key})
    model = build_backbone(section, TOKENIZER, sequence_length=16, with_head=False, unpad=True)
    with pytest.raises(ConfigError, match="cannot keep the documents"):
        model(*padded())


def test_lengths_of_many_batches():
    generator = np.random.default_rng(0)
    for _ in range(50):
        lengths = generator.integers(0, 20, size=17).tolist()
        ids, mask = padded(lengths, 20)
        layout = find_layout(mask)
        if layout is not None:
            assert layout.segment_ids_RW.numel() < mask.numel()
            assert int(layout.pack(ids).sum()) == int(ids.sum())


class Forgetful(torch.nn.Module):
    """An objective that passes on nothing but ids and mask."""

    def forward(self, backbone, batch):
        hidden = backbone(batch["input_ids"], attention_mask=batch["attention_mask"])
        return LossOutput(hidden.square().mean(), {"hidden": (hidden.detach(), torch.ones(()))})


def test_documents_of_packed_rows_are_kept_apart_whatever_the_objective_passes_on():
    model = PretrainingModel(backbone("crammed-bert", False), Forgetful())
    ids, mask = padded([14], 14)
    batch = {"input_ids": ids, "attention_mask": mask}
    segments = {
        "segment_ids": torch.tensor([[1] * 6 + [2] * 8]),
        "position_ids": torch.tensor([[*range(6), *range(8)]]),
    }
    packed = model({**batch, **segments}).metrics["hidden"][0]
    alone = model({"input_ids": ids[:, 6:], "attention_mask": mask[:, 6:]}).metrics["hidden"][0]
    torch.testing.assert_close(packed[:, 6:], alone, rtol=0, atol=1e-5)
    assert (model(batch).metrics["hidden"][0] - packed).abs().max() > 1e-3  # and the next batch is not packed

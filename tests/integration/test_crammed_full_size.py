"""The first loss and logits of crammed-bert at full size (specification of cramming, section 11 item 7)."""

import pytest
import torch

from sparselt_dist.models.crammed import CrammedBertConfig, CrammedBertForMaskedLM

ROWS, LENGTH, TARGETS, TO_MASK, TO_RANDOM = 16, 128, 32, 26, 3
MASK_ID = 6


def corrupted_batch(generator):
    """Uniformly random rows; of 32 targets a row 26 are masked, 3 random, 3 kept."""
    original = torch.randint(0, 32768, (ROWS, LENGTH), generator=generator)
    corrupted, labels = original.clone(), torch.full_like(original, -100)
    for row in range(ROWS):
        chosen = torch.randperm(LENGTH, generator=generator)[:TARGETS]
        labels[row, chosen] = original[row, chosen]
        corrupted[row, chosen[:TO_MASK]] = MASK_ID
        random_ids = torch.randint(0, 32768, (TO_RANDOM,), generator=generator)
        corrupted[row, chosen[TO_MASK : TO_MASK + TO_RANDOM]] = random_ids
    return corrupted, labels


@pytest.mark.slow
def test_fresh_full_size_model_has_the_published_loss_and_logit_spread():
    torch.manual_seed(0)
    model = CrammedBertForMaskedLM(CrammedBertConfig()).eval()
    assert 0.5 < model.decoder.weight[0].norm() < 0.6
    input_ids, labels = corrupted_batch(torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model(input_ids, labels=labels)
    assert output.logits.shape == (ROWS * TARGETS, 32768)
    assert output.loss.item() == pytest.approx(9.90, abs=0.05)
    assert output.logits.std().item() == pytest.approx(0.556, abs=0.01)

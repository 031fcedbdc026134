"""Replaced-token probe: how much the frozen hidden states know of whether a token belongs where it stands.

A share of the positions of real rows gets another id, drawn from the unigram distribution of the training shards; a
logistic regression on the final hidden state then tells replaced from original positions (the task of ELECTRA, Clark et
al. 2020, as a probe). It needs no labels, works for any language and tokenizer, and for encoders and decoders
alike. Replacements have the marginal distribution of the text itself, so a token's identity says nothing about the
answer: only its fit with the context does. There are as many original as replaced positions, so guessing scores 0.5.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparselt_dist.data.batch import Example, pad_examples
from sparselt_dist.data.randomness import random_uniform
from sparselt_dist.evaluation.features import Corrupted, chunks, documents_of

REPLACED_SHARE = 0.15
_PENALTY = 1e-3  # of the squared weights, on standardised features
_ITERATIONS = 100


def replaced_rows(
    examples: list[Example], unigram_V: np.ndarray, special_ids: tuple[int, ...], pad_id: int
) -> Iterator[Corrupted]:
    """Rows with replaced ids; answers are 1 (replaced) and 0 (original), equally often in every row.

    Args:
        unigram_V: probabilities; ids of probability 0 are never drawn.
    """
    for chunk in chunks(examples):
        ids_BL, attention_BL, seeds_B = pad_examples(chunk, pad_id)
        eligible_BL = attention_BL.astype(bool) & ~np.isin(ids_BL, special_ids)
        draws_BL = np.where(eligible_BL, random_uniform(seeds_B, ids_BL.shape[1], "probe places"), 2.0)
        rank_BL = draws_BL.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
        count_B1 = np.rint(REPLACED_SHARE * eligible_BL.sum(axis=1, keepdims=True))
        replaced_BL = rank_BL < count_B1
        looked_at_BL = rank_BL < 2 * count_B1
        drawn_BL = _other_ids(ids_BL, random_uniform(seeds_B, ids_BL.shape[1], "probe ids"), unigram_V)
        places_N = np.flatnonzero(looked_at_BL)
        corrupted_BL = torch.from_numpy(np.where(replaced_BL, drawn_BL, ids_BL))
        yield Corrupted(
            input_ids_BL=corrupted_BL,
            attention_BL=torch.from_numpy(attention_BL),
            places_N=torch.from_numpy(places_N),
            answers_N=torch.from_numpy(replaced_BL.reshape(-1)[places_N].astype(np.int64)),
            documents=documents_of(corrupted_BL, chunk),
        )


def _other_ids(ids_BL: np.ndarray, uniform_BL: np.ndarray, unigram_V: np.ndarray) -> np.ndarray:
    """Ids drawn from the unigram distribution given that they differ from the ones that stand there."""
    upper_V = np.cumsum(unigram_V) / unigram_V.sum()
    own_upper_BL, own_BL = upper_V[ids_BL], (unigram_V / unigram_V.sum())[ids_BL]
    # The own id's interval is cut out of [0, 1) and the draw stretched over what remains.
    draw_BL = uniform_BL * (1 - own_BL)
    draw_BL = np.where(draw_BL >= own_upper_BL - own_BL, draw_BL + own_BL, draw_BL)
    drawn_BL: np.ndarray = np.searchsorted(upper_V, draw_BL, side="right")
    last = int(np.flatnonzero(unigram_V)[-1])
    return drawn_BL.clip(max=last)  # rounding may carry a draw past the last id


def probe_accuracy(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Test accuracy of a logistic regression fitted to (features [N, D], answers [N]), and the larger class's share.

    Fitted on the CPU in float64 by L-BFGS from zero, so the outcome is a function of the features alone.
    """
    features_ND, answers_N = train[0].double().cpu(), train[1].double().cpu()
    mean_D, deviation_D = features_ND.mean(dim=0), features_ND.std(dim=0).clamp(min=1e-6)
    weights = _fit((features_ND - mean_D) / deviation_D, answers_N)
    test_features_ND, test_answers_N = test[0].double().cpu(), test[1].cpu()
    scores_N = ((test_features_ND - mean_D) / deviation_D) @ weights[:-1] + weights[-1]
    accuracy = ((scores_N > 0) == (test_answers_N == 1)).double().mean().item()
    share = test_answers_N.double().mean().item()
    return accuracy, max(share, 1 - share)


def _fit(features_ND: Tensor, answers_N: Tensor) -> Tensor:
    """Weights [D + 1] with the intercept last."""
    weights = torch.zeros(features_ND.shape[1] + 1, dtype=features_ND.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        scores_N = features_ND @ weights[:-1] + weights[-1]
        loss = F.binary_cross_entropy_with_logits(scores_N, answers_N) + _PENALTY * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()

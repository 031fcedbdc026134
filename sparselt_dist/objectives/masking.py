"""Choosing and corrupting targets: pure functions of ids, attention mask and example seeds.

B rows, L positions, V vocabulary, N the most targets of a row. One 64-bit word is drawn for each position from the
seed of its row; every further number is hashed from that word, so a row does not depend on the rest of the batch.

Two ways of counting (MaskingRule.exact):

- Bernoulli (BERT, RoBERTa): every eligible position on its own with probability p; of the targets `mask_share` become
  the mask token, `random_share` a uniformly random id, the rest stay.
- exact (cramming, specification 4): n = round(p * eligible) targets a row without replacement, of which
  round(mask_share * n) become the mask token, round(random_share * n) random and the rest stay: 26, 3 and 3 of 32.
  Halves round to even.

With whole words a word is chosen or left as a whole, by the draw of its first piece; exact counts are then met as
nearly as whole words allow, while fates stay per position as in BERT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sparselt_dist.data.randomness import mix64, purpose_key, random_bits
from sparselt_dist.errors import ConfigError
from sparselt_dist.objectives.base import TokenizerInfo

_LAST = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class MaskingRule:
    """How many positions become targets, which ones, and what becomes of them."""

    probability: float
    exact: bool
    mask_share: float
    random_share: float
    whole_word: bool
    exempt_special: bool


class Masked(NamedTuple):
    """The corrupted rows and the places of the targets."""

    input_ids_BL: np.ndarray  # int64
    targets_BL: np.ndarray  # bool


class Vocabulary:
    """Tables of a tokenizer that masking looks up, made once. Picklable."""

    def __init__(self, tokenizer: TokenizerInfo, rule: MaskingRule) -> None:
        """Raises ConfigError: the tokenizer lacks what the rule needs."""
        if tokenizer.mask_id is None:
            raise ConfigError(
                "objective: the tokenizer has no mask token, expected one ([MASK] or <mask>); "
                "prepare the shards with a tokenizer that has it, or choose an objective without masking"
            )
        if rule.whole_word and tokenizer.continues_word_V is None:
            raise ConfigError(
                "objective.whole_word: found true, but the tokenizer does not mark where words begin; "
                "set it to false or prepare the shards with wordpiece or byte-bpe"
            )
        self.size = tokenizer.vocab_size
        self.mask_id = tokenizer.mask_id
        self.continues_word_V = tokenizer.continues_word_V
        self.special_V = np.zeros(tokenizer.vocab_size, dtype=bool)
        self.special_V[list(tokenizer.special_ids)] = True


def mask_tokens(
    ids_BL: np.ndarray, attention_BL: np.ndarray, seeds_B: np.ndarray, vocabulary: Vocabulary, rule: MaskingRule
) -> Masked:
    """Choose targets among the attended positions and corrupt them."""
    words_BL = random_bits(seeds_B, ids_BL.shape[1], "masking")
    special_BL = vocabulary.special_V[ids_BL]
    eligible_BL = attention_BL.astype(bool)
    if rule.exempt_special:
        eligible_BL &= ~special_BL
    draws_BL = words_BL
    if rule.whole_word:
        draws_BL = _word_draws(words_BL, _word_starts(ids_BL, special_BL, eligible_BL, vocabulary))
    if not rule.exact:
        chosen_BL = eligible_BL & (draws_BL < _threshold(rule.probability))
        flat = np.flatnonzero(chosen_BL)
        shares = _uniform(mix64(words_BL.reshape(-1)[flat] ^ np.uint64(purpose_key("fate"))))
        masked, random = shares < rule.mask_share, shares >= 1 - rule.random_share
    else:
        flat, masked, random = _exact(words_BL, draws_BL, eligible_BL, rule)
        chosen_BL = np.zeros(ids_BL.shape, dtype=bool)
        chosen_BL.reshape(-1)[flat] = True
    input_ids_BL = ids_BL.copy()
    corrupted = input_ids_BL.reshape(-1)
    corrupted[flat[masked]] = vocabulary.mask_id
    replaced = flat[random]
    corrupted[replaced] = random_ids(words_BL.reshape(-1)[replaced], vocabulary.size)
    return Masked(input_ids_BL, chosen_BL)


def random_ids(words: np.ndarray, vocab_size: int) -> np.ndarray:
    """Uniform ids int64 in [0, vocab_size) hashed from 64-bit words; the modulo's bias is below 2**-46."""
    ids: np.ndarray = (mix64(words ^ np.uint64(purpose_key("random id"))) % np.uint64(vocab_size)).astype(np.int64)
    return ids


def _threshold(probability: float) -> np.uint64:
    return np.uint64(int(probability * 2**64))


def _uniform(words: np.ndarray) -> np.ndarray:
    uniform: np.ndarray = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform


def _word_starts(
    ids_BL: np.ndarray, special_BL: np.ndarray, eligible_BL: np.ndarray, vocabulary: Vocabulary
) -> np.ndarray:
    """bool [B, L]: a word begins here. A special token is a word of its own, and so is what follows it."""
    assert vocabulary.continues_word_V is not None
    apart_BL = special_BL | ~eligible_BL
    starts_BL: np.ndarray = ~vocabulary.continues_word_V[ids_BL] | apart_BL
    starts_BL[:, 1:] |= apart_BL[:, :-1]
    starts_BL[:, 0] = True
    return starts_BL


def _word_draws(words_BL: np.ndarray, starts_BL: np.ndarray) -> np.ndarray:
    """Each position's draw replaced by that of its word's first piece; every row begins with a word."""
    starts = starts_BL.reshape(-1)
    first = np.maximum.accumulate(np.where(starts, np.arange(starts.size), 0))  # once is faster than for each row
    draws_BL: np.ndarray = words_BL.reshape(-1).take(first).reshape(words_BL.shape)
    return draws_BL


def _ranked(draws_BL: np.ndarray, eligible_BL: np.ndarray) -> np.ndarray:
    """Positions [B, L] in the order of their draws, the ineligible last; equal draws in order of position.

    Sorting (draw, position) in one word is faster than argsort and does not depend on how sorting treats ties.
    """
    length = draws_BL.shape[1]
    low = np.uint64((1 << max(1, (length - 1).bit_length())) - 1)
    packed_BL = np.where(eligible_BL, draws_BL, _LAST) & ~low
    packed_BL |= np.arange(length, dtype=np.uint64)
    packed_BL.sort(axis=1)
    return (packed_BL & low).astype(np.int64)


def _exact(
    words_BL: np.ndarray, draws_BL: np.ndarray, eligible_BL: np.ndarray, rule: MaskingRule
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat places of the targets [n], and which of them are masked and which random (bool [n])."""
    wanted_B = np.rint(rule.probability * eligible_BL.sum(axis=1)).astype(np.int64)
    order_BL = _ranked(draws_BL, eligible_BL)
    if rule.whole_word:
        chosen_BL = _whole_words(order_BL, draws_BL, eligible_BL, wanted_B)
        wanted_B = chosen_BL.sum(axis=1)
        order_BL = _ranked(words_BL, chosen_BL)  # fates per position, not per word
    most = int(wanted_B.max())
    column_N = np.arange(most)
    masked_B = np.rint(rule.mask_share * wanted_B).astype(np.int64)
    random_B = np.minimum(np.rint(rule.random_share * wanted_B).astype(np.int64), wanted_B - masked_B)
    rank_BN = np.broadcast_to(column_N, (len(order_BL), most))
    used_BN = rank_BN < wanted_B[:, None]
    masked_BN = rank_BN < masked_B[:, None]
    random_BN = (rank_BN < (masked_B + random_B)[:, None]) & ~masked_BN
    flat_BN = order_BL[:, :most] + np.arange(len(order_BL))[:, None] * order_BL.shape[1]
    return flat_BN[used_BN], masked_BN[used_BN], random_BN[used_BN]


def _whole_words(
    order_BL: np.ndarray, draws_BL: np.ndarray, eligible_BL: np.ndarray, wanted_B: np.ndarray
) -> np.ndarray:
    """bool [B, L]: whole words in the order of their draws, up to the total nearest to the wanted count.

    In that order the pieces of a word stand together; a word is in if its middle lies before the wanted count.
    """
    length = order_BL.shape[1]
    flat_BL = order_BL + np.arange(len(order_BL))[:, None] * length
    sorted_BL = np.where(eligible_BL, draws_BL, _LAST).reshape(-1).take(flat_BL)
    begins_BL = np.ones(order_BL.shape, dtype=bool)
    begins_BL[:, 1:] = sorted_BL[:, 1:] != sorted_BL[:, :-1]
    first_W = np.flatnonzero(begins_BL)  # W words: their first places among all B * L, in the order of their draws
    pieces_W = np.diff(first_W, append=order_BL.size)
    words_B = begins_BL.sum(axis=1)
    begin_W = first_W - np.repeat(np.arange(len(words_B)) * length, words_B)
    # One piece more and one less are equally near: toss a coin.
    lucky_W = (sorted_BL.reshape(-1)[first_W] & np.uint64(1)).astype(np.int64)
    inside_W = 2 * begin_W + pieces_W < np.repeat(2 * wanted_B, words_B) + lucky_W
    chosen_BL = np.empty(order_BL.shape, dtype=bool)
    chosen_BL.reshape(-1)[flat_BL] = inside_W.take(np.cumsum(begins_BL) - 1).reshape(order_BL.shape)
    chosen_BL &= eligible_BL
    return chosen_BL

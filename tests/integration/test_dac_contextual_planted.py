"""Stage 1 of DAC's contextual variant on a planted grammar: roles that only the neighbouring word decides are learned."""

import numpy as np
import torch

from sparselt_dist.objectives.base import TokenizerInfo
from sparselt_dist.objectives.dac_contextual import ContextualSubmodel, present_pieces
from sparselt_dist.objectives.dac_contextual_stage1 import AnnotatedText, fit_contextual
from sparselt_dist.objectives.settings import DACConfig

SPECIAL, NOUNS, MARKS = 5, 30, 10
VOCAB = SPECIAL + NOUNS + 2 * MARKS
TOKENIZER = TokenizerInfo(vocab_size=VOCAB, pad_id=0, mask_id=4, special_ids=(0, 1, 2, 3, 4))
CONFIG = DACConfig(table_width=32, mlm_probability=0.15)


def planted(sentences: int, seed: int) -> dict[str, np.ndarray]:
    """Sentences of noun and mark in turn: a noun before a mark of the first kind is a head, else a dependent."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 8, sentences)
    pairs = int(lengths.sum())
    kinds = rng.integers(0, 2, pairs)
    nouns = SPECIAL + rng.integers(0, NOUNS, pairs)
    marks = SPECIAL + NOUNS + kinds * MARKS + rng.integers(0, MARKS, pairs)
    none = np.zeros(pairs, dtype=np.int64)
    return {
        "ids": np.stack([nouns, marks], axis=1).reshape(-1).astype(np.uint16),
        "ends": 2 * np.cumsum(lengths),
        "begins": np.tile([True, False], pairs),
        "roles_A1": np.stack([1 + kinds, none], axis=1).reshape(-1).astype(np.uint8),
        "distances_A1": np.stack([np.where(kinds == 0, 5, 4), none], axis=1).reshape(-1).astype(np.uint8),
    }


def usual_role(arrays: dict[str, np.ndarray]) -> torch.Tensor:
    """The best that can be told of a piece without its neighbours: [V]."""
    counts = np.zeros((VOCAB, 3))
    np.add.at(counts, (arrays["ids"], arrays["roles_A1"]), 1)
    return torch.from_numpy(counts.argmax(axis=1))


def test_roles_that_the_neighbour_decides_are_learned() -> None:
    torch.manual_seed(0)
    arrays = planted(2000, seed=0)
    submodel = ContextualSubmodel(present_pieces(TOKENIZER), CONFIG.table_width)
    text = AnnotatedText(arrays, "A1", CONFIG, TOKENIZER)
    fit_contextual(submodel, text, CONFIG, seed=0, clock=lambda: 0.0, rows_per_step=4)

    held_out = AnnotatedText(planted(200, seed=1), "A1", CONFIG, TOKENIZER)
    ids_BL, classes_BL3 = held_out.batch(np.arange(len(held_out)), np.arange(len(held_out), dtype=np.uint64))
    is_noun = (ids_BL >= SPECIAL) & (ids_BL < SPECIAL + NOUNS)
    told = torch.zeros_like(is_noun)  # nouns whose mark is not masked
    told[:, :-1] = is_noun[:, :-1] & (ids_BL[:, 1:] >= SPECIAL + NOUNS)
    found = [scores.argmax(-1)[told] for scores in submodel.eval().scores(ids_BL)]
    wanted = classes_BL3[told].unbind(-1)
    shares = [float((one == two).double().mean()) for one, two in zip(found, wanted, strict=True)]
    alone = float((usual_role(arrays)[ids_BL[told]] == wanted[1]).double().mean())
    assert alone < 0.6
    assert min(shares) > 0.95  # boundary, role and distance

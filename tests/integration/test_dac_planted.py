"""Stage 1 of DAC on a planted grammar: a submodel learns agreement in number, and learns none from shuffled pairs."""

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from sparselt_dist.objectives.dac_submodels import Pairs, Sides, Submodel, fit_submodel
from sparselt_dist.objectives.settings import DACConfig

NOUNS = VERBS = 20
NOISE = 30  # words that say nothing, one in each side
SPECIAL = 5
VOCAB = SPECIAL + 2 * NOUNS + 2 * VERBS + NOISE
CONFIG = DACConfig(table_width=64, stage1_pairs_per_step=256, stage1_max_passes=3)


def noun(lemma: Tensor, plural: Tensor) -> Tensor:
    return SPECIAL + 2 * lemma + plural


def verb(lemma: Tensor, plural: Tensor) -> Tensor:
    return SPECIAL + 2 * NOUNS + 2 * lemma + plural


def side(roots_N: Tensor, noise_N: Tensor) -> Sides:
    ids_NS = torch.stack([SPECIAL + 2 * (NOUNS + VERBS) + noise_N, roots_N], dim=1)
    return Sides(ids_NS, torch.tensor([1.0, 2.0]).expand(len(roots_N), 2))


def held_out(nouns_N: Tensor, verbs_N: Tensor) -> Tensor:
    """A quarter of all pairs of a noun with a verb, whatever their number."""
    return (nouns_N + verbs_N) % 4 == 0


def planted(count: int, seed: int, *, test: bool) -> Pairs:
    """Verbs that agree in number with their subjects; each pair has its copy in the wrong number."""
    generator = torch.Generator().manual_seed(seed)

    def draw(limit: int) -> Tensor:
        return torch.randint(limit, (8 * count,), generator=generator)

    nouns, verbs, plural, first, second = draw(NOUNS), draw(VERBS), draw(2), draw(NOISE), draw(NOISE)
    chosen = torch.nonzero(held_out(nouns, verbs) == test).squeeze(1)[:count]
    nouns, verbs, plural, first, second = (part[chosen] for part in (nouns, verbs, plural, first, second))
    subjects = side(noun(nouns, plural), second)
    return Pairs(
        side(verb(verbs, plural), first),
        subjects,
        torch.zeros(count, dtype=torch.int64),
        torch.arange(count),
        side(verb(verbs, 1 - plural), first),
        subjects,
    )


def trained(pairs: Pairs, seed: int) -> Submodel:
    torch.manual_seed(seed)
    submodel = Submodel(VOCAB, num_labels=1, width=CONFIG.table_width)
    fit_submodel(submodel, pairs, CONFIG, seed=seed, clock=lambda: 0.0)
    return submodel.eval()


@torch.no_grad()
def share_right(submodel: Submodel) -> float:
    """How often the form that agrees fits better than the other, over all held-out nouns and verbs."""
    nouns, verbs = (part.flatten() for part in torch.meshgrid(torch.arange(NOUNS), torch.arange(VERBS), indexing="ij"))
    chosen = held_out(nouns, verbs)
    nouns, verbs = nouns[chosen].repeat(2), verbs[chosen].repeat(2)
    plural = torch.arange(2).repeat_interleave(len(nouns) // 2)
    noise = torch.zeros_like(nouns)
    subjects = side(noun(nouns, plural), noise)
    right = submodel.scores(side(verb(verbs, plural), noise), subjects)
    wrong = submodel.scores(side(verb(verbs, 1 - plural), noise), subjects)
    return float((right > wrong).double().mean())


def test_agreement_is_learned_for_pairs_never_seen() -> None:
    submodel = trained(planted(8192, seed=0, test=False), seed=0)
    assert share_right(submodel) >= 0.95


def test_agreement_needs_no_wrong_copies_where_pairs_are_many() -> None:
    pairs = planted(8192, seed=0, test=False)
    none = torch.zeros(0, dtype=torch.int64)
    pairs = Pairs(
        pairs.heads, pairs.dependents, pairs.labels_N, none, pairs.flipped_heads.rows(none), pairs.heads.rows(none)
    )
    assert share_right(trained(pairs, seed=0)) >= 0.95


def test_shuffled_pairs_teach_nothing() -> None:
    shares, losses = [], []
    for seed in range(4):
        submodel = trained(planted(8192, seed=seed, test=False).shuffled(seed), seed)
        shares.append(share_right(submodel))
        with torch.no_grad():
            fresh = planted(256, seed=seed + 100, test=True).shuffled(seed)
            losses.append(float(submodel(fresh).contrast))
    assert sum(shares) / len(shares) == pytest.approx(0.5, abs=0.05)
    assert min(losses) > 0.97 * math.log(256)


def test_training_and_inference_need_no_parser() -> None:
    code = """
import sys
sys.modules["spacy"] = None
import sparselt_dist.objectives.dac
loaded = {name.rpartition(".")[2] for name in sys.modules if name.startswith("sparselt_dist.data.")}
assert not loaded & {"agreements", "chunking", "parsing"}, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

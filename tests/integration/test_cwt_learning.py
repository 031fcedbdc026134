"""What contrast learns: pointwise mutual information, so that its logits lack the unigram; and runs of real models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import run_ranks
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sparselt_dist import checkpoint, evaluate
from sparselt_dist.models.loading import load_checkpoint
from sparselt_dist.objectives.cwt import CWTModule, contrastive_weight_tying_loss_from_ids
from sparselt_dist.objectives.cwt_head import RecoveredHead

VOCABULARY, WIDTH = 64, 32


@dataclass(frozen=True)
class Chain:
    """A random Markov chain of order 1 over a Zipf-like vocabulary: next-token probabilities [V, V], their marginal [V]."""

    next_VV: Tensor
    marginal_V: Tensor

    @classmethod
    def draw(cls) -> Chain:
        generator = np.random.default_rng(0)
        low_rank = generator.normal(size=(VOCABULARY, 8)) @ generator.normal(size=(8, VOCABULARY))
        scores = low_rank * 1.2 / 8**0.5 - 1.3 * np.log(np.arange(1, VOCABULARY + 1) + 1)
        chances = np.exp(scores)
        chances /= chances.sum(axis=1, keepdims=True)
        marginal = np.full(VOCABULARY, 1 / VOCABULARY)
        for _ in range(500):
            marginal = marginal @ chances
        return cls(torch.from_numpy(chances), torch.from_numpy(marginal))

    def pairs(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = torch.multinomial(self.marginal_V, count, True, generator=generator)
        return tokens, torch.multinomial(self.next_VV[tokens], 1, generator=generator).squeeze(1)

    def cross_entropy(self, logits_VV: Tensor) -> float:
        """Expected nats of the next token under a model's logits for each token."""
        log_chances = F.log_softmax(logits_VV.double(), dim=1)
        return -float((self.marginal_V[:, None] * self.next_VV * log_chances).sum())


def train(chain: Chain, num_targets: int, steps: int, contrasts: int) -> Tensor:
    """Tied logits [V, V] of a small model trained by contrast of `num_targets`, `contrasts` of them a step."""
    torch.manual_seed(0)
    table = nn.Embedding(VOCABULARY, WIDTH)
    nn.init.normal_(table.weight, std=0.1)
    network = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
    optimizer = torch.optim.Adam([*table.parameters(), *network.parameters()], lr=5e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps)))
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens, following = chain.pairs(num_targets * contrasts, generator)
        hidden = network(table(tokens))
        parts = zip(hidden.split(num_targets), following.split(num_targets), strict=True)
        losses = [contrastive_weight_tying_loss_from_ids(part, table.weight, ids) for part, ids in parts]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        logits_VV: Tensor = network(table.weight) @ table.weight.T
    return logits_VV


@pytest.mark.parametrize(("num_targets", "steps", "contrasts"), [(512, 1000, 1), (32, 600, 16)])
def test_raw_tied_logits_lack_the_unigram(num_targets: int, steps: int, contrasts: int) -> None:
    """Few or many negatives: without the unigram no better than it, with it as good as the chain's entropy allows."""
    chain = Chain.draw()
    entropy = chain.cross_entropy(chain.next_VV.log())
    unigram = chain.cross_entropy(chain.marginal_V.log().expand(VOCABULARY, -1))
    assert unigram - entropy > 0.3
    logits = train(chain, num_targets, steps, contrasts)
    assert chain.cross_entropy(logits) > unigram - 0.1
    assert chain.cross_entropy(logits + chain.marginal_V.log()) < entropy + 0.03


def check_export_and_last_words(run_dir: Path) -> None:
    """The exported model predicts as the run does, and both score the same last words alike."""
    exported = AutoModelForCausalLM.from_pretrained(run_dir / "model").eval()
    loaded = load_checkpoint(checkpoint.find(run_dir))
    objective = cast(CWTModule, loaded.model.objective)
    table_VD, bias_V = cast(RecoveredHead, objective.head).table_and_bias(loaded.model.backbone.get_input_embeddings())
    ids_BL = torch.randint(5, 512, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = F.linear(loaded.model.backbone(ids_BL), table_VD, bias_V).log_softmax(dim=-1)
        found = exported(input_ids=ids_BL).logits.log_softmax(dim=-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    passages = run_dir / "passages.txt"
    passages.write_text("the name of a function is the name of an object\nif the value is true then the\n")
    scores = []
    named = ["--last-word", str(passages)]
    for arguments in ([run_dir, "--tasks", "last-word"], [run_dir, *named], [run_dir / "model", *named]):
        assert evaluate.main(list(map(str, arguments))) == 0
        scores.append(json.loads((run_dir / "results.json").read_text())["metrics"])
    own, of_file, of_export = scores
    assert own["last_word/passages"] > 20 and own["last_word/piece_perplexity"] < own["last_word/raw_piece_perplexity"]
    assert of_file["last_word/passages"] == 2
    for name, value in of_export.items():
        assert value == pytest.approx(of_file[name], rel=0.01)
    assert "last_word/raw_accuracy" in of_file and "last_word/raw_accuracy" not in of_export


@pytest.mark.timeout(240)
def test_a_decoder_learns_without_a_head_and_recovers_one(shards: Path, tmp_path: Path) -> None:
    """One run and one budget: contrast falls, then cross-entropy falls from below the uniform guess."""
    run = run_ranks(
        *(1, shards, tmp_path, "model.architecture=gpt_neox", "model.config.max_position_embeddings=128"),
        *("objective.name=cwt", "objective.prediction=causal", "objective.recover_from=0.6"),
        *("budget.max_steps=50", "train.micro_batch_size=8", "checkpoint.every_steps=50", "optim.peak_lr=1e-2"),
    )
    assert run.code == 0, run.output
    contrast = [line["cwt/in_batch_cross_entropy"] for line in run.journal if "cwt/in_batch_cross_entropy" in line]
    entropy = [line["cwt/cross_entropy"] for line in run.journal if "cwt/cross_entropy" in line]
    assert len(contrast) == 30 and len(entropy) == 20
    assert np.mean(contrast[-5:]) < np.mean(contrast[:5]) - 0.1
    assert np.mean(entropy[-5:]) < np.mean(entropy[:5]) and entropy[0] < np.log(512)
    assert run.journal[-1]["eval/cross_entropy"] == pytest.approx(run.journal[-1]["eval/loss"])
    check_export_and_last_words(tmp_path)
    head = load_file(tmp_path / "model" / "objective.safetensors")
    assert head.keys() == {"head.started", "head.token_counts", "head.bias_change.weight"}
    assert bool(head["head.started"]) and int(head["head.token_counts"].sum()) > 30 * 8 * 20

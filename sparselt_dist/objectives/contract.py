"""The checks that any objective must pass, ours and a plug-in author's: `check_objective(MyObjective())` in a test.

They use a backbone of a few thousand parameters made here, so they need no file and take well under a second.
B rows, L positions, D hidden size, V vocabulary, N positions, H heads.
"""

from __future__ import annotations

import copy
import pickle
import random
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselt_dist.data.batch import IGNORE_INDEX, Batch, Example
from sparselt_dist.errors import PluginError
from sparselt_dist.objectives.base import (
    API_VERSION,
    Collator,
    LossOutput,
    Objective,
    SharesStatistics,
    TokenizerInfo,
    loss_terms,
)

_VOCAB_SIZE = 97
_REQUIRED = ("input_ids", "attention_mask", "labels", "num_targets", "num_tokens")
_PER_POSITION = ("input_ids", "attention_mask", "labels", "original_ids", "segment_ids", "position_ids")
_LENGTHS = (24, 24, 17, 24, 9, 21, 24, 13)

TINY_TOKENIZER = TokenizerInfo(
    vocab_size=_VOCAB_SIZE,
    pad_id=0,
    mask_id=4,
    unk_id=1,
    cls_id=2,
    sep_id=3,
    bos_id=2,
    eos_id=3,
    special_ids=(0, 1, 2, 3, 4),
    continues_word_V=np.arange(_VOCAB_SIZE) % 3 == 2,
)


class TinyBackbone(nn.Module):
    """One transformer layer with tied embeddings, behind the interface of `models.backbone.Backbone`."""

    def __init__(self, *, is_causal: bool = False, has_head: bool = True) -> None:
        super().__init__()
        self.hidden_size = 16
        self.vocab_size = _VOCAB_SIZE
        self.is_causal = is_causal
        self.has_head = has_head
        self.config = SimpleNamespace(hidden_size=16, vocab_size=_VOCAB_SIZE, pad_token_id=0, is_decoder=is_causal)
        self.embedding = nn.Embedding(_VOCAB_SIZE, 16)
        self.places = nn.Embedding(64, 16)
        self.project = nn.Linear(16, 48)
        self.mix = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, L, D]."""
        length = input_ids.shape[1]
        places = torch.arange(length) if position_ids is None else position_ids
        hidden_BLD = self.embedding(input_ids) + self.places(places)
        allowed = torch.ones(1, 1, length, length, dtype=torch.bool)
        if self.is_causal:
            allowed = allowed.tril()
        if attention_mask is not None:
            allowed = allowed & attention_mask.bool()[:, None, None, :]
        if segment_ids is not None:
            allowed = allowed & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
        query_BHLD, key_BHLD, value_BHLD = self.project(hidden_BLD).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mixed_BHLD = F.scaled_dot_product_attention(query_BHLD, key_BHLD, value_BHLD, attn_mask=allowed)
        hidden_BLD = self.norm(hidden_BLD + self.mix(mixed_BHLD.transpose(1, 2).flatten(2)))
        return cast(Tensor, hidden_BLD)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Scores [N, V]."""
        return F.linear(hidden_ND, self.embedding.weight)


def check_objective(
    objective: Objective,
    cfg: Any = None,
    *,
    tokenizer: TokenizerInfo = TINY_TOKENIZER,
    causal: bool = False,
    composes: bool = True,
) -> None:
    """Run every check of the objective interface.

    Args:
        cfg: a configuration of the objective; default `objective.config_cls()`.
        causal: check with a causal backbone.
        composes: the loss is a mean over targets that do not see each other, so micro-batches weighted by their targets
            add up to the whole batch. Contrastive losses, whose targets are compared within a micro-batch, pass False.

    Raises:
        PluginError: a check failed; the message says which, what was found and what was expected.
    """
    if not isinstance(objective, Objective) or objective.api_version != API_VERSION:
        raise PluginError(
            f"{objective!r}: not an objective of api_version {API_VERSION}; expected the attributes and methods of "
            "sparselt_dist.objectives.base.Objective"
        )
    _Check(objective, cfg if cfg is not None else objective.config_cls(), tokenizer, causal).run(composes)


def tiny_examples() -> list[Example]:
    """Eight documents of several lengths."""
    generator = np.random.default_rng(0)
    return [
        {
            "key": f"shard-000000/{number}",
            "ids": generator.integers(5, _VOCAB_SIZE, length).astype(np.uint16),
            "seed": 1000 + number,
        }
        for number, length in enumerate(_LENGTHS)
    ]


class _Check:
    """One run over one objective."""

    def __init__(self, objective: Objective, cfg: Any, tokenizer: TokenizerInfo, causal: bool) -> None:
        self.name = objective.name
        self.objective = objective
        self.cfg = cfg
        self.collator: Collator = objective.build_collator(cfg, tokenizer)
        self.examples = tiny_examples()
        torch.manual_seed(0)
        self.backbone = TinyBackbone(is_causal=causal, has_head=objective.needs_lm_head(cfg))
        self.module = objective.build_module(cfg, self.backbone)
        for part in self.module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0  # its draws are the trainer's affair; without them two passes can be compared
        self.set_progress = cast(Any, self.module).set_progress

    def run(self, composes: bool) -> None:
        self.collator_is_pure()
        self.rows_do_not_depend_on_the_split()
        self.batch_keeps_the_contract(self.collator(self.examples))
        self.progress_is_accepted()
        self.loss_keeps_the_contract(self.collator(self.examples))
        self.no_target_gives_a_finite_loss()
        if composes:
            self.micro_batches_compose()

    def expect(self, truth: bool, found: str, expected: str) -> None:
        if not truth:
            raise PluginError(f"objective {self.name!r}: {found}; expected {expected}")

    # ---------------------------------------------------------------- collator

    def collator_is_pure(self) -> None:
        before = copy.deepcopy(self.examples)
        states = (random.getstate(), str(np.random.get_state()), torch.get_rng_state())
        first = self.collator(self.examples)
        unmoved = (
            random.getstate() == states[0]
            and str(np.random.get_state()) == states[1]
            and torch.equal(torch.get_rng_state(), states[2])
        )
        self.expect(unmoved, "the collator draws from a global generator", "randomness from each example's seed alone")
        untouched = all(
            old["key"] == new["key"] and old["seed"] == new["seed"] and np.array_equal(old["ids"], new["ids"])
            for old, new in zip(before, self.examples, strict=True)
        )
        self.expect(untouched, "the collator changes the examples it is given", "that it leaves them as they are")
        again = self.collator(self.examples)
        self.expect(_equal(first, again), "the same examples gave two different batches", "a pure function")
        try:
            carried = pickle.loads(pickle.dumps(self.collator))
        except Exception as cause:  # whatever a class does when it is pickled
            raise PluginError(
                f"objective {self.name!r}: the collator cannot be pickled ({type(cause).__name__}: {cause}); "
                "expected one, for loader workers may be spawned: make it an instance of a class at module level"
            ) from cause
        self.expect(_equal(first, carried(self.examples)), "a pickled collator gives another batch", "the same batch")

    def rows_do_not_depend_on_the_split(self) -> None:
        whole = self.collator(self.examples)
        expected = "each row to follow from its own example, whatever else is in the batch"
        backwards = self.collator(self.examples[::-1])
        for row in range(len(self.examples)):
            alone = self.collator([self.examples[row]])
            for key in _PER_POSITION:
                if key not in whole or len(whole[key]) != len(self.examples):
                    continue
                length = alone[key].shape[1]
                same = torch.equal(whole[key][row, :length], alone[key][0])
                self.expect(same, f"row {row} of {key!r} changes when its example is collated alone", expected)
                same = torch.equal(whole[key][row], backwards[key][len(self.examples) - 1 - row])
                self.expect(same, f"row {row} of {key!r} changes with the order of the examples", expected)

    def batch_keeps_the_contract(self, batch: Batch) -> None:
        missing = [key for key in _REQUIRED if key not in batch]
        self.expect(not missing, f"the batch lacks {', '.join(missing)}", "the keys of sparselt_dist.data.batch")
        for key, value in batch.items():
            known = key in _REQUIRED or key in _PER_POSITION or key.startswith(f"{self.name}/")
            self.expect(known, f"the batch has the key {key!r}", f"private keys to be named '{self.name}/...'")
            tensor = isinstance(value, torch.Tensor) and value.device.type == "cpu"
            self.expect(tensor, f"{key!r} is a {type(value).__name__}", "a CPU tensor")
            if key in _REQUIRED or key in _PER_POSITION:
                shape = [] if key.startswith("num_") else list(batch["input_ids"].shape)
                found = f"{key!r} is {value.dtype} {list(value.shape)}"
                self.expect(value.dtype == torch.int64 and list(value.shape) == shape, found, f"torch.int64 {shape}")
        targets, tokens = int((batch["labels"] != IGNORE_INDEX).sum()), int(batch["attention_mask"].sum())
        stated = (int(batch["num_targets"]), int(batch["num_tokens"]))
        self.expect(stated[0] == targets, f"num_targets is {stated[0]}", f"{targets}, the labels not {IGNORE_INDEX}")
        self.expect(stated[1] == tokens, f"num_tokens is {stated[1]}", f"{tokens}, the sum of attention_mask")
        hidden = batch["labels"][batch["attention_mask"] == 0]
        self.expect(bool((hidden == IGNORE_INDEX).all()), "padding is a target", f"label {IGNORE_INDEX} there")

    # ---------------------------------------------------------------- module

    def progress_is_accepted(self) -> None:
        for step, progress in ((0, 0.0), (1000, 0.5), (2000, 1.0), (0, 0.0)):
            self.set_progress(step, progress)

    def forward(self, batch: Batch) -> LossOutput:
        return cast(LossOutput, self.module(self.backbone, batch))

    def loss_keeps_the_contract(self, batch: Batch) -> None:
        output = self.forward(batch)
        loss, metrics, terms = output.loss, output.metrics, loss_terms(output)
        found = f"the loss is {loss.dtype} {list(loss.shape)}"
        self.expect(loss.dtype == torch.float32 and loss.ndim == 0, found, "a torch.float32 scalar")
        self.expect(bool(torch.isfinite(loss.detach())), f"the loss is {loss.item()}", "a finite number")
        self.expect(loss.requires_grad, "the loss is detached from the graph", "one that backward runs on")
        self.expect("loss" in metrics, f"metrics are {sorted(metrics)}", "'loss' among them")
        lost = [key for key in terms if key not in batch or batch[key].ndim]
        self.expect(not lost, f"the batch has no count {', '.join(lost)}", "a scalar for each of the loss's terms")
        split = float(torch.stack(list(terms.values())).sum().detach())
        self.expect(
            abs(split - float(loss.detach())) <= 1e-4 * max(abs(split), 1), f"terms add to {split}", f"the loss, {loss}"
        )
        for term, pair in metrics.items():
            summed = len(pair) == 2 and all(isinstance(x, Tensor) and x.ndim == 0 for x in pair)
            self.expect(summed, f"metric {term!r} is {pair!r}", "(sum, count), two scalar tensors")
            self.expect(not any(x.requires_grad for x in pair), f"metric {term!r} holds the graph", "detached numbers")
            prefixed = term.startswith(f"{self.name}/")
            self.expect(not prefixed, f"metric {term!r} repeats the objective's name", "the term's name alone")

    def no_target_gives_a_finite_loss(self) -> None:
        batch = self.collator(self.examples)
        batch = {
            **batch,
            "labels": torch.full_like(batch["labels"], IGNORE_INDEX),
            "num_targets": torch.zeros((), dtype=torch.int64),
            "num_tokens": torch.zeros((), dtype=torch.int64),
        }
        self.loss_keeps_the_contract(batch)
        gradients = self.gradients(self.forward(batch).loss)
        finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
        self.expect(finite, "without a target the gradient is not finite", "a loss attached to the graph, and finite")

    def gradients(self, loss: Tensor) -> list[Tensor]:
        parameters = [*self.backbone.parameters(), *self.module.parameters()]
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    def micro_batches_compose(self) -> None:
        whole = self.gradients(self.forward(self.collator(self.examples)).loss)
        halves = [self.collator(self.examples[:3]), self.collator(self.examples[3:])]
        shared = self.module if isinstance(self.module, SharesStatistics) and self.module.needs_statistics else None
        if shared is not None:
            with torch.no_grad():
                parts = [shared.statistics(self.backbone, half) for half in halves]
            shared.set_statistics(torch.stack(parts).sum(dim=0))
        terms = [loss_terms(self.forward(half)) for half in halves]
        totals = {key: sum(int(half[key]) for half in halves) for key in terms[0]}
        weighed = [
            term * (int(half[key]) / totals[key])
            for half, of_half in zip(halves, terms, strict=True)
            for key, term in of_half.items()
        ]
        summed = self.gradients(torch.stack(weighed).sum())
        if shared is not None:
            shared.set_statistics(None)
        far = max(float((a - b).abs().max()) for a, b in zip(whole, summed, strict=True))
        size = max(float(gradient.abs().max()) for gradient in whole)
        self.expect(
            far <= 1e-5 * max(size, 1e-3),
            f"the gradient of a batch and of its parts weighted by num_targets differ by {far:.2g} (size {size:.2g})",
            "a loss that is the mean over num_targets targets, each seeing its own row alone",
        )


def _equal(first: Batch, second: Batch) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)

"""Fine-tuning of an exported encoder on labelled texts, by the recipe of cramming (arXiv 2212.14034, section 5 and code).

Every weight is trained; the score is that after the last epoch. The official code takes the number of warm-up steps from
the first task of a process for all others; here every task has its own tenth. What else the code does is kept: an incomplete
last batch of an epoch is dropped, and single texts pass through the pair template with an empty second one.

A trial is a pure function of (model, task, seed) on one kind of device: its seed decides the new head, the order and the dropout.
B rows, L positions, C outputs, N examples.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparselt_dist.budget import lr_multiplier
from sparselt_dist.data.cleaning import Normalization, normalize
from sparselt_dist.data.tokenizer import load_for_text, tokenizer_info
from sparselt_dist.evaluation.features import evaluation_mode
from sparselt_dist.evaluation.glue import METRICS, glue_average
from sparselt_dist.evaluation.labelled_tasks import LabelledTask, Row
from sparselt_dist.models.classifier import load_classifier
from sparselt_dist.models.exporting import longest_input
from sparselt_dist.objectives.base import TokenizerInfo

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedModel

_TEXTS_AT_ONCE = 1024
_SCORED_AT_ONCE = 64
_LENGTH_STEP = 8


@dataclass(frozen=True)
class Recipe:
    """How a task is trained; the defaults are the published ones."""

    epochs: int = 5
    batch_size: int = 16
    peak_lr: float = 4e-5
    warmup: float = 0.1
    """Share of the steps of this task."""
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    dropout: float = 0.1
    max_length: int = 128

    def steps_per_epoch(self, examples: int) -> int:
        """Whole batches, at least one."""
        return max(1, examples // self.batch_size)

    def rate(self, step: int, examples: int) -> float:
        """Learning rate of a step, counted from 0: linear from 0 to the peak, then by cosine to 0."""
        spent = step / (self.epochs * self.steps_per_epoch(examples))
        return self.peak_lr * lr_multiplier("cosine", spent, warmup=self.warmup)


PUBLISHED = Recipe()


@dataclass(frozen=True)
class FineTuning:
    """What task fine-tune is asked for."""

    folder: Path
    trials: int = 1
    tell: Callable[[str], None] = lambda line: None
    """Gets a line for every trial."""


class Example(NamedTuple):
    """A labelled text in ids."""

    ids: np.ndarray  # int64 [length]
    type_ids: np.ndarray  # int64 [length], 1 from the second text on
    label: float


def fine_tune(
    folder: Path,
    tasks: Sequence[LabelledTask],
    how: Normalization,
    device: torch.device,
    *,
    trials: int = 1,
    tell: Callable[[str], None] = lambda line: None,
    recipe: Recipe = PUBLISHED,
) -> dict[str, float]:
    """Metrics `fine_tune/...` of an exported folder: of each score the median over trials, of seeds 0, 1, 2 and so on.

    Of several trials there are also `..._min` and `..._max`; `fine_tune/glue` is the mean of GLUE's nine medians.

    Args:
        how: the normalisation of the text that the model was trained on.

    Raises:
        CheckpointError: the folder holds no encoder to classify with.
    """
    results: dict[str, float] = {}
    medians: dict[str, float] = {}
    for task in tasks:
        encoded = _encode_task(folder, task, how, recipe)
        scores = []
        for seed in range(trials):
            started = time.perf_counter()
            scores.append(run_trial(folder, task, encoded, seed, device, recipe))
            told = ", ".join(f"{name} {value:.4f}" for name, value in scores[-1].items())
            tell(f"{task.name}, trial {seed + 1} of {trials}: {told} ({time.perf_counter() - started:.0f} s)")
        for name in scores[0]:
            values = [trial[name] for trial in scores]
            medians[name] = statistics.median(values)
            if trials > 1:
                results |= {f"fine_tune/{name}_min": min(values), f"fine_tune/{name}_max": max(values)}
    average = glue_average(medians)
    overall = {} if average is None else {"fine_tune/glue": average}
    return results | {f"fine_tune/{name}": value for name, value in medians.items()} | overall


def run_trial(
    folder: Path,
    task: LabelledTask,
    encoded: dict[str, list[Example]],
    seed: int,
    device: torch.device,
    recipe: Recipe = PUBLISHED,
) -> dict[str, float]:
    """Scores by name after the last epoch. The caller's random state stays as it is.

    Args:
        encoded: examples of `train` and of each file that is scored.
    """
    pad_id = tokenizer_info(folder).pad_id
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = load_classifier(folder, outputs=task.outputs, dropout=recipe.dropout, pad_id=pad_id).to(device)
        _train(model, encoded["train"], pad_id, recipe)
    return {
        task.kind.score_name(task.name, split): _score(model, task, encoded[split], pad_id)
        for split in task.kind.splits
    }


def _train(model: PreTrainedModel, examples: list[Example], pad_id: int, recipe: Recipe) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), betas=recipe.betas, eps=recipe.eps, weight_decay=0.0)
    model.train()
    step = 0
    for _ in range(recipe.epochs):
        order = torch.randperm(len(examples)).tolist()
        for number in range(recipe.steps_per_epoch(len(examples))):
            chosen = order[number * recipe.batch_size : (number + 1) * recipe.batch_size]
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step, len(examples))
            _loss(model, [examples[index] for index in chosen], pad_id).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1


def _loss(model: PreTrainedModel, batch: list[Example], pad_id: int) -> Tensor:
    """Mean cross-entropy, or mean squared error of a regression."""
    logits_BC = _logits(model, batch, pad_id)
    labels_B = torch.tensor([example.label for example in batch], device=logits_BC.device)
    if logits_BC.shape[1] == 1:
        return F.mse_loss(logits_BC[:, 0], labels_B.float())
    return F.cross_entropy(logits_BC, labels_B.long())


def _logits(model: PreTrainedModel, batch: list[Example], pad_id: int) -> Tensor:
    """float32 [B, C]; on an accelerator the pass is in bf16."""
    device = next(model.parameters()).device
    longest = longest_input(model.config) or sys.maxsize
    inputs = {name: value_BL.to(device) for name, value_BL in _inputs(batch, pad_id, longest).items()}
    if getattr(model.config, "type_vocab_size", 0) < 2:
        del inputs["token_type_ids"]
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
        logits_BC: Tensor = model(**inputs).logits
    return logits_BC.float()


def _inputs(batch: list[Example], pad_id: int, longest: int) -> dict[str, Tensor]:
    """Int64 [B, L], L the longest row's length up to the next multiple of 8, as far as the model goes."""
    lengths_B = np.array([len(example.ids) for example in batch])
    length = min(-(-int(lengths_B.max()) // _LENGTH_STEP) * _LENGTH_STEP, longest)
    ids_BL = np.full((len(batch), length), pad_id, dtype=np.int64)
    types_BL = np.zeros_like(ids_BL)
    for row, example in enumerate(batch):
        ids_BL[row, : len(example.ids)] = example.ids
        types_BL[row, : len(example.ids)] = example.type_ids
    attention_BL = (np.arange(length) < lengths_B[:, None]).astype(np.int64)
    named = {"input_ids": ids_BL, "attention_mask": attention_BL, "token_type_ids": types_BL}
    return {name: torch.from_numpy(array_BL) for name, array_BL in named.items()}


@torch.no_grad()
def _score(model: PreTrainedModel, task: LabelledTask, examples: list[Example], pad_id: int) -> float:
    ordered = sorted(examples, key=lambda example: len(example.ids))
    with evaluation_mode(model):
        logits = [
            _logits(model, ordered[first : first + _SCORED_AT_ONCE], pad_id).cpu()
            for first in range(0, len(ordered), _SCORED_AT_ONCE)
        ]
    logits_NC = torch.cat(logits)
    found_N = logits_NC[:, 0] if task.outputs == 1 else logits_NC.argmax(dim=1)
    return METRICS[task.kind.metric](found_N.numpy(), np.array([example.label for example in ordered]))


# --- texts to ids ----------------------------------------------------------------------------------------------------


def _encode_task(folder: Path, task: LabelledTask, how: Normalization, recipe: Recipe) -> dict[str, list[Example]]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    longest = longest_input(config) or recipe.max_length
    tokenizer = load_for_text(folder)
    _ensure_template(tokenizer, tokenizer_info(folder))
    tokenizer.no_padding()
    tokenizer.enable_truncation(min(recipe.max_length, longest), strategy="longest_first")
    return {split: encode(tokenizer, rows, how) for split, rows in {"train": task.train, **task.scored}.items()}


def encode(tokenizer: Tokenizer, rows: Sequence[Row], how: Normalization) -> list[Example]:
    """The rows through the tokenizer's template of pairs, cut to its truncation length."""
    return [
        Example(np.array(encoding.ids), np.array(encoding.type_ids), row.label)
        for row, encoding in zip(rows, _encodings(tokenizer, rows, how), strict=True)
    ]


def _encodings(tokenizer: Tokenizer, rows: Sequence[Row], how: Normalization) -> Iterator[Encoding]:
    for first in range(0, len(rows), _TEXTS_AT_ONCE):  # an encoding takes kilobytes
        some = rows[first : first + _TEXTS_AT_ONCE]
        yield from tokenizer.encode_batch([(normalize(row.text, how), normalize(row.pair or "", how)) for row in some])


def _ensure_template(tokenizer: Tokenizer, info: TokenizerInfo) -> None:
    """A tokenizer that has no template of pairs gets BERT's: cls, text, sep, text, sep."""
    if tokenizer.num_special_tokens_to_add(is_pair=True):
        return
    from tokenizers.processors import TemplateProcessing

    begin = _named(tokenizer, info.cls_id if info.cls_id is not None else info.bos_id)
    end = _named(tokenizer, info.sep_id if info.sep_id is not None else info.eos_id)
    tokenizer.post_processor = TemplateProcessing(
        single=[*begin, "$A", *end],
        pair=[*begin, "$A", *end, "$B:1", *(f"{name}:1" for name in end)],
        special_tokens=list({**begin, **end}.items()),
    )


def _named(tokenizer: Tokenizer, number: int | None) -> dict[str, int]:
    """The token of that id, if there is one."""
    name = None if number is None else tokenizer.id_to_token(number)
    return {} if number is None or name is None else {name: number}

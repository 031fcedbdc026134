"""What `training_speed.py` measures the product against, each a process that trains until it is ended.

    python tests/benchmarks/training_rivals.py '{"family": "loop", ...}' MARKS

`Job` has the keys. After an optimizer step (on a GPU: when the device is done with so many) a line `step seconds` (a clock
that only rises) is added to the file MARKS.
All read the same stored rows, train in the same precision with a fused AdamW and clip the gradient; B rows, L positions.

* trainer-bert, trainer-crammed: transformers' `Trainer` and `DataCollatorForLanguageModeling`, as documented;
* loop, loop-all-logits: the loop a careful user writes, without and with logits at the positions that are no targets;
* loop-sdpa: the first with torch's own attention, where our model class has a faster one for short rows on a CPU;
* bare: the product's model, objective and optimizer on batches made beforehand: no DeepSpeed, loader or journal.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from sparselt_dist.allocator import keep_freed_memory
from sparselt_dist.config import ModelSection, OptimSection
from sparselt_dist.data.batch import to_device
from sparselt_dist.data.corpora import open_folder
from sparselt_dist.data.tokenizer import tokenizer_info
from sparselt_dist.models import crammed
from sparselt_dist.models.backbone import PretrainingModel, build_backbone
from sparselt_dist.models.crammed import CrammedBertConfig, CrammedBertForMaskedLM
from sparselt_dist.objectives.mlm import MLM
from sparselt_dist.objectives.settings import MLMConfig
from sparselt_dist.optim import build_optimizer

LENGTH, VOCABULARY, PROBABILITY = 128, 32768, 0.15
ENDLESS = 10**9
LARGE = {"cpu": (2048, 2048, 2048), "cuda": (8192, 8192, 8192)}
PREPARED_STEPS = 8  # of `bare`, whose batches come again


class Job(NamedTuple):
    """What a process is to do."""

    family: str
    sizes: dict[str, int]
    """Fields of crammed-bert."""
    shards: str
    batch: int
    """Rows an optimizer step."""
    micro_batch: int
    precision: str
    compiled: bool
    workers: int
    device: str
    """cpu or cuda."""
    mark_every: int
    """Steps between marks; a mark waits for the device."""


class Marks:
    """The file of finished steps."""

    def __init__(self, path: Path, job: Job) -> None:
        self._file = path.open("a")
        self._job = job
        self._step = 0

    def add(self) -> None:
        self._step += 1
        if self._step % self._job.mark_every == 0:
            wait_for(self._job.device)
            print(self._step, time.monotonic(), file=self._file, flush=True)


def wait_for(device: str) -> None:
    """Until the device has done all that was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()


def stored_rows(shards: str) -> np.ndarray:
    """All rows [N, L] of a shard folder, in stored order."""
    opened = open_folder(Path(shards))
    return np.stack(opened.ids(np.arange(opened.num_samples))).astype(np.int64)


def crammed_model(sizes: dict[str, int]) -> CrammedBertForMaskedLM:
    return CrammedBertForMaskedLM(CrammedBertConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **sizes))


def bert_model(sizes: dict[str, int], vocabulary: int = VOCABULARY) -> BertForMaskedLM:
    """BERT of as many weights: its feed-forward part has two matrices of the inner width where a gated one has three
    of half the width, so the same weights are three quarters of the width. Without dropout, as crammed-bert."""
    inner = sizes["intermediate_size"] * 3 // 4
    shape = {**sizes, "intermediate_size": inner}
    config = BertConfig(
        vocab_size=vocabulary,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **shape,
    )
    return BertForMaskedLM(config)


# ---- transformers' Trainer


class RowsDataset(Dataset[dict[str, Tensor]]):
    """Rows as the stock collator wants them."""

    def __init__(self, ids_NL: np.ndarray) -> None:
        self._ids_NL = ids_NL

    def __len__(self) -> int:
        return len(self._ids_NL)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"input_ids": torch.from_numpy(self._ids_NL[row])}


class _MarkSteps(TrainerCallback):
    def __init__(self, marks: Marks) -> None:
        self._marks = marks

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._marks.add()


def run_trainer(job: Job, marks: Marks) -> None:
    model: PreTrainedModel = {"trainer-bert": bert_model, "trainer-crammed": crammed_model}[job.family](job.sizes)
    arguments = TrainingArguments(
        output_dir="unused",
        max_steps=ENDLESS,
        per_device_train_batch_size=job.micro_batch,
        gradient_accumulation_steps=job.batch // job.micro_batch,
        use_cpu=job.device == "cpu",
        bf16=job.precision == "bf16",
        torch_compile=job.compiled,
        optim="adamw_torch_fused",
        lr_scheduler_type="constant",
        dataloader_num_workers=job.workers,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(Path(job.shards, "tokenizer"))
    Trainer(
        model,
        arguments,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=PROBABILITY),
        train_dataset=RowsDataset(stored_rows(job.shards)),
        callbacks=[_MarkSteps(marks)],
    ).train()


# ---- a loop written by hand


def _masked(rows_BL: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels: 15 % targets, of which 80 % show the mask, 10 % a random id and 10 % themselves."""
    target_BL = torch.rand(rows_BL.shape, device=rows_BL.device) < PROBABILITY
    kind_BL = torch.rand(rows_BL.shape, device=rows_BL.device)
    inputs_BL = torch.where(target_BL & (kind_BL < 0.8), mask_id, rows_BL)
    random_BL = torch.randint(5, VOCABULARY, rows_BL.shape, device=rows_BL.device)
    inputs_BL = torch.where(target_BL & (kind_BL > 0.9), random_BL, inputs_BL)
    return inputs_BL, torch.where(target_BL, rows_BL, -100)


def _permuted(rows: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        yield from (rows[chosen] for chosen in torch.randperm(len(rows)).split(size) if len(chosen) == size)


def run_loop(job: Job, marks: Marks) -> None:
    if job.family == "loop-sdpa":
        crammed.LONGEST_PRODUCT_ROW = 0
    model = crammed_model(job.sizes).train().to(job.device)
    if job.compiled:
        model.encoder.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    mask_id = tokenizer_info(Path(job.shards, "tokenizer")).mask_id
    batches = _permuted(torch.from_numpy(stored_rows(job.shards)).to(job.device), job.micro_batch)
    accumulation = job.batch // job.micro_batch
    while True:
        for _ in range(accumulation):
            inputs_BL, labels_BL = _masked(next(batches), mask_id)
            with torch.autocast(job.device, torch.bfloat16, enabled=job.precision == "bf16"):
                if job.family != "loop-all-logits":
                    loss = model(input_ids=inputs_BL, labels=labels_BL).loss
                else:
                    logits = model(input_ids=inputs_BL).logits
                    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels_BL.flatten())
            (loss / accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        marks.add()


# ---- the product's step and nothing around it


def product_model(job: Job) -> tuple[PretrainingModel, MLMConfig]:
    tokenizer = tokenizer_info(Path(job.shards, "tokenizer"))
    section = ModelSection(architecture="crammed-bert", config=dict(job.sizes))
    backbone = build_backbone(section, tokenizer, sequence_length=LENGTH, with_head=True)
    settings = MLMConfig(masking="exact", mlm_probability=PROBABILITY)
    return PretrainingModel(backbone, MLM().build_module(settings, backbone)), settings


def run_bare(job: Job, marks: Marks) -> None:
    keep_freed_memory()
    model, settings = product_model(job)
    model.to(job.device)
    if job.compiled:
        model.backbone.body.compile()
    optimizer = build_optimizer(model.train(), OptimSection(peak_lr=1e-4))
    collate = MLM().build_collator(settings, tokenizer_info(Path(job.shards, "tokenizer")))
    rows = stored_rows(job.shards)[: job.batch * PREPARED_STEPS].astype(np.uint16)
    examples = [{"key": str(number), "ids": row, "seed": number} for number, row in enumerate(rows)]
    batches = [collate(examples[at : at + job.micro_batch]) for at in range(0, len(examples), job.micro_batch)]
    if job.device == "cuda":
        batches = [{key: value.pin_memory() for key, value in batch.items()} for batch in batches]
    accumulation = job.batch // job.micro_batch
    while True:
        for number in range(len(batches)):
            with torch.autocast(job.device, torch.bfloat16, enabled=job.precision == "bf16"):
                loss = model(to_device(batches[number], torch.device(job.device))).loss
            (loss / accumulation).backward()
            if (number + 1) % accumulation == 0:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
                marks.add()


FAMILIES: dict[str, Callable[[Job, Marks], None]] = {
    "trainer-bert": run_trainer,
    "trainer-crammed": run_trainer,
    "loop": run_loop,
    "loop-sdpa": run_loop,
    "loop-all-logits": run_loop,
    "bare": run_bare,
}


# ---- what the machine can do


def matmul_peaks(job: Job, seconds: float = 0.5) -> dict[str, float]:
    """GFLOP/s of the best product of each shape, in both precisions: those of a micro-batch's layers, and a large one."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter  # the same, on a machine at rest
    tokens, width, inner = job.micro_batch * LENGTH, job.sizes["hidden_size"], job.sizes["intermediate_size"]
    found = {}
    for kind, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for rows, depth, columns in ((tokens, width, 3 * width), (tokens, width, inner), LARGE[job.device]):
            left = torch.randn(rows, depth, dtype=dtype, device=job.device)
            right = torch.randn(depth, columns, dtype=dtype, device=job.device)
            out, best = left @ right, float("inf")
            deadline = time.perf_counter() + seconds
            while time.perf_counter() < deadline:
                wait_for(job.device)
                started = clock()
                torch.mm(left, right, out=out)
                wait_for(job.device)
                best = min(best, clock() - started)
            found[f"{kind} {rows}x{depth}x{columns}"] = 2e-9 * rows * depth * columns / best
    return found


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    torch.manual_seed(0)
    if job.family == "peak":
        print(json.dumps(matmul_peaks(job)))
        return
    FAMILIES[job.family](job, Marks(Path(sys.argv[2]), job))


if __name__ == "__main__":
    main()

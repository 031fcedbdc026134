"""A masked language model by transformers' `Trainer` on prepared shards for so many seconds, saved for `sparselt evaluate`.

    python tests/benchmarks/trainer_run.py --shards shards/crammed-cpu --seconds 3600 --output /tmp/trainer

BERT of as many weights as profile `crammed-cpu`, its batch and precision, compiled; of the peak rates 1e-3 and 3e-3 the
one with the lower held-out loss after five minutes (6.60 against 6.79). What the profile has beyond that (schedule by the
clock, batch ramp, exact masks) it has not: the rate falls linearly over the steps that a first trial says will fit, and
the run ends at the deadline. The clock starts with training.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from training_rivals import RowsDataset, bert_model, stored_rows
from transformers import (
    AutoTokenizer,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)

SIZES = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768}
BATCH, MICRO_BATCH, PEAK_LR, WARM_UP, TRIAL_STEPS = 64, 16, 1e-3, 0.02, 12


class Deadline(TrainerCallback):
    """Ends training before a step that would be late."""

    def __init__(self, seconds: float) -> None:
        self.times = [time.monotonic()]
        self._end = self.times[0] + seconds

    def on_step_end(self, _: Any, __: Any, control: TrainerControl, **___: Any) -> None:
        self.times.append(time.monotonic())
        if 2 * self.times[-1] - self.times[-2] > self._end:
            control.should_training_stop = True


def train(model: BertForMaskedLM, shards: Path, steps: int, seconds: float, seed: int) -> list[float]:
    """Times of the start and of each step's end."""
    deadline = Deadline(seconds)
    arguments = TrainingArguments(
        output_dir="unused",
        max_steps=steps,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=BATCH // MICRO_BATCH,
        use_cpu=True,
        bf16=True,
        torch_compile=True,
        optim="adamw_torch_fused",
        learning_rate=PEAK_LR,
        weight_decay=0.01,
        max_grad_norm=0.5,
        lr_scheduler_type="linear",
        warmup_steps=max(1, round(WARM_UP * steps)),
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    collator = DataCollatorForLanguageModeling(
        AutoTokenizer.from_pretrained(shards / "train" / "tokenizer"), mlm_probability=0.25
    )
    rows = RowsDataset(stored_rows(str(shards / "train")))
    Trainer(model, arguments, data_collator=collator, train_dataset=rows, callbacks=[deadline]).train()
    return deadline.times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True, help="holds train/ and validation/")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.shards / "train" / "tokenizer")
    torch.manual_seed(args.seed)
    trial = train(bert_model(SIZES, len(tokenizer)), args.shards, TRIAL_STEPS, 1e9, args.seed)
    step_seconds = (trial[-1] - trial[1]) / (TRIAL_STEPS - 1)
    torch.manual_seed(args.seed)
    model = bert_model(SIZES, len(tokenizer))
    times = train(model, args.shards, int(args.seconds / step_seconds), args.seconds, args.seed)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    steps = len(times) - 1
    summary = {"steps": steps, "tokens": steps * BATCH * 128, "seconds": times[-1] - times[0]}
    (args.output / "summary.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    main()

"""Time and memory of a training step of each objective, by the size of the vocabulary.

    python tests/benchmarks/objective_cost.py
    python tests/benchmarks/objective_cost.py --vocabularies 8192 --shape 128x2 --rows 32 --processor-time

One backbone (crammed-bert, 4 layers of width 256), one batch of 8 rows of 128 random ids, one thread, fp32. Each
variant is a process of its own and all take a step in turn, so what else the machine does meets all alike; medians of
the steps' ratios to `mlm`. On a busy machine processor time says more than the clock. `table` is what the word
embeddings cost whatever the objective: looking the batch up, a gradient of the whole table, and the optimizer's pass
over it. `bare` is a step less the table's, which is what an objective decides. Memory is the peak of the process in a
step above what it holds between steps (weights, gradients, moments).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {
    "mlm": {"name": "mlm", "masking": "exact"},
    "mlm, chunked": {"name": "mlm", "masking": "exact", "cross_entropy": "chunked"},
    "cwt, K x K": {"name": "cwt", "form": "full"},
    "cwt, de-duplicated": {"name": "cwt"},
    "slt": {"name": "slt", "masking": "exact"},
    "dac": {"name": "dac", "masking": "exact"},
}
LENGTH = 128


def _peak_mib() -> float:
    """Most memory since the last reset, MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _held_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def _step_of(variant: str, vocab_size: int, shape: str, batch_rows: int, clock: Callable[[], float]) -> Any:
    """A function that makes one training step of a variant."""
    import numpy as np
    import torch

    from sparselt_dist.config import ModelSection, OptimSection
    from sparselt_dist.models.backbone import PretrainingModel, build_backbone
    from sparselt_dist.objectives.base import TokenizerInfo, get_objective
    from sparselt_dist.objectives.settings import BUILT_IN_SETTINGS
    from sparselt_dist.optim import build_optimizer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    width, layers = map(int, shape.split("x"))
    rows = np.random.default_rng(0).integers(5, vocab_size, (batch_rows, LENGTH)).astype(np.uint32)
    if variant == "table":
        table = torch.nn.Embedding(vocab_size, width)
        optimizer = torch.optim.AdamW(table.parameters(), fused=True)
        ids = torch.from_numpy(rows.astype(np.int64))

        def loss() -> Any:
            return table(ids).square().sum()
    else:
        keys = VARIANTS[variant]
        tokenizer = TokenizerInfo(
            vocab_size=vocab_size, pad_id=0, unk_id=1, cls_id=2, sep_id=3, mask_id=4, special_ids=(0, 1, 2, 3, 4)
        )
        objective = get_objective(keys["name"])
        settings = BUILT_IN_SETTINGS[keys["name"]](**{key: value for key, value in keys.items() if key != "name"})
        sizes = {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64,
            "intermediate_size": 4 * width,
        }
        section = ModelSection(architecture="crammed-bert", config=sizes)
        backbone = build_backbone(
            section, tokenizer, sequence_length=LENGTH, with_head=objective.needs_lm_head(settings)
        )
        model = PretrainingModel(backbone, objective.build_module(settings, backbone))
        optimizer = build_optimizer(model, OptimSection(), encoder_lr_ratio=1.0)
        batch = objective.build_collator(settings, tokenizer)(
            [{"key": f"s/{number}", "ids": row, "seed": number} for number, row in enumerate(rows)]
        )

        def loss() -> Any:
            return model(batch).loss

    def step() -> dict[str, float]:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the last step freed is not held
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
        held, started = _held_mib(), clock()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return {"seconds": clock() - started, "mib": _peak_mib() - held}

    return step


def _work(args: argparse.Namespace) -> None:
    """A child: a step for each line of its input."""
    clock = time.process_time if args.processor_time else time.perf_counter
    step = _step_of(args.work, args.vocabularies[0], args.shape, args.rows, clock)
    for _ in sys.stdin:
        print(json.dumps(step()), flush=True)


def measure(vocab_size: int, args: argparse.Namespace) -> dict[str, tuple[list[float], float]]:
    """Seconds of each round, and the peak in MiB, by variant."""
    own = [sys.executable, __file__, "--vocabularies", str(vocab_size), "--shape", args.shape, "--rows", str(args.rows)]
    own += [*(["--processor-time"] if args.processor_time else []), "--work"]
    names = ["table", *VARIANTS]
    children = {
        name: subprocess.Popen([*own, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for name in names
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(args.rounds + 2):
        for name, child in children.items():
            assert child.stdin is not None and child.stdout is not None
            print(file=child.stdin, flush=True)
            found[name].append(json.loads(child.stdout.readline()))
    for child in children.values():
        child.communicate()
    kept = {name: steps[2:] for name, steps in found.items()}  # the first make gradients and moments
    return {name: ([one["seconds"] for one in steps], max(one["mib"] for one in steps)) for name, steps in kept.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 32768, 131072, 262144])
    parser.add_argument("--shape", default="256x4", help="WIDTHxLAYERS")
    parser.add_argument("--rows", type=int, default=8, help="of a batch")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--processor-time", action="store_true", help="instead of the clock's")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        _work(args)
        return
    print(
        "| vocabulary | objective | step, ms | against mlm | bare, ms | peak in a step, MiB |\n|---|---|---|---|---|---|"
    )
    for vocab_size in args.vocabularies:
        found = measure(vocab_size, args)
        table, base = found["table"][0], found["mlm"][0]
        for name, (seconds, mib) in found.items():
            ratio = statistics.median(own / other for own, other in zip(seconds, base, strict=True))
            bare = statistics.median(own - other for own, other in zip(seconds, table, strict=True))
            shown = "-" if name == "table" else f"{1e3 * bare:.0f}"
            print(
                f"| {vocab_size:,} | {name} | {1e3 * statistics.median(seconds):.0f} | {ratio:.2f} | {shown} | {mib:.0f} |"
            )


if __name__ == "__main__":
    main()

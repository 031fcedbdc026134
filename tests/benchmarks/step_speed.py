"""What the trainer's speed measures give on a CPU: processor time of a training step with and without each.

    python tests/benchmarks/step_speed.py
    python tests/benchmarks/step_speed.py --shape 768x12 --rows 8

crammed-bert with masked language modelling, rows of 128 random ids, vocabulary 32,768, bf16 autocast, one thread: forward,
backward and optimizer. Each variant is a process of its own and all take a step in turn; medians of the steps' ratios to the
first one. Processor time is told rather than wall clock, so that a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable

VARIANTS = {  # name: (memory kept, attention by products)
    "as torch has it": (False, False),
    "freed memory kept": (True, False),
    "attention by products": (False, True),
    "both (what a run does)": (True, True),
}
LENGTH, VOCABULARY = 128, 32768


def _step(shape: str, rows: int, keep_memory: bool, products: bool) -> Callable[[], float]:
    from sparselt_dist.allocator import keep_freed_memory

    if keep_memory:
        keep_freed_memory()
    import numpy as np
    import torch

    from sparselt_dist.config import ModelSection, OptimSection
    from sparselt_dist.models import crammed
    from sparselt_dist.models.backbone import PretrainingModel, build_backbone
    from sparselt_dist.objectives.base import TokenizerInfo
    from sparselt_dist.objectives.mlm import MLM
    from sparselt_dist.objectives.settings import MLMConfig
    from sparselt_dist.optim import build_optimizer

    torch.set_num_threads(1)
    if not products:
        crammed.LONGEST_PRODUCT_ROW = 0
    width, layers = map(int, shape.split("x"))
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
    }
    tokenizer = TokenizerInfo(vocab_size=VOCABULARY, pad_id=0, mask_id=4, special_ids=(0, 1, 2, 3, 4))
    section = ModelSection(architecture="crammed-bert", config=sizes)
    backbone = build_backbone(section, tokenizer, sequence_length=LENGTH, with_head=True)
    settings = MLMConfig(masking="exact")
    model = PretrainingModel(backbone, MLM().build_module(settings, backbone))
    optimizer = build_optimizer(model, OptimSection(), encoder_lr_ratio=1.0)
    ids = np.random.default_rng(0).integers(5, VOCABULARY, (rows, LENGTH)).astype(np.uint16)
    batch = MLM().build_collator(settings, tokenizer)(
        [{"key": f"s/{number}", "ids": row, "seed": number} for number, row in enumerate(ids)]
    )

    def step() -> float:
        before = resource.getrusage(resource.RUSAGE_SELF)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        after = resource.getrusage(resource.RUSAGE_SELF)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="384x6", help="WIDTHxLAYERS")
    parser.add_argument("--rows", type=int, default=16, help="of a micro-batch")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        step = _step(args.shape, args.rows, *VARIANTS[args.work])
        for _ in sys.stdin:
            print(json.dumps(step()), flush=True)
        return
    own = [sys.executable, __file__, "--shape", args.shape, "--rows", str(args.rows), "--work"]
    children = {
        name: subprocess.Popen([*own, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in VARIANTS
    }
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for number in range(args.rounds + 2):
        for name, child in children.items():
            assert child.stdin is not None and child.stdout is not None
            print(file=child.stdin, flush=True)
            value = float(json.loads(child.stdout.readline()))
            if number >= 2:
                seconds[name].append(value)
    for child in children.values():
        child.communicate()
    base = next(iter(seconds.values()))
    print("| variant | processor seconds a step | times as fast |\n|---|---|---|")
    for name, values in seconds.items():
        ratio = statistics.median(first / own for first, own in zip(base, values, strict=True))
        print(f"| {name} | {statistics.median(values):.3f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()

"""Time of a forward and backward pass on documents of unequal length: padded, without padding, and packed rows.

    python tests/benchmarks/unpadding.py

The same tokens in three layouts, alternating, one thread; medians, and tokens a second against the padded layout.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from sparselt_dist.config import ModelSection
from sparselt_dist.models.backbone import build_backbone
from sparselt_dist.models.unpadding import find_layout
from sparselt_dist.objectives.base import TokenizerInfo

TOKENIZER = TokenizerInfo(vocab_size=8192, pad_id=0, mask_id=4)
SIZES = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=128, help="longest document, tokens")
    parser.add_argument("--mean", type=float, default=40, help="median document, tokens")
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(args.mean), 0.7, args.documents).astype(int), 4, args.length)
    lengths[0] = args.length
    mask = (torch.arange(args.length) < torch.from_numpy(lengths)[:, None]).long()
    ids = torch.randint(7, 8192, mask.shape) * mask
    torch.manual_seed(0)
    section = ModelSection(architecture="crammed-bert", config=SIZES)
    backbone = build_backbone(section, TOKENIZER, sequence_length=args.length, with_head=False)
    layout = find_layout(mask)
    assert layout is not None
    packed = layout.pack(ids)

    def padded() -> torch.Tensor:
        backbone.unpad = False
        return backbone(ids, mask)

    def unpadded() -> torch.Tensor:
        backbone.unpad = True
        return backbone(ids, mask)

    def prepared() -> torch.Tensor:
        return backbone(packed, (packed > 0).long(), layout.segment_ids_RW, layout.position_ids_RW)

    seconds: dict[str, list[float]] = {"padded": [], "unpadded": [], "packed rows": []}
    for number in range(args.rounds + 2):
        for name, forward in zip(seconds, (padded, unpadded, prepared), strict=True):
            started = time.perf_counter()
            forward().square().sum().backward()
            if number >= 2:
                seconds[name].append(time.perf_counter() - started)
    tokens, base = int(mask.sum()), statistics.median(seconds["padded"])
    fill = tokens / mask.numel(), tokens / packed.numel()
    print(f"{args.documents} documents, {tokens} tokens; fill padded {fill[0]:.3f}, packed {fill[1]:.3f}")
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(f"{name:<12} {1e3 * middle:8.1f} ms  {tokens / middle:10,.0f} tokens/s  {base / middle:5.2f} x")


if __name__ == "__main__":
    main()

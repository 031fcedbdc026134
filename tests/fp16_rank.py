"""Steps of an engine in fp16 at a ZeRO stage, two of them overflowing; prints the outcome of each as JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator

import deepspeed
import torch
from deepspeed.runtime.zero import GatheredParameters

from sparselt_dist import cli
from sparselt_dist.non_finite import GuardedStep

CLIP = 0.5


def steps(stage: int) -> Iterator[dict[str, float | bool | None]]:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    settings = {
        "train_batch_size": 1,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": CLIP,
        "torch_autocast": {"enabled": True, "dtype": "float16"},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    guarded = GuardedStep(engine, CLIP)

    def weights() -> torch.Tensor:
        with GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
            return torch.cat([parameter.detach().flatten().clone() for parameter in engine.module.parameters()])

    for size in (1e6, 1e6, 1.0, 1.0):
        before = weights()
        engine.backward(engine(torch.ones(1, 4)).float().sum() * size)
        guarded.measure()
        update = guarded.take()
        scale = guarded.scaler.get_scale()
        yield {"norm": update.norm, "made": update.is_made, "scale": scale, "moved": float((weights() - before).norm())}


def main() -> int:
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
    deepspeed.init_distributed("gloo", verbose=False)
    for outcome in steps(int(sys.argv[1])):
        print("outcome", json.dumps(outcome), flush=True)
    return 0


if __name__ == "__main__":
    cli.leave(main)

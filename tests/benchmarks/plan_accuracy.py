"""What `plan` predicts beside what short real runs show: peak memory and seconds of a step, on this machine's CPU.

    python tests/benchmarks/plan_accuracy.py --work-dir /tmp/plan

Each rank is a process of `pretrain` with one thread. Memory is the peak of resident memory over that of a run with next to
no model. Time is the processor time of rank 0 between the second and the last step, so that other work on the machine
counts less; the peak that it is divided by is measured just before each run, as the best product of matrices by
processor time. Processor time leaves out waiting: for other ranks, and for memory that is not there yet.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from sparselt_dist.config_loading import load_config
from sparselt_dist.device import Device, find_device, measured
from sparselt_dist.plan import predict
from sparselt_dist.plan_report import Prediction
from sparselt_dist.planning import Machine

STEPS = 6
POLL_SECONDS = 0.02
COLUMNS = [
    "run",
    "memory over baseline, GiB: predicted / measured",
    "in all, GiB",
    "peak of a core, GFLOP/s",
    "a step, CPU s",
    "share of the peak",
    "a step, wall s",
    "MB sent a step and rank",
]

PEAK = """
import sys, time, torch
torch.set_num_threads(1)
kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[sys.argv[1]]
left, right = torch.ones(2048, 512, dtype=kind), torch.ones(512, 2048, dtype=kind)
out, best, deadline = left @ right, float("inf"), time.perf_counter() + 4
while time.perf_counter() < deadline:
    started = time.process_time()
    for _ in range(4):
        torch.matmul(left, right, out=out)
    best = min(best, (time.process_time() - started) / 4)
print(2 * 2048 * 512 * 2048 / best)
"""

# A rank of pretrain that counts the bytes of its collectives.
RANK = """
import json, os, sys
import torch.distributed as dist
sent = {}
def counting(name):
    function = getattr(dist, name)
    def wrapped(*args, **kwargs):
        tensors = [value for value in (*args, *kwargs.values()) if hasattr(value, "numel")]
        largest = max((tensor.numel() * tensor.element_size() for tensor in tensors), default=0)
        sent[name] = sent.get(name, 0) + largest
        return function(*args, **kwargs)
    setattr(dist, name, wrapped)
for name in ("all_reduce", "reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
    counting(name)
from sparselt_dist import pretrain
code = pretrain.main(sys.argv[2:])
if os.environ["RANK"] == "0":
    open(sys.argv[1], "w").write(json.dumps(sent))
sys.exit(code)
"""


def sizes(hidden: int, layers: int, heads: int, inner: int) -> list[str]:
    values = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
    }
    return [f"model.config.{name}={value}" for name, value in values.items()]


SMALL, MEDIUM = sizes(256, 4, 4, 1024), sizes(512, 8, 8, 2048)
NOTHING = [*sizes(16, 1, 2, 16), "train.micro_batch_size=1", "train.precision=bf16"]
CASES = {
    "4.7M fp32, 32 rows": (
        1,
        [*SMALL, "train.global_batch_size=32", "train.micro_batch_size=32", "train.precision=fp32"],
    ),
    "4.7M bf16, 32 rows": (
        1,
        [*SMALL, "train.global_batch_size=32", "train.micro_batch_size=32", "train.precision=bf16"],
    ),
    "25M bf16, 16 rows": (
        1,
        [*MEDIUM, "train.global_batch_size=16", "train.micro_batch_size=16", "train.precision=bf16"],
    ),
    "25M bf16, 2 ranks x 2 x 4 rows, ZeRO-1": (
        2,
        [
            *MEDIUM,
            "train.global_batch_size=16",
            "train.micro_batch_size=4",
            "train.precision=bf16",
            "train.zero_stage=1",
        ],
    ),
    "25M bf16, 2 ranks x 2 x 4 rows, ZeRO-2": (
        2,
        [
            *MEDIUM,
            "train.global_batch_size=16",
            "train.micro_batch_size=4",
            "train.precision=bf16",
            "train.zero_stage=2",
        ],
    ),
}


@dataclass(frozen=True)
class Measured:
    """A real run."""

    memory_gib: float
    """Peak of rank 0."""
    cpu_seconds: float
    """Of rank 0 and step."""
    wall_seconds: float
    sent: dict[str, int]
    """Bytes of the tensors that rank 0 gave to collectives, in all steps."""


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run(work: Path, ranks: int, overrides: list[str]) -> Measured:
    """A short run of pretrain by `ranks` processes."""
    folder = work / f"run-{time.monotonic_ns()}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [*common(work), f"run.output_dir={folder}", *overrides]
    environment = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    sent = work / "sent.json"
    with (work / "log").open("w") as log:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(sent), *arguments],
                env={**os.environ, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log,
                stderr=log,
            )
            for rank in range(ranks)
        ]
        marks = watch(processes[0], folder / "metrics.jsonl")
        codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"a run failed with {codes}:\n{(work / 'log').read_text()[-3000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "perf/step_seconds" in line][:STEPS]
    return Measured(
        memory_gib=steps[-1]["perf/memory_gib"],
        cpu_seconds=(marks[STEPS - 1] - marks[1]) / (STEPS - 2),
        wall_seconds=statistics.median(line["perf/step_seconds"] for line in steps[2:]),
        sent=json.loads(sent.read_text()),
    )


def watch(process: subprocess.Popen[bytes], journal: Path) -> list[float]:
    """Processor seconds of a process at each new line of its journal."""
    marks: list[float] = []
    while process.poll() is None:
        count = journal.read_bytes().count(b"\n") if journal.exists() else 0
        with contextlib.suppress(OSError):  # the process has just ended
            marks += [processor_seconds(process.pid)] * (count - len(marks))
        time.sleep(POLL_SECONDS)
    return marks


def common(work: Path) -> list[str]:
    fixed = "log.mlflow_uri=null log.every_steps=1 train.yardsticks=false schedule.name=constant"
    return [f"data.train={work / 'shards' / 'train'}", f"budget.max_steps={STEPS}", *fixed.split()]


def prediction(work: Path, ranks: int, overrides: list[str], device: Device) -> Prediction:
    config = load_config([], [*common(work), *overrides], default_profile="quickstart")
    return predict(config, Machine(device, ranks, ranks))


def this_device(overrides: list[str], ranks: int) -> Device:
    """This CPU with a peak by processor time of one thread."""
    precision = "fp32" if "train.precision=fp32" in overrides else "bf16"
    done = subprocess.run([sys.executable, "-c", PEAK, precision], capture_output=True, text=True, check=True)
    known = find_device("cpu").model_copy(update={"peak_tflops": {precision: float(done.stdout) / 1e12}})
    return measured(known, precision, ranks)


def compare(name: str, seen: Measured, base: Measured, plan: Prediction) -> str:
    _, memory, traffic, step = plan.layouts[0]
    device = plan.machine.device
    own, expected = seen.memory_gib - base.memory_gib, memory.total - memory.overhead
    tokens = plan.config.train.global_batch_size * 128 / plan.machine.count
    peak = next(iter((device.peak_tflops or {}).values()))
    reached = plan.flops_per_token * tokens / seen.cpu_seconds / (peak * 1e12)
    seconds = step.compute + step.optimizer
    cells = [
        name,
        f"{expected:.2f} / {own:.2f} ({expected / own - 1:+.0%})",
        f"{memory.total:.2f} / {seen.memory_gib:.2f} ({memory.total / seen.memory_gib - 1:+.0%})",
        f"{peak * 1000:,.0f}",
        f"{seconds:.2f} / {seen.cpu_seconds:.2f} ({seconds / seen.cpu_seconds - 1:+.0%})",
        f"{reached:.2f}",
        f"{seen.wall_seconds:.2f}",
        f"{traffic.links / 1e6:.0f} / {ring_bytes(seen, plan.machine.count) / 1e6:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def ring_bytes(seen: Measured, ranks: int) -> float:
    """Bytes a rank sends a step by rings, of the tensors that it gave to collectives."""
    passes = {"all_reduce": 2, "reduce": 1, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}
    return sum(passes[name] * size for name, size in seen.sent.items()) * (ranks - 1) / ranks / STEPS


def prepare(work: Path) -> None:
    if (work / "shards" / "train").exists():
        return
    command = [sys.executable, "-m", "sparselt_dist.prepare", "--config", "quickstart"]
    subprocess.run([*command, f"prepare.output_dir={work / 'shards'}"], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="where shards and runs lie")
    parser.add_argument("--only", help="cases whose name has this in it")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    prepare(args.work_dir)
    bases = {ranks: run(args.work_dir, ranks, [*NOTHING, f"train.global_batch_size={ranks}"]) for ranks in (1, 2)}
    print(f"baseline {', '.join(f'{base.memory_gib:.2f} GiB with {ranks} ranks' for ranks, base in bases.items())}")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for name, (ranks, overrides) in CASES.items():
        if args.only is None or args.only in name:
            device = this_device(overrides, ranks)
            seen = run(args.work_dir, ranks, overrides)
            print(compare(name, seen, bases[ranks], prediction(args.work_dir, ranks, overrides, device)), flush=True)
    print(f"load of the machine, mean of five minutes: {os.getloadavg()[1]:.1f}")


if __name__ == "__main__":
    main()

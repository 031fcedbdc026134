"""Training speed side by side: the product, a loop written by hand, and transformers' `Trainer`, on a CPU or a GPU.

    python tests/benchmarks/training_speed.py --work-dir /tmp/speed
    python tests/benchmarks/training_speed.py --work-dir /tmp/speed --sizes 25m --rounds 15 --precision fp32
    python tests/benchmarks/training_speed.py --work-dir /tmp/speed --sizes 4m --families ours --logging --steps 100
    python tests/benchmarks/training_speed.py --work-dir /tmp/speed --sizes 25m --families ours --scaling --stalls
    python tests/benchmarks/training_speed.py --work-dir /tmp/speed --device cuda --steps 50 --workers 4

Masked language modelling on rows of 128 real tokens, vocabulary 32,768, the same rows an optimizer step for all. `ours` is a
real `pretrain`, read from its journal: its whole wall clock counts. Every family is first tried with and without
torch.compile and with whole and quarter micro-batches (`--micro-shares`), and goes on with the fastest.

Each competitor is a process that trains on and on; it is stopped (SIGSTOP) while the others have their turn, so that what
else the machine does meets all alike and nobody compiles twice. A turn is `--steps` optimizer steps; shown are medians of
the turns, and medians of the rounds' ratios to ours. The share of the peak is that of the FLOPs a step needs by the project's own
formula (head at the targets alone, for all) in the best matrix product measured between the rounds. On a busy machine
`--processor-time --threads 1` disturbs less: seconds are then those of the processor, of all a competitor's processes.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from training_rivals import LENGTH, PROBABILITY, VOCABULARY, Job, product_model

from sparselt_dist.models.workload import workload
from sparselt_dist.objectives.cost import flops_per_token
from sparselt_dist.objectives.mlm import MLM

# Parameters, and rows an optimizer step: 4.5 M = 4.2 M table + 2 layers; 24.4 M = 12.6 M table + 8; 119.6 M = 25.2 M + 16.
SIZES = {"4m": (128, 2, 64), "25m": (384, 8, 32), "120m": (768, 16, 16)}
GPU_ROWS = {"4m": 512, "25m": 256, "120m": 128}  # all competitors of a size lie in the device's memory together
FAMILIES = ["trainer-bert", "trainer-crammed", "loop", "loop-sdpa", "loop-all-logits", "ours", "bare"]
FOLLOWS = {"loop-sdpa": "loop", "loop-all-logits": "loop", "bare": "ours"}  # takes the settings found for another
WARM_UP_STEPS = 4
SCREENING_TURNS = 2
POLL_SECONDS = 0.01
RIVALS = Path(__file__).with_name("training_rivals.py")
STALL_STEPS, STALL_EVERY = 40, 10


def sizes_of(name: str) -> dict[str, int]:
    width, layers, _ = SIZES[name]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return dict(zip(names, (width, layers, width // 64, 4 * width), strict=True))


# ---- processes that take turns


@dataclass
class Competitor:
    """A process that trains on and on, and the steps it has told of."""

    name: str
    job: Job
    process: subprocess.Popen[bytes]
    output: Path
    read_marks: Callable[[], list[tuple[int, float]]]
    by_processor: bool
    paused: float = 0.0
    stopped_at: float | None = None
    rates: list[float] = field(default_factory=list)
    """Tokens a second, by round."""

    def turn(self, steps: int) -> float:
        """Tokens a second over the next steps; the pause before them is taken off."""
        before, processor = self.read_marks(), self._processor_seconds()
        self._go_on()
        pause, self.paused = self.paused, 0.0
        wanted = (before[-1][0] if before else 0) + steps
        while not (marks := self.read_marks()) or marks[-1][0] < wanted:
            if self.process.poll() is not None:
                raise SystemExit(f"{self.name} ended by itself:\n{self.output.read_text()[-3000:]}")
            time.sleep(POLL_SECONDS)
        self._stop()
        first, last = (before or marks)[-1], marks[-1]
        seconds = self._processor_seconds() - processor if self.by_processor else last[1] - first[1] - pause
        return (last[0] - first[0]) * self.job.batch * LENGTH / max(seconds, 1e-9)

    def end(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in self._all():
                process.kill()
        self.process.wait()

    def _processor_seconds(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self._all())

    def _all(self) -> list[psutil.Process]:
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def _go_on(self) -> None:
        if self.stopped_at is not None:
            for process in reversed(self._all()):
                process.send_signal(signal.SIGCONT)
            self.paused = time.monotonic() - self.stopped_at

    def _stop(self) -> None:
        self.stopped_at = time.monotonic()
        for process in self._all():
            process.send_signal(signal.SIGSTOP)


def start(job: Job, work: Path, args: argparse.Namespace) -> Competitor:
    """Start a competitor and let it warm up."""
    place = work / f"{job.family}-{time.monotonic_ns()}"
    place.mkdir(parents=True)
    threads, command = args.threads, [sys.executable, str(RIVALS), json.dumps(job._asdict()), str(place / "marks")]
    read_marks = lambda: rival_marks(place / "marks")  # noqa: E731
    if job.family.startswith("ours"):
        command, read_marks = product_command(job, place, args.steps), lambda: journal_marks(place / "run")
        threads = args.threads // 2 if "2 ranks" in job.family else args.threads
    output = place / "output"
    with output.open("w") as sink:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": args.device}
        process = subprocess.Popen(command, env=environment, stdout=sink, stderr=sink, cwd=place)
    settings = f"{'compiled' if job.compiled else 'eager'}, {job.micro_batch} rows"
    competitor = Competitor(f"{job.family} ({settings})", job, process, output, read_marks, args.processor_time)
    atexit.register(competitor.end)
    competitor.turn(WARM_UP_STEPS)
    return competitor


def rival_marks(path: Path) -> list[tuple[int, float]]:
    if not path.exists():
        return []
    complete = path.read_text().rpartition("\n")[0].splitlines()
    return [(int(step), float(seconds)) for step, seconds in (line.split() for line in complete)]


def journal_marks(folder: Path) -> list[tuple[int, float]]:
    """Steps of a run and its whole wall clock at each, by its time ledger."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().rpartition("\n")[0].splitlines()]
    return [(line["step"], sum(ledger(line).values())) for line in lines]


def ledger(line: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name.startswith("time/")}


def product_command(job: Job, place: Path, steps: int) -> list[str]:
    """`pretrain` as users start it, with a journal line a turn; the variants of the options by name."""
    overrides = {
        "data.train": job.shards,
        "data.num_workers": job.workers,
        "run.output_dir": place / "run",
        **{f"model.config.{name}": value for name, value in job.sizes.items()},
        "objective.mlm_probability": PROBABILITY,
        "schedule.name": "constant",
        "schedule.warmup": 0,
        "optim.peak_lr": 1e-4,
        "train.global_batch_size": job.batch,
        "train.micro_batch_size": job.micro_batch,
        "train.precision": job.precision,
        "train.compile": str(job.compiled).lower(),
        "train.evaluate_every_steps": "null",
        "checkpoint.every_steps": "null",
        "budget.max_steps": 10**9,
        "log.every_steps": 1 if "each step" in job.family else steps,
        "log.mlflow_uri": "sqlite:///mlflow.db" if "MLflow" in job.family else "null",
    }
    if "2 ranks" in job.family:
        overrides |= {"train.zero_stage": 1, "train.micro_batch_size": min(job.micro_batch, job.batch // 2)}
    launcher = ["sparselt_dist.launch", "--num_gpus", "2", "-m"] if "2 ranks" in job.family else []
    arguments = [f"{key}={value}" for key, value in overrides.items()]
    return [sys.executable, "-m", *launcher, "sparselt_dist.pretrain", "--config", "quickstart", *arguments]


# ---- the measurement


def candidates(job: Job, args: argparse.Namespace) -> list[Job]:
    """The settings a user would try."""
    micro_batches = sorted({max(1, job.batch // share) for share in args.micro_shares}, reverse=True)
    workers = args.workers if job.family.startswith(("trainer", "ours")) else [0]
    return [
        job._replace(compiled=compiled, micro_batch=rows, workers=number)
        for compiled in args.compiled
        for rows in micro_batches
        for number in workers
    ]


def choose(job: Job, work: Path, args: argparse.Namespace) -> Competitor:
    """The fastest of the settings, running."""
    best, best_rate = None, 0.0
    for candidate in candidates(job, args):
        tried = start(candidate, work, args)
        rate = max(tried.turn(args.steps) for _ in range(SCREENING_TURNS))
        print(f"  {tried.name}: {rate:,.0f} tokens/s", flush=True)
        loser = tried if best is not None and rate <= best_rate else best
        if loser is not tried:
            best, best_rate = tried, rate
        if loser is not None:
            loser.end()
    assert best is not None
    return best


def line_up(job: Job, work: Path, args: argparse.Namespace) -> dict[str, Competitor]:
    """All competitors by family, each with its best settings."""
    chosen: dict[str, Competitor] = {}
    for family in args.families:
        if FOLLOWS.get(family) not in args.families:
            chosen[family] = choose(job._replace(family=family), work, args)
    like = [(family, FOLLOWS[family]) for family in args.families if family not in chosen]
    like += [(f"ours, {name}", "ours") for name in ("each step", "each step and MLflow") if args.logging]
    like += [("ours, 2 ranks", "ours")] if args.scaling else []
    for family, model in like:
        chosen[family] = start(chosen[model].job._replace(family=family), work, args)
    return chosen


def peaks(job: Job, threads: int) -> dict[str, float]:
    command = [sys.executable, str(RIVALS), json.dumps(job._replace(family="peak")._asdict())]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def compare(job: Job, work: Path, args: argparse.Namespace) -> tuple[dict[str, Competitor], list[dict[str, float]]]:
    """Rounds in which all take a turn; and the peaks measured after each."""
    chosen = line_up(job, work, args)
    found = []
    for _ in range(args.rounds):
        for competitor in chosen.values():
            competitor.rates.append(competitor.turn(args.steps))
        found.append(peaks(next(iter(chosen.values())).job, args.threads))
    for competitor in chosen.values():
        competitor.end()
    return chosen, found


def report(job: Job, chosen: dict[str, Competitor], found: list[dict[str, float]]) -> None:
    model, settings = product_model(job)
    work = workload(
        model.backbone,
        mean_length=float(LENGTH),
        targets_per_token=PROBABILITY,
        micro_batch_size=job.micro_batch,
        world_size=1,
        accumulation_steps=1,
    )
    flops = flops_per_token(MLM(), settings, work)
    by_shape = {shape: statistics.median(one[shape] for one in found) for shape in found[0]}
    peak = max(value for shape, value in by_shape.items() if shape.startswith(job.precision))
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"\n{count:,} parameters, {flops / 1e6:.1f} MFLOP a token, {job.batch} rows a step, {job.precision}")
    print("peaks, GFLOP/s: " + ", ".join(f"{shape} {value:,.0f}" for shape, value in by_shape.items()))
    print("| | tokens/s | quartiles | ours / it | share of the peak |\n|---|---|---|---|---|")
    for competitor in chosen.values():
        rates = competitor.rates
        low, middle, high = statistics.quantiles(rates, n=4) if len(rates) > 1 else rates * 3
        ratio = "-"
        if "ours" in chosen:
            pairs = zip(chosen["ours"].rates, rates, strict=True)
            ratio = f"{statistics.median(ours / own for ours, own in pairs):.3f}"
        share = middle * flops / (peak * 1e9)
        print(f"| {competitor.name} | {middle:,.0f} | {low:,.0f} to {high:,.0f} | {ratio} | {share:.2f} |", flush=True)
    for family, text in (("bare", "engine, loader and loop"), ("ours, 2 ranks", "2 ranks, times as fast")):
        if "ours" in chosen and family in chosen:
            pairs = zip(chosen["ours"].rates, chosen[family].rates, strict=True)
            ratio = statistics.median(own / ours for ours, own in pairs)
            print(f"{text}: " + (f"{ratio - 1:+.1%} of a step" if family == "bare" else f"{ratio:.2f}"), flush=True)


def stalls(job: Job, work: Path, args: argparse.Namespace) -> None:
    """Seconds of an evaluation and a checkpoint, by the ledger of a run that makes some."""
    place = work / f"stalls-{time.monotonic_ns()}"
    place.mkdir(parents=True)
    command = product_command(job._replace(family="ours"), place, STALL_EVERY)
    command += [f"budget.max_steps={STALL_STEPS}", f"train.evaluate_every_steps={STALL_EVERY}"]
    command += [f"checkpoint.every_steps={STALL_EVERY}", "train.yardsticks=false"]
    command += [f"data.validation={Path(job.shards).with_name('validation')}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "DS_ACCELERATOR": args.device}
    with (place / "output").open("w") as sink:
        subprocess.run(command, env=environment, stdout=sink, stderr=sink, cwd=place, check=True)
    spent = ledger(json.loads((place / "run" / "metrics.jsonl").read_text().splitlines()[-1]))
    times = STALL_STEPS // STALL_EVERY  # the last of each is that of the landing
    shown = {name: spent[f"time/{name}_seconds"] / times for name in ("evaluate", "checkpoint")}
    print("stalls, seconds each: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in shown.items()))
    print("ledger: " + ", ".join(f"{name[5:-8]} {seconds:.1f} s" for name, seconds in spent.items() if seconds > 0.05))


def prepare(work: Path) -> Path:
    """Shards of the embedded corpus with a vocabulary of 32,768; made once."""
    folder = work / "shards"
    if not folder.exists():
        command = [sys.executable, "-m", "sparselt_dist.prepare", "prepare.source=embedded"]
        command += [f"prepare.output_dir={folder}", f"prepare.vocab_size={VOCABULARY}"]
        command += ["prepare.validation_fraction=0.02", f"data.sequence_length={LENGTH}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "train"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="where shards, runs and outputs lie")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--threads", type=int, default=2, help="of every competitor")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps a turn, and between our journal lines")
    parser.add_argument("--micro-shares", type=int, nargs="+", default=[1, 4], help="micro-batches a step to try")
    parser.add_argument("--compile", choices=["try", "always", "never"], default="try")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0], help="loader processes of Trainer and ours to try"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--processor-time", action="store_true", help="instead of the clock's")
    parser.add_argument("--scaling", action="store_true", help="2 ranks with half the threads each, ZeRO 1, beside 1")
    parser.add_argument("--logging", action="store_true", help="a journal line each step, and MLflow's besides")
    parser.add_argument("--stalls", action="store_true", help="of evaluation and checkpoint")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if (args.scaling or args.logging or args.stalls) and "ours" not in args.families:
        raise SystemExit("--scaling, --logging and --stalls need the family ours")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stopped processes must not outlive this one
    args.compiled = {"try": [False, True], "always": [True], "never": [False]}[args.compile]
    args.work_dir = args.work_dir.resolve()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    shards = prepare(args.work_dir)
    if importlib.util.find_spec("accelerate") is None:
        print("accelerate is not installed, which Trainer needs: left out")
        args.families = [family for family in args.families if not family.startswith("trainer")]
    for name in args.sizes:
        print(f"\n{name}, {args.threads} threads; load of the machine {os.getloadavg()[0]:.1f}", flush=True)
        batch = SIZES[name][2] if args.device == "cpu" else GPU_ROWS[name]
        marks = 1 if args.device == "cpu" else args.steps
        job = Job("", sizes_of(name), str(shards), batch, batch, args.precision, False, 0, args.device, marks)
        chosen, found = compare(job, args.work_dir, args)
        report(job, chosen, found)
        if args.stalls:
            stalls(chosen["ours"].job, args.work_dir, args)


if __name__ == "__main__":
    main()

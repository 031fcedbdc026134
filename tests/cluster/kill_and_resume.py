"""Kill -9 of a random rank or loader worker at random times, again and again: the same batches as without.

    python tests/cluster/kill_and_resume.py --kills 20

A small `pretrain` of two ranks (gloo), a loader worker each, runs once undisturbed. Then the same run is started through
the `deepspeed` command with `--resume auto`, killed, and started again until all kills are made; the last start runs to
the end. Every step's `batch_digest`, those of steps that were lost and taken again included, must equal the undisturbed
run's, and so must the losses, bit by bit. Exit code 0 says that they do.

One kill in five falls into the start of the ranks, the others at a random time after the first new step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from runs import pretrain_arguments

LAUNCH = "from sparselt_dist.launch import main; import sys; sys.exit(main())"
POLL_SECONDS = 0.02
END_SECONDS = 300.0  # a run that lost a process must have ended by then
START_SHARE = 0.2


class Kill(NamedTuple):
    """One kill and what came of it."""

    victim: str
    after: str
    step: int
    code: int
    seconds_to_end: float


# --- runs ------------------------------------------------------------------------------------------------------------


def prepare(folder: Path) -> Path:
    """Shards of English that every Python carries."""
    text = folder / "topics.jsonl"
    text.write_text("".join(json.dumps({"text": body}) + "\n" for _, body in sorted(topics.items())))
    command = [sys.executable, "-m", "sparselt_dist.prepare", f"prepare.source={text}", "prepare.num_workers=1"]
    command += [f"prepare.output_dir={folder / 'shards'}", "prepare.vocab_size=512", "prepare.validation_fraction=0.2"]
    command += ["prepare.samples_per_shard=256", "data.sequence_length=32"]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    return folder / "shards"


def prepared(work: Path) -> Path:
    """The shards of a folder that is kept, made once."""
    shards = work / "shards"
    return shards if (shards / "validation" / "manifest.json").exists() else prepare(work)


def command(shards: Path, folder: Path, arguments: argparse.Namespace) -> list[str]:
    """The command of the run; the same at every start."""
    overrides = [
        f"budget.max_steps={arguments.steps}",
        f"checkpoint.every_steps={arguments.checkpoint_every}",
        "train.micro_batch_size=2",
        "data.num_workers=1",
        "run.seed=7",
    ]
    start = [sys.executable, "-c", LAUNCH, "--num_gpus", "2", "-m", "sparselt_dist.pretrain", "--resume", "auto"]
    return [*start, *pretrain_arguments(shards, folder, *overrides)]


@contextmanager
def started(line: list[str], output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a session of its own; nothing of it is left afterwards."""
    with output.open("ab") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(line, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
    finally:
        family = descendants(process.pid)
        for member in [*family, process]:
            member.kill()
        process.wait()


def descendants(pid: int) -> list[psutil.Process]:
    """All processes below one, as far as they live."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def victims(pid: int) -> dict[str, psutil.Process]:
    """Ranks and loader workers by name; a worker is a fork of its rank and so has the same command line."""
    lines = {}
    for process in descendants(pid):
        try:
            lines[process] = (process.ppid(), process.cmdline())
        except psutil.NoSuchProcess:
            continue
    numbers = {
        process.pid: part.removeprefix("--local_rank=")
        for process, (_, line) in lines.items()
        for part in line
        if part.startswith("--local_rank=")
    }
    return {
        f"{'worker of rank' if parent in numbers else 'rank'} {numbers[process.pid]}": process
        for process, (parent, _) in lines.items()
        if process.pid in numbers
    }


def journal(folder: Path) -> list[dict[str, Any]]:
    """The complete lines so far."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def undisturbed(line: list[str], folder: Path) -> tuple[list[dict[str, Any]], float]:
    """The journal of a run without kills, and the seconds until its first step."""
    launched = time.time()
    with started(line, folder.with_suffix(".log")) as process:
        code = process.wait()
    assert code == 0, f"the undisturbed run failed: see {folder.with_suffix('.log')}"
    lines = journal(folder)
    return lines, lines[0]["time"] - launched


# --- kills -----------------------------------------------------------------------------------------------------------


def wait_for_step(process: subprocess.Popen[bytes], folder: Path, launched: float) -> None:
    """Until this start has journalled a step of its own."""
    while process.poll() is None:
        lines = journal(folder)
        if lines and lines[-1]["time"] > launched:
            return
        time.sleep(POLL_SECONDS)


def pick(process: subprocess.Popen[bytes], generator: random.Random) -> tuple[str, psutil.Process] | None:
    """A rank or, as often, a worker, once there is one; None if the run has ended."""
    while process.poll() is None:
        found = victims(process.pid)
        kinds = sorted({name.split(" ")[0] for name in found})
        if kinds:
            kind = generator.choice(kinds)
            return generator.choice(sorted((name, who) for name, who in found.items() if name.startswith(kind)))
        time.sleep(POLL_SECONDS)
    return None


def start_and_kill(
    line: list[str], folder: Path, generator: random.Random, start_seconds: float, span: float
) -> Kill | None:
    """One start, one kill, and the wait for the end; None if the run ended before."""
    launched = time.time()
    with started(line, folder.with_suffix(".log")) as process:
        early = generator.random() < START_SHARE
        if not early:
            wait_for_step(process, folder, launched)
        delay = generator.uniform(0, start_seconds if early else span)
        time.sleep(delay)
        picked = pick(process, generator)
        if picked is None:
            return None
        name, victim = picked
        steps = journal(folder)
        victim.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        code = process.wait(timeout=END_SECONDS)
        ended = time.monotonic() - killed
        assert not (left := descendants(process.pid)), f"left behind: {left}"
    after = f"{delay:.2f} s after {'the start' if early else 'its first step'}"
    return Kill(name, after, steps[-1]["step"] if steps else 0, code, ended)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--checkpoint-every", type=int, default=20, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work-dir", type=Path, help="new folder that keeps the runs; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work_dir or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        return disturb(work, arguments)


def disturb(work: Path, arguments: argparse.Namespace) -> int:
    """Both runs, the kills and the comparison; the exit code."""
    shards = prepare(work)
    expected, start_seconds = undisturbed(command(shards, work / "undisturbed", arguments), work / "undisturbed")
    stepping = expected[-1]["time"] - expected[0]["time"]
    span = 0.8 * stepping / (arguments.kills + 1)
    print(f"undisturbed: {len(expected)} steps in {stepping:.0f} s; {start_seconds:.0f} s to the first", flush=True)
    generator = random.Random(arguments.seed)
    folder = work / "killed"
    line = command(shards, folder, arguments)
    digests = {entry["step"]: entry["batch_digest"] for entry in expected}
    checked = 0
    print("| kill | victim | when | step | exit code | s to the end |\n|---|---|---|---|---|---|")
    for number in range(1, arguments.kills + 1):
        kill = start_and_kill(line, folder, generator, start_seconds, span)
        if kill is None:
            print(f"the run ended before kill {number}; give more --steps")
            return 1
        print(f"| {number} | {kill.victim} | {kill.after} | {kill.step} | {kill.code} | {kill.seconds_to_end:.1f} |")
        sys.stdout.flush()
        seen = journal(folder)
        checked += len(seen)
        assert all(entry["batch_digest"] == digests[entry["step"]] for entry in seen), f"kill {number}: other batches"
        assert kill.code != 0, f"kill {number}: the run says that nothing happened"
    with started(line, folder.with_suffix(".log")) as process:
        assert process.wait() == 0, f"the last start failed: see {folder.with_suffix('.log')}"
    return verdict(expected, journal(folder), checked)


def verdict(expected: list[dict[str, Any]], found: list[dict[str, Any]], checked: int) -> int:
    """Compare the final journals; 0 if they say the same."""
    for key in ("step", "batch_digest", "train/loss"):
        same = [entry[key] for entry in found] == [entry[key] for entry in expected]
        print(f"{key}: {'equal over all' if same else 'DIFFERS over'} {len(expected)} steps")
        if not same:
            return 1
    print(f"{checked} journal lines read between the starts agreed as well")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The faults that random_faults.py makes: what surrounds the run, when and how each is made, and how the run must end.

A kind is a context manager that is given a case and gives its plan. All that is random is drawn from the case's generator.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from faulty_http import serve_apart
from launched_runs import TESTS, Toy, end_all, environment
from mlflow_server import Server
from runs import free_port
from save_kills import damage
from small_disk import fill, small_disk

from sparselt_dist import checkpoint
from sparselt_dist.follower import read_json

POLL_SECONDS = 0.02
OUTAGE_SECONDS = 30.0
DOWN_SECONDS = 4.0  # of a node
DAY_SECONDS = 86400
HANG_MINUTES = 0.2
DISK_MEGABYTES = 16
DISTURBED_START = (
    r"exits with return code|Connection closed by peer|[Cc]onnection reset|died|failed:"  # ranks not all met
)

Process = subprocess.Popen[bytes]
Family = Callable[[int], dict[str, psutil.Process]]


@dataclass
class Case:
    """One fault: its run folder, marks and randomness."""

    toy: Toy
    folder: Path
    mark: str
    generator: random.Random
    moment: float  # seconds after the start
    family: Family  # ranks and loader workers below a process, by name

    @property
    def run(self) -> Path:
        return self.folder / "run"


@dataclass
class Plan:
    """How one case goes."""

    make: Callable[[Process], bool]
    """Make the fault, once it is time; False: the run ended before there was anything to disturb."""
    said: Callable[[str, int], bool]
    """Whether the disturbed start, by its output and code, or the one after it, said what it should."""
    overrides: tuple[str, ...] = ()
    line: list[str] | None = None
    """The command, if it is another than usual."""
    variables: Mapping[str, str] = field(default_factory=environment)
    may_make: Callable[[], bool] = lambda: True
    """Whether there is already what the fault needs."""
    mend: Callable[[], object] = lambda: None
    """Before the next start."""
    said_by: int = 0  # start, from 0
    check: Callable[[], list[str]] = list
    """What is wrong at the very end, besides the weights."""
    damaged: int = 0  # checkpoints that the fault itself damages
    saves_fail: bool = False  # while the fault lasts, so that more is lost than lies between two of them


Kind = Callable[[Case], AbstractContextManager[Plan]]


def _rank(case: Case, process: Process) -> tuple[str, psutil.Process] | None:
    """A random rank, once there is one; None if the run has ended."""
    while process.poll() is None:
        ranks = sorted((name, who) for name, who in case.family(process.pid).items() if name.startswith("rank "))
        if len(ranks) == 2:
            return case.generator.choice(ranks)
        time.sleep(POLL_SECONDS)
    return None


def _is_watched(case: Case, pid: int) -> bool:
    """Whether a rank is past the start in which no other could say what became of it, and the run not over."""
    logs = "".join(path.read_text(errors="replace") for path in (case.run / "logs").glob("rank_*.log"))
    return f": process {pid} on " in logs and not (case.run / "summary.json").exists()


@contextmanager
def rank_killed(case: Case) -> Iterator[Plan]:
    """Named by its number and process, with code 1, if the ranks had met."""
    expected = [DISTURBED_START]

    def make(process: Process) -> bool:
        if (picked := _rank(case, process)) is None:
            return False
        name, victim = picked
        if _is_watched(case, victim.pid):
            expected[0] = rf"error: {name} on \S+ \(pid {victim.pid}\) died"
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
        return True

    over = r": finished after "
    yield Plan(make, lambda output, code: code != 75 and re.search(f"{expected[0]}|{over}", output) is not None)


@contextmanager
def rank_stopped(case: Case) -> Iterator[Plan]:
    """A hang, with the stopped rank as the one behind; before the ranks have met, the others wait for it in vain."""
    expected = [""]

    def make(process: Process) -> bool:
        if (picked := _rank(case, process)) is None:
            return False
        name, victim = picked
        hangs = rf"the run hangs: nothing got on for {HANG_MINUTES:g} minutes[^|]*behind: {name} on "
        expected[0] = rf"{hangs}|ranks did not meet at "
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.suspend()
        return True

    limit = (f"train.hang_minutes={HANG_MINUTES}",)
    yield Plan(make, lambda output, code: code == 1 and re.search(expected[0], output) is not None, limit)


@contextmanager
def launcher_killed(case: Case) -> Iterator[Plan]:
    """Its ranks, if it had any, stop after a checkpoint."""
    ranks: dict[str, psutil.Process] = {}

    def make(process: Process) -> bool:
        ranks.update(case.family(process.pid))
        process.kill()
        return True

    told = r": (stopped|finished) after |its launcher is gone"
    yield Plan(make, lambda output, code: not ranks or re.search(told, output) is not None)


@contextmanager
def disk_full(case: Case) -> Iterator[Plan]:
    """While something is saved, for some seconds or for good: training goes on, only the last save must be."""
    forever, pause = case.generator.random() < 0.5, case.generator.uniform(0.5, 4.0)
    with small_disk(case.folder / "disk", DISK_MEGABYTES) as disk:
        (disk / "run").mkdir()
        case.run.symlink_to(disk / "run")
        filler = disk / "filler"

        def make(process: Process) -> bool:
            while not list((case.run / "checkpoints").glob("step_*.partial")):
                if process.poll() is not None:
                    return False
                time.sleep(0.002)
            fill(filler)
            if not forever:
                time.sleep(pause)
                filler.unlink()
            return True

        def said(output: str, code: int) -> bool:
            told = re.search(r"cannot be written|No space left on device", output) is not None
            return code == 0 or (code == 2 and told)

        yield Plan(make, said, mend=lambda: filler.unlink(missing_ok=True), saves_fail=True)


@contextmanager
def checkpoint_torn(case: Case) -> Iterator[Plan]:
    """The newest checkpoint is damaged after its commit and a kill of everything: the one before is used, and it is said."""
    newest: list[Path] = []

    def make(process: Process) -> bool:
        process.kill()
        process.wait()  # before another can reap it, and with it its code
        end_all(case.mark)
        newest.append(checkpoint.complete_checkpoints(case.run)[-1])
        damage(case.generator.choice(sorted(newest[0].iterdir())), case.generator)
        return True

    def said(output: str, code: int) -> bool:
        return re.search(rf"checkpoint \S*{newest[0].name}: .*; trying the previous one", output) is not None

    def may_make() -> bool:
        return len(checkpoint.complete_checkpoints(case.run)) > 1

    yield Plan(make, said, may_make=may_make, said_by=1, damaged=1)


@contextmanager
def mlflow_down(case: Case) -> Iterator[Plan]:
    """A server that is killed, or a data base that is locked by another, for the rest of the run: it goes on as it would."""
    (case.folder / "store").mkdir()
    server = Server(case.folder / "store") if case.generator.random() < 0.5 else None
    base = case.folder / "store" / "mlflow.db"
    uri = server.uri if server else f"sqlite:///{base}"
    locks: list[sqlite3.Connection] = []

    def make(process: Process) -> bool:
        if server:
            server.kill()
        else:
            locks.append(sqlite3.connect(base, timeout=60.0, isolation_level=None))
            locks[0].execute("BEGIN EXCLUSIVE")
        return True

    def said(output: str, code: int) -> bool:
        told = "MLflow has not got everything of this run" in output
        return code == 0 and told != bool(read_json(case.run / "mlflow.json").get("delivered"))

    def check() -> list[str]:
        for lock in locks:
            lock.close()
        if server:
            server.start()
        return _not_delivered(case, uri)

    try:
        if server:
            server.start()
        yield Plan(make, said, (f"log.mlflow_uri={uri}",), check=check)
    finally:
        if server:
            server.kill()


def _not_delivered(case: Case, uri: str) -> list[str]:
    """What is wrong with the store after `mlflow-sync`: each step must stand there once."""
    from sparselt_dist.mlflow_sink import open_client

    line = [sys.executable, "-m", "sparselt_dist.mlflow_sync", str(case.run)]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        return [f"mlflow-sync: {done.stdout}{done.stderr}"]
    history = open_client(uri).get_metric_history(read_json(case.run / "mlflow.json")["run_id"], "train/loss")
    steps = sorted(point.step for point in history)
    return [] if steps == list(range(1, case.toy.steps + 1)) else [f"MLflow has steps {steps}"]


@contextmanager
def shards_down(case: Case) -> Iterator[Plan]:
    """The web server of the shards is gone for 30 s: outlived, or one message that names the shard."""
    port, attempts = free_port(), case.generator.choice((5, 10))
    servers = [serve_apart(case.toy.shards, port)]
    timers: list[threading.Timer] = []

    def make(process: Process) -> bool:
        servers[0].kill()
        servers[0].wait()
        timers.append(threading.Timer(OUTAGE_SECONDS, lambda: servers.append(serve_apart(case.toy.shards, port))))
        timers[0].start()
        return True

    def said(output: str, code: int) -> bool:
        return code == 0 or (
            code == 2 and re.search(r"error: \S*http://\S+: tried (once|\d+ times), at last ", output) is not None
        )

    where = (f"data.train=http://127.0.0.1:{port}/train", f"data.cache_dir={case.folder / 'cache'}")
    try:
        yield Plan(make, said, (*where, f"data.download_attempts={attempts}"))
    finally:
        for timer in timers:
            timer.cancel()
            timer.join()
        for each in servers:
            each.kill()
            each.wait()


@contextmanager
def clock_jumps(case: Case) -> Iterator[Plan]:
    """By a day, of all processes or of one rank: nobody notices."""
    file = case.folder / "clock"
    seconds = case.generator.choice((-DAY_SECONDS, DAY_SECONDS))
    whose = case.generator.choice(("all", "0", "1"))
    variables = environment(SPARSELT_TESTS_CLOCK=str(file))
    variables["PYTHONPATH"] = os.pathsep.join([str(TESTS / "shifted_clock"), variables["PYTHONPATH"]])

    def make(process: Process) -> bool:
        partial = file.with_suffix(".partial")
        partial.write_text(f"{seconds} {whose}")
        partial.replace(file)
        return True

    said_nothing = re.compile(r"(?m)^error:|Traceback")
    yield Plan(make, lambda output, code: code == 0 and not said_nothing.search(output), variables=variables)


@contextmanager
def node_killed(case: Case) -> Iterator[Plan]:
    """The daemon of a node of a real Slurm, alone or with all that ran there, and started again: nothing, or a new start."""
    from slurm_cluster import missing_programs, slurm_cluster

    if missing := missing_programs():
        pytest.skip(f"needs Slurm and munge; missing: {missing}")
    whole = case.generator.random() < 0.5
    log = case.folder / "job.log"
    with (
        tempfile.TemporaryDirectory() as folder,
        slurm_cluster(Path(folder)) as cluster,
    ):  # a socket's path must be short
        node = case.generator.choice(cluster.nodes)
        path = os.pathsep.join([str(Path(sys.executable).parent), cluster.environment["PATH"]])
        variables = environment() | cluster.environment
        variables |= {"PATH": path, "PYTHONPATH": environment()["PYTHONPATH"]}
        script = str(TESTS.parent / "slurm" / "pretrain.sh")
        sbatch = str(shutil.which("sbatch", path=path))

        def make(process: Process) -> bool:
            cluster.kill_node(node, whole=whole)
            time.sleep(DOWN_SECONDS)
            cluster.start_node(node)
            return True

        def said(output: str, code: int) -> bool:
            shown = log.read_text(errors="replace") if log.exists() else ""
            told = r"error: rank \d+ .*died|Connection (closed|reset)|(?i:node failure)|task \d+: (Killed|Exited)"
            return code == 0 or (whole and re.search(told, shown) is not None)

        line = [sbatch, "--wait", "--nodes=2", f"--output={log}", script, *case.toy.arguments(case.run)]
        yield Plan(make, said, line=line, variables=variables)


KINDS: dict[str, Kind] = {
    "rank killed": rank_killed,
    "launcher killed": launcher_killed,
    "node's daemon killed": node_killed,
    "rank stopped": rank_stopped,
    "disk full during a save": disk_full,
    "checkpoint torn after its commit": checkpoint_torn,
    "MLflow down": mlflow_down,
    "shard server down for 30 s": shards_down,
    "clock jumps by a day": clock_jumps,
}

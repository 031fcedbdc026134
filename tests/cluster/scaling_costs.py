"""What the parts of a start, a step and a checkpoint cost on this machine, by number of ranks: what `scaling_model.py` rests on.

Measured are the functions that a run calls: with real processes where ranks meet, and on synthetic content where a large job
is only a large table (a commit of 1,024 ranks needs their sizes and sums, not the ranks). All in seconds and bytes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import socket
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from ours import rank_plan

from sparselt_dist import checkpoint, committing, distributed, hang, health, preflight
from sparselt_dist.committing import Retention, Written
from sparselt_dist.data.manifest import MANIFEST, Manifest, ShardEntry, parse_manifest, write_manifest
from sparselt_dist.data.shard_files import Access, ShardFiles
from sparselt_dist.rank_line import RankLine
from sparselt_dist.snapshot import Snapshot
from sparselt_dist.tensor_files import TensorFiles, cut

RANKS = (8, 64, 256, 1024)
MEETING = (2, 4, 8)
CLIENTS = (1, 2, 4, 8)
SHARDS = (1_000, 10_000, 100_000)
SAMPLES_A_SHARD = 10_000
SMALL_BYTES, LARGE_BYTES = 256, 1 << 18  # of an object that is gathered
SECONDS = 1.0  # of a measurement that repeats

IMPORTS = """
import time
started = time.perf_counter()
from sparselt_dist.extensions import prepare_environment
prepare_environment()
import sparselt_dist.run
imported = time.perf_counter()
import json, sys
from sparselt_dist.config_loading import load_config, make_plan
make_plan(load_config(["base"], [], default_profile="quickstart"), 8)
files = sum(getattr(module, "__file__", None) is not None for module in list(sys.modules.values()))
print(json.dumps([imported - started, time.perf_counter() - imported, files]))
"""


@dataclass(frozen=True)
class Costs:
    """Seconds, unless the name says otherwise; keys of tables are numbers of ranks, clients or shards."""

    import_seconds: float
    import_files: int
    config_seconds: float
    store_requests_s: dict[int, float]  # by clients, of all together
    meet: dict[int, float]  # the process group's start
    small_gather: dict[int, float]
    large_gather: dict[int, float]
    step_sum: dict[int, float]
    open_files: dict[int, int]  # of rank 0, for its ranks
    taken_apart: dict[int, float]  # what was gathered, made objects again on every rank
    facts_bytes: int
    written_bytes: int
    judge: dict[int, float]
    hung: dict[int, float]
    leaks: dict[int, float]
    beat_message: float
    commit: dict[int, float]
    rotate: dict[int, float]
    copy_bytes_s: float  # into a snapshot's buffers
    write_bytes_s: float  # written, flushed and hashed
    hash_bytes_s: float
    read_bytes_s: float
    manifest_bytes: dict[int, int]
    manifest_parse: dict[int, float]
    manifest_memory: dict[int, int]  # bytes
    presence: dict[int, float]
    plan: dict[int, float]
    plan_memory: dict[int, int]  # bytes

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, path: Path) -> Costs:
        """What `save` wrote; JSON makes text of the tables' keys."""
        stored = json.loads(path.read_text())
        tables = {
            name: {int(key): value for key, value in table.items()}
            for name, table in stored.items()
            if isinstance(table, dict)
        }
        return cls(**{**stored, **tables})


def seconds(function: Callable[[], object], repeats: int = 5) -> float:
    """The median over some calls."""
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def allocated(function: Callable[[], object]) -> int:
    """Bytes that Python and NumPy hold for what a function returns."""
    tracemalloc.start()
    kept = function()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del kept
    return held


# --- processes -------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def together(count: int, work: Callable[[int, int, Connection], None]) -> list[Any]:
    """What forked processes send, each told its number and a free port."""
    context, port = multiprocessing.get_context("fork"), free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    started = [context.Process(target=work, args=(number, port, pipes[number][1])) for number in range(count)]
    for process in started:
        process.start()
    try:
        answers = []
        for reader, _ in pipes:
            if not reader.poll(300):
                raise TimeoutError(f"one of {count} processes said nothing for 300 s")
            answers.append(reader.recv())
        return answers
    finally:
        for process in started:
            process.join(30)
            if process.is_alive():
                process.kill()


def ask_store(clients: int) -> float:
    """Requests a second that one store answers: set, get and add of short values in turn."""

    def client(number: int, port: int, answer: Connection) -> None:
        # The first process serves and does not ask, as far as the others are concerned: its thread is the server.
        store = dist.TCPStore("127.0.0.1", port, clients + 1, is_master=number == 0)
        store.set(f"here {number}", "1")
        store.wait([f"here {other}" for other in range(clients + 1)])
        done, started = 0, time.perf_counter()
        while number and time.perf_counter() - started < SECONDS:
            store.set(f"key {number}", "value")
            store.get(f"key {number}")
            store.add("counter", 1)
            done += 3
        answer.send(done / SECONDS)
        store.set(f"gone {number}", "1")
        if number == 0:
            store.wait([f"gone {other}" for other in range(clients + 1)])

    return sum(together(clients + 1, client))


def meet(world_size: int) -> dict[str, float]:
    """Seconds of rank 0 for the start of a group and for what ranks do together; and its open files."""

    def rank(number: int, port: int, answer: Connection) -> None:
        torch.set_num_threads(1)
        before, started = len(os.listdir("/proc/self/fd")), time.perf_counter()
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=world_size)
        distributed.barrier()
        met = time.perf_counter() - started
        ranks = distributed.Ranks(number, world_size, number)
        small, large, numbers = b"x" * SMALL_BYTES, b"x" * LARGE_BYTES, torch.zeros(12, dtype=torch.float64)
        told = {
            "meet": met,
            "small_gather": seconds(lambda: distributed.gather_objects(small, ranks), 200),
            "large_gather": seconds(lambda: distributed.gather_objects(large, ranks), 20),
            "step_sum": seconds(lambda: distributed.reduce_sum(numbers), 500),
            "open_files": len(os.listdir("/proc/self/fd")) - before,
        }
        distributed.barrier()
        answer.send(told)
        distributed.barrier()
        distributed.shut_down()

    return dict(together(world_size, rank)[0])


def imports() -> tuple[float, float, int]:
    """Seconds of an interpreter to import what a rank needs, and to read a configuration; files that it imported."""
    command = [sys.executable, "-c", IMPORTS]
    rows = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(3)]
    return statistics.median(row[0] for row in rows), statistics.median(row[1] for row in rows), rows[0][2]


# --- what rank 0 does for all ----------------------------------------------------------------------------------------


def facts() -> preflight.Facts:
    """Of a sound rank."""
    versions = dict.fromkeys(("python", *preflight.SAME_PACKAGES), "0.0.0")
    device = "GPU-00000000-0000-0000-0000-000000000000"
    return preflight.Facts("host-0000", versions, "c0ffee000000", 99.0, 999.0, 500.0, "", device, 1.0, "", 8.0, 5)


def written(rank: int) -> Written:
    """What a rank tells of its files."""
    names = (f"weights-{rank:05d}.safetensors", f"moments-{rank:05d}.safetensors", f"rank_{rank:05d}.pt")
    return Written({name: {"bytes": 10**8, "sha256": "0" * 64} for name in names}, 1.0)


def taken_apart(ranks: int) -> float:
    """What torch does on every rank with an object of each: find the largest, cut it out, load it. Here on a CPU."""
    content = torch.frombuffer(bytearray(pickle.dumps(facts())), dtype=torch.uint8)
    sizes, joined = torch.full((ranks,), len(content)), content.repeat(ranks)

    def take() -> list[object]:
        each = [sizes[rank].unsqueeze(dim=0) for rank in range(ranks)]
        size = int(max(each).item())
        parts = (joined[size * rank : size * (rank + 1)] for rank in range(ranks))
        return [pickle.loads(part.cpu().numpy().tobytes()) for part in parts]

    return seconds(take)


def judge(ranks: int) -> float:
    """Rank 0's verdict before the start."""
    devices = [facts()._replace(device=f"GPU-{rank:036d}") for rank in range(ranks)]
    return seconds(lambda: preflight.judge(devices, [0.0] * ranks, 500.0, Path("run")))


def hung(ranks: int) -> float:
    """Rank 0's look at where all ranks are, once a beat."""
    reports = {rank: hang.Report(9, "forward", 0.1, 0.5) for rank in range(ranks)}
    return seconds(lambda: hang.hung_ranks(reports, 600.0))


def leaks(ranks: int) -> float:
    """Every rank's look at the memory of all, at most once a minute."""
    gibs = [[random.random() for _ in range(4 * health.LEAK_LOOKS)] for _ in range(ranks)]
    return seconds(lambda: [health.leak(looks) for looks in gibs])


def beat_message() -> float:
    """One message of a rank to the watchdog of rank 0, sent and understood."""
    ours, theirs = (RankLine(end) for end in socket.socketpair())

    def message() -> None:
        ours.send(step=123456, phase="forward", age=0.123456)
        theirs.receive()

    return seconds(message, 2000)


def commit_and_rotate(work: Path, ranks: int) -> tuple[float, float]:
    """Rank 0's seconds to commit the files of so many ranks, which are short, and to delete an old checkpoint."""
    run = work / f"commit-{ranks}"
    for step in (1, 2):
        final = run / "checkpoints" / checkpoint.folder_name(step)
        committing.start_staging(final, 0)
        files = {name: entry for rank in range(ranks) for name, entry in written(rank).files.items()}
        for name in files:
            (committing.staging_of(final) / name).write_bytes(b"x")
        meta = {"format": checkpoint.FORMAT, "step": step, "files": files}
        started = time.perf_counter()
        committing.commit(final, {}, meta)
        taken = time.perf_counter() - started
    started = time.perf_counter()
    committing.rotate(run, Retention(1))
    return taken, time.perf_counter() - started


def storage(work: Path, num_bytes: int) -> tuple[float, float, float, float]:
    """Bytes a second of a rank's share copied to buffers in use; written, flushed and hashed; hashed alone; read back."""
    folder = work / "share"
    folder.mkdir()
    tensors, snapshot = [("weight", torch.rand(num_bytes // 4))], Snapshot()
    snapshot.take({"weights": cut(tensors, 0, 1)})
    copied = seconds(lambda: snapshot.take({"weights": cut(tensors, 0, 1)}), 3)
    done = committing.write_rank_files(folder, snapshot.parts, {}, 0)
    if isinstance(done, str):
        raise OSError(done)
    path = folder / "weights-00000.safetensors"
    hashed = seconds(lambda: checkpoint.sha256(path), 3)
    read = seconds(lambda: TensorFiles(folder, [path.name]).read("weight").clone(), 3)
    return num_bytes / copied, num_bytes / done.seconds, num_bytes / hashed, num_bytes / read


# --- shards ----------------------------------------------------------------------------------------------------------


def manifest(work: Path, shards: int) -> tuple[bytes, Manifest]:
    """A manifest of so many shards, as a file holds it."""
    entries = [
        ShardEntry(f"shard-{number:06d}.tar", SAMPLES_A_SHARD, 10**7, 2 * 10**7, f"{number:064x}", 8)
        for number in range(shards)
    ]
    options: dict[str, Any] = {"kind": "rows", "sequence_length": 1024, "dtype": "uint16", "vocab_size": 50_000}
    made = write_manifest(work, entries, tokenizer_sha256="0" * 64, **options)
    return (work / MANIFEST).read_bytes(), made


def presence(work: Path, made: Manifest) -> float:
    """The look for every local shard, which is there."""
    folder = work / "present"
    folder.mkdir(exist_ok=True)
    entries = [replace(entry, bytes=0) for entry in made.shards]
    for entry in entries:
        (folder / entry.name).touch()

    def never(path: Path, shard: int, room: int) -> Any:
        raise AssertionError("nothing is opened")

    return seconds(ShardFiles(str(folder), entries, Access(), never).check_presence, 3)


def plan(shards: int) -> object:
    """What a loader process holds to know its samples: of the last of 1,024 ranks, in the middle of an epoch."""
    sizes = [SAMPLES_A_SHARD] * shards
    middle = shards // 2 * SAMPLES_A_SHARD
    loader = rank_plan(sizes, rank=1023, world_size=1024, micro_batch_size=16, start_position=middle)
    return loader, loader.planned(0)


# --- all of it -------------------------------------------------------------------------------------------------------


def measure(work: Path, num_bytes: int, say: Callable[[str], None]) -> Costs:
    """Everything, in an empty folder; `num_bytes` are written once. Processes are forked before torch has any thread."""
    say("ranks that meet")
    met = {ranks: meet(ranks) for ranks in MEETING}
    say("the store")
    store = {clients: ask_store(clients) for clients in CLIENTS}
    say("imports")
    import_seconds, config_seconds, import_files = imports()
    say("checkpoints")
    saved = {ranks: commit_and_rotate(work, ranks) for ranks in RANKS}
    copied, flushed, hashed, read = storage(work, num_bytes)
    say("shards")
    manifests = {shards: manifest(work, shards) for shards in SHARDS}
    return Costs(
        import_seconds=import_seconds,
        import_files=import_files,
        config_seconds=config_seconds,
        store_requests_s=store,
        meet=_column(met, "meet"),
        small_gather=_column(met, "small_gather"),
        large_gather=_column(met, "large_gather"),
        step_sum=_column(met, "step_sum"),
        open_files={ranks: int(told["open_files"]) for ranks, told in met.items()},
        facts_bytes=len(pickle.dumps(facts())),
        written_bytes=len(pickle.dumps(written(0))),
        taken_apart=_by(RANKS, taken_apart),
        judge=_by(RANKS, judge),
        hung=_by(RANKS, hung),
        leaks=_by(RANKS, leaks),
        beat_message=beat_message(),
        commit={ranks: pair[0] for ranks, pair in saved.items()},
        rotate={ranks: pair[1] for ranks, pair in saved.items()},
        copy_bytes_s=copied,
        write_bytes_s=flushed,
        hash_bytes_s=hashed,
        read_bytes_s=read,
        manifest_bytes={shards: len(content) for shards, (content, _) in manifests.items()},
        manifest_parse=_by(SHARDS, lambda shards: seconds(lambda: parse_manifest(manifests[shards][0], "m"), 3)),
        manifest_memory={
            shards: allocated(lambda c=content: parse_manifest(c, "m")) for shards, (content, _) in manifests.items()
        },
        presence={shards: presence(work, manifests[shards][1]) for shards in SHARDS[:2]},
        plan=_by(SHARDS, lambda shards: seconds(lambda: plan(shards))),
        plan_memory=_by(SHARDS, lambda shards: allocated(lambda: plan(shards))),
    )


def _column(met: dict[int, dict[str, float]], name: str) -> dict[int, float]:
    return {ranks: told[name] for ranks, told in met.items()}


def _by(numbers: Sequence[int], function: Callable[[int], Any]) -> dict[int, Any]:
    return {number: function(number) for number in numbers}

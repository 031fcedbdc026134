"""What is checked of all ranks together before the budget's clock starts: faults end the start, slowness is said.

Every rank looks at itself for some milliseconds (versions, configuration, device, memory, the run's folder, local shards); all
see all facts and judge them alike. A fault is one error that names its ranks. What of it concerns one machine alone, and more, is
in `doctor`, whose findings these are.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import os
import platform
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch

from sparselt_dist import distributed
from sparselt_dist.config import Config
from sparselt_dist.data.storage import is_remote, join
from sparselt_dist.diagnosis import GIB, Finding
from sparselt_dist.errors import ConfigError
from sparselt_dist.extensions import slurm_cores_per_rank

if TYPE_CHECKING:
    from sparselt_dist.data.corpora import Corpora

SAME_PACKAGES = ("sparselt_dist", "torch", "deepspeed", "transformers")
WRITTEN_BYTES = 4 * 2**20
REDUCED_FLOATS = 2**18
LOW_MEMORY_GIB, LOW_DISK_GIB = 1.0, 1.0
LOW_DEVICE_SHARE = 0.5  # of a device's memory that is free: else somebody else uses it
SLOW_WRITE_MIB, SLOW_REDUCE_MIB = 10.0, 20.0  # a second
SKEW_SECONDS = 2.0
MOST_SHARDS = 2_000  # looked for on every host


class Facts(NamedTuple):
    """What a rank found of itself."""

    host: str
    versions: dict[str, str]
    config: str  # digest
    memory_gib: float  # free
    disk_gib: float  # free
    write_mib: float  # a second, to the run's folder
    write_fault: str  # why it cannot be written
    device: str  # its identity; empty on a CPU
    device_free: float  # share of its memory
    missing: str  # a shard that is not there
    cores: float  # for this rank, of Slurm's; infinite elsewhere
    processes: int  # this rank and its loader's workers


def own_facts(config: Config, run_dir: Path, corpora: Sequence[Corpora], device: torch.device, num_bytes: int) -> Facts:
    """Of this rank, which writes so many bytes."""
    speed, fault = _write_speed(run_dir, num_bytes)
    identity, free = "", 1.0
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        identity = str(getattr(properties, "uuid", device))
        free_bytes, all_bytes = torch.cuda.mem_get_info(device)
        free = free_bytes / all_bytes
    return Facts(
        host=socket.gethostname(),
        versions={"python": platform.python_version(), **{name: _version(name) for name in SAME_PACKAGES}},
        config=hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:12],
        memory_gib=psutil.virtual_memory().available / GIB,
        disk_gib=shutil.disk_usage(run_dir).free / GIB if not fault else 0.0,
        write_mib=speed,
        write_fault=fault,
        device=identity,
        device_free=free,
        missing=_missing_shard(corpora) if config.data.on_bad_shard != "skip" else "",
        cores=slurm_cores_per_rank(os.environ),
        processes=1 + config.data.num_workers,
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _write_speed(run_dir: Path, num_bytes: int) -> tuple[float, str]:
    """MiB a second to disk, infinite where nothing is written, and why the folder takes no file."""
    path = run_dir / f".preflight-{socket.gethostname()}-{os.getpid()}"
    started = time.perf_counter()
    try:
        with path.open("wb") as file:
            if num_bytes:
                file.write(os.urandom(num_bytes))
                file.flush()
                os.fsync(file.fileno())
        seconds = time.perf_counter() - started
        path.unlink()
    except OSError as error:
        path.unlink(missing_ok=True)
        return 0.0, error.strerror or str(error)
    return (num_bytes / 2**20 / max(seconds, 1e-6) if num_bytes else math.inf), ""


def _missing_shard(corpora: Sequence[Corpora]) -> str:
    """A local shard that this host does not see, of some at even distances; the ranks together have just looked for all. Of
    remote ones each rank has just fetched the manifest."""
    files = [
        join(folder.location, entry.name)
        for opened in corpora
        for folder in opened.folders
        if not is_remote(folder.location)
        for entry in folder.shards
    ]
    some = files[:: -(-len(files) // MOST_SHARDS)] if files else []
    return next((file for file in some if not os.path.exists(file)), "")


# ---- of all together -----------------------------------------------------------------------------------------------


def judge(facts: Sequence[Facts], skews: Sequence[float], reduce_mib: float | None, run_dir: Path) -> list[Finding]:
    """Errors and warnings, each naming its ranks; `skews`: clocks against rank 0's, seconds."""
    return [
        *_unequal(facts),
        *_shared_devices(facts),
        *_faults_of_one(facts, run_dir),
        *_slow(facts, skews, reduce_mib, run_dir),
    ]


def _named(ranks: Sequence[int], facts: Sequence[Facts]) -> str:
    shown = ", ".join(f"{rank} ({facts[rank].host})" for rank in ranks[:4])
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{f' and {len(ranks) - 4} more' if len(ranks) > 4 else ''}"


def _unequal(facts: Sequence[Facts]) -> list[Finding]:
    columns: dict[str, list[str]] = {name: [fact.versions[name] for fact in facts] for name in facts[0].versions}
    columns["configuration"] = [fact.config for fact in facts]
    findings = []
    for name, values in columns.items():
        usual = Counter(values).most_common(1)[0][0]
        others = [rank for rank, value in enumerate(values) if value != usual]
        if others:
            odd = values[others[0]]
            found = f"{name} is {odd} on {_named(others, facts)}, {usual} elsewhere"
            fix = "give all ranks one command" if name == "configuration" else "install one environment on all hosts"
            findings.append(Finding("error", name, found, fix))
    return findings


def _shared_devices(facts: Sequence[Facts]) -> list[Finding]:
    users: dict[tuple[str, str], list[int]] = {}
    for rank, fact in enumerate(facts):
        if fact.device:
            users.setdefault((fact.host, fact.device), []).append(rank)
    fix = "start one rank a device, as `--num_gpus` or one task a GPU do"
    return [
        Finding("error", "devices", f"{_named(ranks, facts)} share device {device}", fix)
        for (_, device), ranks in users.items()
        if len(ranks) > 1
    ]


def _faults_of_one(facts: Sequence[Facts], run_dir: Path) -> list[Finding]:
    findings = []
    if unwritable := [rank for rank, fact in enumerate(facts) if fact.write_fault]:
        found = f"{run_dir} cannot be written on {_named(unwritable, facts)}: {facts[unwritable[0]].write_fault}"
        fix = "free space, or set run.output_dir to a folder that all hosts share and may write"
        findings.append(Finding("error", "run.output_dir", found, fix))
    if blind := [rank for rank, fact in enumerate(facts) if fact.missing]:
        found = f"{facts[blind[0]].missing} is not there on {_named(blind, facts)}"
        findings.append(Finding("error", "data", found, "restore it, or put the shards where all hosts see them"))
    return findings


def _slow(facts: Sequence[Facts], skews: Sequence[float], reduce_mib: float | None, run_dir: Path) -> list[Finding]:
    def warn(ranks: list[int], subject: str, found: str, fix: str) -> list[Finding]:
        return [Finding("warning", subject, f"{found} on {_named(ranks, facts)}", fix)] if ranks else []

    def where(is_low: Callable[[Facts], bool]) -> list[int]:
        return [rank for rank, fact in enumerate(facts) if is_low(fact)]

    least = min(facts, key=lambda fact: fact.write_mib)
    crowded = min(facts, key=lambda fact: fact.cores)
    ahead = [rank for rank, skew in enumerate(skews) if abs(skew) > SKEW_SECONDS]
    worst = max(skews, key=abs, default=0.0)
    findings = [
        *warn(where(lambda f: f.memory_gib < LOW_MEMORY_GIB), "memory", f"less than {LOW_MEMORY_GIB:g} GiB free",
              "end other programs, or lower train.micro_batch_size"),
        *warn(where(lambda f: not f.write_fault and f.disk_gib < LOW_DISK_GIB), "run.output_dir",
              f"less than {LOW_DISK_GIB:g} GiB free in {run_dir}", "free space, or lower checkpoint.keep"),
        *warn(where(lambda f: f.cores < f.processes), "cores",
              f"Slurm gives {crowded.cores:.3g} a rank, which is {crowded.processes} process(es) with its loader's workers,",
              f"ask for --cpus-per-gpu={crowded.processes} (without GPUs --cpus-per-task) or --exclusive"),
        *warn(where(lambda f: f.device_free < LOW_DEVICE_SHARE), "devices", "more than half of the memory is taken",
              "end the other program on that device"),
        *warn(where(lambda f: not f.write_fault and f.write_mib < SLOW_WRITE_MIB), "run.output_dir",
              f"{run_dir} takes {least.write_mib:.1f} MiB/s", "checkpoints will take long; choose a faster disk"),
        *warn(ahead, "clock", f"{worst:+.1f} s against rank 0", "synchronise the hosts' clocks (NTP)"),
    ]  # fmt: skip
    if reduce_mib is not None and reduce_mib < SLOW_REDUCE_MIB:
        found = f"a sum over ranks moves {reduce_mib:.1f} MiB/s"
        findings.append(Finding("warning", "network", found, "see which interface is used (NCCL_/GLOO_SOCKET_IFNAME)"))
    return findings


def _clock_skews(ranks: distributed.Ranks) -> list[float]:
    """Seconds each rank's clock is ahead of rank 0's, as far as a meeting can tell: the least of three."""
    rounds = []
    for _ in range(3):
        distributed.barrier()
        now = time.time()
        times = distributed.gather_objects(now, ranks)
        rounds.append([other - times[0] for other in times])
    return [min(column, key=abs) for column in zip(*rounds, strict=True)]


def _reduce_speed(ranks: distributed.Ranks, device: torch.device) -> float | None:
    """MiB a second through a sum over all ranks; None for one alone."""
    if ranks.world_size == 1:
        return None
    values = torch.zeros(REDUCED_FLOATS, device=device)
    distributed.reduce_sum(values)
    float(values[0])
    started = time.perf_counter()
    distributed.reduce_sum(values)
    float(values[0])
    return 4 * REDUCED_FLOATS / 2**20 / max(time.perf_counter() - started, 1e-6)


def check(
    config: Config,
    run_dir: Path,
    corpora: Sequence[Corpora],
    ranks: distributed.Ranks,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Check and say what is slow; all ranks call it together.

    Raises:
        ConfigError: on all ranks alike, said by rank 0: a fault.
    """
    started = time.perf_counter()
    num_bytes = WRITTEN_BYTES if ranks.local_rank == 0 else 0  # one a host: the others would only share its speed
    looked_at = corpora if ranks.local_rank == 0 else ()  # the others of a host see the same
    facts = distributed.gather_objects(own_facts(config, run_dir, looked_at, device, num_bytes), ranks)
    skews, reduce_mib = _clock_skews(ranks), _reduce_speed(ranks, device)
    findings = distributed.on_main(ranks, lambda: judge(facts, skews, reduce_mib, run_dir))
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        fault = ConfigError("before the start: " + "\n".join(f"{found.found}; {found.fix}" for found in errors))
        fault.silent = not ranks.is_main
        raise fault
    for finding in findings:
        say(f"warning: {finding.subject}: {finding.found}; {finding.fix}")
    hosts = len({fact.host for fact in facts})
    network = "" if reduce_mib is None else f", sums over ranks {reduce_mib:.0f} MiB/s"
    written = min(fact.write_mib for fact in facts)
    seconds = time.perf_counter() - started
    say(
        f"pre-flight: {ranks.world_size} rank(s) on {hosts} host(s), run folder {written:.0f} MiB/s{network}; "
        f"checked in {seconds:.2f} s"
    )


def check_room(run_dir: Path, model: torch.nn.Module, keep: int, say: Callable[[str], None]) -> None:
    """Before the first step of a run, on rank 0: whether the disk takes its checkpoints, each of weights and moments in fp32.

    Raises:
        ConfigError: not one, even with a single moment.
    """
    weights = sum(parameter.nbytes for parameter in model.parameters())
    moment = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    whole, free = weights + 2 * moment, shutil.disk_usage(run_dir).free
    told = f"run.output_dir: {free / 1e9:.2f} GB are free at {run_dir}, and a checkpoint takes {whole / 1e9:.2f} GB"
    if free < weights + moment:
        raise ConfigError(f"{told}; make room or choose another folder")
    if free < (keep + 1) * whole:
        say(f"warning: {told}, of which {keep + 1} will lie there (checkpoint.keep={keep} and the one under way)")

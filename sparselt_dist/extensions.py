"""The environment a rank needs before torch and DeepSpeed are imported; imports neither.

DeepSpeed compiles C++ operators on first use into a folder guarded by a lock file. A run killed meanwhile leaves the
lock, on which every later run waits for ever, silently. So the folder is private to the user, the host and the torch
build (operators are compiled for the CPU at hand), and a lock that no process holds open is removed.
"""

from __future__ import annotations

import fcntl
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import MutableMapping
from importlib import metadata
from pathlib import Path

Environment = MutableMapping[str, str]

# Nodes that a usable accelerator's driver creates: NVIDIA, NVIDIA under WSL, AMD, Intel Gaudi, Ascend, generic.
DEVICE_NODES = ("nvidia[0-9]*", "dxg", "kfd", "hl[0-9]*", "davinci[0-9]*", "accel/*")

# A folder the user chose may be shared by hosts whose processes we cannot see; no build takes this long.
FOREIGN_LOCK_SECONDS = 3600.0


def prepare_environment(environment: Environment | None = None) -> None:
    """Choose accelerator, extension folder and threads of this rank, each only where the user has not.

    Call it before numpy, torch or deepspeed is imported: thread counts are read when their libraries load.
    """
    env = os.environ if environment is None else environment
    prepare_launch(env)
    if env.get("DS_ACCELERATOR") == "cpu":
        env.setdefault("OMP_NUM_THREADS", str(threads_per_rank(env)))


def prepare_launch(env: Environment) -> None:
    """The part that holds for all ranks of a node: accelerator, extension folder, ninja."""
    if not accelerator_visible(env):
        env.setdefault("DS_ACCELERATOR", "cpu")
    chosen = env.get("TORCH_EXTENSIONS_DIR")
    folder = Path(chosen) if chosen else private_folder(env)
    if folder is not None:
        env["TORCH_EXTENSIONS_DIR"] = str(folder)
        remove_stale_locks(folder, minimum_age_seconds=FOREIGN_LOCK_SECONDS if chosen else 0.0)
    if shutil.which("ninja", path=env.get("PATH")) is None:  # an environment's python started by its path
        env["PATH"] = os.pathsep.join([env.get("PATH", os.defpath), os.path.dirname(sys.executable)])


def accelerator_visible(env: Environment, device_root: Path = Path("/dev")) -> bool:
    """Whether an accelerator may be usable; False only where it is certain that none is."""
    build = torch_build()
    if sys.platform != "linux" or build.endswith("+xpu"):
        return True
    if build.endswith("+cpu") or env.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return any(True for pattern in DEVICE_NODES for _ in device_root.glob(pattern))


def torch_build() -> str:
    """Version of the installed torch with its local part ("2.13.0+cpu"), without importing it."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "none"


def private_folder(env: Environment) -> Path | None:
    """Folder for compiled operators, made if need be; None where none can be written safely."""
    tag = f"torch{torch_build()}-py{sys.version_info.major}{sys.version_info.minor}-{platform.node()}"
    home_cache = env.get("XDG_CACHE_HOME") or os.path.join(env.get("HOME", os.path.expanduser("~")), ".cache")
    fallback = Path(tempfile.gettempdir(), f"sparselt_dist-{os.getuid()}")
    for root in (Path(home_cache, "sparselt_dist"), fallback):
        folder = root / "torch_extensions" / tag
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        # Code is loaded from here: a folder that somebody else made under a guessable name is not ours to trust.
        if root.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
            return folder
    return None


def remove_stale_locks(folder: Path, minimum_age_seconds: float = 0.0) -> list[Path]:
    """Remove build locks that no process holds open; returns them.

    torch creates the lock file and keeps it open while it builds, so an unopened one is left by a killed build.
    Removal is itself under a lock: a lock seen stale cannot become a live one before it is removed.
    """
    if not any(folder.glob("*/lock")) or not os.access(folder, os.W_OK):
        return []
    with open(folder / ".stale_lock_guard", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        locks = [path for path in folder.glob("*/lock") if _age_seconds(path) >= minimum_age_seconds]
        held = _open_files() if locks else set()
        stale = [path for path in locks if os.path.realpath(path) not in held]
        for path in stale:
            path.unlink(missing_ok=True)
    return stale


def _age_seconds(path: Path) -> float:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except FileNotFoundError:  # released by its builder meanwhile
        return -1.0


def _open_files() -> set[str]:
    """Real paths of the files that any process visible to this user holds open."""
    import psutil

    found: set[str] = set()
    for process in psutil.process_iter():
        try:
            found.update(os.path.realpath(file.path) for file in process.open_files())
        except psutil.Error:
            continue
    return found


def threads_per_rank(env: Environment) -> int:
    """Cores for each rank of this host, at least one."""
    per_task = env.get("SLURM_CPUS_PER_TASK", "")
    if "SLURM_PROCID" in env and per_task.isdigit():
        return max(1, int(per_task))
    return max(1, usable_cores() // ranks_on_host(env))


def slurm_cores_per_rank(env: Environment) -> float:
    """Cores that Slurm has given the job on this host, for each of its ranks; infinite outside Slurm.

    Slurm gives one core a node where no more are asked for, and a rank may be bound to it.
    """
    cores = env.get("SLURM_CPUS_ON_NODE", "")
    return int(cores) / ranks_on_host(env) if cores.isdigit() else math.inf


def ranks_on_host(env: Environment) -> int:
    """Ranks that share this host, as DeepSpeed's launcher, torchrun or Slurm tell it; else 1."""
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        if env.get(name, "").isdigit():
            return max(1, int(env[name]))
    return _slurm_tasks_on_host(env.get("SLURM_STEP_TASKS_PER_NODE", ""), env.get("SLURM_NODEID", "0"))


def _slurm_tasks_on_host(tasks: str, node: str) -> int:
    """Entry `node` of a list like "2(x3),1": three hosts with two tasks, one with one."""
    counts: list[int] = []
    for part in tasks.split(","):
        count, _, repeat = part.partition("(x")
        if count.isdigit():
            counts += [int(count)] * int(repeat.rstrip(")") or 1)
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else 1


def usable_cores(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores this process may use: its affinity mask, cut by a container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return cores

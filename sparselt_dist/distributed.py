"""Ranks: who am I, how the group starts, and the few collectives a run needs.

A rank learns its place from the environment that DeepSpeed's launcher, torchrun or `srun` sets, or is alone.
A stop signal only sets a flag; the training loop asks all ranks once a step and acts together.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import resource
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from queue import Empty, SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from sparselt_dist.errors import ConfigError, RunFailureError, SparseltError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# Of rank 0: its store and its watchdog hold a connection to each rank, gloo one for each group.
FILES_A_RANK, OTHER_FILES = 8, 1024

# Long enough for rank 0 to prepare a corpus or another rank to compile; a dead rank is noticed at once by its socket.
GROUP_TIMEOUT = timedelta(hours=2)
# Between the first rank and the last: one that died on its way is missed so late only where no launcher ends the others.
MEETING_TIMEOUT = timedelta(minutes=10)
_TORCHS_LIMIT = MEETING_TIMEOUT + timedelta(minutes=1)  # comes after ours, so that ours is the message


@dataclass(frozen=True)
class Ranks:
    """This process's place among all."""

    rank: int
    world_size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"environment: {name} is {text!r}, expected a whole number; unset it or start by a launcher"
        ) from None


def ranks_from_environment(environment: dict[str, str] | None = None) -> Ranks:
    """Rank, world size and local rank from a launcher's, torchrun's or Slurm's variables; alone: 0 of 1.

    Raises:
        ConfigError: the variables are incomplete or contradict each other.
    """
    env = dict(os.environ) if environment is None else environment
    if "RANK" in env or "WORLD_SIZE" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and env.get("SLURM_STEP_NUM_TASKS", "1") != "0":
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    else:
        return Ranks(0, 1, 0)
    missing = [name for name in names[:2] if name not in env]
    if missing:
        raise ConfigError(
            f"environment: {missing[0]} is not set beside {names[0]}/{names[1]}; start by deepspeed, torchrun or srun"
        )
    rank, world_size = _integer(names[0], env[names[0]]), _integer(names[1], env[names[1]])
    if not 0 <= rank < world_size:
        raise ConfigError(f"environment: rank {rank} of {world_size} ranks, expected 0 to {world_size - 1}")
    return Ranks(rank, world_size, _integer(names[2], env.get(names[2], "0")))


def first_host(nodes: str) -> str:
    """The first host of a Slurm list such as `gpu[03-05,9],login`."""
    first = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in first.groups()) if first else nodes


def _rendezvous_defaults(ranks: Ranks) -> None:
    """Address and port where a launcher gave none (alone, or plain srun on one node)."""
    in_slurm = "SLURM_JOB_ID" in os.environ and ranks.world_size > 1  # alone in a job, as others may be in the same one
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    os.environ.setdefault(
        "MASTER_ADDR", first_host(nodes) if in_slurm and "SLURM_PROCID" in os.environ else "127.0.0.1"
    )
    if "MASTER_PORT" not in os.environ:
        if in_slurm:
            step = int(os.environ.get("SLURM_STEP_ID", "0"))
            port = 20000 + (int(os.environ["SLURM_JOB_ID"]) * 7 + step) % 30000
        else:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
        os.environ["MASTER_PORT"] = str(port)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def interface_towards(host: str, port: int) -> str | None:
    """Name of the network interface by which this machine reaches a host; None if that is the loopback or unknown."""
    import psutil

    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # of a datagram socket: sends nothing, asks the routing table
            own = probe.getsockname()[0]
    except OSError:
        return None
    if _is_loopback(own):
        return None
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, given in interfaces if own in (address.address for address in given)), None)


def _choose_interface() -> None:
    """Where this machine's name means its loopback (Debian's 127.0.1.1), gloo would listen where no other host can call."""
    try:
        own = {entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None)}
    except OSError:
        own = set()
    if "GLOO_SOCKET_IFNAME" in os.environ or not all(_is_loopback(str(address)) for address in own):
        return
    name = interface_towards(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def allow_open_files(world_size: int) -> None:
    """Raise the limit of open files, usually 1024, to what rank 0 needs of them, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OTHER_FILES + FILES_A_RANK * world_size
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _meet(ranks: Ranks, backend: str, device: torch.device | None = None, timeout: timedelta = MEETING_TIMEOUT) -> None:
    """Start torch's process group, its collectives on `device` if it is no CPU, once all ranks have come to rank 0's store.

    Raises:
        RunFailureError: not all came in time, or rank 0's address cannot be used.
    """
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    found: SimpleQueue[Any] = SimpleQueue()

    def find_store() -> None:
        try:
            found.put(next(rendezvous("env://", ranks.rank, ranks.world_size, timeout=_TORCHS_LIMIT))[0])
        except Exception as error:
            found.put(error)

    # Against a rank 0 that has stopped, torch tries twice and longer than it is told: the limit is kept here.
    threading.Thread(target=find_store, daemon=True).start()
    try:
        store = found.get(timeout=timeout.total_seconds())
        if isinstance(store, Exception):
            raise store
        dist.init_process_group(
            backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=GROUP_TIMEOUT, device_id=device
        )
    except (Empty, dist.DistError) as error:
        # Behind the first line stand C++ frames.
        reason = str(error).splitlines()[0] if str(error) else "some did not come"
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RunFailureError(
            f"rank {ranks.rank}: the {ranks.world_size} ranks did not meet at {place} within "
            f"{timeout.total_seconds():g} s ({reason}); look for the first rank that failed, see that "
            "all hosts reach that address, or, where it is in use, start again on another port"
        ) from None


def initialise(ranks: Ranks) -> torch.device:
    """Start the process group, for DeepSpeed too (NCCL on GPUs, gloo on CPU); return this rank's device.

    Raises:
        RunFailureError: not all ranks came.
    """
    allow_open_files(ranks.world_size)
    os.environ.update(RANK=str(ranks.rank), WORLD_SIZE=str(ranks.world_size), LOCAL_RANK=str(ranks.local_rank))
    _rendezvous_defaults(ranks)
    _choose_interface()
    # DeepSpeed calls collectives by names that torch has renamed; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    # Slurm may show each rank only its own device.
    device_number = 0 if on_cpu else ranks.local_rank % accelerator.device_count()
    if not on_cpu:
        accelerator.set_device(device_number)
        os.environ["LOCAL_RANK"] = str(device_number)  # as which DeepSpeed takes it
    # Of DeepSpeed's compiled CPU collectives only inference makes use; building them takes minutes at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "gloo" if on_cpu else accelerator.communication_backend_name()
    device = torch.device("cpu") if on_cpu else torch.device(accelerator.device_name(device_number))
    _meet(ranks, backend, None if on_cpu else device)
    deepspeed.init_distributed(dist_backend=backend, timeout=GROUP_TIMEOUT, verbose=False, auto_mpi_discovery=False)
    return device


def shut_down() -> None:
    """Leave the process group together. Threads of groups that DeepSpeed holds live on: see `cli.leave`."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    import torch.distributed as dist

    dist.barrier()


def reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place."""
    import torch.distributed as dist

    dist.all_reduce(values)
    return values


def reduce_min(values: torch.Tensor) -> torch.Tensor:
    """Minimum over ranks, in place."""
    import torch.distributed as dist

    dist.all_reduce(values, op=dist.ReduceOp.MIN)
    return values


def broadcast(values: torch.Tensor) -> torch.Tensor:
    """Rank 0's values on all ranks, in place."""
    import torch.distributed as dist

    dist.broadcast(values, src=0)
    return values


def gather_objects(value: T, ranks: Ranks) -> list[T]:
    """Every rank's value, in rank order, on all ranks."""
    import torch.distributed as dist

    gathered: list[T | None] = [None] * ranks.world_size
    dist.all_gather_object(gathered, value)
    return gathered  # type: ignore[return-value]


def agreed(ranks: Ranks, function: Callable[[], T]) -> T:
    """Run on every rank; an error the user can mend on any is raised on all, so that none waits for the others.

    Only the first rank that met it says it (`SparseltError.silent` elsewhere).
    """
    value: T | None = None
    error: SparseltError | None = None
    try:
        value = function()
    except SparseltError as met:
        error = met
    errors = gather_objects(error, ranks)
    first = next((rank for rank, met in enumerate(errors) if met is not None), None)
    if first is not None:
        raised = errors[first]
        assert raised is not None
        raised.silent = first != ranks.rank
        raise raised
    return value  # type: ignore[return-value]


def on_main(ranks: Ranks, function: Callable[[], T]) -> T:
    """Run on rank 0 and give the result to all; an error the user can mend is raised on all ranks, said by rank 0."""
    import torch.distributed as dist

    value = agreed(ranks, lambda: function() if ranks.is_main else None)
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


class StopFlag:
    """Remembers that a stop was asked for; acts by itself only where it is told to."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._interrupts = False

    def install(self) -> None:
        """From now on SIGTERM, SIGINT and SIGUSR1 only set the flag."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        if self._interrupts:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Around what may be broken off anywhere: a stop raises KeyboardInterrupt in it, also one asked for before."""
        self._interrupts = True
        try:
            if self.is_set:
                raise KeyboardInterrupt
            yield
        finally:
            self._interrupts = False

    @property
    def is_set(self) -> bool:
        return self.signal_name is not None

"""A real Slurm cluster on this machine for tests: munged, slurmctld and several slurmd, all below one folder.

Nothing outside the folder is written, every port is a free one, and leaving the context ends every daemon and job.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin", "/usr/local/sbin"])
FINAL_STATES = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}

SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}({address})
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it starts again.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,batch_sched_delay=0
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=15
InactiveLimit=0
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
# Its jobs take the nodes from those of the other.
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """Programs of Slurm and munge that this machine lacks."""
    return [name for name in DAEMONS if shutil.which(name, path=_PATH) is None]


@dataclass
class SlurmCluster:
    """A running cluster; its commands are run with `run`."""

    folder: Path
    nodes: tuple[str, ...]
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """What a shell of this cluster's users has set."""
        foreign = ("SLURM_", "SBATCH_", "SRUN_")
        own = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        return own | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _PATH}

    def run(self, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
        """Standard output of a command of Slurm."""
        result = subprocess.run(
            command, cwd=cwd, env=self.environment | dict(env or {}), capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 0, f"{' '.join(command)}: {result.stderr}{self.logs()}"
        return result.stdout.strip()

    def submit(self, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> str:
        """Number of the job that `sbatch ARGUMENTS` makes."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd, env=env).partition(";")[0]

    def job(self, number: str) -> dict[str, str]:
        """Fields that `scontrol show job` tells."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, seconds: float) -> dict[str, str]:
        """The job's fields once it has ended for good."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in FINAL_STATES:
            assert time.monotonic() < deadline, f"job {number} still {job['JobState']} after {seconds} s{self.logs()}"
            time.sleep(0.5)
        return job

    def kill_node(self, node: str, *, whole: bool) -> None:
        """Kill -9 a node's daemon; `whole`: with all that runs on the node, as when its power fails, and tell Slurm."""
        (daemon,) = (daemon for daemon in self.daemons if daemon.args == _slurmd(node))
        daemon.kill()
        daemon.wait()
        self.daemons.remove(daemon)
        if not whole:
            return
        for process in _of_node(self, node):
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def start_node(self, node: str) -> None:
        """Start its daemon again, by which a node that was down is back."""
        _start(self, *_slurmd(node))

    def logs(self, lines: int = 15) -> str:
        """The last lines of each daemon's log."""
        parts = []
        for path in sorted(self.folder.glob("*.log")):
            tail = path.read_text(errors="replace").splitlines()[-lines:]
            parts.append(f"\n--- {path.name}\n" + "\n".join(tail))
        return "".join(parts)


@contextlib.contextmanager
def slurm_cluster(folder: Path, nodes: int = 2, cpus: int = 2) -> Iterator[SlurmCluster]:
    """Start a cluster whose state lies in `folder`, wait until its nodes are idle, and end it at the end."""
    cluster = SlurmCluster(folder, tuple(f"node{number}" for number in range(nodes)))
    _write_configuration(cluster, cpus)
    try:
        _start_munge(cluster)
        _start(cluster, "slurmctld", "-D", "-i")
        for node in cluster.nodes:
            _start(cluster, *_slurmd(node))
        _wait_until_idle(cluster)
        yield cluster
    finally:
        _end(cluster)


def _slurmd(node: str) -> list[str]:
    return [str(shutil.which("slurmd", path=_PATH)), "-D", "-N", node]


def _write_configuration(cluster: SlurmCluster, cpus: int) -> None:
    folder = cluster.folder
    folder.chmod(0o755)  # munged refuses a socket below a folder that others may write
    ports = _free_ports(1 + len(cluster.nodes))
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} Gres=gpu:2 State=UNKNOWN"
        for name, port in zip(cluster.nodes, ports[1:], strict=True)
    )
    (folder / "state").mkdir()
    for name in cluster.nodes:
        (folder / f"spool_{name}").mkdir()
    text = SLURM_CONF.format(
        folder=folder, ports=ports, nodes=nodes, host=socket.gethostname(), address="127.0.0.1", user=getpass.getuser()
    )
    (folder / "slurm.conf").write_text(text)
    # GPUs that are only counted and handed out: any file will do as their device.
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
    for number in range(2):
        (folder / f"gpu{number}").touch()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _start_munge(cluster: SlurmCluster) -> None:
    folder = cluster.folder
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    files = [f"--{name}={folder / file}" for name, file in (
        ("key-file", key.name), ("socket", "munge.socket"), ("pid-file", "munge.pid"), ("seed-file", "munge.seed"),
        ("log-file", "munged.log"),
    )]  # fmt: skip
    _start(cluster, "munged", "--foreground", "--force", *files)
    _wait_for(cluster, lambda: (folder / "munge.socket").exists(), "munged listens")


def _start(cluster: SlurmCluster, program: str, *arguments: str) -> None:
    with (cluster.folder / f"{Path(program).name}.output.log").open("ab") as output:
        cluster.daemons.append(
            subprocess.Popen(
                [str(shutil.which(program, path=_PATH)), *arguments],
                env=cluster.environment,
                cwd=cluster.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        )


def _wait_until_idle(cluster: SlurmCluster) -> None:
    def idle() -> bool:
        states = subprocess.run(
            ["sinfo", "--noheader", "--partition=test", "--Node", "--format=%T"],
            env=cluster.environment,
            capture_output=True,
            text=True,
        )
        return states.stdout.split() == ["idle"] * len(cluster.nodes)

    _wait_for(cluster, idle, "the nodes are idle")


def _wait_for(cluster: SlurmCluster, condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        dead = [daemon.args for daemon in cluster.daemons if daemon.poll() is not None]
        assert not dead, f"ended: {dead}{cluster.logs()}"
        assert time.monotonic() < deadline, f"waited {seconds} s in vain until {what}{cluster.logs()}"
        time.sleep(0.2)


def _end(cluster: SlurmCluster) -> None:
    """End the daemons, and the step managers and tasks that slurmd leaves on purpose."""
    left = _of_cluster(cluster)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(left, timeout=5)
    for process in {*alive, *_of_cluster(cluster)}:
        with contextlib.suppress(psutil.Error):
            process.kill()
    for daemon in cluster.daemons:
        daemon.wait(timeout=30)


def _of_cluster(cluster: SlurmCluster) -> Sequence[psutil.Process]:
    """Every process that was started with this cluster's configuration."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("SLURM_CONF") == str(cluster.folder / "slurm.conf"):
                found.append(process)
    return found


def _of_node(cluster: SlurmCluster, node: str) -> list[psutil.Process]:
    """The processes of this cluster's jobs on a node, and the step managers that they stand under."""
    found = []
    for process in _of_cluster(cluster):
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("SLURMD_NODENAME") == node:
                managers = [parent for parent in process.parents() if parent.name().startswith("slurmstepd")]
                found += [*managers, process]
    return found

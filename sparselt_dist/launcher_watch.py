"""Whether the process that started a rank is still there. Free of torch."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from sparselt_dist.follower import process_birth

LAUNCHER_VARIABLE = "SPARSELT_LAUNCHER"  # machine:pid:birth of the `deepspeed` command
_SHELLS = frozenset({"sh", "bash", "dash", "zsh", "fish", "ksh", "tcsh", "tmux: server", "screen", "systemd"})


def launcher_mark() -> str:
    """For the environment of ranks: which process is their launcher, where."""
    return f"{_machine()}:{os.getpid()}:{process_birth(os.getpid())}"


def _machine() -> str:
    """Where numbers of processes mean what they do here. Hosts may share a name, and a container has that of its host."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


class Launcher:
    """The processes whose end is meant for this rank too: its parent, unless a shell, and the `deepspeed` command.

    On a host that the `deepspeed` command has reached by ssh its end shows as that of the session: sshd ends with the
    connection, and what it had started gets another parent.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._parent = os.getppid() if "RANK" in environment and not _is_shell(os.getppid()) else None
        machine, _, process = environment.get(LAUNCHER_VARIABLE, "").partition(":")
        pid, _, birth = process.partition(":")
        self._command = (int(pid), birth) if machine == _machine() and pid.isdigit() else None
        is_launched = self._parent is not None and LAUNCHER_VARIABLE in environment
        self._session = _parents_up_to_session(self._parent) if self._parent is not None and is_launched else {}

    def is_gone(self) -> bool:
        if self._parent is not None and os.getppid() != self._parent:
            return True
        if any(_has_another_parent(pid, parent) for pid, parent in self._session.items()):
            return True
        return self._command is not None and process_birth(self._command[0]) != self._command[1]


def _parents_up_to_session(node_launcher: int) -> dict[int, int]:
    """The parent of the node launcher and, where that is the shell of an ssh session, the shell's."""
    shell = _parent_of(node_launcher)
    if shell is None:
        return {}
    session = _parent_of(shell) if _is_shell(shell) else None
    return {node_launcher: shell} if session is None else {node_launcher: shell, shell: session}


def _parent_of(pid: int) -> int | None:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def _has_another_parent(pid: int, parent: int) -> bool:
    """Also where it has ended; not where it cannot be seen just now."""
    return _parent_of(pid) not in (parent, None) or not Path(f"/proc/{pid}").exists()


def _is_shell(pid: int) -> bool:
    """A run started by hand outlives its terminal."""
    with contextlib.suppress(OSError):
        return pid <= 1 or Path(f"/proc/{pid}/comm").read_text().strip() in _SHELLS
    return pid <= 1

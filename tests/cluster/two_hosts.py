"""Two hosts on one machine for tests: network namespaces joined by a cable that can be pulled, each with a name and an sshd.

Keys, configuration and logs lie below one folder; nothing of the machine's own ssh is read or changed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PROGRAMS = ("ip", "ssh", "sshd", "ssh-keygen", "pdsh", "unshare", "hostname")
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

SSHD_CONFIG = """\
Port 22
ListenAddress {address}
HostKey {folder}/host_key
PidFile {folder}/sshd_{number}.pid
AuthorizedKeysFile {folder}/user_key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
"""
SSH_CONFIG = """\
Host *
IdentityFile {folder}/user_key
IdentitiesOnly yes
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""


def missing() -> str:
    """Why there can be no two hosts here; empty if there can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"needs network namespaces, sshd and pdsh; missing: {absent}"
    probe = f"probe{os.getpid()}"
    if _ip("netns", "add", probe, check=False).returncode != 0:
        return "network namespaces are not permitted here"
    _ip("netns", "delete", probe)
    return ""


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["ip", *arguments], env={"PATH": _PATH}, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, f"ip {' '.join(arguments)}: {done.stderr}"
    return done


def _on(name: str) -> list[str]:
    """What begins a command on a host: its network and its own host name, by which ranks tell whether they share a machine."""
    network = [str(shutil.which("ip", path=_PATH)), "netns", "exec", name]
    return [
        *network,
        str(shutil.which("unshare")),
        "--uts",
        "sh",
        "-c",
        'hostname "$0" && exec "$@"',
        name.partition("_")[0],
    ]


@dataclass
class TwoHosts:
    """Two running hosts."""

    folder: Path
    names: tuple[str, str]
    addresses: tuple[str, str]
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """What a user's shell on these hosts has set; its `ssh` knows the key."""
        path = os.pathsep.join([str(self.folder / "bin"), str(Path(sys.executable).parent), _PATH])
        return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}

    def start(self, host: int, *command: str, cwd: Path, output: Path) -> subprocess.Popen[bytes]:
        """Start a command on a host."""
        with output.open("ab") as file:
            return subprocess.Popen(
                [*_on(self.names[host]), *command],
                cwd=cwd,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def pull_the_cable(self) -> None:
        """From now on neither hears anything of the other, not even a refusal."""
        _ip("-n", self.names[0], "link", "set", "cable0", "down")

    def processes(self, host: int, word: str) -> list[psutil.Process]:
        """Processes on a host whose command line has the word."""
        found = []
        for pid in map(int, _ip("netns", "pids", self.names[host], check=False).stdout.split()):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if word in " ".join(process.cmdline()):
                    found.append(process)
        return found


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Make the hosts, wait until each answers the other by ssh, and end them and all that runs on them."""
    number = os.getpid()
    names = (f"host0_{number}", f"host1_{number}")
    hosts = TwoHosts(folder, names, (f"10.77.{number % 250}.1", f"10.77.{number % 250}.2"))
    try:
        _connect(hosts)
        _start_sshd(hosts)
        yield hosts
    finally:
        for name in names:
            pids = [int(pid) for pid in _ip("netns", "pids", name, check=False).stdout.split()]
            for pid in pids:
                with contextlib.suppress(psutil.Error):
                    psutil.Process(pid).kill()
            _ip("netns", "delete", name, check=False)
        for daemon in hosts.daemons:
            daemon.wait(timeout=30)


def _connect(hosts: TwoHosts) -> None:
    for name in hosts.names:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "set", "lo", "up")
    _ip(
        "-n", hosts.names[0], "link", "add", "cable0", "type", "veth", "peer", "name", "cable1", "netns", hosts.names[1]
    )
    for number, (name, address) in enumerate(zip(hosts.names, hosts.addresses, strict=True)):
        _ip("-n", name, "address", "add", f"{address}/24", "dev", f"cable{number}")
        _ip("-n", name, "link", "set", f"cable{number}", "up")


def _start_sshd(hosts: TwoHosts) -> None:
    folder = hosts.folder
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
    (folder / "bin").mkdir()
    ssh = folder / "bin" / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh", path=_PATH)} -F {folder}/ssh_config "$@"\n')
    ssh.chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd refuses to start without its empty folder
    for number, address in enumerate(hosts.addresses):
        config = folder / f"sshd_config_{number}"
        config.write_text(SSHD_CONFIG.format(folder=folder, address=address, number=number))
        sshd = str(shutil.which("sshd", path=_PATH))
        log = folder / f"sshd_{number}.log"
        hosts.daemons.append(hosts.start(number, sshd, "-D", "-e", "-f", str(config), cwd=folder, output=log))
    for number, address in enumerate(hosts.addresses):
        _wait_for_ssh(hosts, 1 - number, address)


def _wait_for_ssh(hosts: TwoHosts, host: int, address: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    log = hosts.folder / "ssh.log"
    while hosts.start(host, "ssh", address, "true", cwd=hosts.folder, output=log).wait(timeout=30) != 0:
        logs = "".join(path.read_text() for path in hosts.folder.glob("*.log"))
        assert time.monotonic() < deadline, f"{address} does not answer by ssh: {logs}"
        time.sleep(0.3)

"""Which command hands a signal to ranks that pdsh has started on other hosts, and whom it finds there."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from sparselt_dist.remote_ranks import signal_command

PDSH = ["pdsh", "-S", "-f", "1024", "-w", "a,b", "export X=1; ", "cd /work;", "/usr/bin/python3", "-u", "-m"]
PDSH += ["deepspeed.launcher.launch", "--world_info=e30=", "--node_rank=%n", "--master_addr=a", "--master_port={port}"]


def test_it_goes_to_the_same_hosts() -> None:
    command = signal_command([word.format(port=29500) for word in PDSH] + ["train.py"], signal.SIGUSR1)
    assert command is not None
    cut = ["pdsh", "-S", "-w", "a", "b", "export X=1; ", "--master_port=1"]  # as a running pdsh shows its words
    assert (signal_command(cut, signal.SIGTERM) or [])[:4] == ["pdsh", "-S", "-w", "a,b"]
    assert command[:6] == ["pdsh", "-S", "-f", "1024", "-w", "a,b"]
    assert "pkill -10 -P" in command[-1]


def test_options_of_the_user_are_kept() -> None:
    words = [word.format(port=29500) for word in PDSH]
    command = signal_command([*words[:6], "-l", "bob", *words[6:]], signal.SIGTERM)
    assert command is not None and command[4:8] == ["-w", "a,b", "-l", "bob"]


def test_a_host_that_cannot_be_told_says_so() -> None:
    command = signal_command([word.format(port=29500) for word in PDSH], signal.SIGTERM)
    assert command is not None
    assert subprocess.run(["/bin/bash", "-c", command[-1]], env={"PATH": "/nowhere"}, check=False).returncode == 127


def test_another_pdsh_is_left_alone() -> None:
    assert signal_command(["pdsh", "-w", "a", "uptime"], signal.SIGTERM) is None
    assert signal_command(["pdsh", "-w", "a", "--master_port=1; reboot"], signal.SIGTERM) is None


def test_children_of_the_launcher_with_that_port_get_the_signal(tmp_path: Path) -> None:
    """The remote half, run by a shell as sshd would."""
    module = tmp_path / "deepspeed" / "launcher" / "launch.py"
    module.parent.mkdir(parents=True)
    for package in (module.parent.parent, module.parent):  # without, the installed package would be taken
        (package / "__init__.py").touch()
    module.write_text("import subprocess, sys; sys.exit(subprocess.call(['sleep', '30']) == -15)")
    words = [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
    started = {
        port: subprocess.Popen([*words, f"--master_port={port}", "x"], cwd=tmp_path, env={}) for port in (61001, 610010)
    }
    command = signal_command([word.format(port=61001) for word in PDSH], signal.SIGTERM)
    assert command is not None
    try:
        for _ in range(50):
            subprocess.run(["bash", "-c", command[-1]], check=True, timeout=10)
            try:
                assert started[61001].wait(timeout=0.1) == 1  # its child was ended by TERM, itself it was not
                break
            except subprocess.TimeoutExpired:
                continue
        assert started[610010].poll() is None
    finally:
        for process in started.values():
            subprocess.run(["pkill", "-P", str(process.pid)], check=False)
            process.kill()
            process.wait()

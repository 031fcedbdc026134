"""The `deepspeed` command: DeepSpeed's launcher with `-m`, as `python` and `torchrun` spell it.

A strict superset: every option of the stock command means what it meant. Added are `-m` for `--module`, CPU ranks
where no accelerator is visible, a free rendezvous port, and the supervision of `supervisor.py`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sparselt_dist.extensions import prepare_launch
from sparselt_dist.launcher_watch import LAUNCHER_VARIABLE, launcher_mark
from sparselt_dist.rank_report import REPORT_DIR_VARIABLE
from sparselt_dist.remote_environment import FILE_VARIABLE, write_exports
from sparselt_dist.supervisor import Supervisor

STOCK_HOSTFILE = "/job/hostfile"
STOCK_PORT = 29500
# Below the range from which the kernel takes the ports of outgoing connections.
FIRST_PORT, PORTS = 20000, 10000
# Without, pdsh would wait for a host that is gone until the kernel gives up on it, a quarter of an hour later.
SSH_KEEPALIVE = "-o ServerAliveInterval=15 -o ServerAliveCountMax=4"

EXAMPLE = "example: deepspeed --num_gpus 2 -m sparselt_dist.pretrain --config quickstart budget.max_steps=100"

# (names, metavar or None for a switch, help) of DeepSpeed's runner; where a value follows decides where `-m` is ours.
OPTIONS: tuple[tuple[tuple[str, ...], str | None, str], ...] = (
    (("-H", "--hostfile"), "FILE", f"hosts and slots, MPI style (default: {STOCK_HOSTFILE})"),
    (("-i", "--include"), "SPEC", "resources to use: NODE[:SLOT,...][@NODE...]"),
    (("-e", "--exclude"), "SPEC", "resources to leave out; written as for --include"),
    (("--num_nodes",), "N", "use the top N hosts of the hostfile (default: all)"),
    (("--num_gpus", "--num_accelerators"), "N", "ranks on each host (default: one a device; without any, CPU ranks)"),
    (("--master_port",), "PORT", f"rendezvous port (default: {STOCK_PORT}; on one host a free one)"),
    (("--master_addr",), "IP", "address of the first host (default: asked by `hostname -I`)"),
    (("--node_rank",), "N", "number of this host, with --no_ssh"),
    (("--launcher",), "NAME", "pdsh|openmpi|mvapich|slurm|mpich|impi (default: pdsh)"),
    (("--launcher_args",), "ARGS", "arguments of that launcher, one quoted word"),
    (("--module",), None, "run a module, as `python -m` does"),
    (("--no_python",), None, "run the script directly, without python"),
    (("--no_local_rank",), None, "do not pass --local_rank to the script"),
    (("--no_ssh",), None, "start on this host only; every host runs this command itself"),
    (("--no_ssh_check",), None, "do not try ssh to the first host before the start"),
    (("--force_multi",), None, "several-host mode even for one host"),
    (("--save_pid",), None, "write the launcher's pid to a file"),
    (("--enable_each_rank_log",), "DIR", "each rank's output into its own file of DIR"),
    (("--autotuning",), "tune|run", "run DeepSpeed's autotuner"),
    (("--bind_cores_to_rank",), None, "bind each rank to its own cores"),
    (("--bind_core_list",), "LIST", "cores to bind to, as 1,3-5,7"),
    (("--ssh_port",), "PORT", "ssh port of the other hosts"),
    (("--venv_script",), "FILE", "script that activates the virtual environment on each host"),
    (("--log_level",), "LEVEL", "debug|info|warning|error|critical (default: info)"),
    (("-q", "--quiet"), None, "same as --log_level error"),
)

_FIRST_NAME = {name: names[0] for names, _, _ in OPTIONS for name in names}
_VALUED = {names[0] for names, metavar, _ in OPTIONS if metavar is not None}


def build_parser() -> argparse.ArgumentParser:
    """Only for `--help` and the usage line: arguments are handed to DeepSpeed as typed."""
    parser = argparse.ArgumentParser(
        prog="deepspeed",
        description="Start a training program on the devices of one or several hosts (DeepSpeed's launcher).",
        epilog=EXAMPLE,
    )
    for names, metavar, text in OPTIONS:
        if metavar is None:
            parser.add_argument(*names, action="store_true", help=text)
        else:
            parser.add_argument(*names, metavar=metavar, help=text)
    parser.add_argument("-m", action="store_true", help="same as --module: the next word is a module's name")
    parser.add_argument("program", help="script, or module's name after -m or --module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="handed to every rank")
    return parser


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The launcher's own arguments, with `-m` read as `--module`, and those from the program's name on."""
    own: list[str] = []
    position = 0
    while position < len(argv) and argv[position].startswith("-") and argv[position] not in ("-", "--"):
        word = argv[position]
        position += 1
        if word.startswith("-m"):
            own.append("--module")
            if word != "-m":  # -mNAME, as python takes it
                return own, [word[2:], *argv[position:]]
            continue
        own.append(word)
        if option_name(word) in _VALUED and "=" not in word:
            own += argv[position : position + 1]
            position += 1
    return own, list(argv[position:])


def option_name(word: str) -> str | None:
    """First name of the option that DeepSpeed's parser sees in `word`, abbreviations included; None if unknown."""
    typed = word.partition("=")[0]
    if typed in _FIRST_NAME:
        return _FIRST_NAME[typed]
    matches = {first for name, first in _FIRST_NAME.items() if typed.startswith("--") and name.startswith(typed)}
    return matches.pop() if len(matches) == 1 else None


def rendezvous_arguments(own: Sequence[str]) -> list[str]:
    """A port of this launch's own, so that two runs on one host do not meet; none where hosts must agree on it."""
    names = {option_name(word) for word in own if word.startswith("-")}
    if names & {"--master_port", "-H", "--no_ssh", "--node_rank", "--autotuning"} or os.path.isfile(STOCK_HOSTFILE):
        return []
    return ["--master_port", str(free_port())]


def goes_over_ssh(own: Sequence[str]) -> bool:
    """Whether the runner may start ranks through pdsh; what mpirun and srun are given no shell reads."""
    names = [option_name(word) for word in own if word.startswith("-")]
    launcher = next((_value(own, at) for at, word in enumerate(own) if option_name(word) == "--launcher"), "pdsh")
    hostfile = "-H" in names or "--force_multi" in names or os.path.isfile(STOCK_HOSTFILE)
    return hostfile and "--no_ssh" not in names and launcher.lower() == "pdsh"


def _value(own: Sequence[str], at: int) -> str:
    _, equals, value = own[at].partition("=")
    return value if equals else "".join(own[at + 1 : at + 2])


def free_port() -> int:
    """A port nobody listens on, different for launches that start together."""
    for attempt in range(PORTS):
        port = FIRST_PORT + (os.getpid() * 7 + attempt) % PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    return STOCK_PORT


def main(argv: list[str] | None = None) -> int:
    """Exit code of the ranks."""
    own, program = split_arguments(sys.argv[1:] if argv is None else argv)
    if not program or {"-h", "--help"} & set(own):
        build_parser().parse_args(own)  # shows the help, or says what is missing, and exits
    environment = dict(os.environ)
    # A rank of an outer launch must not be taken for one of ours.
    for name in ("RANK", "LOCAL_RANK"):
        environment.pop(name, None)
    prepare_launch(environment)
    report_dir = Path(tempfile.mkdtemp(prefix="sparselt_ranks_"))
    try:
        ours = {REPORT_DIR_VARIABLE: str(report_dir), LAUNCHER_VARIABLE: launcher_mark()}
        environment |= ours
        over_ssh = goes_over_ssh(own)
        if over_ssh:
            environment[FILE_VARIABLE] = str(write_exports(report_dir, os.environ, ours))
        environment["PDSH_SSH_ARGS_APPEND"] = f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} {SSH_KEEPALIVE}".strip()
        command = [sys.executable, "-m", "deepspeed.launcher.runner", *own, *rendezvous_arguments(own), *program]
        return Supervisor(command, environment, report_dir, over_ssh=over_ssh).run()
    finally:
        shutil.rmtree(report_dir, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())

"""Runs DeepSpeed's runner so that signals reach every rank, its exit code is the ranks', and no process is left.

The stock runner dies of a signal and leaves the node launcher and the ranks behind; the node launcher tells its
ranks one after another and loses their exit codes. Here the runner gets a session of its own, so that Ctrl-C and
signals to our process group reach only us; we hand each signal to the ranks themselves, adopt whatever loses its
parent, and wait until nothing is left.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import psutil

from sparselt_dist.follower import process_birth
from sparselt_dist.rank_report import Reports, read_reports
from sparselt_dist.remote_environment import SECRET_SUFFIX
from sparselt_dist.remote_ranks import RemoteRanks, signal_command

STOPPED_ON_REQUEST = 75
SSH_LOST = 255  # of ssh, and so of pdsh: a host did not answer, or its connection broke
LOST_RANK = 1
LAST_SIGNAL = 31  # those above are the real-time ones
POLL_SECONDS = 0.1
# A rank that has not announced itself gets signals only at this age: before, python would die without its handlers.
UNANNOUNCED_SECONDS = 10.0
# Without a node launcher nobody else ends the ranks that outlive the first one.
ORPHAN_GRACE_SECONDS = 60.0
KILL_AFTER_SECONDS = 30.0
# Over ssh: until ranks can be told, and for those elsewhere to hear of a failure, to close the run and to end by themselves.
REMOTE_START_SECONDS = 20.0
REMOTE_GRACE_SECONDS = 180.0
# The first Ctrl-C asks for a checkpoint; who insists gets the prompt back.
KILLING_INTERRUPTS = 3
PR_SET_CHILD_SUBREAPER = 36
PDSH = ("pdsh", "pdsh.bin")  # the second on Debian
BACKENDS = ("mpirun", "mpiexec", "mpirun_rsh", "srun")

# A closed terminal asks the run to stop; under nohup it is ignored and stays so.
FORWARDED = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,
}


class Supervisor:
    """One launch: start the runner, forward signals, wait for all descendants, tell the exit code."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], report_dir: Path, *, over_ssh: bool = False
    ) -> None:
        self.command = list(command)
        self.environment = dict(environment)
        self.report_dir = report_dir
        self.received: list[signal.Signals] = []
        self.interrupts = 0
        self.delivered: dict[psutil.Process, int] = {}
        self.adopted_codes: list[int] = []
        self.deadline: float | None = None
        self.next_signal = signal.SIGTERM
        self.awaits_pdsh = over_ssh
        self.remote: RemoteRanks | None = None
        self.remote_since = 0.0
        self.sent_remotely = 0
        self.births: dict[int, str | None] = {}  # of ranks that announced themselves, when they were first seen

    def run(self) -> int:
        """Exit code of the launch."""
        _adopt_orphans()
        for number in FORWARDED:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._remember)
        self.runner = subprocess.Popen(self.command, env=self.environment, start_new_session=True)
        while self.runner.poll() is None:
            if self.awaits_pdsh:
                self._look_for_pdsh()
            if self.remote is not None:
                self._end_remote_survivors()
                self._remove_secrets()
            if self.received:
                self._forward(_descendants())
            time.sleep(POLL_SECONDS)
        self._wait_for_survivors()
        if self.interrupts >= KILLING_INTERRUPTS:
            return _shell_code(-signal.SIGINT)
        return exit_code(read_reports(self.report_dir), self.runner.returncode, self.adopted_codes)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.interrupts += number == signal.SIGINT
        self.received.append(FORWARDED[signal.Signals(number)])

    def _forward(self, family: Sequence[psutil.Process]) -> None:
        """Hand every signal received so far to each rank that has not got it yet."""
        if self.interrupts >= KILLING_INTERRUPTS:
            _send(family, signal.SIGKILL)
            return
        if self.remote is not None:
            is_early = time.monotonic() < self.remote_since + REMOTE_START_SECONDS and not self._ready_pids()
            if is_early and self.runner.poll() is None:
                return
            for number in self.received[self.sent_remotely :]:
                if not self.remote.send(number):
                    text = f"warning: {number.name} did not reach all hosts (pdsh and pkill must work there); one rank that "
                    sys.stderr.write(
                        text + "has it stops all; three times Ctrl-C ends the sessions, whose ranks then save\n"
                    )
            self.sent_remotely = len(self.received)
            return
        ready = self._ready_pids()
        targets = [rank for rank in find_ranks(family) if rank.pid in ready or _age(rank) > UNANNOUNCED_SECONDS]
        for target in targets or self._other_backend(family):
            for number in self.received[self.delivered.get(target, 0) :]:
                _send([target], number)
            self.delivered[target] = len(self.received)

    def _ready_pids(self) -> set[int]:
        return set(read_reports(self.report_dir).ready_pids.values())

    def _other_backend(self, family: Sequence[psutil.Process]) -> list[psutil.Process]:
        """Whom to tell when others than pdsh start the ranks: mpirun and srun forward."""
        children = [process for process in family if _parent(process) == self.runner.pid]
        if any(map(_is_node_launcher, children)) or find_ranks(family):
            return []
        return [process for process in children if _name(process) in BACKENDS]

    def _look_for_pdsh(self) -> None:
        """Keep what it was started with: ranks must be reached when it is gone. One host alone has a node launcher instead."""
        for child in _children(self.runner.pid):
            words = _command_line(child)
            if _name(child) in PDSH and signal_command(words, signal.SIGTERM) is not None:
                self.remote, self.awaits_pdsh = RemoteRanks(words, _environment(child)), False
                self.remote_since = time.monotonic()
            elif _is_node_launcher(child):
                self.awaits_pdsh = False

    def _end_remote_survivors(self) -> None:
        """After a failure here, ranks elsewhere end by themselves or are made to.

        One that is stopped, or waits for a disk, and has no other beside it would keep its host, and so pdsh, for ever.
        """
        if self.remote is None or not self._has_failed_here():
            return
        now = time.monotonic()
        if self.deadline is None:
            self.deadline, self.next_signal = now + REMOTE_GRACE_SECONDS, signal.SIGTERM
        elif now > self.deadline and self.next_signal == signal.SIGTERM:
            text = f"error: ranks on other hosts outlive a failure by {REMOTE_GRACE_SECONDS:.0f} s and are killed\n"
            sys.stderr.write(text)
            self.remote.send(signal.SIGKILL)
            self.deadline, self.next_signal = time.monotonic() + KILL_AFTER_SECONDS, signal.SIGKILL
        elif now > self.deadline:
            _send(_descendants(), signal.SIGKILL)

    def _remove_secrets(self) -> None:
        """Once a rank of this host has them, no other is to read them."""
        if any(birth is not None for birth in self.births.values()):
            for path in self.report_dir.glob(f"*{SECRET_SUFFIX}"):
                path.unlink(missing_ok=True)

    def _has_failed_here(self) -> bool:
        """Whether a rank that can be seen from here ended with an error, or without a word."""
        reports = read_reports(self.report_dir)
        for pid in reports.ready_pids.values():
            if pid not in self.births:
                self.births[pid] = process_birth(pid)  # None for those of other hosts
        silent = {pid for name, pid in reports.ready_pids.items() if name not in reports.exit_codes}
        if any(self.births[pid] is not None and process_birth(pid) != self.births[pid] for pid in silent):
            return True
        return any(code not in (0, STOPPED_ON_REQUEST) for code in reports.exit_codes.values())

    def _wait_for_survivors(self) -> None:
        """After the runner: ranks that it left behind end by themselves or are made to; then nothing is left."""
        while family := self._reap(_descendants()):
            ranks = find_ranks(family)
            is_left = self.remote is not None and self.runner.returncode != 0
            if (ranks or is_left) and not self.received:
                self.received.append(signal.SIGTERM)  # whatever ended the runner meant the run
            if self.received:
                self._forward(family)
            if not any(map(_is_node_launcher, family)):
                self._hurry(family, ranks)
            time.sleep(POLL_SECONDS)

    def _hurry(self, family: Sequence[psutil.Process], ranks: Sequence[psutil.Process]) -> None:
        """Once the first rank has ended, the rest of the family has a grace period; then TERM, then KILL."""
        if ranks and not read_reports(self.report_dir).exit_codes and not self.adopted_codes:
            return
        now = time.monotonic()
        if self.deadline is None:
            self.deadline, self.next_signal = now + ORPHAN_GRACE_SECONDS, signal.SIGTERM
        elif now > self.deadline:
            _send(family, self.next_signal)
            self.deadline, self.next_signal = now + KILL_AFTER_SECONDS, signal.SIGKILL

    def _reap(self, family: Sequence[psutil.Process]) -> list[psutil.Process]:
        """Collect the exit codes of adopted processes that ended; returns those still alive."""
        alive = []
        for process in family:
            try:
                pid, status = os.waitpid(process.pid, os.WNOHANG)
            except ChildProcessError:  # not ours to wait for: its parent lives
                alive.append(process)
                continue
            if pid == 0:
                alive.append(process)
            else:
                self.adopted_codes.append(os.waitstatus_to_exitcode(status))
        return alive


def exit_code(reports: Reports, runner_code: int, adopted_codes: Sequence[int]) -> int:
    """The ranks' answer: the first failure, else 75 if any stopped on request, else 0.

    Programs that report nothing are judged by the runner's code and those of the processes it left behind.
    """
    runner_failure = LOST_RANK if runner_code == SSH_LOST else _shell_code(max(runner_code, 0))
    if not reports.ready_pids and not reports.exit_codes:
        orphan_failure = next((_shell_code(code) for code in adopted_codes if code != 0), 0)
        return runner_failure or orphan_failure or _shell_code(runner_code)
    failures = [code for code in reports.exit_codes.values() if code not in (0, STOPPED_ON_REQUEST)]
    if failures:
        return failures[0]
    if reports.any_lost:
        return runner_failure if runner_failure not in (0, STOPPED_ON_REQUEST) else LOST_RANK
    return STOPPED_ON_REQUEST if STOPPED_ON_REQUEST in reports.exit_codes.values() else runner_failure


def find_ranks(family: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The processes that were started with a LOCAL_RANK, without their own children."""
    with_rank = {process.pid: process for process in family if "LOCAL_RANK" in _environment(process)}
    return [process for process in with_rank.values() if _parent(process) not in with_rank]


def _adopt_orphans() -> None:
    """On Linux, descendants that lose their parent become our children, so that none escapes."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _is_node_launcher(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[1:4] == ["-u", "-m", "deepspeed.launcher.launch"]
    except psutil.Error:
        return False


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children()
    except psutil.Error:
        return []


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _environment(process: psutil.Process) -> Mapping[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def _parent(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.Error:
        return None


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""


def _age(process: psutil.Process) -> float:
    return time.time() - process.create_time()


def _send(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.Error:  # ended meanwhile
            continue


def _shell_code(code: int) -> int:
    """A death by signal N as shells tell it, 128 + N. DeepSpeed's launcher ends with -N, which the system makes 256 - N."""
    if 256 - LAST_SIGNAL <= code < SSH_LOST:
        code -= 256
    return code if code >= 0 else 128 - code

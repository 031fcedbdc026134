"""Signals to ranks on other hosts, where DeepSpeed's runner has started them through pdsh.

The stock runner answers a signal by killing pdsh and the node launchers, which leaves ranks no time to save and loses
their exit codes. Here the ranks themselves are signalled, over a second pdsh to the same hosts; the first stays and
brings back their output and exit code. A node launcher is known by its rendezvous port, which is the launch's own.
"""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PORT_OPTION = "--master_port="
REMOTE_WORDS = ("export ", "cd ", "source ")  # that the remote command begins with
REACH_SECONDS = 30.0  # for pdsh to hand a signal to all hosts


@dataclass(frozen=True)
class RemoteRanks:
    """The ranks that one pdsh has started, also after it has gone."""

    pdsh: Sequence[str]
    environment: Mapping[str, str]

    def send(self, number: signal.Signals) -> bool:
        """Hand them a signal; whether all hosts have taken it."""
        command = signal_command(self.pdsh, number)
        if command is None:
            return False
        try:
            done = subprocess.run(
                command, env=dict(self.environment), stdin=subprocess.DEVNULL, timeout=REACH_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0


def signal_command(pdsh: Sequence[str], number: signal.Signals) -> list[str] | None:
    """The command that hands a signal to the ranks that a pdsh command line has started; None if it is no such line.

    Args:
        pdsh: words of the running pdsh, as DeepSpeed's runner made them: options, hosts behind `-w`, remote command.
    """
    port = next((word.removeprefix(PORT_OPTION) for word in pdsh if word.startswith(PORT_OPTION)), "")
    if "-w" not in pdsh or not re.fullmatch(r"\d+", port):
        return None
    # A running pdsh has cut its list of hosts at the commas: what was one word shows as several.
    first = pdsh.index("-w") + 1
    end = next((at for at in range(first, len(pdsh)) if pdsh[at].startswith((*REMOTE_WORDS, "-"))), first + 1)
    further = next((at for at in range(end, len(pdsh)) if pdsh[at].startswith(REMOTE_WORDS)), end)  # --launcher_args
    hosts = [*pdsh[:first], ",".join(pdsh[first:end]), *pdsh[end:further]]
    # The launcher itself begins so; shells, ssh and pdsh, whose words hold the same, do not.
    launchers = f"pgrep -f '^[^ ]+ -u -m deepspeed.launcher.launch .*{PORT_OPTION}{port}( |$)'"
    tell = f"for launcher in $({launchers}); do pkill -{number.value} -P $launcher; done; true"
    return [*hosts, f"command -v pkill >/dev/null || exit 127; {tell}"]

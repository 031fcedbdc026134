"""Ranks of `pretrain` forked from one process that has imported torch and DeepSpeed: a start costs no seconds.

Everything after the imports is as under a launcher: a process of its own in a session of its own, arguments,
environment, signals, exit code. Not so the start and the teardown of an interpreter, which tests of these ask for.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

TESTS = Path(__file__).parent
SERVER_MARK = "SPARSELT_TESTS_WARM"
TIMED_MARK = "SPARSELT_TESTS_TIMED"  # in a rank's environment: say how long its command took, by a clock outside of it

if SERVER_MARK in os.environ:  # in the server, which is forked from
    from sparselt_dist.extensions import prepare_environment

    prepare_environment()

    import sparselt_dist.evaluation.yardsticks
    import sparselt_dist.models.crammed
    import sparselt_dist.models.exporting
    import sparselt_dist.objectives.cwt
    import sparselt_dist.objectives.mix
    import sparselt_dist.objectives.mlm
    import sparselt_dist.objectives.slt
    import sparselt_dist.run  # noqa: F401


def _start_server() -> None:
    """Start the process to fork from, once; threads and search path are read while it imports."""
    before = dict(os.environ)
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), *filter(None, [before.get("PYTHONPATH")])])
    os.environ.update({SERVER_MARK: "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path})
    try:
        multiprocessing.get_context("forkserver").set_forkserver_preload(["warm_rank"])
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _be_rank(arguments: Sequence[str], environment: Mapping[str, str], output: str, fresh: bool) -> None:
    """In the forked process: what `python -m sparselt_dist.pretrain ARGUMENTS` would do, or that itself."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if fresh:
        os.execve(sys.executable, [sys.executable, "-m", "sparselt_dist.pretrain", *arguments], dict(environment))
    from sparselt_dist import cli, pretrain

    if "SPARSELT_TESTS_FAULT" in environment:
        import fault_rank

        fault_rank.plant()

    def command() -> int:
        started = time.monotonic()
        code = pretrain.main(list(arguments))
        if TIMED_MARK in environment:
            print(f"the command took {time.monotonic() - started:.3f} s")
        return code

    cli.leave(command)


def start_rank(
    arguments: Sequence[str], environment: Mapping[str, str], output: Path, *, fresh: bool
) -> ForkServerProcess:
    """Start one rank, if asked to in an interpreter of its own; what it prints goes to the file `output`."""
    _start_server()
    process = multiprocessing.get_context("forkserver").Process(
        target=_be_rank, args=(list(arguments), dict(environment), str(output), fresh)
    )
    process.start()
    return process

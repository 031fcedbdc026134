"""The side process that feeds MLflow from a run folder, as the training process sees it: start, ask, wait.

The training process never imports MLflow and never waits for a store: it writes the journal, and a process of low
priority in its own session (`mlflow_sync --follow`) carries it over. They talk through files of the run folder:
`mlflow.json` (the follower's state), `mlflow.log` (its output), `summary.json` (says that the run has ended) and
`process.json` (who trains, so that a dead run can be told from a live one).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from sparselt_dist.errors import ConfigError
from sparselt_dist.journal import JOURNAL_NAME, replace_file
from sparselt_dist.redaction import shown

STATE_NAME: Final = "mlflow.json"
LOG_NAME: Final = "mlflow.log"
SUMMARY_NAME: Final = "summary.json"
PROCESS_NAME: Final = "process.json"
STORE_VARIABLE: Final = "SPARSELT_FOLLOWED_STORE"
# What the follower must outlive: it ends when the run has ended, not when the run is told to.
BLOCKED_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_POLL_SECONDS: Final = 0.05
# A run on another machine counts as alive while its journal is younger than this.
_SILENT_SECONDS: Final = 600.0


def resolve_store_uri(uri: str, base: Path | None = None) -> str:
    """The store's URI with a relative SQLite file made absolute (against `base`, default the working directory).

    Raises ConfigError for a URI that MLflow takes no runs for, such as a folder's.
    """
    prefix = "sqlite:///"
    if uri.startswith(prefix):
        path = Path(uri.removeprefix(prefix)).expanduser()
        return prefix + str((base or Path.cwd()).joinpath(path).absolute())
    if not re.match(r"(https?|sqlite|postgresql|mysql|mssql)(\+\w+)?://|databricks", uri):
        raise ConfigError(
            f"log.mlflow_uri: found {shown(uri)!r}, expected sqlite:///FILE, http://HOST:PORT or a data base's URI; "
            "MLflow keeps no new runs in plain folders, use a SQLite file"
        )
    return uri


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where the file is missing, torn or something else."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


# ---- who is alive --------------------------------------------------------------------------------------------------


def process_birth(pid: int) -> str | None:
    """What tells this process from a later one of the same number; None if it is dead (or a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return "unknown"
    return None if fields[0] in "ZX" else fields[19]


def record_process(run_dir: Path, pid: int, follower: int | None = None) -> None:
    """Note in the run folder which process trains, and which follows it."""
    content = {"pid": pid, "birth": process_birth(pid), "host": socket.gethostname(), "follower": follower}
    replace_file(run_dir / PROCESS_NAME, json.dumps(content).encode())


def run_is_alive(run_dir: Path) -> bool:
    """Is the run without a summary still being trained? Known on the machine it runs on; elsewhere judged by the
    age of its journal."""
    who = read_json(run_dir / PROCESS_NAME)
    if who.get("host") == socket.gethostname() and isinstance(who.get("pid"), int):
        return who.get("birth") is not None and process_birth(who["pid"]) == who["birth"]
    try:
        return time.time() - (run_dir / JOURNAL_NAME).stat().st_mtime < _SILENT_SECONDS
    except OSError:
        return False


# ---- the training process's side -----------------------------------------------------------------------------------


def start_follower(run_dir: Path, uri: str, parent_pid: int) -> subprocess.Popen[bytes]:
    """Start the side process; call it on rank 0 after an old summary.json was removed and before training.

    It takes experiment, parameters and tags from `config.resolved.yaml`, `environment.json` and `run_id`, which must
    stand in the folder. The store's URI travels in its environment: a command line is shown to every user of the
    machine. Raises ConfigError for a store that MLflow does not take.
    """
    run_dir, uri = Path(run_dir).absolute(), resolve_store_uri(uri)
    state = read_json(run_dir / STATE_NAME)
    if state.get("uri") != shown(uri):
        (run_dir / STATE_NAME).unlink(missing_ok=True)
    else:
        replace_file(run_dir / STATE_NAME, json.dumps({**state, "delivered": False}).encode())
    command = [sys.executable, "-m", "sparselt_dist.mlflow_sync", "--follow", str(run_dir)]
    command += ["--parent", str(parent_pid)]
    # One thread and no GPU: it must not take what training uses.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", STORE_VARIABLE: uri}
    # Blocked signals are inherited: none of these reaches it, not even in its first moments.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)
    try:
        with (run_dir / LOG_NAME).open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    record_process(run_dir, parent_pid, process.pid)
    return process


def mlflow_identity(run_dir: Path, timeout_seconds: float = 20.0) -> str | None:
    """The MLflow run's id, waiting for the follower to find or make the run; None if it cannot or has not in time."""
    run_dir = Path(run_dir)
    follower = read_json(run_dir / PROCESS_NAME).get("follower")
    deadline = time.monotonic() + timeout_seconds
    while True:
        gone = not isinstance(follower, int) or process_birth(follower) is None
        state = read_json(run_dir / STATE_NAME)
        if state.get("run_id"):
            return str(state["run_id"])
        if gone or state.get("error") or time.monotonic() >= deadline:
            return None
        time.sleep(_POLL_SECONDS)


def wait_follower(process: subprocess.Popen[bytes], run_dir: Path, timeout_seconds: float) -> str:
    """Wait, after summary.json was written, until all is in the store; never raises.

    Returns one line that says what is missing and what to do, empty if nothing; the figures are in `mlflow.json`. A
    follower that is not done in time is ended, so that a run leaves no process behind; what it has not delivered,
    `mlflow-sync` does.
    """
    run_dir = Path(run_dir)
    try:
        process.wait(timeout_seconds)
    except subprocess.TimeoutExpired:
        # Nothing gentler reaches it; a kill at any moment loses and doubles nothing.
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
    state = read_json(run_dir / STATE_NAME)
    return "" if process.returncode == 0 and state.get("delivered") else _shortfall(run_dir, state)


def _shortfall(run_dir: Path, state: dict[str, Any]) -> str:
    cause = state.get("error") or f"out of time; see {run_dir / LOG_NAME}"
    return (
        f"MLflow has not got everything of this run ({cause}); nothing is lost: "
        f"`sparselt mlflow-sync {run_dir}` brings it over when the store is back"
    )

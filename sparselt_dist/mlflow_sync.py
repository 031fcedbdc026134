"""Command: bring run folders' journals into an MLflow store; idempotent, nothing lost or doubled.

With `--follow RUN_DIR --parent PID` it is the side process of a run in training (see `follower.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sparselt_dist.cli import EXIT_DONE, EXIT_USER_ERROR, make_parser, run_command
from sparselt_dist.errors import ConfigError, DataError, SparseltError
from sparselt_dist.follower import (
    STATE_NAME,
    STORE_VARIABLE,
    SUMMARY_NAME,
    process_birth,
    read_json,
    resolve_store_uri,
    run_is_alive,
)
from sparselt_dist.journal import JOURNAL_NAME, Journal, parse_lines, replace_file
from sparselt_dist.redaction import scrubbed, shown

if TYPE_CHECKING:
    from sparselt_dist.mlflow_sink import FinalStatus, MlflowSink

_POLL_SECONDS: Final = 0.5
_FLUSH_SECONDS: Final = 5.0
_LONGEST_PAUSE_SECONDS: Final = 30.0
# How long a follower whose run is over keeps trying a store that is down.
_PATIENCE_SECONDS: Final = 60.0
# How long the command waits for a follower that may be about to end.
_SYNC_WAIT_SECONDS: Final = 5.0
_CHUNK_BYTES: Final = 1 << 20
_NICENESS: Final = 10


class JournalTail:
    """Reads what was added to a journal; the newest line again when it was completed, all again when the journal was
    cut back."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / JOURNAL_NAME
        self._offset = 0
        self._inode = 0
        self._seen: tuple[int, int, int] | None = None

    def read(self) -> list[dict[str, Any]]:
        """The next lines, at most a megabyte of them; none if nothing is new."""
        try:
            with self._path.open("rb") as file:
                facts = os.fstat(file.fileno())
                now = (facts.st_ino, facts.st_size, facts.st_mtime_ns)
                if now == self._seen:
                    return []
                if facts.st_ino != self._inode or facts.st_size < self._offset:
                    self._offset, self._inode = 0, facts.st_ino
                file.seek(self._offset)
                data = file.read(_CHUNK_BYTES)
        except FileNotFoundError:
            return []
        lines, used, last = parse_lines(data)
        at_end = self._offset + len(data) >= facts.st_size
        self._seen = now if at_end else None
        self._offset += last if at_end else used
        return lines


@contextlib.contextmanager
def feeding(run_dir: Path, uri: str, wait: Callable[[], bool]) -> Iterator[bool]:
    """Be the only process that feeds this store from this folder; yields False if another is and `wait()` says to
    give up. On a file system without locks it goes on without."""
    name = f".mlflow-{hashlib.sha256(shown(uri).encode()).hexdigest()[:8]}.lock"
    with (run_dir / name).open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if wait():
                    continue
                yield False
                return
            except OSError:
                pass
            yield True
            return


# ---- following a live run ------------------------------------------------------------------------------------------


class Follower:
    """Feeds a store from a run in training until the run has ended or its process has died."""

    def __init__(self, run_dir: Path, uri: str, parent: int, *, patience_seconds: float = _PATIENCE_SECONDS) -> None:
        self._run_dir = run_dir
        self._uri = uri
        self._parent = parent
        self._birth = process_birth(parent)
        self._patience = patience_seconds
        self._ended_at: float | None = None
        self._sink: MlflowSink | None = None
        self._tail = JournalTail(run_dir)
        self._rereading = False
        self._configuration_was_tried = False
        self._pending: list[dict[str, Any]] = []
        self._down_since: float | None = None
        self._failures = 0
        earlier = read_json(run_dir / STATE_NAME)
        self._state: dict[str, Any] = {
            "run_id": None,
            "experiment_id": None,
            "uri": shown(uri),
            "points": 0,
            "outages": 0,
            "outage_seconds": 0.0,
            "status": "RUNNING",
            "delivered": False,
            "error": None,
        }
        self._state |= {
            key: earlier[key]
            for key in ("run_id", "experiment_id")
            if earlier.get("uri") == shown(uri) and key in earlier
        }

    def run(self) -> int:
        """Follow to the end; 0 if the store has everything."""
        with feeding(self._run_dir, self._uri, self._wait) as alone:
            if not alone:
                return self._leave("another process has been feeding this run all the time")
            next_attempt = 0.0
            while True:
                status, end_time = self._final_status()
                now = time.monotonic()
                # The end is tried at once, even in the pause after a failure.
                if now >= next_attempt or (status is not None and self._failures == 0):
                    if self._attempt(status, end_time):
                        return 0
                    pause = (
                        min(2.0 ** (self._failures - 1), _LONGEST_PAUSE_SECONDS) if self._failures else _FLUSH_SECONDS
                    )
                    next_attempt = time.monotonic() + pause
                if not self._wait():
                    return self._leave(self._state["error"])

    def _wait(self) -> bool:
        """Sleep a moment; False when the run ended longer ago than the patience lasts."""
        if self._ended_at is None and self._final_status()[0] is not None:
            self._ended_at = time.monotonic()
        if self._ended_at is not None and time.monotonic() - self._ended_at > self._patience:
            return False
        time.sleep(_POLL_SECONDS)
        return True

    def _final_status(self) -> tuple[FinalStatus | None, float | None]:
        """How the run ended, and when; None while it runs. A process that died without a summary has failed."""
        alive = self._birth is not None and process_birth(self._parent) == self._birth
        status, end_time = summary_status(self._run_dir)  # after the question above: a summary may just be written
        return (status, end_time) if status is not None or alive else ("FAILED", None)

    def _attempt(self, status: FinalStatus | None, end_time: float | None) -> bool:
        """Bring the store up to date; True when the run's end is in it too."""
        from sparselt_dist.mlflow_sink import MlflowSink

        try:
            sink = self._sink = self._sink or MlflowSink(self._run_dir, self._uri)
            if sink.run_id is None:
                sink.connect()
                sink.set_running()
                self._note(run_id=sink.run_id, experiment_id=sink.experiment_id)
            if status is not None and not self._rereading:
                # Once more from the beginning: the end must not hang on having seen every single change.
                self._tail, self._rereading = JournalTail(self._run_dir), True
            while self._pending or (more := self._tail.read()):
                self._pending = self._pending or more
                sink.deliver(self._pending)
                self._pending = []
            if not self._configuration_was_tried:
                self._configuration_was_tried = True
                with contextlib.suppress(Exception):  # artifacts may lie where this host cannot write: the end says so
                    sink.show_configuration()
            if status is not None:
                sink.finish(status, end_time)
        except Exception as error:  # stores fail in many ways; none may end the feeding
            self._count_failure(error)
            return False
        self._count_success()
        if status is not None:
            self._note(status=status, delivered=True, points=sink.sent)
        return status is not None

    def _count_failure(self, error: Exception) -> None:
        text = scrubbed(" ".join(f"{type(error).__name__}: {error}".split()))[:500]
        if self._down_since is None:
            self._down_since = time.monotonic()
            self._note(outages=self._state["outages"] + 1, error=text)
            print(f"{time.strftime('%F %T')} store out of reach: {text}", file=sys.stderr, flush=True)
        self._failures += 1
        if self._sink is not None:
            self._sink.run_id = None

    def _count_success(self) -> None:
        self._failures = 0
        if self._down_since is not None:
            seconds = time.monotonic() - self._down_since
            self._down_since = None
            self._note(outage_seconds=round(self._state["outage_seconds"] + seconds, 3), error=None)
            print(f"{time.strftime('%F %T')} store is back after {seconds:.0f} s", file=sys.stderr, flush=True)

    def _note(self, **values: Any) -> None:
        self._state |= values
        # A full disk is the trainer's to report.
        with contextlib.suppress(SparseltError):
            replace_file(self._run_dir / STATE_NAME, json.dumps(self._state, indent=1).encode())

    def _leave(self, error: str | None) -> int:
        self._note(error=error, points=self._sink.sent if self._sink is not None else 0)
        return 1


def summary_status(run_dir: Path) -> tuple[FinalStatus | None, float | None]:
    """The final status that summary.json tells, and when it was written."""
    from sparselt_dist.mlflow_sink import STATUS_OF

    path = run_dir / SUMMARY_NAME
    status = STATUS_OF.get(str(read_json(path).get("status")))
    try:
        return status, path.stat().st_mtime if status is not None else None
    except OSError:
        return None, None


def follow(run_dir: Path, uri: str, parent: int, *, patience_seconds: float = _PATIENCE_SECONDS) -> int:
    """Follow a run as its side process, at low priority. `start_follower` has put it out of reach of signals."""
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
    return Follower(run_dir, uri, parent, patience_seconds=patience_seconds).run()


# ---- the command ---------------------------------------------------------------------------------------------------


def sync(run_dir: Path, uri: str | None, experiment: str | None) -> str:
    """Bring one folder into the store; returns the line that says what was done.

    Raises:
        DataError: the folder is no run. ConfigError: no store is known, or it cannot be used.
    """
    from sparselt_dist.mlflow_sink import CONFIG_NAME, MlflowSink, read_config

    if not (run_dir / JOURNAL_NAME).is_file() and not (run_dir / CONFIG_NAME).is_file():
        found = "no such folder" if not run_dir.is_dir() else f"found neither {JOURNAL_NAME} nor {CONFIG_NAME}"
        raise DataError(f"{run_dir}: {found}; expected a run's folder, such as runs/<name>")
    chosen = uri or (read_config(run_dir).get("log") or {}).get("mlflow_uri")
    if not chosen:
        raise ConfigError(f"{run_dir}: the run's log.mlflow_uri is null; name the store with --uri")
    store = resolve_store_uri(str(chosen))
    give_up_at = time.monotonic() + _SYNC_WAIT_SECONDS

    def wait() -> bool:
        time.sleep(_POLL_SECONDS)
        return time.monotonic() < give_up_at

    with feeding(run_dir, store, wait) as alone:
        if not alone:
            return f"{run_dir}: the run is in training and feeds {shown(store)} itself"
        lines = Journal.read(run_dir)
        sink = MlflowSink(run_dir, store, experiment)
        try:
            status = _bring(sink, lines)
        except SparseltError:
            raise
        except Exception as error:  # whatever the store fails with, it is the user's to mend
            text = scrubbed(" ".join(str(error).split()))[:300]
            raise ConfigError(
                f"{run_dir}: the store {store} failed ({type(error).__name__}: {text}); "
                "expected a reachable MLflow store; start it or name another with --uri, then repeat"
            ) from error
    return (
        f"{run_dir}: {sink.sent} points sent, {sink.already_there} already there, status {status}, "
        f"MLflow run {sink.run_id} in {shown(store)}"
    )


def _bring(sink: MlflowSink, lines: Sequence[dict[str, Any]]) -> str:
    run_id = sink.connect()
    sink.deliver(lines)
    status, end_time = summary_status(sink.run_dir)
    if status is None and run_is_alive(sink.run_dir):
        sink.set_running()
        return "RUNNING"
    status = status or "FAILED"
    sink.finish(status, end_time or (lines[-1].get("time") if lines else None))
    earlier = read_json(sink.run_dir / STATE_NAME)
    public = shown(sink.uri)
    if earlier.get("uri", public) == public:
        state = {**earlier, "run_id": run_id, "experiment_id": sink.experiment_id, "uri": public}
        state |= {"status": status, "delivered": True, "error": None}
        replace_file(sink.run_dir / STATE_NAME, json.dumps(state, indent=1).encode())
    return status


def build_parser() -> argparse.ArgumentParser:
    """The command line of `mlflow-sync`."""
    parser = make_parser(
        "mlflow-sync",
        "Bring run folders' journals into an MLflow store. Sends only what the store lacks; may be repeated at will.",
        "sparselt mlflow-sync runs/* --uri http://tracking.example:5000",
    )
    parser.add_argument("run_dirs", nargs="*", type=Path, metavar="RUN_DIR", help="folders of runs")
    parser.add_argument("--uri", help="store: sqlite:///FILE or http://HOST:PORT; none: each run's log.mlflow_uri")
    parser.add_argument("--experiment", help="MLflow experiment; none: each run's log.experiment")
    parser.add_argument("--follow", type=Path, metavar="RUN_DIR", help="feed from a run in training (used by pretrain)")
    parser.add_argument("--parent", type=int, metavar="PID", help="with --follow: the training process")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    if arguments.follow is not None:
        uri = arguments.uri or os.environ.pop(STORE_VARIABLE, None)
        if arguments.parent is None or uri is None:
            raise ConfigError("--follow: expected --parent PID and --uri with it")
        return follow(arguments.follow, resolve_store_uri(uri), arguments.parent)
    if not arguments.run_dirs:
        raise ConfigError("found no RUN_DIR, expected one or more folders of runs, such as runs/*")
    code = EXIT_DONE
    for run_dir in arguments.run_dirs:  # one that is no run keeps none of the others
        try:
            print(sync(run_dir, arguments.uri, arguments.experiment), flush=True)
        except SparseltError as error:
            print(f"error: {error}", file=sys.stderr)
            code = EXIT_USER_ERROR
    return code


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _run(arguments))


if __name__ == "__main__":
    sys.exit(main())

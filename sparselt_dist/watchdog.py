"""A rank that died or hangs is noticed by all others, and the job ends with one message and no process left.

Each rank has a thread that tells rank 0 once a second where the rank is: step, phase of the time ledger, and how long it has
been there, so that the training thread pays nothing. A rank whose connection breaks without a farewell has died: noticed at
once. A run in which no rank gets on, or a rank that says nothing, for `train.hang_minutes` hangs: every rank leaves its stack
traces in `hang/`, rank 0 says who is behind, and all end with code 1; what cannot end itself is killed on its machine.

A rank whose launcher is gone is asked to stop, as by SIGTERM, and ends after a grace period. Phases in which some ranks wait for
one without a bound (before the first step, yardsticks, export) are watched for deaths only. Connections are greeted with a
random word that only the ranks know; what travels is JSON. Free of torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparselt_dist import distributed, rank_report
from sparselt_dist.errors import RunFailureError, SparseltError
from sparselt_dist.follower import process_birth
from sparselt_dist.hang import BEAT_SECONDS, Report, hang_message, hung_ranks
from sparselt_dist.launcher_watch import Launcher
from sparselt_dist.metrics import TimeLedger
from sparselt_dist.rank_line import RankLine

FOLDER = "hang"
EXIT_CODE = 1
RANKS_A_SECOND = 256  # more ranks report less often, for rank 0's sake
VERDICT_SECONDS = 5.0  # how long a rank whose collective failed waits to hear why
SAID = "said"  # leave taken with an error that a user can mend, on which ranks as a rule have agreed
FOLLOW_SECONDS = 60.0  # after which one that has not ended as well was not among them
LEAVE_SECONDS = 20.0  # how long a training thread has to end by itself after a death
ORPHAN_SECONDS = 60.0  # how long a rank without its launcher has to save
_COMMUNICATION = re.compile(r"gloo|nccl|connection|peer|socket|store|broken pipe|timed? ?out", re.IGNORECASE)


class LostRankError(RunFailureError):
    """Another rank died, ended or hangs."""


class Watchdog:
    """One a rank. `start` on all ranks together; `explained` for an exception; `stop` at the end."""

    def __init__(
        self,
        ranks: distributed.Ranks,
        ledger: TimeLedger,
        run_dir: Path,
        hang_minutes: float | None,
        launcher: Launcher,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.step: Callable[[], int] = lambda: 0
        self.at_worst: Callable[[], None] = lambda: None  # before this process is ended from here
        self._ranks, self._ledger, self._run_dir, self._clock = ranks, ledger, run_dir, clock
        self._minutes = hang_minutes
        self._beat = max(BEAT_SECONDS, ranks.world_size / RANKS_A_SECOND)
        self._launcher = launcher
        self._address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        self._token, self._port = "", 0
        self._server: socket.socket | None = None
        self._lines: dict[int, RankLine] = {}  # rank 0: of the others; others: rank 0's
        self._peers: dict[int, dict[str, Any]] = {}
        self._heard: dict[int, tuple[float, int, str, float]] = {}  # when, step, phase, age
        self._ended: dict[int, str] = {}  # ranks that took leave, and how
        self._follows: dict[int, float] = {}  # ranks that ended with an error of which all know, and when
        self._broken = threading.Event()  # a collective of this rank has failed
        self._verdict = threading.Event()
        self._done = threading.Event()
        self._orphaned: float | None = None
        self._stacks: Any = None

    # ---- called by the training thread

    def start(self) -> None:
        """Meet the other ranks and begin; all ranks call it together."""
        if self._ranks.is_main and self._ranks.world_size > 1:
            self._token = secrets.token_hex(16)
            self._server = socket.create_server(("", 0), backlog=self._ranks.world_size)
            self._port = self._server.getsockname()[1]
        port, token = self._port, self._token
        self._port, self._token = distributed.on_main(self._ranks, lambda: (port, token))
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Around all that the ranks do together; all ranks enter it together. An exception leaves it as `explained` says."""
        self.start()
        try:
            yield
        except BaseException as error:
            explained = self.explained(error)
            if explained is error:
                raise
            raise explained from None
        finally:
            self.stop()

    def stop(self) -> None:
        """This rank ends in order."""
        if not self._done.is_set():
            self._leave_word("done")

    def explained(self, error: BaseException) -> BaseException:
        """What to raise instead: the loss of another rank, said by one, where that is what broke a collective."""
        if self._done.is_set():
            return error
        if isinstance(error, SparseltError | RunFailureError) or not isinstance(error, Exception):
            self._leave_word(SAID if isinstance(error, Exception) else "done")
            return error
        if self._ranks.world_size > 1 and _COMMUNICATION.search(str(error)):
            self._broken.set()
            if self._verdict.wait(VERDICT_SECONDS):
                lost = LostRankError("another rank was lost")
                lost.silent = True  # the watching thread has said it
                return lost
        text = str(error).splitlines()[0][:300] if str(error) else ""
        self._leave_word(f"{type(error).__name__}: {text}")
        return error

    def _leave_word(self, how: str) -> None:
        self._done.set()
        for line in list(self._lines.values()):
            line.send(bye=how, rank=self._ranks.rank)

    def _forget(self) -> None:
        """In a forked loader worker, which must not hold this rank's connections open after its death."""
        self._done.set()
        for holder in (self._server, *(line.socket for line in self._lines.values())):
            if holder is not None:
                holder.close()

    # ---- the watching thread

    def _watch(self) -> None:
        try:
            self._watch_until_done()
        finally:
            with contextlib.suppress(Exception):
                faulthandler.cancel_dump_traceback_later()

    def _watch_until_done(self) -> None:
        with selectors.DefaultSelector() as selector:
            if self._server is not None:
                selector.register(self._server, selectors.EVENT_READ)
            elif self._ranks.world_size > 1:
                self._greet(selector)
            due = self._clock()
            while not self._done.is_set():
                for key, _ in selector.select(max(0.0, min(due - self._clock(), self._beat))):
                    self._hear(key, selector)
                if self._clock() >= due:
                    due = self._clock() + self._beat
                    self._turn()

    def _greet(self, selector: selectors.BaseSelector) -> None:
        try:
            line = RankLine(socket.create_connection((self._address, self._port), timeout=10.0))
        except OSError as error:
            print(
                f"rank {self._ranks.rank}: warning: rank 0 cannot be watched ({self._address}:{self._port}: {error}); "
                "open the ports between the hosts of a job",
                file=sys.stderr,
                flush=True,
            )
            return
        birth = process_birth(os.getpid())
        line.send(token=self._token, rank=self._ranks.rank, host=socket.gethostname(), pid=os.getpid(), birth=birth)
        self._lines[0] = line
        self._heard[0] = (self._clock(), 0, "other", 0.0)
        selector.register(line.socket, selectors.EVENT_READ, line)

    def _hear(self, key: selectors.SelectorKey, selector: selectors.BaseSelector) -> None:
        if key.fileobj is self._server and self._server is not None:
            with contextlib.suppress(OSError):
                connection, _ = self._server.accept()
                selector.register(connection, selectors.EVENT_READ, RankLine(connection))
            return
        line: RankLine = key.data
        messages = line.receive()
        if messages is None or not all(self._take(line, message) for message in messages):
            selector.unregister(line.socket)
            line.socket.close()
            rank = 0 if not self._ranks.is_main else line.rank
            if rank is not None and rank not in self._ended:
                self._lost(rank)

    def _take(self, line: RankLine, message: dict[str, Any]) -> bool:
        """Whether the message is from one of us."""
        if self._ranks.is_main and line.rank is None:
            if not secrets.compare_digest(str(message.get("token")), self._token):
                return False
            line.rank = int(message["rank"])
            self._lines[line.rank], self._peers[line.rank] = line, message
            self._heard[line.rank] = (self._clock(), 0, "other", 0.0)
            return True
        rank = 0 if not self._ranks.is_main else line.rank
        assert rank is not None
        if "verdict" in message:
            self._end(message["verdict"], message["hung"], message["kill"], speak=False)
        elif "bye" in message:
            self._ended[rank] = message["bye"]
            self._heard.pop(rank, None)
            if message["bye"] == SAID:
                self._follows[rank] = self._clock()
            elif message["bye"] != "done":
                self._lost(rank)
        else:
            self._heard[rank] = (self._clock(), message["step"], message["phase"], message["age"])
            if rank == 0:
                self._peers[0] = message["of"]
        return True

    def _turn(self) -> None:
        """Once a second: say where this rank is, look for hangs and for the launcher."""
        phase, age = self._ledger.current()
        step = self.step()
        of = {"host": socket.gethostname(), "pid": os.getpid(), "birth": process_birth(os.getpid())}
        for line in list(self._lines.values()):
            line.send(step=step, phase=phase, age=age, **({"of": of} if self._ranks.is_main else {}))
        self._look_for_launcher()
        for rank, since in list(self._follows.items()):
            if self._broken.is_set() or self._clock() - since > FOLLOW_SECONDS:
                self._lost(rank)
        if self._minutes is None or self._verdict.is_set():
            return
        limit = self._minutes * 60
        with contextlib.suppress(Exception):  # a backstop, should this thread itself never run again
            faulthandler.dump_traceback_later(limit + 60, exit=True)
        if self._ranks.is_main:
            self._peers[0] = of
            reports = {0: Report(step, phase, age, 0.0), **self._reports()}
            if behind := hung_ranks(reports, limit):
                text = hang_message(behind, reports, self._peers, self._minutes)
                mute = [self._peers.get(rank, {}) for rank in behind if reports[rank].silent > limit]
                self._end(text, True, mute, speak=True)
        elif (rank_0 := self._reports().get(0)) is not None and rank_0.silent > limit + 2 * self._beat:
            reports = {0: rank_0, self._ranks.rank: Report(step, phase, age, 0.0)}
            peers = {**self._peers, self._ranks.rank: of}
            text = hang_message([0], reports, peers, self._minutes)
            self._end(text, True, [self._peers.get(0, {})], speak=self._speaks_without_main())

    def _reports(self) -> dict[int, Report]:
        now = self._clock()
        return {rank: Report(step, phase, age, now - at) for rank, (at, step, phase, age) in list(self._heard.items())}

    def _speaks_without_main(self) -> bool:
        return self._ranks.rank == 1 or self._ranks.local_rank == 0

    def _look_for_launcher(self) -> None:
        if self._orphaned is None:
            if self._launcher.is_gone():
                self._orphaned = self._clock()
                os.kill(os.getpid(), signal.SIGTERM)
        elif self._clock() - self._orphaned > ORPHAN_SECONDS:
            self._exit("its launcher is gone, and it could not stop in time")

    def _lost(self, rank: int) -> None:
        """A rank is gone: say so, and let the training thread end by itself if it can."""
        if self._verdict.is_set():
            return
        step, phase = self._heard.get(rank, (0.0, 0, "", 0.0))[1:3]
        seen = f", last seen at step {step}, phase {phase}" if phase else ""
        peer = self._peers.get(rank, {})
        whose = f"rank {rank}" + (f" on {peer['host']} (pid {peer['pid']})" if peer else "")
        if (how := self._ended.get(rank)) == SAID:
            text = f"{whose} ended with an error of its own, which it has said"
        elif how is not None:
            text = f"{whose} failed: {how}; its traceback stands in its output"
        else:
            text = f"{whose} died{seen}: it was killed (out of memory?), or its machine is gone"
        self._end(text, False, [], speak=self._ranks.is_main or self._speaks_without_main())

    def _end(self, text: str, hung: bool, kill: list[dict[str, Any]], *, speak: bool) -> None:
        """The run is over: tell the others, say it once, and end this process if its training thread does not."""
        if self._verdict.is_set():
            return
        if self._ranks.is_main:
            for line in list(self._lines.values()):
                line.send(verdict=text, hung=hung, kill=kill)
        if hung:
            self._leave_stacks()
        if speak:
            traces = f"\n  stack traces: {self._run_dir / FOLDER}" if hung else ""
            _say(f"error: {text}{traces}\nAll ranks end; the same command continues from the last checkpoint")
        self._verdict.set()
        threading.Thread(target=self._finish_off, args=(hung, kill), daemon=True).start()

    def _leave_stacks(self) -> None:
        with contextlib.suppress(Exception):
            path = self._run_dir / FOLDER / f"rank_{self._ranks.rank:05d}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)

    def _finish_off(self, hung: bool, kill: list[dict[str, Any]]) -> None:
        # After a hang the others end too, and a collective of ours may fail on their account: wait for that a little.
        if not self._done.wait(2.0 if hung else LEAVE_SECONDS):
            _kill_local(kill)
            self._exit("")
        _kill_local(kill)

    def _exit(self, why: str) -> None:
        if why:
            _say(f"rank {self._ranks.rank}: {why}")
        closing = threading.Thread(target=self.at_worst, daemon=True)
        closing.start()
        closing.join(LEAVE_SECONDS)
        with contextlib.suppress(OSError):
            rank_report.record_exit(EXIT_CODE)
        os._exit(EXIT_CODE)


def _say(text: str) -> None:
    """Where nobody listens any more the process ends all the same."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _kill_local(peers: list[dict[str, Any]]) -> None:
    """End ranks of this machine that say nothing, for they cannot end themselves."""
    for peer in peers:
        pid, is_here = peer.get("pid"), peer.get("host") == socket.gethostname()
        if is_here and isinstance(pid, int) and pid != os.getpid() and process_birth(pid) == peer.get("birth"):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

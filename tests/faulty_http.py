"""A real HTTP server on this machine that fails by plan: it stalls, breaks off, answers with errors, sends wrong bytes.

Files are given by path; without a plan they are served whole or by range, with entity tags, as a good server does.
"""

from __future__ import annotations

import hashlib
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

START_SECONDS = 60  # of a server in a process of its own


@dataclass(frozen=True)
class Reply:
    """How one request is answered.

    Args:
        status: 200 sends the file; 0 closes the connection without a word; others send an error without body.
        headers: in addition.
        stall_after: after so many bytes of the body nothing comes for `stall_seconds`, then the rest.
        close_after: after so many bytes of the body the connection is closed.
        corrupt: the last byte sent is a wrong one.
        ignore_range: the whole file is sent whatever range is asked for.
        untold_size: no Content-Length; the body ends with the connection.
    """

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    stall_after: int | None = None
    stall_seconds: float = 60.0
    close_after: int | None = None
    corrupt: bool = False
    ignore_range: bool = False
    untold_size: bool = False


GOOD = Reply()


@dataclass(frozen=True)
class Seen:
    """A request, as it came."""

    path: str
    range: str | None
    authorization: str | None


class FaultyServer:
    """The server, its files and its plans.

    Args:
        folder: its files are served.
        files: more files, content by path with "/" at its beginning; may be changed at any time.
        port: to listen on; 0 for a free one.
    """

    def __init__(self, folder: Path | None = None, files: dict[str, bytes] | None = None, port: int = 0) -> None:
        self.files = dict(files or {})
        self.seen: list[Seen] = []
        self._folder = folder
        self._plans: dict[str, tuple[list[Reply], Reply]] = {}
        self._lock = threading.Lock()
        self.stopping = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"faulty": self}))
        self._http.daemon_threads = True
        self.root = f"http://127.0.0.1:{self._http.server_address[1]}"

    def plan(self, path: str, *replies: Reply, then: Reply = GOOD) -> str:
        """Answer requests for a path by these replies in order, and by `then` ever after; gives its address."""
        self._plans[path] = (list(replies), then)
        return self.root + path

    def times_asked(self, path: str) -> int:
        return sum(request.path == path for request in self.seen)

    def take(self, request: Seen) -> tuple[bytes | None, Reply]:
        """The content of the file that a request names, None if there is none, and the reply that is due."""
        with self._lock:
            self.seen.append(request)
            replies, then = self._plans.get(request.path, ([], GOOD))
            reply = replies.pop(0) if replies else then
        content = self.files.get(request.path)
        if content is None and self._folder is not None:
            path = self._folder / request.path.lstrip("/")
            content = path.read_bytes() if path.is_file() else None
        return content, reply

    @contextmanager
    def running(self) -> Iterator[FaultyServer]:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield self
        finally:
            self.stopping.set()
            self._http.shutdown()
            self._http.server_close()


def serve_apart(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """A good server in a process of its own, that can be killed with all its connections; returns once it listens."""
    process = subprocess.Popen([sys.executable, __file__, str(folder), str(port)], stderr=subprocess.DEVNULL)
    for _ in range(START_SECONDS * 10):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"no server on port {port} after {START_SECONDS} s")


class _Handler(BaseHTTPRequestHandler):
    faulty: FaultyServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = Seen(path, self.headers.get("Range"), self.headers.get("Authorization"))
        content, reply = self.faulty.take(request)
        try:
            self._answer(content, reply)
        except (BrokenPipeError, ConnectionResetError):  # the client has given up
            self.close_connection = True

    def _answer(self, content: bytes | None, reply: Reply) -> None:
        status = 404 if reply.status == 200 and content is None else reply.status
        if status == 0:
            self.close_connection = True
        elif status != 200 or content is None:
            self.send_response(status)
            for name, value in (*reply.headers, ("Content-Length", "0")):
                self.send_header(name, value)
            self.end_headers()
        else:
            self._send_file(content, reply)

    def _send_file(self, content: bytes, reply: Reply) -> None:
        etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        current = self.headers.get("If-Range", etag) == etag
        start = int(asked[1]) if asked and current and not reply.ignore_range else 0
        if start and start >= len(content):
            self._answer(content, Reply(status=416))
            return
        self.send_response(206 if start else 200)
        headers = [("ETag", etag), *reply.headers]
        if start:
            headers.append(("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"))
        headers.append(("Connection", "close") if reply.untold_size else ("Content-Length", str(len(content) - start)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self._send_body(content[start:], reply)

    def _send_body(self, body: bytes, reply: Reply) -> None:
        if reply.corrupt:
            body = body[:-1] + bytes([body[-1] ^ 1])
        if reply.stall_after is not None:
            self._send(body[: reply.stall_after])
            body = body[reply.stall_after :]
            self.faulty.stopping.wait(reply.stall_seconds)
        if reply.close_after is not None:
            body = body[: reply.close_after]
            self.close_connection = True
        self._send(body)

    def _send(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()


if __name__ == "__main__":  # FOLDER PORT
    with FaultyServer(Path(sys.argv[1]), port=int(sys.argv[2])).running() as server:
        server.stopping.wait()

"""Messages between two ranks over a socket, one JSON object a line. Free of torch."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any


class RankLine:
    """JSON lines over a socket that never blocks for long."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(2.0)
        self.socket = connection
        self.rank: int | None = None  # of a peer that greeted
        self._rest = b""

    def send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Messages that have come; None at the end of the connection. Call it when there is something to read."""
        try:
            read = self.socket.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not read or len(self._rest) > 1 << 20:
            return None
        *lines, self._rest = (self._rest + read).split(b"\n")
        try:
            return [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError):
            return None

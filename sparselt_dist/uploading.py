"""Copies committed checkpoints to object storage in the background, `COMPLETE` last; nothing is deleted there.

One copy is under way at most. A checkpoint that comes meanwhile waits, and gives way to a newer one: a slow store
misses some, the last one never. A copy that fails is said and given up; the next checkpoint is the next try.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from sparselt_dist.data.storage import RetryPolicy, join, upload
from sparselt_dist.errors import DataError


class Uploader:
    """A folder of object storage that checkpoints are copied to.

    Args:
        target: `s3://bucket/prefix`; checkpoints go to `target/step_00000100/`.
        say: tells the user; called from a thread.
    """

    def __init__(self, target: str, say: Callable[[str], None], retry: RetryPolicy | None = None) -> None:
        self._target = target
        self._say = say
        self._retry = retry or RetryPolicy()
        self._changed = threading.Condition()
        self._busy: Path | None = None
        self._waiting: Path | None = None

    def offer(self, checkpoint: Path) -> set[Path]:
        """Copy a checkpoint as soon as the one under way is done; returns those that must stay until then."""
        with self._changed:
            self._waiting = checkpoint
            if self._busy is None:
                self._next()
            return {path for path in (self._busy, self._waiting) if path is not None}

    def wait(self, timeout_seconds: float | None) -> bool:
        """Wait until all is copied or given up, no longer than that; whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: self._busy is None, timeout_seconds)

    def _next(self) -> None:
        """Take up what waits; the caller holds the lock."""
        self._busy, self._waiting = self._waiting, None
        if self._busy is not None:
            threading.Thread(target=self._copy, args=(self._busy,), daemon=True, name="upload").start()

    def _copy(self, checkpoint: Path) -> None:
        try:
            files = sorted(checkpoint.iterdir(), key=lambda path: (path.name == "COMPLETE", path.name))
            for path in files:
                upload(path, join(self._target, f"{checkpoint.name}/{path.name}"), self._retry)
        except (DataError, OSError) as error:
            self._say(f"checkpoint {checkpoint.name} was not uploaded: {error}")
        finally:
            with self._changed:
                self._next()
                self._changed.notify_all()

"""A file that is held open and read at any place, or kept in memory if it is small.

It is read, never mapped: a file that is cut short under a map kills the process.
"""

from __future__ import annotations

import os
from pathlib import Path

from sparselt_dist.errors import DataError


class OpenFile:
    """Random access to the bytes of a file; thread-safe, and usable in a forked child.

    Args:
        keep_bytes: a file up to this size is kept in memory.

    Raises:
        FileNotFoundError: it is not there.
        DataError: it cannot be read.
    """

    def __init__(self, path: Path, keep_bytes: int = 0) -> None:
        self.path = path
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise
        except OSError as cause:
            raise DataError(f"{path}: cannot be opened: {cause.strerror}; correct its permissions") from cause
        size = os.fstat(self._descriptor).st_size
        self._content = self._read(0, size) if size <= keep_bytes else None
        self.held_bytes = 0 if self._content is None else size

    def bytes_at(self, offset: int, size: int) -> bytes:
        """Bytes of the file.

        Raises:
            DataError: it cannot be read there, or no longer reaches so far.
        """
        if self._content is not None:
            return self._content[offset : offset + size]
        return self._read(offset, size)

    def _read(self, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._descriptor, size, offset)
        except OSError as cause:
            raise DataError(f"{self.path}: cannot be read: {cause.strerror}; restore the file") from cause
        if len(data) != size:
            raise DataError(f"{self.path}: truncated while in use: found {len(data)} of {size} bytes at {offset}")
        return data

    def close(self) -> None:
        """Close the file; it cannot be read afterwards."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()

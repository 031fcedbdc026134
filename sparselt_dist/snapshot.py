"""A copy of this rank's share of weights and moments, in buffers that are used again for the next one.

Training may go on as soon as it is taken. The buffers are page-locked where tensors come from a GPU, which copies into
these at full speed; with a scratch folder they are files there, mapped into memory and already unlinked, so that the copy
needs no memory that cannot be written out, and a killed run leaves nothing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch


class Snapshot:
    """The tensors that fall to one rank to write, by kind and name."""

    def __init__(self, rank: int, world_size: int, *, pinned: bool = False, scratch: Path | None = None) -> None:
        self.rank = rank
        self.world_size = world_size
        self.pinned = pinned and scratch is None
        self.scratch = scratch
        self.parts: dict[str, dict[str, torch.Tensor]] = {}

    def take(self, parts: Mapping[str, Iterable[tuple[str, torch.Tensor]]]) -> str | None:
        """Copy this rank's share; every rank is given all tensors in the same order. The text of an error, if any.

        Each tensor goes to the rank with the fewest bytes so far. Iterating is collective, so a rank that meets an error
        still goes through all of them.
        """
        loads = [0] * self.world_size
        kept, self.parts = self.parts, {}
        fault: str | None = None
        for kind, tensors in parts.items():
            own: dict[str, torch.Tensor] = {}
            for name, tensor in tensors:
                owner = loads.index(min(loads))
                loads[owner] += tensor.nbytes
                if owner != self.rank or fault is not None:
                    continue
                try:
                    own[name] = self._copy(tensor, kept.get(kind, {}).get(name))
                except (OSError, RuntimeError) as error:  # torch: no memory left
                    fault = f"rank {self.rank}: no room for the copy ({error})"
            self.parts[kind] = own
        return fault

    def release(self) -> None:
        """Give the buffers back."""
        self.parts = {}

    def _copy(self, tensor: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffer(tensor)
        return buffer.copy_(tensor)

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        if self.scratch is None or like.numel() == 0:
            return torch.empty(like.shape, dtype=like.dtype, pin_memory=self.pinned)
        self.scratch.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(prefix="sparselt-snapshot-", dir=self.scratch)
        try:
            os.posix_fallocate(handle, 0, like.nbytes)  # a disk that is full later would kill the process
            return torch.from_file(path, shared=True, size=like.numel(), dtype=like.dtype).view(like.shape)
        finally:
            os.close(handle)
            os.unlink(path)

"""A copy of what this rank saves of weights and moments, in buffers that are used again for the next one.

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

from sparselt_dist.tensor_files import Slice


class Snapshot:
    """The slices that one rank writes, by kind."""

    def __init__(self, *, pinned: bool = False, scratch: Path | None = None) -> None:
        self.pinned = pinned and scratch is None
        self.scratch = scratch
        self.parts: dict[str, list[Slice]] = {}

    def take(self, parts: Mapping[str, Iterable[Slice]]) -> str | None:
        """Copy them, each before the next is asked for; the text of an error, if any."""
        kept = {(kind, each.name): each.values for kind, slices in self.parts.items() for each in slices}
        self.parts = {}
        for kind, slices in parts.items():
            self.parts[kind] = []
            for each in slices:
                try:
                    values = self._copy(each.values, kept.get((kind, each.name)))
                except (OSError, RuntimeError) as error:  # torch: no memory left
                    return f"no room for the copy ({error})"
                self.parts[kind].append(each._replace(values=values))
        return None

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

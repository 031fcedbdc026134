"""Tensors of a checkpoint: safetensors files, one of a kind a rank, in which a tensor lies whole or cut over several files.

A rank writes what it holds already, so that a save needs no communication, and another number of ranks or another ZeRO stage
reads the elements that it needs. A whole tensor is stored in its shape, as safetensors readers expect. Of one that is cut a
file holds flat elements, and `slices` in its header where they belong: `{name: [start, *shape of the whole]}`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sparselt_dist.errors import CheckpointError

if TYPE_CHECKING:
    import torch

SLICES = "slices"
LEAST_SHARE_BYTES = 32 * 2**20  # of what all ranks hold: many small files are slower to open than a few to write


class Slice(NamedTuple):
    """Elements of a tensor, of the flattened one those from `start` on."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    values: torch.Tensor
    """Flat."""

    @property
    def is_whole(self) -> bool:
        return self.values.numel() == math.prod(self.shape)


def cut(tensors: Sequence[tuple[str, torch.Tensor]], rank: int, world_size: int) -> Iterator[Slice]:
    """A rank's part of tensors that every rank holds: as many bytes for each rank, or for fewer ranks, far from each other."""
    total = sum(tensor.nbytes for _, tensor in tensors)
    shares = max(1, min(world_size, total // LEAST_SHARE_BYTES))
    share = -(-rank * shares // world_size)
    if share * world_size // shares != rank:
        return
    offset = 0
    for name, tensor in tensors:
        first, last = (total * (share + further) // shares - offset for further in range(2))
        start, stop = (min(max(0, -(-bytes_ // tensor.itemsize)), tensor.numel()) for bytes_ in (first, last))
        if start < stop or (tensor.numel() == 0 and share == 0):  # one without elements is there as well
            yield Slice(name, tuple(tensor.shape), start, tensor.reshape(-1)[start:stop])
        offset += tensor.nbytes


def write_slices(slices: Iterable[Slice], path: Path) -> None:
    """One file of them, at most one of a tensor."""
    from safetensors.torch import save_file

    tensors = {each.name: each.values.view(each.shape) if each.is_whole else each.values for each in slices}
    places = {each.name: [each.start, *each.shape] for each in slices if not each.is_whole}
    save_file(tensors, path, {SLICES: json.dumps(places)} if places else None)


class _Part(NamedTuple):
    """Where a slice lies."""

    start: int
    stop: int
    shape: tuple[int, ...]
    file: Any  # an open one


class TensorFiles:
    """Tensors of one kind in a checkpoint, read by name from memory-mapped files, each opened once and only if it is needed.

    Args:
        checkpoint: its folder, verified.
        names: of its files of this kind, in the order of the ranks that wrote them.
        share: in [0, 1), where among the files what is asked for will be: a rank of as many ranks as saved it finds its own
            moments in one or two.
    """

    def __init__(self, checkpoint: Path, names: Iterable[str], share: float = 0.0) -> None:
        self.checkpoint = checkpoint
        paths = [checkpoint / name for name in names]
        by_distance = sorted(enumerate(paths), key=lambda each: abs(each[0] - share * len(paths)), reverse=True)
        self._unopened = [path for _, path in by_distance]
        self._parts: dict[str, list[_Part]] = {}

    def names(self) -> list[str]:
        """Of all tensors."""
        while self._unopened:
            self._open_next()
        return list(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, whole.

        Raises:
            CheckpointError: the checkpoint holds no such tensor.
        """
        while name not in self._parts and self._unopened:
            self._open_next()
        if name not in self._parts:
            raise CheckpointError(
                f"checkpoint {self.checkpoint}: holds no {name!r}; it belongs to another model, objective or optimizer"
            )
        return self._parts[name][0].shape

    def read(self, name: str) -> torch.Tensor:
        """One tensor, whole, on the CPU.

        Raises:
            CheckpointError: the checkpoint does not hold it, or only parts of it.
        """
        shape = self.shape(name)
        (first, *_) = self._parts[name]
        if first.stop - first.start == math.prod(shape):
            tensor: torch.Tensor = first.file.get_tensor(name)
            return tensor
        return self.read_elements(name, 0, math.prod(shape)).view(shape)

    def read_all(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""
        return {name: self.read(name) for name in self.names()}

    def read_elements(self, name: str, start: int, numel: int) -> torch.Tensor:
        """Flat elements of one tensor, on the CPU.

        Raises:
            CheckpointError: the checkpoint does not hold them.
        """
        import torch

        stop = start + numel
        if stop > math.prod(self.shape(name)):
            raise CheckpointError(
                f"checkpoint {self.checkpoint}: {name} is {self.shape(name)}, expected {stop} elements or more; it "
                "belongs to another model"
            )
        pieces = self._covering(name, start, stop)
        while pieces is None and self._unopened:
            self._open_next()
            pieces = self._covering(name, start, stop)
        if pieces is None:
            raise CheckpointError(
                f"checkpoint {self.checkpoint}: holds not all of {name}, elements {start} to {stop} were expected; use "
                "an earlier checkpoint"
            )
        found = [
            part.file.get_tensor(name).reshape(-1)[first - part.start : last - part.start]
            for part, first, last in pieces
        ]
        return found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(0)

    def _covering(self, name: str, start: int, stop: int) -> list[tuple[_Part, int, int]] | None:
        """Parts of opened files, and the elements to take of each; None if some are elsewhere."""
        pieces = []
        for part in sorted(self._parts[name], key=lambda part: part.start):
            if part.start <= start < min(part.stop, stop):
                pieces.append((part, start, min(part.stop, stop)))
                start = pieces[-1][2]
        return pieces if start >= stop else None

    def _open_next(self) -> None:
        from safetensors import SafetensorError, safe_open

        path = self._unopened.pop()
        try:
            file: Any = safe_open(path, framework="pt")
            places = dict(json.loads((file.metadata() or {}).get(SLICES, "{}")))
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                stored = tuple(file.get_slice(name).get_shape())
                start, *shape = (int(number) for number in places.get(name, [0, *stored]))
                part = _Part(start, start + math.prod(stored), tuple(shape), file)
                parts = self._parts.setdefault(name, [])
                if start < 0 or part.stop > math.prod(shape) or (parts and part.shape != parts[0].shape):
                    raise ValueError(f"elements {start} to {part.stop} of {name} of shape {part.shape}")
                parts.append(part)
        except (OSError, SafetensorError, ValueError, TypeError, OverflowError) as error:
            raise CheckpointError(
                f"checkpoint {self.checkpoint}: {path.name} cannot be read ({error}); use an earlier checkpoint"
            ) from None

"""What autograd keeps of a forward pass over a model's body, counted without computing or allocating anything.

The model's own code runs on fake tensors under autocast; every storage that an operation saves counts once, parameters
and buffers not at all. So the count follows any architecture: gates, windows, dropout, 16-bit copies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from sparselt_dist.planning import SavedBytes

if TYPE_CHECKING:
    from sparselt_dist.models.backbone import Backbone

_ROWS = (1, 2)


class _AttentionAsOnAccelerators(TorchFunctionMode):
    """Attention without dropout: a CPU stores the attention matrix to drop some of it, fused kernels elsewhere do not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        options = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            options["dropout_p"] = 0.0
        return func(*args, **options)


def trace_saved(backbone: Backbone, *, length: int, precision: str, on_cpu: bool) -> SavedBytes:
    """Bytes saved by a forward pass over rows of `length` tokens in training mode. The backbone lies on the meta device
    and is of no use afterwards.

    Raises:
        Exception: of any kind, where the model's code looks at values, which fake tensors do not have.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        backbone.to_empty(device="cpu")
        backbone.train()
        one, two = (_saved(backbone, torch.zeros(rows, length, dtype=torch.int64), precision, on_cpu) for rows in _ROWS)
    return SavedBytes(fixed=float(2 * one - two), per_row=float(two - one), traced=True)


def _saved(backbone: nn.Module, ids_BL: Tensor, precision: str, on_cpu: bool) -> int:
    """Bytes of the distinct storages that one forward pass saves, those of parameters and buffers left out."""
    own = {tensor.untyped_storage()._cdata for tensor in (*backbone.parameters(), *backbone.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no address is used twice
        return tensor

    # Of one size; but bfloat16 on a CPU is what a model may take another kind of attention for.
    dtype = torch.bfloat16 if on_cpu else torch.float16
    half = torch.autocast("cpu", dtype, enabled=precision != "fp32")
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    if on_cpu:
        with hooks, half:
            backbone(ids_BL)
    else:
        with hooks, half, _AttentionAsOnAccelerators():
            backbone(ids_BL)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

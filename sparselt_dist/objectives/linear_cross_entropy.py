"""Cross-entropy over many classes whose scores are never all in memory: exact, a piece of the targets at a time.

N targets, D hidden size, V classes. The scores of a piece are computed, reduced to loss and gradients, and dropped, so
memory is O(rows V + V D) where the plain form keeps several tensors [N, V]. Nothing is left out or rounded otherwise:
loss and gradients are those of `F.cross_entropy(scores(hidden_ND), labels_N)` up to the order of summation.

Gradients are formed in the forward pass, when a piece's scores are at hand, so chunking costs no second product (the
order of work of Liger's fused linear cross-entropy, Hsu et al. 2024, arXiv 2410.10989). Two cases recompute the
scores in the backward pass instead, at one more product: parameters partitioned by ZeRO-3, which only its own backward
hooks may see, and fp16 autocast, where a gradient formed before loss scaling could underflow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from sparselt_dist.data.batch import IGNORE_INDEX

_SCORES_AT_ONCE = 2**24  # 64 MiB of fp32
_FEWEST_ROWS = 256  # fewer, and adding up a gradient [V, D] a piece would cost more than its product

Scores = Callable[[Tensor], Tensor]
"""Hidden states [N, D] to scores [N, V]; N may be 0."""


class CrossEntropy(NamedTuple):
    """Sums over targets; labels that are IGNORE_INDEX count nowhere."""

    total: Tensor
    """Scalar, float32 or wider: the sum of -log softmax(scores)[label]."""
    correct: Tensor
    """Scalar int64: targets whose score is the largest of their row. Detached."""
    largest: Tensor
    """Scalar: the largest score of all, 0 without a target. Detached."""


def full_cross_entropy(scores: Scores, hidden_ND: Tensor, labels_N: Tensor) -> CrossEntropy:
    """The plain form: all scores at once."""
    scores_NV = scores(hidden_ND)
    scores_NV = scores_NV.to(torch.promote_types(scores_NV.dtype, torch.float32))
    if len(scores_NV) == 0:
        nothing = scores_NV.sum()  # attached to all that scores depend on
        return CrossEntropy(nothing, torch.zeros_like(nothing, dtype=torch.int64), torch.zeros_like(nothing))
    total = F.cross_entropy(scores_NV, labels_N, ignore_index=IGNORE_INDEX, reduction="sum")
    best_N, guess_N = scores_NV.detach().max(dim=-1)
    return CrossEntropy(total, (guess_N == labels_N).sum(), best_N.max())


def chunked_cross_entropy(
    scores: Scores,
    hidden_ND: Tensor,
    labels_N: Tensor,
    *,
    shared: Sequence[Tensor],
    rows: int,
    recompute: bool = False,
) -> CrossEntropy:
    """The same numbers as `full_cross_entropy`, `rows` targets at a time.

    Args:
        shared: the tensors that `scores` uses and that gradients shall reach (parameters or not). Any other that
            requires a gradient gets none.
        recompute: drop each piece's graph and compute its scores again in the backward pass.
    """
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in (hidden_ND, *shared)):
        return _added(full_cross_entropy(scores, *piece) for piece in _pieces(hidden_ND, labels_N, rows))
    if recompute:
        return _added(
            cast(CrossEntropy, checkpoint(full_cross_entropy, scores, *piece, use_reentrant=False))
            for piece in _pieces(hidden_ND, labels_N, rows)
        )
    apply = cast(Callable[..., tuple[Tensor, Tensor, Tensor]], _GradientsInForward.apply)
    return CrossEntropy(*apply(scores, labels_N, rows, hidden_ND, *shared))


def head_cross_entropy(backbone: nn.Module, hidden_ND: Tensor, labels_N: Tensor, *, chunked: bool) -> CrossEntropy:
    """Cross-entropy of the backbone's own vocabulary head, whatever it is made of, at once or chunked.

    Without targets the loss is a zero attached to every parameter of the head.
    """
    head = cast("HeadedBackbone", backbone)
    if not chunked:
        return full_cross_entropy(head.logits, hidden_ND, labels_N)
    nothing_0V = head.logits(hidden_ND.detach()[:0])
    partitioned = any(hasattr(parameter, "ds_id") for parameter in backbone.parameters())
    return chunked_cross_entropy(
        head.logits,
        hidden_ND,
        labels_N,
        shared=[] if partitioned else _leaves(nothing_0V),
        rows=rows_at_once(nothing_0V.shape[1]),
        recompute=partitioned or is_half_autocast(hidden_ND),
    )


def rows_at_once(num_classes: int) -> int:
    """Targets of a piece, so that its scores take some tens of megabytes."""
    return max(_FEWEST_ROWS, _SCORES_AT_ONCE // max(num_classes, 1))


def is_half_autocast(tensor: Tensor) -> bool:
    """Whether products on this tensor's device run in fp16 now."""
    kind = tensor.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16


def _pieces(hidden_ND: Tensor, labels_N: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Consecutive targets; one empty piece where there is none, so that the graph is the same."""
    return zip(hidden_ND.split(rows), labels_N.split(rows), strict=True)


def _added(parts: Iterator[CrossEntropy]) -> CrossEntropy:
    total, correct, largest = next(parts)
    for part in parts:
        total, correct, largest = total + part.total, correct + part.correct, torch.maximum(largest, part.largest)
    return CrossEntropy(total, correct, largest)


def _leaves(scores_0V: Tensor) -> list[Tensor]:
    """The parameters behind a result, in a fixed order."""
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    waiting = [scores_0V.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.setdefault(id(node.variable), node.variable)
        waiting.extend(following for following, _ in node.next_functions)
    return list(found.values())


class _GradientsInForward(torch.autograd.Function):
    """Each piece's gradients are taken while its scores exist; the backward pass only scales their sums."""

    @staticmethod
    def forward(
        ctx: Any, scores: Scores, labels_N: Tensor, rows: int, hidden_ND: Tensor, *shared: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = [tensor for tensor in shared if tensor.requires_grad]
        sums: list[Tensor] = []
        gradient_ND = torch.empty_like(hidden_ND)

        def piece(hidden_nD: Tensor, labels_n: Tensor, gradient_nD: Tensor) -> CrossEntropy:
            with torch.enable_grad():
                leaf_nD = hidden_nD.detach().requires_grad_()
                found = full_cross_entropy(scores, leaf_nD, labels_n)
                of_hidden, *of_shared = torch.autograd.grad(found.total, [leaf_nD, *wanted])
            gradient_nD.copy_(of_hidden)
            # Not in place: two of the gradients may be one tensor.
            sums[:] = [total + part for total, part in zip(sums, of_shared, strict=True)] if sums else of_shared
            return found._replace(total=found.total.detach())

        parts = _pieces(hidden_ND, labels_N, rows)
        found = _added(piece(*part, slot) for part, slot in zip(parts, gradient_ND.split(rows), strict=True))
        ctx.mark_non_differentiable(found.correct, found.largest)
        ctx.shared_needs_grad = [tensor.requires_grad for tensor in shared]
        ctx.save_for_backward(gradient_ND, *sums)
        return found.total, found.correct, found.largest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        gradient_ND, *sums = (gradient * grad_total for gradient in ctx.saved_tensors)
        remaining = iter(sums)
        of_shared = [next(remaining) if needed else None for needed in ctx.shared_needs_grad]
        return None, None, None, gradient_ND, *of_shared


if TYPE_CHECKING:

    class HeadedBackbone(nn.Module):
        """A backbone with its vocabulary head."""

        def logits(self, hidden_ND: Tensor) -> Tensor: ...

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
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from sparselt_dist.data.batch import IGNORE_INDEX

_SCORES_AT_ONCE = 2**24  # 64 MiB of fp32
_NUMBERS_IN_CACHE = 2**19  # 2 MiB of fp32
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
    if len(scores_NV) == 0:
        nothing = _widened(scores_NV).sum()  # attached to all that scores depend on
        return CrossEntropy(nothing, torch.zeros_like(nothing, dtype=torch.int64), torch.zeros_like(nothing))
    return CrossEntropy(
        *cast(Callable[..., tuple[Tensor, Tensor, Tensor]], _CrossEntropyOfScores.apply)(scores_NV, labels_N)
    )


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


def _widened(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


class _CrossEntropyOfScores(torch.autograd.Function):
    """Sum of softmax cross-entropies, and its gradient by the scores in the same pass over rows that fit a cache.

    Computed in float32 or wider from scores of any dtype. Nothing of size [N, V] is kept but the gradient, in the dtype of the
    scores; of float16 scores in float32, for it is formed before the loss is scaled and could underflow.
    """

    @staticmethod
    def forward(ctx: Any, scores_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gradient_NV: Tensor | None = None
        if ctx.needs_input_grad[0]:
            kept_dtype = torch.float32 if scores_NV.dtype == torch.float16 else scores_NV.dtype
            gradient_NV = torch.empty_like(scores_NV, dtype=kept_dtype)
            ctx.save_for_backward(gradient_NV)
        ctx.scores_dtype = scores_NV.dtype
        ctx.rows = rows = _rows_in_cache(scores_NV)
        totals, correct, largest = [], [], []
        for start in range(0, len(scores_NV), rows):
            raw_nV, labels_n = scores_NV[start : start + rows], labels_N[start : start + rows]
            counts_n1 = (labels_n != IGNORE_INDEX)[:, None]
            label_n1 = labels_n.clamp(min=0)[:, None]
            best_n1 = raw_nV.amax(dim=1, keepdim=True)
            own_n1 = raw_nV.gather(1, label_n1)
            correct.append(count_correct(raw_nV, labels_n, (own_n1 == best_n1).squeeze(1)))
            best_n1, own_n1 = _widened(best_n1), _widened(own_n1)
            terms_nV = (raw_nV - best_n1).exp_()
            sums_n1 = terms_nV.sum(dim=1, keepdim=True)
            totals.append(((sums_n1.log() + best_n1 - own_n1) * counts_n1).sum())
            largest.append(best_n1.max())
            if gradient_NV is not None:
                share_n1 = counts_n1.to(terms_nV.dtype)
                terms_nV.mul_(share_n1 / sums_n1).scatter_add_(1, label_n1, -share_n1)
                gradient_NV[start : start + rows] = terms_nV
        results = torch.stack(totals).sum(), torch.stack(correct).sum(), torch.stack(largest).max()
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *unused: Tensor) -> tuple[Tensor, None]:
        (gradient_NV,) = ctx.saved_tensors
        scaled_NV = torch.empty_like(gradient_NV, dtype=ctx.scores_dtype)
        for part_nV, slot_nV in zip(gradient_NV.split(ctx.rows), scaled_NV.split(ctx.rows), strict=True):
            slot_nV.copy_(_widened(part_nV) * grad_total)  # in half precision the factor would be rounded first
        return scaled_NV, None


def count_correct(scores_nV: Tensor, labels_n: Tensor, may_be_n: Tensor) -> Tensor:
    """How many labels have the largest score, the first of several equal ones; `may_be_n`: whether a label's is as large."""
    # `argmax` is slow on a CPU, so only rows that can be right are looked at; on an accelerator picking them is waited for.
    if scores_nV.device.type == "cpu":
        picked = (may_be_n & (labels_n != IGNORE_INDEX)).nonzero().squeeze(1)
        scores_nV, labels_n = _widened(scores_nV[picked]), labels_n[picked]
    return (scores_nV.argmax(dim=1) == labels_n).sum()


def _rows_in_cache(scores_NV: Tensor) -> int:
    """Rows handled at a time: few on a CPU, whose caches are much faster than its memory."""
    numbers = _NUMBERS_IN_CACHE if scores_NV.device.type == "cpu" else _SCORES_AT_ONCE
    return max(1, numbers // scores_NV.shape[1])


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

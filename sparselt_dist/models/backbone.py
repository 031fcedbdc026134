"""Any Hugging Face encoder or decoder as the backbone of an objective, and the model that the trainer trains.

`Backbone` wraps a whole `transformers` model. Its forward pass ends at the hidden states that enter the head; `logits`
runs the model's own head on any of them, so that only the targets of a batch are projected to the vocabulary. No
parameter is copied or held twice: the wrapped model is the one that is saved.

Shapes: B rows, L positions, D hidden, V vocabulary, N chosen positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from sparselt_dist.config import ModelSection
from sparselt_dist.data.batch import Batch
from sparselt_dist.errors import ConfigError
from sparselt_dist.models.construction import POSITIONS_AFTER_PADDING, is_causal, make_model
from sparselt_dist.models.unpadding import find_layout
from sparselt_dist.objectives.base import LossOutput, SplitLossOutput, TokenizerInfo


class Backbone(nn.Module):
    """A `transformers` model split at the entrance of its head.

    Args:
        unpad: compute padded batches without their padding, see `unpadding.py`.
    """

    def __init__(self, model: PreTrainedModel, *, has_head: bool, unpad: bool = False) -> None:
        super().__init__()
        self.model = model
        self.unpad = unpad
        self.config = model.config
        self.hidden_size: int = model.config.hidden_size
        self.vocab_size: int = model.config.vocab_size
        self.is_causal = is_causal(model.config)
        self.has_head = has_head
        self._accepted = frozenset(inspect.signature(self.body.forward).parameters)
        self._documents: tuple[Tensor, Tensor] | None = None
        self._full_mask: Tensor | None = None

    @property
    def body(self) -> PreTrainedModel:
        """The model without its head; what `torch.compile` should compile."""
        return cast(PreTrainedModel, self.model.base_model)

    def get_input_embeddings(self) -> nn.Module:
        """The table of word embeddings [V, D]; call it with ids."""
        return cast(nn.Module, self.model.get_input_embeddings())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, L, D] that enter the head, from ids [B, L] int64 and a mask [B, L] of 1 (attend) and 0.

        `segment_ids` [B, L] (0: padding) keep the documents of a packed row apart: attention stays inside a document.
        `position_ids` [B, L] count from 0, whatever the architecture's own first position is.

        Raises:
            ConfigError: packed rows, and an architecture whose positions cannot be kept apart.
        """
        if segment_ids is None and self._documents is not None and self._documents[0].shape == input_ids.shape:
            segment_ids, position_ids = self._documents
        if self.unpad and segment_ids is None and attention_mask is not None and position_ids is None:
            layout = find_layout(attention_mask)
            if layout is not None:
                packed_RW = layout.pack(input_ids)
                hidden_RWD = self(packed_RW, None, layout.segment_ids_RW, layout.position_ids_RW)
                return layout.unpack(hidden_RWD, *input_ids.shape)
        options: dict[str, Any] = {"use_cache": False} if "use_cache" in self._accepted else {}
        mask: Tensor | dict[str, Tensor] | None = attention_mask
        if segment_ids is not None:
            mask = self._segment_mask(segment_ids)
        elif attention_mask is not None and self._hides_nothing(attention_mask):
            mask = None  # attention without a mask is faster
        if position_ids is not None:
            options["position_ids"] = position_ids + self._first_position()
        hidden_BLD: Tensor = self.body(input_ids=input_ids, attention_mask=mask, **options)[0]
        return hidden_BLD

    @contextmanager
    def knowing(self, batch: Batch) -> Iterator[None]:
        """Inside, rows of the batch's shape are packed as the batch says: no objective can forget to pass that on. And
        whether its rows are full is told by its count, without a look at the mask."""
        if "segment_ids" in batch:
            self._documents = (batch["segment_ids"], batch["position_ids"])
        mask = batch.get("attention_mask")
        if mask is not None and "num_tokens" in batch and int(batch["num_tokens"]) == mask.numel():
            self._full_mask = mask
        try:
            yield
        finally:
            self._documents = self._full_mask = None

    def _hides_nothing(self, mask_BL: Tensor) -> bool:
        """Whether a mask is known to be all ones; on an accelerator a look at it would be waited for."""
        return mask_BL is self._full_mask or (mask_BL.device.type == "cpu" and bool(mask_BL.all()))

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """The model's own head on any hidden states: [N, D] to [N, V]; N may be 0."""
        if not self.has_head:
            raise ConfigError(
                f"objective: asked {type(self.model).__name__} for vocabulary logits, expected none, for it was built "
                "without its head; an objective that needs the head says so by needs_lm_head"
            )
        # The class's forward on a stand-in that shares everything but the body. It is made anew each time, so that
        # nothing is registered twice, a copied or pickled model stays whole and ZeRO's replaced dicts are seen.
        stand_in = object.__new__(type(self.model))
        given = _GivenStates(self.body, hidden_ND[None])
        modules = {**self.model._modules, self.model.base_model_prefix: given}
        stand_in.__dict__.update({**self.model.__dict__, "_modules": modules})
        output = type(self.model).forward(stand_in)
        logits_1NV: Tensor = output[0] if isinstance(output, tuple) else output.logits
        return logits_1NV[0]

    def _first_position(self) -> int:
        return self.config.pad_token_id + 1 if self.config.model_type in POSITIONS_AFTER_PADDING else 0

    def _segment_mask(self, segment_ids_BL: Tensor) -> Tensor | dict[str, Tensor]:
        """The architecture's own mask, cut to the pairs of one document: [B, 1, L, L], true where attention may go.

        Models that mix full and windowed layers take a mask for each kind.
        """
        kinds = self._attention_kinds()
        same_B1LL = segment_ids_BL[:, None, :, None] == segment_ids_BL[:, None, None, :]
        masks = {kind: self._own_mask(kind, segment_ids_BL) & same_B1LL for kind in sorted(kinds)}
        return masks["full_attention"] if kinds == {"full_attention"} else self._as_taken(masks)

    def _as_taken(self, masks: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        return masks if getattr(self.config, "layer_types", None) else masks["sliding_attention"]

    def _attention_kinds(self) -> set[str]:
        kinds = set(getattr(self.config, "layer_types", None) or ())
        if not kinds:
            windowed = self.is_causal and getattr(self.config, "sliding_window", None) is not None
            kinds = {"sliding_attention" if windowed else "full_attention"}
        implementation = self.config._attn_implementation
        if (
            kinds - {"full_attention", "sliding_attention"}
            or implementation != "sdpa"
            or getattr(self.model, "_is_stateful", False)
            or getattr(self.config, "token_dropout", False)  # ESM: counts tokens by a mask of two dimensions
            or "position_ids" not in self._accepted
        ):
            raise ConfigError(
                f"model.architecture: found {self.config.model_type} (attention {implementation}, layers "
                f"{', '.join(sorted(kinds))}), which cannot keep the documents of a packed row apart, expected softmax "
                "attention through sdpa; choose another architecture or rows without segment_ids"
            )
        return kinds

    def _own_mask(self, kind: str, ids_BL: Tensor) -> Tensor:
        # The makers of masks look only at this tensor's first two sizes, dtype and device.
        shape_only = torch.empty((*ids_BL.shape, 0), dtype=self.model.dtype, device=ids_BL.device)
        options: dict[str, Any] = {"config": self.config, "inputs_embeds": shape_only, "attention_mask": None}
        whole = kind == "full_attention"
        make: Callable[..., Any]
        if self.is_causal:
            make = create_causal_mask if whole else create_sliding_window_causal_mask
            options |= {"past_key_values": None, "allow_is_causal_skip": False}
        else:
            make = create_bidirectional_mask if whole else create_bidirectional_sliding_window_mask
            options |= {"allow_is_bidirectional_skip": False}
        return cast(Tensor, make(**options))


class _GivenOutput(BaseModelOutputWithPoolingAndCrossAttentions):  # type: ignore[misc]
    """An output that has nothing but hidden states, whatever else a head looks for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class _GivenStates:
    """Stands where the body was: returns the given hidden states; all else is the body's own."""

    def __init__(self, body: PreTrainedModel, hidden: Tensor) -> None:
        self._body, self._hidden = body, hidden

    def __call__(self, *args: Any, **kwargs: Any) -> _GivenOutput:
        return _GivenOutput(last_hidden_state=self._hidden)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._body, name)
        return self if isinstance(value, PreTrainedModel) else value  # OPT and its kin call the body's own body


class PretrainingModel(nn.Module):
    """Backbone and objective: one module from a batch to a loss."""

    def __init__(self, backbone: Backbone, objective: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.objective = objective

    def forward(self, batch: Batch, *, statistics: bool = False) -> LossOutput | SplitLossOutput | Tensor:
        """The objective's loss of a batch, or the `statistics` that its step is told beforehand."""
        objective: Any = self.objective
        with self.backbone.knowing(batch):
            output: LossOutput | SplitLossOutput | Tensor = (
                objective.statistics(self.backbone, batch) if statistics else objective(self.backbone, batch)
            )
        return output

    def set_progress(self, step: int, progress: float) -> None:
        """Tell the objective the optimizer step (from 0) and the spent share of the budget [0, 1]."""
        set_progress: Any = self.objective.set_progress
        set_progress(step, progress)


def build_backbone(
    model: ModelSection, tokenizer: TokenizerInfo, *, sequence_length: int | None, with_head: bool, unpad: bool = False
) -> Backbone:
    """The configured backbone, float32, on the CPU; draws from torch's global generator, which the caller seeds.

    `sequence_length` (null: unknown) makes the position table long enough. Without head, the vocabulary head's
    parameters do not exist.

    Raises:
        ConfigError: unknown architecture or field, or values that the architecture refuses.
        CheckpointError: `model.init_from` is no checkpoint, or one of another model or vocabulary.
    """
    built = make_model(model, tokenizer, sequence_length=sequence_length, with_head=with_head)
    return Backbone(built, has_head=with_head, unpad=unpad)

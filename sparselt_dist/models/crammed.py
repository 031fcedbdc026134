"""crammed-bert, version 2, as a `transformers` model (Geiping & Goldstein, "Cramming", arXiv 2212.14034).

A pre-norm encoder without biases (they exist only in the norms): scaled sinusoidal positions, a norm after the
embedding, gated GELU whose inner width is *not* widened, a final norm, and a head that is nothing but the tied
word embedding. Invariants:

* the head is tied to the table unless `tie_word_embeddings` is false;
* id 0 is padding: its row of the table gets no gradient from the look-up, yet it starts non-zero and the tied
  head trains it, as in the official code;
* the rows of the fused projection are grouped head by head, in each head query, key, value: the official order;
* the position table is a constant, rebuilt wherever the module is moved or loaded, and never stored;
* with labels, only the labelled positions pass through the head;
* pretraining runs without dropout, so the dropout fields default to 0; fine-tuning sets them to 0.1.

Three fields leave the official model, each on its own: `norm_type: rms` (Zhang & Sennrich 2019, arXiv 1910.07467),
`position_type: rope` (Su et al. 2021, arXiv 2104.09864) and `gate_activation` (Shazeer 2020, arXiv 2002.05202; relu2: So et
al. 2021, arXiv 2109.08668).

This file stands alone (torch, transformers and the standard library): `save_pretrained` copies it beside the weights,
so that an environment without this package loads the model with `trust_remote_code=True`.

Shapes: B rows, T positions, D hidden, H heads, E width of a head, V vocabulary, N labelled positions,
C classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple

MODEL_TYPE = "crammed-bert"
IGNORE_INDEX = -100
MASKED_SCORE = -10000.0  # added to the scores of hidden keys; the official value, finite in half precision
LONGEST_PRODUCT_ROW = 512  # beyond it attention by products moves more memory than it saves
_Value = TypeVar("_Value")


class CrammedBertConfig(PretrainedConfig):  # type: ignore[misc]
    """Sizes of crammed-bert; the defaults are the full model of 119,589,889 parameters.

    `intermediate_size` is the projection before gating (3072 gives an inner width of 1536). `pooler` is of sequence
    classification: "zero_index" takes the first position, "avg" the mean over all, padding included, as officially.
    `decoder_bias` gives the head a bias, as the export of a recovered head needs. `norm_type`, `position_type` and
    `gate_activation` choose the parts of a layer; the defaults are the official model's.
    """

    model_type = MODEL_TYPE

    vocab_size: int = 32768
    hidden_size: int = 768
    num_hidden_layers: int = 16
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 128
    pad_token_id: int | None = 0
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    classifier_dropout: float = 0.1
    classifier_hidden_size: int = 1024
    pooler: Literal["zero_index", "avg"] = "zero_index"
    tie_word_embeddings: bool = True
    decoder_bias: bool = False
    norm_type: Literal["layer", "rms"] = "layer"
    position_type: Literal["scaled-sinusoidal", "rope"] = "scaled-sinusoidal"
    rope_theta: float = 10000.0
    gate_activation: Literal["gelu", "silu", "relu2"] = "gelu"

    def __post_init__(self, **kwargs: Any) -> None:
        # Every Auto class finds its class in the copied file, whichever of them was saved.
        kwargs.setdefault("auto_map", {name: f"crammed.{cls}" for name, cls in _AUTO_CLASSES.items()})
        super().__post_init__(**kwargs)


_AUTO_CLASSES = {
    "AutoConfig": "CrammedBertConfig",
    "AutoModel": "CrammedBertModel",
    "AutoModelForMaskedLM": "CrammedBertForMaskedLM",
    "AutoModelForSequenceClassification": "CrammedBertForSequenceClassification",
}


VARIANTS = {
    "pooler": ("zero_index", "avg"),
    "norm_type": ("layer", "rms"),
    "position_type": ("scaled-sinusoidal", "rope"),
    "gate_activation": ("gelu", "silu", "relu2"),
}


def check_config(config: CrammedBertConfig) -> None:
    """Whether a model can be built; every model checks its own.

    Raises:
        ValueError: lists every fault.
    """
    sizes = "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings"
    values = {name: getattr(config, name) for name in sizes.split()}
    wrong = {name: value for name, value in values.items() if not (isinstance(value, int) and value >= 1)}
    faults = [f"{name} is {value!r}, expected a whole number from 1" for name, value in wrong.items()]
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    if not wrong and (width % heads or width % 2 or inner % 2):
        faults.append(
            f"hidden_size is {width} and intermediate_size {inner}, expected even numbers, the first a multiple of "
            f"num_attention_heads {heads}"
        )
    if config.pad_token_id != 0:
        faults.append(
            f"pad_token_id is {config.pad_token_id}, expected 0: the row without look-up gradient must be padding; "
            "use a tokenizer whose padding token has id 0"
        )
    for name, choices in VARIANTS.items():
        if getattr(config, name) not in choices:
            faults.append(f"{name} is {getattr(config, name)!r}, expected {' or '.join(map(repr, choices))}")
    if config.position_type == "rope":
        if not wrong and width % (2 * heads):
            faults.append(f"hidden_size is {width}, expected a multiple of {2 * heads}: rope turns pairs of a head")
        if not config.rope_theta > 0:
            faults.append(f"rope_theta is {config.rope_theta!r}, expected a number above 0")
    if faults:
        raise ValueError("crammed-bert: " + "; ".join(faults))


def sinusoid_table(length: int, width: int) -> Tensor:
    """Positions [length, width], float32: sin(p * 10000^(-2i/width)) in even columns, the cosine in odd ones.

    Computed in float32 throughout, as the official table is, so that both hold the same bits.
    """
    positions = torch.arange(length, dtype=torch.float32, device="cpu")[:, None]
    steps = torch.arange(0, width, 2, dtype=torch.float32, device="cpu")
    angles = positions * torch.exp(steps * (-math.log(10000.0) / width))
    return torch.stack((torch.sin(angles), torch.cos(angles)), dim=-1).reshape(length, width)


Rotation = tuple[Tensor, Tensor]
"""Cosines and sines [B or 1, 1, T, E/2] of the angles by which queries and keys are turned."""


def rotation_at(positions_BT: Tensor, width: int, theta: float, dtype: torch.dtype) -> Rotation:
    """The angles p * theta^(-2i/E) of positions [B or 1, T], for pairs i of a head of width E; float32 at least."""
    dtype = torch.promote_types(dtype, torch.float32)
    pairs = torch.arange(0, width, 2, dtype=dtype, device=positions_BT.device)
    angles_BTE = positions_BT[..., None].to(dtype) * torch.exp(pairs * (-math.log(theta) / width))
    return torch.cos(angles_BTE)[:, None], torch.sin(angles_BTE)[:, None]


def rotate(states_BHTE: Tensor, rotation: Rotation) -> Tensor:
    """Each pair (i, i + E/2) turned by its angle, so that products of two states depend on their distance alone."""
    cosine, sine = rotation
    first, second = states_BHTE.chunk(2, dim=-1)
    turned_BHTE = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    return turned_BHTE.to(states_BHTE.dtype)


def make_norm(config: CrammedBertConfig) -> nn.Module:
    """A norm over the last dimension D: with mean and bias (`layer`) or without both (`rms`)."""
    if config.norm_type == "rms":
        return nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class CrammedBertEmbeddings(nn.Module):
    """Word embedding, + scale * sinusoid unless positions are rotary, then norm and dropout."""

    position_table_TD: Tensor | None

    def __init__(self, config: CrammedBertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        table = None
        if config.position_type == "scaled-sinusoidal":
            self.position_scale = nn.Parameter(torch.full((1,), width**-0.5))
            table = sinusoid_table(config.max_position_embeddings, width)
        self.register_buffer("position_table_TD", table, persistent=False)
        self.norm = make_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def reset_position_table(self) -> None:
        """Fill the table, where there is one, again in its present dtype and on its present device."""
        if self.position_table_TD is not None:
            with torch.no_grad():
                self.position_table_TD.copy_(sinusoid_table(*self.position_table_TD.shape))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CrammedBertEmbeddings:
        # `to_empty` leaves noise in a buffer that no checkpoint holds, and a cast to bf16 and back loses digits.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.reset_position_table()
        return self

    def forward(self, input_ids_BT: Tensor | None, position_ids_BT: Tensor | None, words_BTD: Tensor | None) -> Tensor:
        if words_BTD is None:
            words_BTD = self.word_embeddings(input_ids_BT)
        summed_BTD = self._with_positions(words_BTD, position_ids_BT)
        hidden_BTD: Tensor = self.dropout(self.norm(summed_BTD))
        return hidden_BTD

    def _with_positions(self, words_BTD: Tensor, position_ids_BT: Tensor | None) -> Tensor:
        if self.position_table_TD is None:
            return words_BTD
        length, limit = words_BTD.shape[1], self.position_table_TD.shape[0]
        if length > limit and position_ids_BT is None:
            raise ValueError(
                f"crammed-bert: found rows of {length} positions, expected at most {limit} (max_position_embeddings); "
                "shorten the rows or build the model with a larger max_position_embeddings"
            )
        table = self.position_table_TD[:length] if position_ids_BT is None else self.position_table_TD[position_ids_BT]
        summed_BTD: Tensor = words_BTD + self.position_scale * table.to(words_BTD.dtype)
        return summed_BTD


def attend(query_BHTE: Tensor, key_BHTE: Tensor, value_BHTE: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """softmax(Q K^T / sqrt(E) + bias) V: [B, H, T, E] with E the width of a head.

    On a CPU in bfloat16 the fused kernel's backward pass takes several times as long as its forward pass; for short rows two
    batched products with a float32 softmax between them are faster, at the price of holding the weights [B, H, T, T].

    Args:
        bias: added to the scores, broadcastable to [B, H, T, T]; None adds nothing.
        dropout: probability that a weight is dropped; 0 outside of training.
    """
    if _products_are_faster(query_BHTE):
        return attend_by_products(query_BHTE, key_BHTE, value_BHTE, bias, dropout)
    return F.scaled_dot_product_attention(query_BHTE, key_BHTE, value_BHTE, attn_mask=bias, dropout_p=dropout)


def _products_are_faster(query_BHTE: Tensor) -> bool:
    if query_BHTE.device.type != "cpu" or query_BHTE.shape[-2] > LONGEST_PRODUCT_ROW:
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query_BHTE.dtype
    return dtype == torch.bfloat16


def attend_by_products(
    query_BHTE: Tensor, key_BHTE: Tensor, value_BHTE: Tensor, bias: Tensor | None, dropout: float
) -> Tensor:
    """As `attend`, by two batched products; the softmax is in float32 at least."""
    scores_BHTT = torch.matmul(query_BHTE, key_BHTE.transpose(-1, -2)) * query_BHTE.shape[-1] ** -0.5
    scores_BHTT = scores_BHTT.to(torch.promote_types(scores_BHTT.dtype, torch.float32))
    if bias is not None:
        scores_BHTT = scores_BHTT + bias
    weights_BHTT = scores_BHTT.softmax(dim=-1).to(value_BHTE.dtype)
    mixed_BHTE: Tensor = torch.matmul(F.dropout(weights_BHTT, dropout, training=dropout > 0), value_BHTE)
    return mixed_BHTE


class CrammedBertAttention(nn.Module):
    """Softmax attention over one fused projection; no position term but the rotation, if there is one."""

    def __init__(self, config: CrammedBertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, hidden_BTD: Tensor, bias: Tensor | None, rotation: Rotation | None = None) -> Tensor:
        rows, length, width = hidden_BTD.shape
        fused = self.qkv(hidden_BTD).view(rows, length, self.num_heads, 3, width // self.num_heads)
        query, key, value = fused.permute(3, 0, 2, 1, 4).unbind(0)  # each [B, H, T, E]
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        context = attend(query, key, value, bias, self.dropout if self.training else 0.0)
        mixed_BTD: Tensor = self.output(context.transpose(1, 2).reshape(rows, length, width))
        return mixed_BTD


def _squared_relu(gate: Tensor) -> Tensor:
    return F.relu(gate).square()


_GATES: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu, "relu2": _squared_relu}


class CrammedBertFeedForward(nn.Module):
    """W_out(f(g) * u) with (u, g) the halves of one projection and f GELU unless `gate_activation` says otherwise."""

    def __init__(self, config: CrammedBertConfig) -> None:
        super().__init__()
        self.activate = _GATES[config.gate_activation]
        self.input = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.output = nn.Linear(config.intermediate_size // 2, config.hidden_size, bias=False)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        values, gate = self.input(hidden_BTD).chunk(2, dim=-1)
        output_BTD: Tensor = self.output(self.activate(gate) * values)
        return output_BTD


class CrammedBertLayer(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: CrammedBertConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = CrammedBertAttention(config)
        self.ffn_norm = make_norm(config)
        self.ffn = CrammedBertFeedForward(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_BTD: Tensor, bias: Tensor | None, rotation: Rotation | None = None) -> Tensor:
        hidden_BTD = hidden_BTD + self.dropout(self.attention(self.attention_norm(hidden_BTD), bias, rotation))
        output_BTD: Tensor = hidden_BTD + self.dropout(self.ffn(self.ffn_norm(hidden_BTD)))
        return output_BTD


def attention_bias(attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What to add to the scores, broadcastable to [B, H, T, T], from a mask of 1 (attend) and 0.

    The mask is [B, T] (keys), [B, T, T] or [B, 1, T, T] (query, key); a floating mask of four dimensions is taken as
    the bias itself, as elsewhere in transformers.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() == 4 and attention_mask.is_floating_point():
        return attention_mask.to(dtype)
    if attention_mask.dim() < 4:
        attention_mask = attention_mask[:, None, None] if attention_mask.dim() == 2 else attention_mask[:, None]
    bias: Tensor = (1.0 - attention_mask.to(dtype)) * MASKED_SCORE
    return bias


class CrammedBertPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """Initial weights N(0, initializer_range^2), nothing scaled by depth; norms 1 and 0."""

    config_class = CrammedBertConfig
    base_model_prefix = "encoder"
    _supports_sdpa = True
    _no_split_modules = ["CrammedBertLayer"]

    def __init__(self, config: CrammedBertConfig) -> None:
        check_config(config)
        super().__init__(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            # The padding row too: it must start non-zero, for the tied head reads it.
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, CrammedBertEmbeddings) and module.position_table_TD is not None:
            nn.init.constant_(module.position_scale, self.config.hidden_size**-0.5)
            module.reset_position_table()


class CrammedBertModel(CrammedBertPreTrainedModel):
    """The encoder. `last_hidden_state` [B, T, D] is the residual stream after the final norm."""

    def __init__(self, config: CrammedBertConfig) -> None:
        super().__init__(config)
        self.embeddings = CrammedBertEmbeddings(config)
        self.layers = nn.ModuleList(CrammedBertLayer(config) for _ in range(config.num_hidden_layers))
        self.final_norm = make_norm(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value  # type: ignore[assignment]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,  # accepted since tokenizers send it; the model has none
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Encode. `hidden_states`, if asked for, are the embedding and each layer's output, the last one normed."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("crammed-bert: give exactly one of input_ids and inputs_embeds")
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_BTD = self.embeddings(input_ids, position_ids, inputs_embeds)
        bias = attention_bias(attention_mask, hidden_BTD.dtype)
        rotation = self._rotation(hidden_BTD, position_ids)
        states = []
        for layer in self.layers:
            if keep:
                states.append(hidden_BTD)
            hidden_BTD = layer(hidden_BTD, bias, rotation)
        hidden_BTD = self.final_norm(hidden_BTD)
        return BaseModelOutput(last_hidden_state=hidden_BTD, hidden_states=(*states, hidden_BTD) if keep else None)

    def _rotation(self, hidden_BTD: Tensor, position_ids_BT: Tensor | None) -> Rotation | None:
        """The same in all layers, so made once."""
        if self.config.position_type != "rope":
            return None
        if position_ids_BT is None:
            position_ids_BT = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)[None]
        width = self.config.hidden_size // self.config.num_attention_heads
        return rotation_at(position_ids_BT, width, self.config.rope_theta, hidden_BTD.dtype)


class CrammedBertForMaskedLM(CrammedBertPreTrainedModel):
    """The encoder with the word embedding as its head, or a table of its own: no transform, and no bias unless
    `decoder_bias` asks for one."""

    _tied_weights_keys = {"decoder.weight": "encoder.embeddings.word_embeddings.weight"}

    def __init__(self, config: CrammedBertConfig) -> None:
        super().__init__(config)
        self.encoder = CrammedBertModel(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=config.decoder_bias)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Without labels `logits` are [B, T, V]. With labels [B, T] (-100: none) `loss` is the mean cross-entropy over
        the N labelled positions and `logits` are theirs, [N, V], in reading order; the loss of N = 0 is zero.

        The other arguments are those of `CrammedBertModel`.
        """
        encoded = self.encoder(input_ids, attention_mask, **kwargs)
        if labels is None:
            logits_BTV = self.decoder(encoded.last_hidden_state)
            return MaskedLMOutput(logits=logits_BTV, hidden_states=encoded.hidden_states)
        labelled_BT = labels != IGNORE_INDEX
        logits_NV = self.decoder(encoded.last_hidden_state[labelled_BT])
        loss = mean_cross_entropy(logits_NV, labels[labelled_BT])
        return MaskedLMOutput(loss=loss, logits=logits_NV, hidden_states=encoded.hidden_states)


def mean_cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Mean over N, in float32 at least; zero, and attached to the graph, for N = 0."""
    if logits_NV.dtype in (torch.float16, torch.bfloat16):
        logits_NV = logits_NV.float()
    return F.cross_entropy(logits_NV, labels_N, reduction="sum") / max(labels_N.numel(), 1)


class CrammedBertForSequenceClassification(CrammedBertPreTrainedModel):
    """The encoder, one vector a row, linear layer, tanh, dropout and a linear classifier (one output: regression)."""

    def __init__(self, config: CrammedBertConfig) -> None:
        super().__init__(config)
        self.encoder = CrammedBertModel(config)
        self.pooler = nn.Linear(config.hidden_size, config.classifier_hidden_size)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.head = nn.Linear(config.classifier_hidden_size, config.num_labels or 2)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """`logits` [B, C]. Labels: class ids [B], targets [B] of a regression, or floats [B, C] for several labels.

        The other arguments are those of `CrammedBertModel`.
        """
        encoded = self.encoder(input_ids, attention_mask, **kwargs)
        hidden_BTD = encoded.last_hidden_state
        pooled_BD = hidden_BTD[:, 0] if self.config.pooler == "zero_index" else hidden_BTD.mean(dim=1)
        logits_BC = self.head(self.dropout(torch.tanh(self.pooler(pooled_BD))))
        loss = None if labels is None else self._loss(logits_BC, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits_BC, hidden_states=encoded.hidden_states)

    def _loss(self, logits_BC: Tensor, labels: Tensor) -> Tensor:
        kind = self.config.problem_type
        if kind == "regression" or (kind is None and self.config.num_labels == 1):
            return F.mse_loss(logits_BC.squeeze(-1), labels.to(logits_BC.dtype).view_as(logits_BC.squeeze(-1)))
        if kind == "multi_label_classification" or (kind is None and labels.is_floating_point()):
            return F.binary_cross_entropy_with_logits(logits_BC, labels)
        return F.cross_entropy(logits_BC, labels.view(-1))


_OFFICIAL_NAMES = {
    r"layers\.\d+\.attn\.self_attention\.norm_factor|embedding\.pos_embedding\.pe": "",  # constants, recomputed by us
    r"embedding\.word_embedding\.weight": "encoder.embeddings.word_embeddings.weight",
    r"embedding\.pos_embedding\.scale_factor": "encoder.embeddings.position_scale",
    r"embedding\.norm\.(weight|bias)": r"encoder.embeddings.norm.\1",
    r"layers\.(\d+)\.norm1\.(weight|bias)": r"encoder.layers.\1.attention_norm.\2",
    r"layers\.(\d+)\.attn\.self_attention\.query_key_value\.weight": r"encoder.layers.\1.attention.qkv.weight",
    r"layers\.(\d+)\.attn\.dense\.weight": r"encoder.layers.\1.attention.output.weight",
    r"layers\.(\d+)\.norm2\.(weight|bias)": r"encoder.layers.\1.ffn_norm.\2",
    r"layers\.(\d+)\.ffn\.dense_in\.weight": r"encoder.layers.\1.ffn.input.weight",
    r"layers\.(\d+)\.ffn\.dense_out\.weight": r"encoder.layers.\1.ffn.output.weight",
    r"final_norm\.(weight|bias)": r"encoder.final_norm.\1",
    r"decoder\.weight": "decoder.weight",
    r"pooler\.dense\.(weight|bias)": r"pooler.\1",
    r"head\.(weight|bias)": r"head.\1",
}
_WRAPPERS = ("module", "_orig_mod")  # left in the names by data parallelism and by torch.compile


def convert_official_state_dict(state: dict[str, _Value]) -> dict[str, _Value]:
    """The official names of weights or gradients (crammed-bert v2) to ours; values pass untouched.

    Takes the pretraining model, the classifier and the bare encoder, with or without `encoder.`, `module.` and
    `_orig_mod.`. The tied `decoder.weight` is kept where given.

    Raises:
        ValueError: a name that crammed-bert v2 does not have (all are listed), or two names for one tensor.
    """
    result: dict[str, _Value] = {}
    unknown = []
    for name, value in state.items():
        bare = ".".join(part for part in name.split(".") if part not in _WRAPPERS).removeprefix("encoder.")
        matches = ((re.fullmatch(pattern, bare), ours) for pattern, ours in _OFFICIAL_NAMES.items())
        ours = next((match.expand(ours) for match, ours in matches if match), None)
        if ours is None:
            unknown.append(name)
        elif ours and ours in result:
            raise ValueError(f"official crammed-bert state: {name!r} gives {ours!r} a second time")
        elif ours:
            result[ours] = value
    if unknown:
        raise ValueError(
            f"official crammed-bert state: {len(unknown)} of {len(state)} names are not of crammed-bert v2: "
            f"{', '.join(unknown)}; expected the state dict of its model (names such as "
            "'encoder.embedding.word_embedding.weight'), not the training checkpoint around it or another model"
        )
    return result


CrammedBertConfig.register_for_auto_class()
# A copy loaded with trust_remote_code is found by its folder's auto_map and must not displace the package's own.
_IS_COPY = __name__.startswith("transformers_modules")
if not _IS_COPY:
    AutoConfig.register(MODEL_TYPE, CrammedBertConfig, exist_ok=True)
for _auto, _model in (
    (AutoModel, CrammedBertModel),
    (AutoModelForMaskedLM, CrammedBertForMaskedLM),
    (AutoModelForSequenceClassification, CrammedBertForSequenceClassification),
):
    _model.register_for_auto_class(_auto.__name__)
    if not _IS_COPY:
        _auto.register(CrammedBertConfig, _model, exist_ok=True)

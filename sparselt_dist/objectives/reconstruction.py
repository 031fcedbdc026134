"""The decoder of sparse latent typing: it rebuilds a row from the typed states of its tokens (Ren et al. 2022).

One post-norm transformer layer, teacher-forced, with cross-attention to the gated memory, followed by the encoder's own
word table and a bias of its own. Quirks of the official code (github.com/renll/SparseLT) that its numbers depend on:

* it has no embedding of its own: word vectors pass through the encoder's whole embedding module TWICE, so positions,
  norm and dropout apply twice, and then through a norm of its own;
* in training the only layer is skipped with a fixed probability (LayerDrop), one decision a step, so that the source is
  invisible; here it is computed and multiplied by 0, so all ranks and parameters take part in every step;
* linear layers keep the framework's initial values, norms its epsilon of 1e-5;
* null tokens stay in the cross-attention, as zero memory.

B rows, S decoder positions, T memory positions, D hidden size, H heads, N chosen positions, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselt_dist.errors import ConfigError
from sparselt_dist.objectives.linear_cross_entropy import (
    CrossEntropy,
    chunked_cross_entropy,
    full_cross_entropy,
    is_half_autocast,
    rows_at_once,
)

_WORD_ARGUMENTS = ("inputs_embeds", "input_embeds", "words_BTD")
_PLACE_ARGUMENTS = ("position_ids", "position_ids_BT")


# ---------------------------------------------------------------- the encoder's embedding module


def check_embeddings(backbone: nn.Module) -> None:
    """Whether the decoder can share the encoder's embeddings.

    Raises:
        ConfigError: the embedding module takes no word vectors, or vectors of another width than the hidden states.
    """
    module, table = _embedding_module(backbone), cast(Any, backbone).get_input_embeddings()
    width, hidden_size = table.weight.shape[1], cast(Any, backbone).hidden_size
    if module is not None and _argument(module, _WORD_ARGUMENTS) is None:
        raise ConfigError(
            f"objective.name: found 'slt' with {type(module).__name__}, which takes no word vectors in place of ids, "
            "expected an encoder whose embeddings do; set model.architecture to crammed-bert, bert, roberta or modernbert"
        )
    if width != hidden_size:
        raise ConfigError(
            f"objective.name: found 'slt' with word vectors of {width} and hidden states of {hidden_size}, expected the "
            "same width, for the reconstruction reads both; set model.config.embedding_size to the hidden size"
        )


def embed(backbone: nn.Module, ids_BS: Tensor, position_ids_BS: Tensor | None, passes: int) -> Tensor:
    """Word vectors [B, S, D] after `passes` passes through the encoder's whole embedding module.

    A backbone without such a module gives the bare word vectors.
    """
    module = _embedding_module(backbone)
    states_BSD: Tensor = cast(Any, backbone).get_input_embeddings()(ids_BS)
    if module is None:
        return states_BSD
    arguments: dict[str, Any] = {
        name: None
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }
    place = _argument(module, _PLACE_ARGUMENTS)
    if position_ids_BS is not None and place is not None:
        padding: int | None = getattr(module, "padding_idx", None)  # RoBERTa's kin count from behind the padding row
        arguments[place] = position_ids_BS if padding is None else position_ids_BS + padding + 1
    words = cast(str, _argument(module, _WORD_ARGUMENTS))
    for _ in range(passes):
        states_BSD = module(**{**arguments, words: states_BSD})
    return states_BSD


def _embedding_module(backbone: nn.Module) -> nn.Module | None:
    module: nn.Module | None = getattr(getattr(backbone, "body", None), "embeddings", None)
    return module


def _argument(module: nn.Module, names: tuple[str, ...]) -> str | None:
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in names if name in parameters), None)


# ---------------------------------------------------------------- the layer


class Attention(nn.Module):
    """Multi-head softmax attention; all projections have a bias."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states_BSD: Tensor, memory_BTD: Tensor, allowed_BST: Tensor) -> Tensor:
        """[B, S, D]; `allowed_BST` is true where a position may look, with at least one such place each."""
        query_BHSE = self._split(self.query(states_BSD))
        key_BHTE, value_BHTE = self._split(self.key(memory_BTD)), self._split(self.value(memory_BTD))
        mixed_BHSE = F.scaled_dot_product_attention(
            query_BHSE,
            key_BHTE,
            value_BHTE,
            attn_mask=allowed_BST[:, None],
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        mixed_BSD: Tensor = self.output(mixed_BHSE.transpose(1, 2).flatten(2))
        return mixed_BSD

    def _split(self, states_BSD: Tensor) -> Tensor:
        heads_BHSE: Tensor = states_BSD.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        return heads_BHSE


class DecoderLayer(nn.Module):
    """Post-norm: self-attention, cross-attention, GELU network."""

    def __init__(
        self, hidden_size: int, num_heads: int, inner_size: int, *, dropout: float, attention_dropout: float
    ) -> None:
        super().__init__()
        self.self_attention = Attention(hidden_size, num_heads, attention_dropout)
        self.self_attention_norm = nn.LayerNorm(hidden_size)
        self.cross_attention = Attention(hidden_size, num_heads, attention_dropout)
        self.cross_attention_norm = nn.LayerNorm(hidden_size)
        self.inner = nn.Linear(hidden_size, inner_size)
        self.outer = nn.Linear(inner_size, hidden_size)
        self.output_norm = nn.LayerNorm(hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states_BSD: Tensor, memory_BTD: Tensor, causal_BSS: Tensor, visible_BST: Tensor) -> Tensor:
        """[B, S, D] from the decoder's states and the gated memory."""
        seen_BSD = self.dropout(self.self_attention(states_BSD, states_BSD, causal_BSS))
        states_BSD = self.self_attention_norm(states_BSD + seen_BSD)
        seen_BSD = self.dropout(self.cross_attention(states_BSD, memory_BTD, visible_BST))
        states_BSD = self.cross_attention_norm(states_BSD + seen_BSD)
        change_BSD = self.dropout(self.outer(self.dropout(F.gelu(self.inner(states_BSD)))))
        output_BSD: Tensor = self.output_norm(states_BSD + change_BSD)
        return output_BSD


class TiedHead(nn.Module):
    """Scores by the encoder's word table, which stays the encoder's, and a bias of its own."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, states_ND: Tensor, table: nn.Module) -> Tensor:
        """[N, V]."""
        return F.linear(states_ND, cast(Tensor, table.weight), self.bias)


class ReconstructionDecoder(nn.Module):
    """Decoder and head; sizes and dropout are those of the encoder's configuration where it has such fields."""

    def __init__(self, backbone: nn.Module, *, dropout: float | None = None, embedding_passes: int = 2) -> None:
        super().__init__()
        config, width = cast(Any, backbone).config, cast(Any, backbone).hidden_size
        self.embedding_passes = embedding_passes
        own_dropout = getattr(config, "hidden_dropout_prob", 0.1) if dropout is None else dropout
        self.embedding_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(own_dropout)
        self.layer = DecoderLayer(
            width,
            getattr(config, "num_attention_heads", 1),
            getattr(config, "intermediate_size", 4 * width),
            dropout=own_dropout,
            attention_dropout=getattr(config, "attention_probs_dropout_prob", 0.1) if dropout is None else dropout,
        )
        self.head = TiedHead(cast(Any, backbone).vocab_size)

    def forward(
        self,
        backbone: nn.Module,
        ids_BS: Tensor,
        memory_BTD: Tensor,
        attention_mask_BT: Tensor,
        *,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        keep_layer: bool = True,
    ) -> Tensor:
        """States [B, S, D] from which the next token of each position is scored.

        The ids are the first S of the row's T; the mask and the optional [B, T] ids of a packed row are of all T.
        """
        length = ids_BS.shape[1]
        places_BS = None if position_ids is None else position_ids[:, :length]
        states_BSD = embed(backbone, ids_BS, places_BS, self.embedding_passes)
        states_BSD = self.dropout(self.embedding_norm(states_BSD))
        visible_BST = visible_positions(attention_mask_BT, segment_ids, length)
        causal_SS = torch.ones(length, length, dtype=torch.bool, device=ids_BS.device).tril()
        itself_SS = torch.eye(length, dtype=torch.bool, device=ids_BS.device)
        causal_BSS = (visible_BST[:, :, :length] & causal_SS) | itself_SS
        layer_BSD: Tensor = self.layer(states_BSD, memory_BTD, causal_BSS, visible_BST)
        return layer_BSD if keep_layer else states_BSD + 0.0 * layer_BSD

    def cross_entropy(self, backbone: nn.Module, states_ND: Tensor, labels_N: Tensor, *, chunked: bool) -> CrossEntropy:
        """Sums over N next tokens; without any a zero attached to the head."""
        table: nn.Module = cast(Any, backbone).get_input_embeddings()

        def scores(piece_nD: Tensor) -> Tensor:
            return cast(Tensor, self.head(piece_nD, table))

        if not chunked:
            return full_cross_entropy(scores, states_ND, labels_N)
        partitioned = hasattr(table.weight, "ds_id")
        return chunked_cross_entropy(
            scores,
            states_ND,
            labels_N,
            shared=[] if partitioned else [cast(Tensor, table.weight), self.head.bias],
            rows=rows_at_once(self.head.vocab_size),
            recompute=partitioned or is_half_autocast(states_ND),
        )


def visible_positions(attention_mask_BT: Tensor, segment_ids_BT: Tensor | None, length: int) -> Tensor:
    """bool [B, S, T]: real tokens, of the same document in a packed row; all of them where there would be none."""
    visible_BST = attention_mask_BT.bool()[:, None, :].expand(-1, length, -1)
    if segment_ids_BT is not None:
        visible_BST = visible_BST & (segment_ids_BT[:, :length, None] == segment_ids_BT[:, None, :])
    return visible_BST | ~visible_BST.any(dim=-1, keepdim=True)

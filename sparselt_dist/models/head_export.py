"""A head that an objective recovered, put into the Hugging Face class of the architecture, so that it predicts alike.

The objective's module offers it by a method `exported_head(backbone)`: a matrix T [V, D] and a bias b [V] or None, for
logits h T^T + b of the body's hidden states h. A class has its own form of head, so three cases arise:

- crammed-bert, and decoders without a bias to hold: T and b are its own weights.
- Encoders with a transform (dense, activation, norm) in front of their decoder, such as BERT: with h = g y + s the
  output of the body's last norm, the dense layer computes y + c, whose entries all lie where the activation is the
  identity (|y| <= sqrt D), and the norm takes c away again and gives g y + s.
- Decoders that have no bias: entries of y add up to zero, so h (1/g) = sum(s/g) is one number k for every h, and the
  rows T_v + b_v/(g k) give T h + b. The mean of b, which changes no probability, is left out.

The last two are exact in float32 only, and rest on a layer norm with a bias. Whatever was made is compared with the head
itself on a few tokens; where it differs, nothing is put in and the reason is told.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from sparselt_dist.models.backbone import Backbone, PretrainingModel
from sparselt_dist.models.crammed import CrammedBertConfig
from sparselt_dist.models.objective_weights import OBJECTIVE_FILE
from sparselt_dist.objectives.cwt_head import HoldsHead

_CLOSE = 2e-3  # nats: between the log-probabilities of the head and of its export
_MARGIN = 6.0  # from here on GELU and ReLU are the identity in float32
_PROBE_TOKENS = 24


class ExportedHead(NamedTuple):
    """What to export, and what to say of it."""

    backbone: Backbone
    """With the recovered head, or as it was."""
    note: str
    """Empty: no head was recovered, so there is nothing to tell."""
    is_missing: bool
    """A head was recovered and is not in the backbone."""


class _Head(NamedTuple):
    table_VD: Tensor
    bias_V: Tensor | None


class _NoPlace(Exception):
    """The class cannot hold the head; the text says why."""


def with_exported_head(model: PretrainingModel) -> ExportedHead:
    """The backbone of a run with the head that its objective recovered, where it did and the class can hold it.

    The given model is left as it is; the result shares no memory with it where a head was put in.
    """
    backbone = model.backbone
    objective = model.objective
    offered = objective.exported_head(backbone) if isinstance(objective, HoldsHead) and not backbone.has_head else None
    if offered is None:
        return ExportedHead(backbone, "", is_missing=False)
    table_VD, bias_V = offered
    head = _Head(table_VD.float().cpu(), None if bias_V is None else bias_V.float().cpu())
    try:
        headed, how = _headed(backbone, head)
    except _NoPlace as reason:
        note = f"not in the model: {reason}; it is in {OBJECTIVE_FILE}, and `evaluate` on the run uses it"
        return ExportedHead(backbone, note, is_missing=True)
    return ExportedHead(headed, f"in the model, {how}", is_missing=False)


@torch.no_grad()
def _headed(backbone: Backbone, head: _Head) -> tuple[Backbone, str]:
    """Raises _NoPlace."""
    body = copy.deepcopy(backbone.body).float().cpu().eval()
    hidden_ND, norm = _probe(body)
    tied = torch.equal(head.table_VD, body.get_input_embeddings().weight)
    how, held = "as its own weights", head
    model = _with_fresh_head(backbone, body, tied=tied, has_bias=head.bias_V is not None)
    output = _output(model, head)
    if output.bias is None and head.bias_V is not None:
        how = "its bias inside its matrix, exact in float32 alone"
        held = _Head(head.table_VD + _bias_rows(head.bias_V, norm, type(model).__name__), None)
        model = _with_fresh_head(backbone, body, tied=False, has_bias=False)
        output = _output(model, head)
    if output.weight is not model.get_input_embeddings().weight:
        output.weight.copy_(held.table_VD)
    if output.bias is not None:
        output.bias.copy_(torch.zeros(()) if held.bias_V is None else held.bias_V)
    if _pass_through_transform(model, output, norm):
        how = "behind a transform that changes nothing, exact in float32 alone"
    headed = Backbone(model.eval(), has_head=True)
    _check(headed, head, hidden_ND)
    return headed, how


def _with_fresh_head(backbone: Backbone, body: PreTrainedModel, *, tied: bool, has_bias: bool) -> PreTrainedModel:
    """The architecture's class with a head, the body's weights in it."""
    config = copy.deepcopy(backbone.config)
    config.tie_word_embeddings = tied
    if isinstance(config, CrammedBertConfig):
        config.decoder_bias = has_bias
    auto = AutoModelForCausalLM if backbone.is_causal else AutoModelForMaskedLM
    with torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    model.base_model.load_state_dict(body.state_dict())
    model.tie_weights()
    return model


def _output(model: PreTrainedModel, head: _Head) -> nn.Linear:
    output = model.get_output_embeddings()
    if not isinstance(output, nn.Linear) or output.weight.shape != head.table_VD.shape:
        raise _NoPlace(f"{type(model).__name__} has no head of {tuple(head.table_VD.shape)} weights")
    return output


def _probe(body: PreTrainedModel) -> tuple[Tensor, nn.LayerNorm | None]:
    """Hidden states [N, D] of a few tokens, and the norm that gives them, if it is a layer norm with a bias."""
    given: dict[nn.LayerNorm, Tensor] = {}
    norms = [part for part in body.modules() if isinstance(part, nn.LayerNorm) and part.bias is not None]
    hooks = [norm.register_forward_hook(lambda part, _, output: given.update({part: output})) for norm in norms]
    ids_1L = torch.arange(min(_PROBE_TOKENS, body.config.vocab_size))[None]
    hidden_1LD: Tensor = body(input_ids=ids_1L, attention_mask=torch.ones_like(ids_1L))[0]
    for hook in hooks:
        hook.remove()
    last = next((norm for norm, output in given.items() if torch.equal(output, hidden_1LD)), None)
    return hidden_1LD[0], last


def _bias_rows(bias_V: Tensor, norm: nn.LayerNorm | None, name: str) -> Tensor:
    """What to add to the matrix [V, D] so that it gives the bias, up to one number for all of it."""
    constant = 0.0 if norm is None else float((norm.bias.double() / norm.weight.double()).sum())
    if norm is None or abs(constant) < 1e-2:
        raise _NoPlace(
            f"{name} has no bias of the decoder to hold the head's (objective.recovered_bias=none needs none)"
        )
    direction_D = 1 / (norm.weight.double() * constant)
    return ((bias_V - bias_V.mean()).double()[:, None] * direction_D).float()


def _pass_through_transform(model: PreTrainedModel, output: nn.Linear, norm: nn.LayerNorm | None) -> bool:
    """Make the identity of a transform between body and decoder; false where there is none."""
    inside = {id(part) for part in model.base_model.modules()} | {id(output)}
    parts = [part for part in model.modules() if id(part) not in inside]
    dense = [part for part in parts if isinstance(part, nn.Linear) and part.bias is not None]
    after = [part for part in parts if isinstance(part, nn.LayerNorm) and part.bias is not None]
    if not dense and not after:
        return False
    if len(dense) != 1 or len(after) != 1 or norm is None or bool((norm.weight == 0).any()):
        raise _NoPlace(
            f"the transform of {type(model).__name__} in front of its decoder cannot be made to change nothing"
        )
    width = norm.weight.numel()
    dense[0].weight.copy_(torch.diag(1 / norm.weight))
    dense[0].bias.copy_(_MARGIN + width**0.5 - norm.bias / norm.weight)
    after[0].weight.copy_(norm.weight)
    after[0].bias.copy_(norm.bias)
    return True


def _check(headed: Backbone, head: _Head, hidden_ND: Tensor) -> None:
    """Raises _NoPlace: the class predicts otherwise than the head."""
    expected_NV = torch.nn.functional.linear(hidden_ND, head.table_VD, head.bias_V).log_softmax(dim=-1)
    far = float((headed.logits(hidden_ND).log_softmax(dim=-1) - expected_NV).abs().max())
    if not far <= _CLOSE:
        name = type(headed.model).__name__
        raise _NoPlace(f"{name} predicts otherwise, through what stands in front of its decoder (by {far:.2g} nats)")

"""How the official code of SparseLT, cramming and headless-lm names its tensors, and where each goes in ours.

A layout is chosen by names alone. It builds our model from the stored configuration and then lists every name that the
official model has: weights, copies of tied weights, and constants, which are checked and not kept. Rows and columns
stand in the same order in all of them, so nothing is split, joined or reordered. Sources: github.com/renll/SparseLT
(model.py, decoder.py), github.com/JonasGeiping/cramming (architectures/crammed_bert.py), github.com/NathanGodey/
headless-lm (engine/lit, engine/tasks/pretraining, hf_publisher.py), and the BERT and GPT-NeoX of transformers 4 that
they build on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXModel,
    PretrainedConfig,
    PreTrainedModel,
)

from sparselt_dist.errors import CheckpointError
from sparselt_dist.models.backbone import Backbone
from sparselt_dist.models.crammed import (
    CrammedBertConfig,
    CrammedBertForMaskedLM,
    CrammedBertForSequenceClassification,
    convert_official_state_dict,
)
from sparselt_dist.objectives import get_objective
from sparselt_dist.objectives.settings import SLTConfig

Kind = Literal["sparselt", "cramming", "headless"]
KINDS: tuple[Kind, ...] = ("sparselt", "cramming", "headless")
Fields = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Expected:
    """Our model, with initial weights, and every name that the official one may have."""

    model: PreTrainedModel
    weights: dict[str, str]
    """Official name -> name in the model's state dict; all are needed."""
    copies: dict[str, str]
    """Official name -> official name of the same tensor; may be absent, or stand for the other."""
    constants: dict[str, Tensor]
    """Official name -> value; may be absent."""
    objective: nn.Module | None = None
    objective_weights: dict[str, str] = field(default_factory=dict)
    """Official name -> name in the objective's state dict; all are needed."""


@dataclass(frozen=True)
class Layout:
    """One way in which official weights are written."""

    kind: Kind
    title: str
    is_like: Callable[[Collection[str]], bool]
    expect: Callable[[Shapes, Fields], Expected]
    normal: Callable[[str], str] = lambda name: name
    """A stored name without what wrappers left in it."""


def find_layout(names: Collection[str], kind: Kind | None = None) -> Layout:
    """The layout that the names of the tensors show; `kind` excludes the others.

    Raises:
        CheckpointError: none, or none of this kind.
    """
    found = next((layout for layout in LAYOUTS if kind in (None, layout.kind) and layout.is_like(names)), None)
    if found is not None:
        return found
    other = next((layout.title for layout in LAYOUTS if layout.is_like(names)), None)
    shown = ", ".join(sorted(names)[:4])
    expected = "; ".join(layout.title for layout in LAYOUTS if kind in (None, layout.kind))
    hint = f"it looks like {other}: leave --kind out" if other else "give weights that one of these programs wrote"
    raise CheckpointError(
        f"convert: found {len(names)} tensors such as {shown}, which are of no known layout, expected {expected}; {hint}"
    )


# --- BERT and GPT-NeoX of transformers ------------------------------------------------------------------------------


def _make_config(config_cls: type[PretrainedConfig], fields: Fields, **needed: Any) -> Any:
    """The fields that the class of today knows; the others are of the official code alone or bookkeeping.

    Raises:
        CheckpointError: a needed field has another value, or the class refuses one.
    """
    found = fields.get("model_type", config_cls.model_type)
    faults = [f"model_type is {found!r}, expected {config_cls.model_type!r}"] if found != config_cls.model_type else []
    if "num_attention_heads" not in fields:
        faults.append("num_attention_heads is missing, which no tensor shows")
    faults += [
        f"{name} is {fields[name]!r}, expected {value!r}"
        for name, value in needed.items()
        if fields.get(name, value) != value
    ]
    if faults:
        raise CheckpointError("; ".join(faults))
    known = {*config_cls().to_dict(), "rotary_pct", "rotary_emb_base", "rope_theta", "rope_scaling"}
    known -= {"model_type", "transformers_version", "architectures", "dtype", "torch_dtype"}
    try:
        return config_cls(**{name: value for name, value in fields.items() if name in known})
    except Exception as cause:  # the configuration classes refuse values by errors of many kinds
        raise CheckpointError(f"{config_cls.model_type} refuses the fields: {cause}") from cause


def _tied(model: PreTrainedModel) -> tuple[list[str], dict[str, str]]:
    """Names of a model's weights, each tensor once, and of their further names the first."""
    first: dict[int, str] = {}
    copies: dict[str, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if first.setdefault(id(value), name) != name:
            copies[name] = first[id(value)]
    return list(first.values()), copies


def _expect(model: PreTrainedModel, official: Callable[[str], str], constants: dict[str, Tensor]) -> Expected:
    names, copies = _tied(model)
    return Expected(
        model,
        weights={official(name): name for name in names},
        copies={official(name): official(original) for name, original in copies.items()},
        constants=constants,
    )


def _bert(prefix: str, has_head: bool, fields: Fields, **needed: Any) -> Expected:
    config = _make_config(BertConfig, fields, position_embedding_type="absolute", is_decoder=False, **needed)
    model = BertForMaskedLM(config) if has_head else BertModel(config, add_pooling_layer=False)
    places_1P = torch.arange(config.max_position_embeddings)[None]
    embeddings = f"{prefix}bert.embeddings."
    constants = {f"{embeddings}position_ids": places_1P, f"{embeddings}token_type_ids": torch.zeros_like(places_1P)}
    return _expect(model, lambda name: f"{prefix}{'' if has_head else 'bert.'}{name}", constants)


def _neox(prefix: str, has_head: bool, fields: Fields) -> Expected:
    config = _make_config(GPTNeoXConfig, fields)
    model = GPTNeoXForCausalLM(config) if has_head else GPTNeoXModel(config)

    def official(name: str) -> str:
        name = name if has_head else f"gpt_neox.{name}"
        return prefix + name.replace("lm_head.", "embed_out.")

    length = config.max_position_embeddings
    constants: dict[str, Tensor] = {}
    for layer in range(config.num_hidden_layers):
        attention = f"{prefix}gpt_neox.layers.{layer}.attention."
        constants[f"{attention}bias"] = torch.ones(length, length).tril()[None, None]  # the causal mask
        constants[f"{attention}masked_bias"] = torch.tensor(-1e9)
        constants[f"{attention}rotary_emb.inv_freq"] = model.base_model.rotary_emb.inv_freq
    return _expect(model, official, constants)


# --- SparseLT --------------------------------------------------------------------------------------------------------

_DECODER = {
    "self_attn.q_proj": "self_attention.query",
    "self_attn.k_proj": "self_attention.key",
    "self_attn.v_proj": "self_attention.value",
    "self_attn.out_proj": "self_attention.output",
    "self_attn_layer_norm": "self_attention_norm",
    "encoder_attn.q_proj": "cross_attention.query",
    "encoder_attn.k_proj": "cross_attention.key",
    "encoder_attn.v_proj": "cross_attention.value",
    "encoder_attn.out_proj": "cross_attention.output",
    "encoder_attn_layer_norm": "cross_attention_norm",
    "fc1": "inner",
    "fc2": "outer",
    "final_layer_norm": "output_norm",
}


def _sparselt(shapes: Shapes, fields: Fields) -> Expected:
    """Encoder with its head, typer and reconstruction decoder; the decoder shares the encoder's embeddings."""
    encoder = _bert("model.", True, fields, decoder_layers=1, hidden_act="gelu", activation_function="gelu")
    num_types = (*shapes.get("sa_pm.vars", ()), SLTConfig().num_types)[0]
    objective = get_objective("slt").build_module(
        SLTConfig(num_types=max(num_types, 2)), Backbone(encoder.model, has_head=True)
    )
    embeddings = "model.bert.embeddings."
    shared = [name for name in (*encoder.weights, *encoder.constants) if name.startswith(embeddings)]
    decoder_side = {name: f"decoder.embeddings.{name.removeprefix(embeddings)}" for name in shared}
    ours = {f"decoder.layers.0.{name}": f"decoder.layer.{target}" for name, target in _DECODER.items()}
    ours["decoder.layernorm_embedding"] = "decoder.embedding_norm"
    weights = {f"{name}.{part}": f"{target}.{part}" for name, target in ours.items() for part in ("weight", "bias")}
    return Expected(
        encoder.model,
        encoder.weights,
        copies={
            **encoder.copies,
            **{copy: name for name, copy in decoder_side.items() if name in encoder.weights},
            "glm_head.weight": f"{embeddings}word_embeddings.weight",
        },
        constants={
            **encoder.constants,
            **{copy: encoder.constants[name] for name, copy in decoder_side.items() if name in encoder.constants},
        },
        objective=objective,
        objective_weights={
            **weights,
            "glm_head.bias": "decoder.head.bias",
            "sa_pm.vars": "typer.type_vectors",
            "sa_pm.weight_proj.weight": "typer.classifier.weight",
        },
    )


# --- cramming --------------------------------------------------------------------------------------------------------

# What the tensors do not show, and the value that our model computes with.
_ARCH = {
    "norm": "LayerNorm",
    "nonlin": "GELUglu",
    "ffn_layer_frequency": 1,
    "embedding.pos_embedding": "scaled-sinusoidal",
    "embedding.pad_token_id": 0,
    "attention.type": "self-attention",
    "attention.causal_attention": False,
    "attention.rotary_embedding": False,
    "attention.sequence_op": "torch-softmax",
}
_ARCH_SIZES = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_transformer_layers",
    "num_attention_heads": "attention.num_attention_heads",
    "intermediate_size": "intermed_size",
    "max_position_embeddings": "embedding.max_seq_length",
    "layer_norm_eps": "norm_eps",
}
_BODY = ("word_embedding.weight", "pos_embedding.scale_factor", "norm.weight", "norm.bias")
_LAYER = """norm1.weight norm1.bias norm2.weight norm2.bias attn.self_attention.query_key_value.weight attn.dense.weight
ffn.dense_in.weight ffn.dense_out.weight""".split()


def _without_wrappers(name: str) -> str:
    """Without what compilation and data parallelism left; names of the bare encoder as those inside a model."""
    bare = ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))
    return f"encoder.{bare}" if bare.startswith(("embedding.", "layers.", "final_norm.")) else bare


def _cramming(shapes: Shapes, fields: Fields) -> Expected:
    values = {name: _look_up(fields, name) for name in (*_ARCH, *_ARCH_SIZES.values())}
    faults = [
        f"{name} is {values[name]!r}, expected {value!r}" for name, value in _ARCH.items() if values[name] != value
    ]
    faults += [f"{name} is missing" for name in _ARCH_SIZES.values() if values[name] is None]
    if faults:
        raise CheckpointError("; ".join(faults))
    sizes = {ours: values[name] for ours, name in _ARCH_SIZES.items()}
    sizes["layer_norm_eps"] = float(sizes["layer_norm_eps"])
    is_classifier = "head.weight" in shapes
    if is_classifier:
        sizes |= {"num_labels": shapes["head.weight"][0], "pooler": _look_up(fields, "classification_head.pooler")}
        sizes["classifier_hidden_size"] = _look_up(fields, "classification_head.head_dim")
    table = shapes.get("encoder.embedding.word_embedding.weight") or shapes.get("decoder.weight") or (1,)
    try:
        config = CrammedBertConfig(vocab_size=table[0], **sizes)
        model = (CrammedBertForSequenceClassification if is_classifier else CrammedBertForMaskedLM)(config)
    except Exception as cause:  # transformers and our own checks refuse values by errors of several kinds
        raise CheckpointError(f"crammed-bert refuses the fields: {cause}") from cause
    return _expect(model, _official_cramming_names(config, is_classifier).__getitem__, _cramming_constants(config))


def _official_cramming_names(config: CrammedBertConfig, is_classifier: bool) -> dict[str, str]:
    """Our name -> the official one, written down from the official modules and mapped by the one converter."""
    names = [f"encoder.embedding.{name}" for name in _BODY] + ["encoder.final_norm.weight", "encoder.final_norm.bias"]
    names += [f"encoder.layers.{layer}.{name}" for layer in range(config.num_hidden_layers) for name in _LAYER]
    heads = ["pooler.dense.weight", "pooler.dense.bias", "head.weight", "head.bias"]
    names += heads if is_classifier else ["decoder.weight"]
    return convert_official_state_dict({name: name for name in names})


def _cramming_constants(config: CrammedBertConfig) -> dict[str, Tensor]:
    factor = torch.tensor(config.hidden_size / config.num_attention_heads).rsqrt()
    layers = range(config.num_hidden_layers)
    return {f"encoder.layers.{layer}.attn.self_attention.norm_factor": factor for layer in layers}


def _look_up(fields: Fields, path: str) -> Any:
    value: Any = fields
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


# --- the table -------------------------------------------------------------------------------------------------------


def _starting(*prefixes: str) -> Callable[[Collection[str]], bool]:
    """Whether each prefix begins some name."""
    return lambda names: all(any(name.startswith(prefix) for name in names) for prefix in prefixes)


def _is_cramming(names: Collection[str]) -> bool:
    return any(re.search(r"(^|\.)layers\.\d+\.attn\.", name) for name in names)


def _headless_bert(prefix: str) -> Callable[[Shapes, Fields], Expected]:
    head = f"{prefix}cls."
    return lambda shapes, fields: _bert(prefix, any(name.startswith(head) for name in shapes), fields)


def _headless_neox(prefix: str) -> Callable[[Shapes, Fields], Expected]:
    return lambda shapes, fields: _neox(prefix, f"{prefix}embed_out.weight" in shapes, fields)


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "sparselt",
        "SparseLT's whole model (model.*, decoder.*, sa_pm.*)",
        _starting("model.bert.", "sa_pm."),
        _sparselt,
    ),
    Layout(
        "sparselt",
        "SparseLT's extracted encoder (bert.*, cls.*)",
        _starting("bert.", "cls."),
        lambda shapes, fields: _bert("", True, fields),
    ),
    Layout("cramming", "cramming's crammed-bert (layers.*.attn.*)", _is_cramming, _cramming, _without_wrappers),
    Layout(
        "headless",
        "headless-lm's encoder in a Lightning checkpoint (task.mlm_model.*)",
        _starting("task.mlm_model.bert."),
        _headless_bert("task.mlm_model."),
    ),
    Layout(
        "headless",
        "headless-lm's decoder in a Lightning checkpoint (task.lm_model.*)",
        _starting("task.lm_model.gpt_neox."),
        _headless_neox("task.lm_model."),
    ),
    Layout("headless", "headless-lm's published encoder (bert.*)", _starting("bert."), _headless_bert("")),
    Layout("headless", "headless-lm's published decoder (gpt_neox.*)", _starting("gpt_neox."), _headless_neox("")),
)

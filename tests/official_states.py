"""State dicts in the layouts of the official programs, small, and their forward passes written down independently.

Names and shapes follow github.com/renll/SparseLT, github.com/JonasGeiping/cramming and github.com/NathanGodey/headless-lm
with the transformers 4 of their day. B rows, T positions, D hidden, H heads, V vocabulary, K types.
"""

import json
import pickle
import sys
import types
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
V, D, LAYERS, HEADS, INNER, POSITIONS, TYPES = 37, 12, 2, 3, 20, 16, 6

BERT_CONFIG: dict[str, Any] = {
    "architectures": ["BertForMaskedLM"],
    "model_type": "bert",
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": POSITIONS,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "gradient_checkpointing": False,
    "transformers_version": "4.21.1",
}
SPARSELT_CONFIG = {
    **BERT_CONFIG,
    "architectures": ["RobertaAutoEncoder"],
    "decoder_layers": 1,
    "activation_function": "gelu",
    "decoder_ffn_dim": INNER,
    "init_std": 0.02,
}
NEOX_CONFIG: dict[str, Any] = {
    "model_type": "gpt_neox",
    "vocab_size": V,
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": INNER,
    "max_position_embeddings": POSITIONS,
    "hidden_act": "gelu",
    "rotary_pct": 0.5,
    "rotary_emb_base": 700,
    "use_parallel_residual": True,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
ARCH: dict[str, Any] = {
    "architectures": ["ScriptableCrammedBERT"],
    "num_transformer_layers": LAYERS,
    "hidden_size": D,
    "intermed_size": INNER,
    "hidden_dropout_prob": 0.1,
    "norm": "LayerNorm",
    "norm_eps": 1e-12,
    "norm_scheme": "pre",
    "nonlin": "GELUglu",
    "tie_weights": True,
    "decoder_bias": False,
    "sparse_prediction": 0.25,
    "objective_layout": "MLM",
    "embedding": {
        "vocab_size": V,
        "pos_embedding": "scaled-sinusoidal",
        "pad_token_id": 0,
        "max_seq_length": POSITIONS,
        "embedding_dim": D,
        "normalization": True,
    },
    "attention": {
        "type": "self-attention",
        "causal_attention": False,
        "num_attention_heads": HEADS,
        "skip_output_projection": False,
        "qkv_bias": False,
        "rotary_embedding": False,
        "sequence_op": "torch-softmax",
    },
    "ffn_layer_frequency": 1,
    "skip_head_transform": True,
    "use_bias": False,
    "final_norm": True,
    "num_labels": None,
    "classification_head": {"pooler": "avg", "include_ff_layer": True, "head_dim": 10, "nonlin": "Tanh"},
}


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape).mul(0.4)


def norm_weights(name: str, width: int = D) -> State:
    return {f"{name}.weight": 1 + draw(width), f"{name}.bias": draw(width)}


def linear_weights(name: str, out: int, into: int) -> State:
    return {f"{name}.weight": draw(out, into), f"{name}.bias": draw(out)}


def at(state: State, prefix: str) -> State:
    """The part of a state below a name."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def linear(values: Tensor, state: State, name: str) -> Tensor:
    return F.linear(values, state[f"{name}.weight"], state.get(f"{name}.bias"))


def norm(values: Tensor, state: State, name: str, eps: float) -> Tensor:
    return F.layer_norm(values, values.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attend(query_BHTE: Tensor, key_BHSE: Tensor, value_BHSE: Tensor, *, causal: bool) -> Tensor:
    """[B, T, D]; softmax of scaled products."""
    scores = query_BHTE @ key_BHSE.mT / query_BHTE.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    mixed_BTD: Tensor = (scores.softmax(-1) @ value_BHSE).transpose(1, 2).flatten(2)
    return mixed_BTD


# --- BERT ------------------------------------------------------------------------------------------------------------


def bert_state(*, has_head: bool, vocabulary: int = V) -> State:
    """BertForMaskedLM of transformers 4, tied, with its stored position ids; without head: `cls` was taken away."""
    state: State = {"bert.embeddings.position_ids": torch.arange(POSITIONS)[None]}
    for name, rows in (("word", vocabulary), ("position", POSITIONS), ("token_type", 2)):
        state[f"bert.embeddings.{name}_embeddings.weight"] = draw(rows, D)
    state |= norm_weights("bert.embeddings.LayerNorm")
    for layer in range(LAYERS):
        base = f"bert.encoder.layer.{layer}"
        for part in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            state |= linear_weights(f"{base}.{part}", D, D)
        state |= norm_weights(f"{base}.attention.output.LayerNorm") | norm_weights(f"{base}.output.LayerNorm")
        state |= linear_weights(f"{base}.intermediate.dense", INNER, D) | linear_weights(
            f"{base}.output.dense", D, INNER
        )
    if has_head:
        head = "cls.predictions"
        state |= {f"{head}.bias": draw(vocabulary)} | linear_weights(f"{head}.transform.dense", D, D)
        state |= norm_weights(f"{head}.transform.LayerNorm")
        state[f"{head}.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"]
        state[f"{head}.decoder.bias"] = state[f"{head}.bias"]
    return state


def bert_embed(words_BTD: Tensor, state: State) -> Tensor:
    places = state["bert.embeddings.position_embeddings.weight"][: words_BTD.shape[1]]
    kinds = state["bert.embeddings.token_type_embeddings.weight"][0]
    return norm(words_BTD + places + kinds, state, "bert.embeddings.LayerNorm", 1e-12)


def bert_hidden(state: State, ids_BT: Tensor) -> Tensor:
    hidden = bert_embed(state["bert.embeddings.word_embeddings.weight"][ids_BT], state)
    for layer in range(LAYERS):
        part = at(state, f"bert.encoder.layer.{layer}.")
        q, k, v = (
            linear(hidden, part, f"attention.self.{name}").unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        seen = linear(attend(q, k, v, causal=False), part, "attention.output.dense")
        hidden = norm(hidden + seen, part, "attention.output.LayerNorm", 1e-12)
        change = linear(F.gelu(linear(hidden, part, "intermediate.dense")), part, "output.dense")
        hidden = norm(hidden + change, part, "output.LayerNorm", 1e-12)
    return hidden


def bert_logits(state: State, ids_BT: Tensor) -> Tensor:
    head = at(state, "cls.predictions.")
    hidden = F.gelu(linear(bert_hidden(state, ids_BT), head, "transform.dense"))
    hidden = norm(hidden, head, "transform.LayerNorm", 1e-12)
    return F.linear(hidden, head["decoder.weight"], head["bias"])


# --- SparseLT --------------------------------------------------------------------------------------------------------


def sparselt_state(*, vocabulary: int = V) -> State:
    """The whole autoencoder as its Trainer saves it: tied tensors and shared modules under every name they have."""
    encoder = bert_state(has_head=True, vocabulary=vocabulary)
    state = {f"model.{name}": value for name, value in encoder.items()}
    state["glm_head.weight"] = encoder["bert.embeddings.word_embeddings.weight"]
    state["glm_head.bias"] = draw(vocabulary)
    state |= {f"decoder.embeddings.{name}": value for name, value in at(encoder, "bert.embeddings.").items()}
    for block in ("self_attn", "encoder_attn"):
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            state |= linear_weights(f"decoder.layers.0.{block}.{part}", D, D)
        state |= norm_weights(f"decoder.layers.0.{block}_layer_norm")
    state |= linear_weights("decoder.layers.0.fc1", INNER, D) | linear_weights("decoder.layers.0.fc2", D, INNER)
    state |= norm_weights("decoder.layers.0.final_layer_norm") | norm_weights("decoder.layernorm_embedding")
    return state | {"sa_pm.vars": draw(TYPES, D), "sa_pm.weight_proj.weight": draw(TYPES, D)}


def sparselt_reconstruction(state: State, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Types [B, T] and the decoder's logits [B, T - 1, V] of rows without padding, in evaluation."""
    encoder = at(state, "model.")
    hidden = bert_hidden(encoder, ids_BT)
    scores = F.linear(hidden, state["sa_pm.weight_proj.weight"])
    scores[..., 0] = 0
    types_BT = scores.argmax(-1)
    vectors = state["sa_pm.vars"].clone()
    vectors[0] = 0
    memory = hidden * vectors[types_BT]
    words = encoder["bert.embeddings.word_embeddings.weight"][ids_BT[:, :-1]]
    states = norm(bert_embed(bert_embed(words, encoder), encoder), state, "decoder.layernorm_embedding", 1e-5)
    layer = at(state, "decoder.layers.0.")
    for block, source in (("self_attn", None), ("encoder_attn", memory)):
        read = states if source is None else source
        q, k, v = (
            linear(values, layer, f"{block}.{part}_proj").unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part, values in (("q", states), ("k", read), ("v", read))
        )
        seen = linear(attend(q, k, v, causal=source is None), layer, f"{block}.out_proj")
        states = norm(states + seen, layer, f"{block}_layer_norm", 1e-5)
    change = linear(F.gelu(linear(states, layer, "fc1")), layer, "fc2")
    states = norm(states + change, layer, "final_layer_norm", 1e-5)
    return types_BT, F.linear(states, state["glm_head.weight"], state["glm_head.bias"])


# --- cramming --------------------------------------------------------------------------------------------------------


def cramming_state(*, vocabulary: int = V, labels: int = 0) -> State:
    """crammed-bert v2 with its buffers; with labels, the classifier."""
    state: State = {
        "encoder.embedding.word_embedding.weight": draw(vocabulary, D),
        "encoder.embedding.pos_embedding.scale_factor": draw(1),
        **norm_weights("encoder.embedding.norm"),
    }
    for layer in range(LAYERS):
        base = f"encoder.layers.{layer}"
        state |= norm_weights(f"{base}.norm1") | norm_weights(f"{base}.norm2")
        state[f"{base}.attn.self_attention.norm_factor"] = torch.tensor(D // HEADS).rsqrt()
        state[f"{base}.attn.self_attention.query_key_value.weight"] = draw(3 * D, D)
        state[f"{base}.attn.dense.weight"] = draw(D, D)
        state[f"{base}.ffn.dense_in.weight"] = draw(INNER, D)
        state[f"{base}.ffn.dense_out.weight"] = draw(D, INNER // 2)
    state |= norm_weights("encoder.final_norm")
    if labels:
        return state | linear_weights("pooler.dense", 10, D) | linear_weights("head", labels, 10)
    return state | {"decoder.weight": state["encoder.embedding.word_embedding.weight"]}


def cramming_hidden(state: State, ids_BT: Tensor) -> Tensor:
    encoder = at(state, "encoder.")
    place_T = torch.arange(ids_BT.shape[1])[:, None]
    angles = place_T * 10000 ** (-torch.arange(0, D, 2) / D)
    table = torch.stack((angles.sin(), angles.cos()), -1).flatten(1)
    words = encoder["embedding.word_embedding.weight"][ids_BT]
    hidden = norm(words + encoder["embedding.pos_embedding.scale_factor"] * table, encoder, "embedding.norm", 1e-12)
    for layer in range(LAYERS):
        part = at(encoder, f"layers.{layer}.")
        fused = linear(norm(hidden, part, "norm1", 1e-12), part, "attn.self_attention.query_key_value")
        q, k, v = fused.unflatten(-1, (HEADS, 3 * D // HEADS)).transpose(1, 2).chunk(3, dim=-1)
        hidden = hidden + linear(attend(q, k, v, causal=False), part, "attn.dense")
        values, gate = linear(norm(hidden, part, "norm2", 1e-12), part, "ffn.dense_in").chunk(2, dim=-1)
        hidden = hidden + linear(F.gelu(gate) * values, part, "ffn.dense_out")
    return norm(hidden, encoder, "final_norm", 1e-12)


def cramming_logits(state: State, ids_BT: Tensor) -> Tensor:
    return F.linear(cramming_hidden(state, ids_BT), state["encoder.embedding.word_embedding.weight"])


# --- headless-lm -----------------------------------------------------------------------------------------------------


def neox_state(*, has_head: bool) -> State:
    """GPTNeoXForCausalLM of transformers 4 with its stored buffers."""
    width, inner = NEOX_CONFIG["hidden_size"], INNER
    state: State = {"gpt_neox.embed_in.weight": draw(V, width), **norm_weights("gpt_neox.final_layer_norm", width)}
    for layer in range(LAYERS):
        base = f"gpt_neox.layers.{layer}"
        state |= norm_weights(f"{base}.input_layernorm", width) | norm_weights(
            f"{base}.post_attention_layernorm", width
        )
        state |= linear_weights(f"{base}.attention.query_key_value", 3 * width, width)
        state |= linear_weights(f"{base}.attention.dense", width, width)
        state |= linear_weights(f"{base}.mlp.dense_h_to_4h", inner, width)
        state |= linear_weights(f"{base}.mlp.dense_4h_to_h", width, inner)
        state[f"{base}.attention.bias"] = torch.ones(POSITIONS, POSITIONS).bool().tril()[None, None]
        state[f"{base}.attention.masked_bias"] = torch.tensor(-1e9)
        state[f"{base}.attention.rotary_emb.inv_freq"] = 1.0 / 700 ** (torch.arange(0, 4, 2).float() / 4)
    return state | ({"embed_out.weight": draw(V, width)} if has_head else {})


def neox_hidden(state: State, ids_BT: Tensor) -> Tensor:
    """Rotary places on the first half of each head, attention and feed-forward side by side."""
    model = at(state, "gpt_neox.")
    hidden = model["embed_in.weight"][ids_BT]
    angles_TE = (torch.arange(ids_BT.shape[1])[:, None] * 700 ** (-torch.arange(0, 4, 2) / 4)).repeat(1, 2)

    def rotate(values_BHTE: Tensor) -> Tensor:
        turned, rest = values_BHTE[..., :4], values_BHTE[..., 4:]
        swapped = torch.cat((-turned[..., 2:], turned[..., :2]), dim=-1)
        return torch.cat((turned * angles_TE.cos() + swapped * angles_TE.sin(), rest), dim=-1)

    for layer in range(LAYERS):
        part = at(model, f"layers.{layer}.")
        fused = linear(norm(hidden, part, "input_layernorm", 1e-5), part, "attention.query_key_value")
        q, k, v = fused.unflatten(-1, (2, -1)).transpose(1, 2).chunk(3, dim=-1)
        seen = linear(attend(rotate(q), rotate(k), v, causal=True), part, "attention.dense")
        inner = F.gelu(linear(norm(hidden, part, "post_attention_layernorm", 1e-5), part, "mlp.dense_h_to_4h"))
        hidden = hidden + seen + linear(inner, part, "mlp.dense_4h_to_h")
    return norm(hidden, model, "final_layer_norm", 1e-5)


def save_lightning(path: Path, state: State, config: dict[str, Any], *, model: str, extra: Any = None) -> None:
    """A checkpoint as Lightning writes it for headless-lm: its classes are gone from memory when this returns."""
    package, own = "engine.tasks.pretraining.mlm_headless", "pytorch_lightning.trainer.trainer"
    made = {name: types.ModuleType(name) for name in (*_parents(package), package, *_parents(own), own)}
    sys.modules.update(made)
    try:
        task_class = _class(package, "MlmHeadlessPretraining")
        made[package].cwt_loss = _loss  # type: ignore[attr-defined]
        _loss.__module__, _loss.__qualname__ = package, "cwt_loss"
        settings = _class(own, "Configuration")()
        settings.__dict__.update(config, torch_dtype=torch.float32)
        model_object = _class(own, "Model")()
        model_object.__dict__.update(config=settings, _parameters={}, _modules={})
        task = task_class()
        trainer = _class(own, "Results", dict)({"epoch": {1, 2}, "paths": [Path("a")], "counts": defaultdict(list)})
        task.__dict__.update(
            training=True,
            _modules={model: model_object},
            contrastive_loss_fn=partial(_loss, temperature=1.0),
            trainer=trainer,
            mask_ignore_token_ids={1, 2},
            extra=extra,
        )
        prefix = f"task.{model}."
        content = {
            "epoch": 0,
            "global_step": 10,
            "pytorch-lightning_version": "2.0.7",
            "state_dict": {prefix + name: value for name, value in state.items()},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
            "task": task,
        }
        torch.save(content, path)
    finally:
        for name in made:
            del sys.modules[name]


def _loss(temperature: float) -> float:
    return temperature


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _class(module: str, name: str, base: type = object) -> Any:
    made = type(name, (base,), {"__module__": module, "__qualname__": name})
    setattr(sys.modules[module], name, made)
    return made


# --- files -----------------------------------------------------------------------------------------------------------


class Runs:
    """Its unpickling calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def write_folder(folder: Path, state: State, config: dict[str, Any], *, weights: str = "pytorch_model.bin") -> Path:
    """A folder with a pickle of weights and config.json (cramming's own: model_config.json)."""
    folder.mkdir(parents=True)
    torch.save(state, folder / weights)
    name = "model_config.json" if "num_transformer_layers" in config else "config.json"
    (folder / name).write_text(json.dumps(config))
    return folder


def write_bare_pickle(path: Path, content: Any) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))

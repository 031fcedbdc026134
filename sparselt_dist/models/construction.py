"""A `transformers` model from the section `model` of the configuration: new, or from a local checkpoint.

The vocabulary and the special ids follow the tokenizer of the shards; every other field of the architecture's own
configuration class stands as its default, its folder or `model.config` gives it, dropout included. An unknown field is
an error, and so is a checkpoint that leaves a weight without a value.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_MAPPING,
)

from sparselt_dist.config import ModelSection
from sparselt_dist.errors import CheckpointError, ConfigError
from sparselt_dist.models import crammed  # its import registers crammed-bert with the Auto classes
from sparselt_dist.objectives.base import TokenizerInfo

_log = logging.getLogger(__name__)

# Their position table begins behind the padding row, so it must be longer than the rows by pad_id + 1.
_LIKE_ROBERTA = "camembert data2vec-text esm ibert longformer luke mpnet roberta roberta-prelayernorm xlm-roberta xmod"
POSITIONS_AFTER_PADDING = frozenset([*_LIKE_ROBERTA.split(), "xlm-roberta-xl"])
# Rows that a checkpoint's table may have beyond the tokenizer, for tables are padded to round sizes.
SPARE_ROWS = 512
# Accepted by the constructors, which turn them into other fields.
_CONSTRUCTOR_ONLY = frozenset({"num_labels", "attn_implementation"})
_ROTARY_SHORTHANDS = frozenset({"rope_theta", "rope_scaling", "partial_rotary_factor"})
# Bookkeeping of transformers, not fields of an architecture.
_BOOKKEEPING = "model_type transformers_version architectures _name_or_path name_or_path auto_map dtype"
_NOT_FIELDS = frozenset(_BOOKKEEPING.split())


def make_model(
    section: ModelSection, tokenizer: TokenizerInfo, *, sequence_length: int | None, with_head: bool
) -> PreTrainedModel:
    """The model that `section` asks for, float32, on the CPU, with (`with_head`) or without its vocabulary head.

    Raises:
        ConfigError: unknown architecture or field, or values that the architecture refuses.
        CheckpointError: `model.init_from` is no checkpoint, or one of another model or vocabulary.
    """
    if section.init_from is not None:
        return _load(section, section.init_from, tokenizer, sequence_length, with_head)
    config = make_config(section, tokenizer, sequence_length)
    auto = _auto_class(config, with_head)
    try:
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32, **_options(auto, config))
    except Exception as cause:  # each architecture refuses bad values in its own way, from assert to KeyError
        raise ConfigError(
            f"model: {config.model_type} cannot be built as configured: {_text(cause)}; mend model.config"
        ) from cause
    return model


def is_causal(config: PretrainedConfig) -> bool:
    """Whether positions see only what stands before them."""
    return bool(getattr(config, "is_decoder", False)) or type(config) not in MODEL_FOR_MASKED_LM_MAPPING


def make_config(section: ModelSection, tokenizer: TokenizerInfo, sequence_length: int | None) -> PretrainedConfig:
    """The architecture's configuration for new weights; builds no model.

    Raises:
        ConfigError: unknown architecture or field, a value of the wrong type, or rows longer than the position table.
    """
    config_cls, stored, source = _architecture(section.architecture)
    standard = _construct(config_cls, stored, source)
    given = _known_fields(section.config, standard)
    fields = {**given, **_tokenizer_fields(standard, given, tokenizer)}
    positions = _attribute(standard, "max_position_embeddings")
    needed = _positions_needed(standard.model_type, tokenizer, sequence_length)
    if stored == {} and positions not in given and isinstance(getattr(standard, positions, None), int):
        fields[positions] = max(getattr(standard, positions), needed)
    config = _construct(config_cls, {**stored, **fields}, "model.config")
    _check_positions(config, needed, source)
    return config


def _architecture(name: str) -> tuple[type[PretrainedConfig], dict[str, Any], str]:
    """The configuration class of a type or folder, the folder's fields, and how to name the source."""
    if (Path(name) / "config.json").is_file():
        stored = _read_config(Path(name), ConfigError, "model.architecture")
        model_type = stored["model_type"]
        return CONFIG_MAPPING[model_type], stored, f"{name}/config.json"
    for spelling in (name, name.replace("-", "_"), name.replace("_", "-")):
        if spelling in CONFIG_MAPPING:
            return CONFIG_MAPPING[spelling], {}, f"the defaults of {spelling}"
    known = [crammed.MODEL_TYPE, *MODEL_FOR_MASKED_LM_MAPPING_NAMES, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    raise ConfigError(
        f"model.architecture: found {name!r}, expected {crammed.MODEL_TYPE}, a folder with a config.json, or a type "
        f"of transformers {transformers.__version__} (bert, roberta, modernbert, gpt_neox, ...){_nearest(name, known)}"
    )


def _read_config(folder: Path, error: type[ConfigError] | type[CheckpointError], where: str) -> dict[str, Any]:
    """config.json of a folder, its `model_type` known."""
    path = folder / "config.json"
    try:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise error(f"{where}: {path} cannot be read: {cause}; expected the JSON of a transformers model") from cause
    model_type = stored.get("model_type") if isinstance(stored, dict) else None
    if model_type not in CONFIG_MAPPING:
        raise error(
            f"{where}: {path} has model_type {model_type!r}, expected one that transformers "
            f"{transformers.__version__} knows{_nearest(str(model_type), CONFIG_MAPPING)}"
        )
    return stored


def _construct(config_cls: type[PretrainedConfig], fields: dict[str, Any], source: str) -> PretrainedConfig:
    try:
        config = config_cls(**{name: value for name, value in fields.items() if name not in _NOT_FIELDS})
        if isinstance(config, crammed.CrammedBertConfig):
            crammed.check_config(config)
        _refuse_kernels(config)
    except Exception as cause:  # the configuration classes refuse values by errors of many kinds
        raise ConfigError(f"{source}: {config_cls.model_type} refuses its fields: {_text(cause)}; mend them") from cause
    return config


def _refuse_kernels(config: PretrainedConfig) -> None:
    """transformers takes an implementation `owner/name` for a repository of the hub, whose code it loads and runs."""
    for name in ("attn_implementation", "experts_implementation"):
        found = getattr(config, f"_{name}", None)
        if "/" in str(found):
            raise ValueError(f"{name} is {found!r}, code of a repository; expected a name such as sdpa or eager")


def _attribute(config: PretrainedConfig, name: str) -> str:
    """The architecture's own name of a field (`n_positions` for GPT-2's `max_position_embeddings`)."""
    return str(config.attribute_map.get(name, name))


def _known_fields(given: dict[str, Any], standard: PretrainedConfig) -> dict[str, Any]:
    """`model.config` under the architecture's own names.

    Raises:
        ConfigError: names the architecture does not have, each with the nearest that it has.
    """
    names = (set(standard.to_dict()) | set(standard.attribute_map) | _CONSTRUCTOR_ONLY) - _NOT_FIELDS
    if hasattr(standard, "rope_parameters"):
        names |= _ROTARY_SHORTHANDS
    faults = [
        f"model.config.{name}: found a field that {standard.model_type} does not have, expected one of "
        f"{type(standard).__name__}{_nearest(name, names)}"
        for name in given
        if name not in names
    ]
    if faults:
        raise ConfigError("\n".join(faults))
    return {_attribute(standard, name): value for name, value in given.items()}


def _tokenizer_fields(standard: PretrainedConfig, given: dict[str, Any], tokenizer: TokenizerInfo) -> dict[str, Any]:
    """Vocabulary size and special ids, as far as the architecture has such fields.

    Raises:
        ConfigError: `model.config` says otherwise.
    """
    ids = {
        "pad_token_id": tokenizer.pad_id,
        "mask_token_id": tokenizer.mask_id,
        "unk_token_id": tokenizer.unk_id,
        "cls_token_id": tokenizer.cls_id,
        "sep_token_id": tokenizer.sep_id,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    }
    # Encoders whose class fixes ids for bos and eos (RoBERTa, ModernBERT) mean cls and sep by them.
    for name, stand_in in (("bos_token_id", tokenizer.cls_id), ("eos_token_id", tokenizer.sep_id)):
        if ids[name] is None and getattr(standard, name, None) is not None:
            ids[name] = stand_in
    has = set(standard.to_dict())
    fields = {name: value for name, value in ids.items() if name in has}
    for name, value in fields.items():
        if given.get(name, value) != value:
            raise ConfigError(
                f"model.config.{name}: found {given[name]}, expected {value}: special ids follow the tokenizer of the "
                "shards; remove the field"
            )
    vocabulary = _attribute(standard, "vocab_size")
    size = given.get(vocabulary, tokenizer.vocab_size)
    if size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.config.{vocabulary}: found {size}, expected at least the {tokenizer.vocab_size} entries of the "
            "tokenizer; remove the field and it follows the tokenizer"
        )
    return {**fields, vocabulary: size}


def _positions_needed(model_type: str, tokenizer: TokenizerInfo, sequence_length: int | None) -> int:
    offset = tokenizer.pad_id + 1 if model_type in POSITIONS_AFTER_PADDING else 0
    return (sequence_length or 0) + offset


def _check_positions(config: PretrainedConfig, needed: int, source: str) -> None:
    name = _attribute(config, "max_position_embeddings")
    found = getattr(config, name, None)
    if isinstance(found, int) and 0 < found < needed:
        raise ConfigError(
            f"model.config.{name}: found {found} ({source}), expected at least {needed} for the rows of "
            f"data.sequence_length; set model.config.{name}={needed} or shorten data.sequence_length"
        )


def _auto_class(config: PretrainedConfig, with_head: bool) -> Any:
    """The Auto class that builds or loads the model.

    Raises:
        ConfigError: the architecture has no such model.
    """
    masked, causal = type(config) in MODEL_FOR_MASKED_LM_MAPPING, type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not (masked or causal) or config.is_encoder_decoder or (not with_head and type(config) not in MODEL_MAPPING):
        raise ConfigError(
            f"model.architecture: found {config.model_type!r}, expected an encoder or a decoder of text with a "
            "language-model head in transformers, such as bert or gpt_neox; choose one"
        )
    if not with_head:
        return AutoModel
    return AutoModelForMaskedLM if masked and not is_causal(config) else AutoModelForCausalLM


def _options(auto: Any, config: PretrainedConfig) -> dict[str, Any]:
    """A bare BERT-like model comes without the pooler, which no objective trains."""
    if auto is not AutoModel:
        return {}
    model_cls: Any = MODEL_MAPPING[type(config)]
    parameters = inspect.signature(model_cls).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in parameters else {}


def _load(
    section: ModelSection, source: str, tokenizer: TokenizerInfo, sequence_length: int | None, with_head: bool
) -> PreTrainedModel:
    folder = Path(source)
    if not (folder / "config.json").is_file():
        what = "a folder without config.json" if folder.is_dir() else "no folder"
        raise CheckpointError(
            f"model.init_from: found {what} at {source!r}, expected a local transformers checkpoint (config.json and "
            "weights), such as the folder model/ of a run; give one"
        )
    stored = _read_config(folder, CheckpointError, "model.init_from")
    _check_same_architecture(section, source, stored["model_type"])
    config_cls = CONFIG_MAPPING[stored["model_type"]]
    standard = _construct(config_cls, stored, f"{source}/config.json")
    config = _construct(config_cls, {**stored, **_known_fields(section.config, standard)}, "model.config")
    _check_same_parts(config, standard, source)
    _check_vocabulary(config, tokenizer, source)
    _check_positions(config, _positions_needed(config.model_type, tokenizer, sequence_length), source)
    auto = _auto_class(config, with_head)
    try:
        with quiet_transformers():
            loaded: tuple[PreTrainedModel, dict[str, Any]] = auto.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                **_options(auto, config),
            )
    except Exception as cause:  # unreadable files, weights of another shape, ...: torch, safetensors and OS errors
        raise CheckpointError(
            f"model.init_from: the weights of {source} do not fit its configuration: {_text(cause)}; give an undamaged "
            "checkpoint and leave model.config fields that change shapes alone"
        ) from cause
    _check_report(*loaded, source)
    return loaded[0].train()  # as a new one is; transformers leaves it in evaluation mode, where dropout is off


def _check_same_architecture(section: ModelSection, source: str, found: str) -> None:
    if "architecture" not in section.model_fields_set:
        return
    expected = _architecture(section.architecture)[0].model_type
    if expected != found:
        raise CheckpointError(
            f"model.init_from: {source} holds a {found} model, expected {expected} as model.architecture says; "
            f"set model.architecture={found} or give another checkpoint"
        )


def _check_same_parts(config: PretrainedConfig, stored: PretrainedConfig, source: str) -> None:
    """The parts of a crammed-bert layer are those the weights were trained in; some of them fit any weights."""
    if not isinstance(config, crammed.CrammedBertConfig):
        return
    for name in ("norm_type", "position_type", "rope_theta", "gate_activation"):
        found, expected = getattr(config, name), getattr(stored, name)
        if found != expected:
            raise CheckpointError(
                f"model.init_from: {source} was trained with {name} {expected!r}, found model.config.{name}={found!r}; "
                "remove the field, or train the variant from new weights"
            )


def _check_vocabulary(config: PretrainedConfig, tokenizer: TokenizerInfo, source: str) -> None:
    spare = config.vocab_size - tokenizer.vocab_size
    if not 0 <= spare < SPARE_ROWS:
        raise CheckpointError(
            f"model.init_from: {source} has a vocabulary of {config.vocab_size}, expected the {tokenizer.vocab_size} "
            "entries of the shards' tokenizer; prepare the shards with the checkpoint's own (prepare.tokenizer=FOLDER)"
        )
    pad_id = getattr(config, "pad_token_id", None)
    if pad_id is not None and pad_id != tokenizer.pad_id:
        raise CheckpointError(
            f"model.init_from: {source} pads with id {pad_id}, expected {tokenizer.pad_id} as the shards' tokenizer; "
            "prepare the shards with the checkpoint's own tokenizer (prepare.tokenizer=FOLDER)"
        )


def _check_report(model: PreTrainedModel, report: dict[str, Any], source: str) -> None:
    """Every weight of the model must come from the checkpoint; of the checkpoint, only other heads may stay unused."""
    missing = sorted(report["missing_keys"])
    prefix = f"{model.base_model_prefix}."
    unexpected = sorted(report["unexpected_keys"])
    strange = [name for name in unexpected if name.startswith(prefix) and ".pooler." not in f".{name}"]
    if missing or strange:
        faults = [f"{len(missing)} weights missing ({_some(missing)})"] if missing else []
        faults += [f"{len(strange)} unknown ({_some(strange)})"] if strange else []
        raise CheckpointError(
            f"model.init_from: {source} is not a checkpoint of {type(model).__name__}: {', '.join(faults)}; expected "
            "every weight and no other; give one that was saved with its language-model head, or train a head onto a headless "
            "one by objective.name=cwt with objective.recover_from=0.01"
        )
    if unexpected:
        _log.warning("model.init_from: weights of other heads in %s stay unused: %s", source, _some(unexpected))


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Its bars and reports are replaced by ours."""
    controls = transformers.utils.logging
    level, bars = controls.get_verbosity(), controls.is_progress_bar_enabled()
    controls.set_verbosity(logging.CRITICAL)
    controls.disable_progress_bar()
    try:
        yield
    finally:
        controls.set_verbosity(level)
        if bars:
            controls.enable_progress_bar()


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _text(cause: Exception) -> str:
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:600]


def _nearest(word: str, choices: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, sorted(set(choices)), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""

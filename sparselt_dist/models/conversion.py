"""Official weights to a folder that transformers and `model.init_from` load, with an account of every tensor.

Strict: what is not exactly a known layout is refused, see `official_matching.py`. Weights are stored as float32, which
holds half precision exactly. The folder is written beside its place and renamed into it.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from sparselt_dist.data.tokenizer import tokenizer_info
from sparselt_dist.errors import CheckpointError, DataError
from sparselt_dist.models.exporting import CARD, no_progress_bars
from sparselt_dist.models.objective_weights import MARKER, OBJECTIVE_FILE
from sparselt_dist.models.official_files import TOKENIZER_FILES, OfficialFiles, read_official
from sparselt_dist.models.official_layouts import Expected, Kind, Layout, find_layout
from sparselt_dist.models.official_matching import Matched, TensorReport, match

REPORT = "conversion.json"


@dataclass(frozen=True)
class Conversion:
    """What was converted, and what of the source was not."""

    layout: str
    source: Path
    output: Path
    class_name: str
    tensors: tuple[TensorReport, ...]
    others: tuple[str, ...]
    """Entries of the source beside the weights; none is taken over."""
    notes: tuple[str, ...]


def convert(
    source: Path,
    output: Path,
    *,
    kind: Kind | None = None,
    model_config: Path | None = None,
    tokenizer: Path | None = None,
) -> Conversion:
    """Convert an official checkpoint into the new folder `output`.

    Args:
        source: file of weights, or a folder with one.
        kind: whose; None: recognised by the tensors' names.
        model_config: the model's configuration where none lies beside the weights.
        tokenizer: folder of the tokenizer where none lies beside the weights.

    Raises:
        CheckpointError: the source cannot be read or is not exactly of a known layout, or `output` is not empty.
        DataError: the tokenizer is not the model's.
    """
    _check_output(output)
    files = read_official(source, config=model_config, tokenizer=tokenizer)
    layout = find_layout([*files.tensors], kind)
    expected = _expected(layout, files)
    matched = match(layout, files, expected)
    report = expected.model.load_state_dict(matched.model, strict=False)
    assert not report.unexpected_keys, "every name was matched with one of the model"
    expected.model.tie_weights()
    conversion = Conversion(
        layout=layout.title,
        source=files.path,
        output=output,
        class_name=type(expected.model).__name__,
        tensors=matched.reports,
        others=files.others,
        notes=_notes(files, expected),
    )
    _write(conversion, files.tokenizer_dir, expected.model, matched)
    return conversion


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(
            f"convert: {output} is there already, expected an absent or empty folder to write; name another, or remove "
            "it yourself"
        )


def _expected(layout: Layout, files: OfficialFiles) -> Expected:
    if not files.config:
        raise CheckpointError(
            f"convert: found no configuration beside {files.path} ({layout.title}), expected the one that the official "
            "code stores there, for the number of attention heads and the like stand in no tensor; name it by "
            "--model-config"
        )
    shapes = {layout.normal(name): tuple(value.shape) for name, value in files.tensors.items()}
    try:
        return layout.expect(shapes, files.config)
    except CheckpointError as cause:
        raise CheckpointError(
            f"convert: {files.config_source} does not fit {layout.title}: {cause}; give the model's own configuration "
            "by --model-config, or weights of a model that this version computes"
        ) from cause


def _notes(files: OfficialFiles, expected: Expected) -> tuple[str, ...]:
    """What the user should know. Raises DataError: the tokenizer is of another model."""
    notes = []
    if files.tokenizer_dir is None:
        notes.append("no fast tokenizer lay beside the weights; evaluation needs one: name it by --tokenizer")
    else:
        info, config = tokenizer_info(files.tokenizer_dir), expected.model.config
        if info.vocab_size > config.vocab_size:
            raise DataError(
                f"convert: the tokenizer in {files.tokenizer_dir} has {info.vocab_size} entries, expected at most the "
                f"model's {config.vocab_size}; name the model's own by --tokenizer"
            )
        if config.pad_token_id not in (None, info.pad_id):
            notes.append(
                f"the model pads with id {config.pad_token_id} and its tokenizer with {info.pad_id}: training it on "
                "takes shards of a tokenizer that agrees"
            )
    if expected.objective is not None:
        notes.append(f"the weights of the objective slt are in {OBJECTIVE_FILE}")
    return tuple(notes)


# --- the folder ------------------------------------------------------------------------------------------------------


def _write(conversion: Conversion, tokenizer_dir: Path | None, model: PreTrainedModel, matched: Matched) -> None:
    """Raises CheckpointError: the folder cannot be written."""
    target = conversion.output.resolve()
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with no_progress_bars():
            model.save_pretrained(partial)
        if matched.objective:
            save_file({name: _stored(value) for name, value in matched.objective.items()}, partial / OBJECTIVE_FILE)
        if tokenizer_dir is not None:
            for name in TOKENIZER_FILES:
                if (tokenizer_dir / name).is_file():
                    shutil.copyfile(tokenizer_dir / name, partial / name)
        marker = {"run_id": "", "objective": "slt" if matched.objective else None, "converted": conversion.layout}
        _write_json(partial / MARKER, marker)
        _write_json(partial / REPORT, asdict(conversion))
        remote = ", trust_remote_code=True" if getattr(model.config, "auto_map", None) else ""
        (partial / CARD).write_text(_card(conversion, f"AutoModel.from_pretrained(PATH{remote})"), encoding="utf-8")
        partial.rename(target)
    except OSError as cause:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"convert: {conversion.output} cannot be written ({cause}); free space, mend permissions or name another "
            "folder"
        ) from cause


def _stored(value: Tensor) -> Tensor:
    return value.float().contiguous().clone()


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def _card(conversion: Conversion, loading: str) -> str:
    counts = Counter(row.action for row in conversion.tensors)
    totals = ", ".join(f"{count} tensors {action}" for action, count in counts.items())
    lines = [
        f"# {conversion.class_name}, converted by sparselt_dist",
        f"From `{conversion.source.name}`: {conversion.layout}.",
        f"{totals}; `{REPORT}` tells of each. Weights are float32.",
        f"```python\nfrom transformers import AutoModel\n\nmodel = {loading}\n```",
        "Train it on with `sparselt pretrain model.init_from=PATH`.",
        *conversion.notes,
    ]
    return "\n\n".join(lines) + "\n"

"""The README.md of an exported model: what it is, from which text, how long trained, how good, how to load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from sparselt_dist.config import Config
from sparselt_dist.data.manifest import Manifest

_MEANING = {
    "eval/loss": "held-out loss of the objective",
    "yardstick/masked_ce": "masked tokens through a recovered head, nats",
    "yardstick/unigram_ce": "the same targets from token frequencies alone, nats",
    "yardstick/masked_accuracy": "masked tokens predicted right",
    "yardstick/probe_accuracy": "replaced tokens told from original ones by a linear probe",
    "yardstick/majority_accuracy": "the same by guessing",
}


@dataclass(frozen=True)
class ModelFacts:
    """What the card says of the model itself."""

    class_name: str
    auto_class: str
    pipeline: str  # task of the transformers pipeline
    parameters: int
    mask_token: str | None
    remote_code: bool  # the folder brings its own code
    load_options: str = ""  # further arguments of from_pretrained, such as ", add_pooling_layer=False"


def model_card(
    config: Config,
    manifest: Manifest | None,
    model: ModelFacts,
    *,
    progress: Mapping[str, Any],
    data_sha256: str,
    metrics: Mapping[str, float],
) -> str:
    """The card as Markdown with the front matter that model hubs read.

    Args:
        manifest: of the training shards, if they are still there.
        progress: `step`, `tokens` and `seconds` of the checkpoint.
        data_sha256: hash of the manifest that the run recorded.
        metrics: last `eval/` and `yardstick/` values; others are left out.
    """
    front = {
        "library_name": "transformers",
        "pipeline_tag": model.pipeline,
        "license": "other",
        "tags": ["sparselt_dist", config.objective.name, config.model.architecture.rstrip("/").rpartition("/")[2]],
    }
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {config.run.name}",
        f"`{model.class_name}` with {model.parameters:,} parameters, pretrained by sparselt_dist with the objective "
        f"`{config.objective.name}`.",
        _usage(model),
        _data(config, manifest, data_sha256),
        _training(config, progress),
        _results(metrics),
    ]
    return "\n\n".join(sections) + "\n"


def _usage(model: ModelFacts) -> str:
    remote = ", trust_remote_code=True" if model.remote_code else ""
    lines = [
        f"from transformers import {model.auto_class}, AutoTokenizer",
        "",
        f"model = {model.auto_class}.from_pretrained(PATH{remote}{model.load_options})",
        f"tokenizer = AutoTokenizer.from_pretrained(PATH{remote})",
    ]
    if model.pipeline == "fill-mask" and model.mask_token:
        lines += [
            "",
            "from transformers import pipeline",
            "",
            f'pipeline("fill-mask", model=PATH{remote})("The {model.mask_token} of the country.")',
        ]
    note = (
        "\n\nThe folder brings the model's own code, hence `trust_remote_code`; after "
        "`import sparselt_dist.models.crammed` it loads without."
        if model.remote_code
        else ""
    )
    return "## Loading\n\n```python\n" + "\n".join(lines) + "\n```" + note


def _data(config: Config, manifest: Manifest | None, data_sha256: str) -> str:
    lines = ["## Data", ""]
    if manifest is None:
        lines.append("The training shards were not at hand at export, so their sources are not listed here.")
    else:
        lines += ["| source | licence | documents | characters |", "|---|---|---:|---:|"]
        lines += [
            f"| {_cell(source.name)} | {_cell(source.license)} | {source.documents:,} | {source.characters:,} |"
            for source in manifest.sources
        ]
        amount = f"{manifest.samples:,} {manifest.kind} with {manifest.tokens:,} tokens"
        lines += ["", f"{amount}, vocabulary {manifest.vocab_size:,}."]
    lines += ["", f"Manifest of the training shards, SHA-256: `{data_sha256}`."]
    lines += ["The licence of the text may bind whoever passes the model on."]
    return "\n".join(lines)


def _training(config: Config, progress: Mapping[str, Any]) -> str:
    limits = {name: value for name, value in config.budget.model_dump().items() if value is not None}
    own = config.objective.own_keys()
    rows = {
        "objective": config.objective.name + (f" {json.dumps(own)}" if own else ""),
        "budget": ", ".join(f"{name} {value}" for name, value in limits.items()) or "none",
        "optimizer steps": f"{progress['step']:,}",
        "tokens": f"{progress['tokens']:,}",
        "seconds of training": f"{progress['seconds']:,.0f}",
        "sequences a step": str(config.train.global_batch_size),
        "sequence length": str(config.data.sequence_length or "whole documents"),
        "optimizer": f"{config.optim.name}, peak rate {config.optim.peak_lr:g}, schedule {config.schedule.name}",
        "precision": config.train.precision,
        "starting weights": config.model.init_from or "new",
        "seed": str(config.run.seed),
    }
    return "## Training\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {_cell(text)} |" for name, text in rows.items())


def _results(metrics: Mapping[str, float]) -> str:
    shown = {name: metrics[name] for name in sorted(metrics) if name.startswith(("eval/", "yardstick/"))}
    if not shown:
        return "## Results on held-out text\n\nNone were measured."
    rows = [f"| `{name}` | {value:.4f} | {_MEANING.get(name, '')} |" for name, value in shown.items()]
    return "## Results on held-out text\n\n| metric | value | meaning |\n|---|---:|---|\n" + "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

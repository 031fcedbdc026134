"""A small corpus that comes with Python, and short ways to prepare it and to look at the result."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import numpy as np

from sparselt_dist.config_loading import load_config
from sparselt_dist.data.cleaning import normalize
from sparselt_dist.data.corpora import open_folder
from sparselt_dist.data.manifest import file_sha256
from sparselt_dist.data.preparation import PrepareReport, prepare

TEXTS = [text for _, text in sorted(pydoc_data.topics.topics.items())]
SMALL = {"prepare.vocab_size": 700, "prepare.num_workers": 1, "data.sequence_length": 32}


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def arguments_of(source: Path, output: Path, settings: dict[str, Any]) -> list[str]:
    values = {"prepare.source": source, "prepare.output_dir": output, **SMALL, **settings}
    return [f"{key}={json.dumps(value) if not isinstance(value, Path) else value}" for key, value in values.items()]


def run_prepare(source: Path, output: Path, **settings: Any) -> PrepareReport:
    overrides = arguments_of(source, output, {key.replace("__", "."): value for key, value in settings.items()})
    return prepare(load_config([], overrides, for_training=False), progress=False)


def all_ids(folder: Path) -> list[np.ndarray]:
    shards = open_folder(folder)
    return shards.ids(np.arange(shards.num_samples))


def file_hashes(output: Path) -> dict[str, str]:
    return {str(path.relative_to(output)): file_sha256(path) for path in sorted(output.rglob("*")) if path.is_file()}


def kept_texts(texts: list[str], minimum: int = 200) -> list[str]:
    return list(dict.fromkeys(text for text in (normalize(raw, "nfc") for raw in texts) if len(text) >= minimum))

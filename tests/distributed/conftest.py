"""Shards of real English that every Python carries, prepared once a session."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    text = folder / "topics.jsonl"
    text.write_text("".join(json.dumps({"text": body}) + "\n" for _, body in sorted(topics.items())))
    command = [
        sys.executable,
        "-m",
        "sparselt_dist.prepare",
        f"prepare.source={text}",
        f"prepare.output_dir={folder / 'out'}",
    ]
    command += ["prepare.vocab_size=512", "prepare.validation_fraction=0.2", "prepare.samples_per_shard=256"]
    command += ["data.sequence_length=32", "prepare.num_workers=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "out"

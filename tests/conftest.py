"""Options and fixtures shared by all tests; markers and warning filters stand in pyproject.toml."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from s3_server import S3Server, missing_program, s3_server

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell's background job; the programs under test would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write the files of tests/golden anew instead of comparing with them",
    )


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are written instead of compared."""
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shard folders `train` and `validation` of real English that every Python carries; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("shards")
    text = folder / "topics.jsonl"
    text.write_text("".join(json.dumps({"text": body}) + "\n" for _, body in sorted(topics.items())))
    command = [sys.executable, "-m", "sparselt_dist.prepare", f"prepare.source={text}"]
    command += [f"prepare.output_dir={folder / 'out'}", "prepare.vocab_size=512", "prepare.validation_fraction=0.2"]
    command += ["prepare.samples_per_shard=256", "data.sequence_length=32", "prepare.num_workers=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "out"


@pytest.fixture(scope="session")
def s3_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server, started once."""
    if missing_program():
        pytest.skip(missing_program())
    with s3_server(tmp_path_factory.mktemp("s3")) as running:
        yield running

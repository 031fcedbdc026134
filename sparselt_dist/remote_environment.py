"""Which of the launcher's variables reach ranks that DeepSpeed's runner starts over ssh, and how. Free of torch.

The runner writes variables whose names begin so or so, and those of its own file (`.deepspeed_env`), into the command line of
pdsh, which it prints and `ps` shows. Here that file is replaced by one with the user's lines and ours. What is secret stands
there as a command that reads it from a private file of this host: in the command line nobody sees more than that file's name.
On a host without the file the remote shell's own variable holds.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from sparselt_dist.redaction import shown

FILE_VARIABLE = "DS_ENV_FILE"
STOCK_FILE = ".deepspeed_env"
SECRET_SUFFIX = ".value"  # of files with a secret
# Those that mend or tune a run and are the same on every host.
PUBLIC = re.compile(
    r"(NCCL|TORCH_NCCL|GLOO)_\w+|(OMP|MKL)_NUM_THREADS|DS_ACCELERATOR|TORCH_EXTENSIONS_DIR|XDG_CACHE_HOME"
    r"|HF_(HOME|HUB_CACHE|HUB_OFFLINE|DATASETS_CACHE|DATASETS_OFFLINE|ENDPOINT)|TRANSFORMERS_OFFLINE"
)
# The runner exports all that begins with MLFLOW; MLflow's data base asks for the other one.
_OF_MLFLOW = re.compile(r"MLFLOW\w*|PGPASSWORD")
_SECRET = re.compile(r"PASS|TOKEN|SECRET|KEY|USERNAME|AUTH")


def write_exports(folder: Path, chosen: Mapping[str, str], ours: Mapping[str, str]) -> Path:
    """Make the runner's file of variables in a private folder; returns it.

    Args:
        folder: that only this user can read; it has to last as long as the launch.
        chosen: the environment as the user has set it.
        ours: variables by which ranks know their launcher.
    """
    lines = [f"{name}={value}" for name, value in ours.items()]
    for name, value in sorted(chosen.items()):
        if _is_secret(name, value):
            path = folder / f"{name}{SECRET_SUFFIX}"
            path.touch(mode=0o600)
            path.write_text(value)
            lines.append(f"{name}=$(cat {shlex.quote(str(path))} 2>/dev/null || printenv {name})")
        elif PUBLIC.fullmatch(name) and "\n" not in value:
            lines.append(f"{name}={value}")
    lines += _users_lines(chosen.get(FILE_VARIABLE, STOCK_FILE))
    file = folder / "exports"
    file.touch(mode=0o600)
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def _is_secret(name: str, value: str) -> bool:
    return bool(_OF_MLFLOW.fullmatch(name)) and (bool(_SECRET.search(name)) or shown(value) != value)


def _users_lines(name: str) -> list[str]:
    """What the runner would have read, from where it looks."""
    files = [Path(folder, name) for folder in (os.path.expanduser("~"), ".")]
    return [line for file in files if file.is_file() for line in file.read_text().splitlines() if "=" in line]

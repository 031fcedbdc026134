"""Variables of the user's shell on other hosts, with DeepSpeed's real runner: public ones arrive, secrets are shown nowhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
# Does what the remote shell would, as far as variables go; says its own words and what that shell has got.
PDSH = """#!/bin/sh
echo "words: $*"
for word; do case "$word" in "export "*) exports=$word;; esac; done
exec env -i PATH=/usr/bin:/bin MLFLOW_TRACKING_TOKEN=of_that_host sh -c "$BEFORE$exports env"
"""
SECRETS = {
    "MLFLOW_TRACKING_PASSWORD": "pass w$ord",
    "MLFLOW_TRACKING_TOKEN": "t0ken",
    "MLFLOW_TRACKING_URI": "http://me:s3cret@h",
    "PGPASSWORD": "pg-word",
}
PUBLIC = {
    "MLFLOW_EXPERIMENT_NAME": "mine",
    "GLOO_SOCKET_IFNAME": "eth7",
    "NCCL_SOCKET_IFNAME": "^lo",
    "OMP_NUM_THREADS": "3",
}
OTHERS = {"HF_TOKEN": "hf-word", "AWS_SECRET_ACCESS_KEY": "aws-word"}


def launch(folder: Path, **more: str) -> tuple[str, dict[str, str]]:
    """All that the launch says but the remote environment, and that."""
    (folder / "bin").mkdir()
    (folder / "bin" / "pdsh").write_text(PDSH)
    (folder / "bin" / "pdsh").chmod(0o755)
    (folder / "hosts").write_text("one slots=1\ntwo slots=1\n")
    (folder / ".deepspeed_env").write_text("FROM_FILE=yes\nOMP_NUM_THREADS=5\n")
    environment = {**os.environ, **SECRETS, **PUBLIC, **OTHERS, "PYTHONPATH": str(REPOSITORY), "BEFORE": "", **more}
    environment |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HOME": str(folder)}
    command = [
        sys.executable,
        "-m",
        "sparselt_dist.launch",
        "--hostfile",
        "hosts",
        "--no_ssh_check",
        "--master_addr",
        "one",
    ]
    done = subprocess.run(
        [*command, "x.py"], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shown, _, got = done.stdout.partition("words: ")
    words, *variables = got.splitlines()
    return done.stderr + shown + words, dict(line.split("=", 1) for line in variables if "=" in line)


def test_secrets_reach_the_ranks_of_this_host_and_no_command_line(tmp_path: Path) -> None:
    said, got = launch(tmp_path)
    assert "MLFLOW_TRACKING_PASSWORD" in said and "deepspeed.launcher.launch" in said
    for secret in (*SECRETS.values(), *OTHERS.values()):
        assert secret not in said
    assert SECRETS.items() <= got.items()
    assert (PUBLIC | {"FROM_FILE": "yes", "OMP_NUM_THREADS": "5"}).items() <= got.items()
    assert not OTHERS.keys() & got.keys()
    assert "SPARSELT_LAUNCHER" in got and not Path(got["SPARSELT_EXIT_DIR"]).exists()  # ended with the launch


def test_on_another_host_its_own_secrets_hold(tmp_path: Path) -> None:
    _, got = launch(tmp_path, BEFORE=f"rm -r {tmp_path}/sparselt_ranks_*; ", TMPDIR=str(tmp_path))
    assert got["MLFLOW_TRACKING_TOKEN"] == "of_that_host"

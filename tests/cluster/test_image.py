"""docker/Dockerfile built for real without a Docker engine, and its entry point run. Needs root, network and minutes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("buildah", "debootstrap")
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
ABSENT = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
REASON = f"missing: {ABSENT}" if ABSENT else "" if os.geteuid() == 0 else "needs root"
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(REASON), reason=f"building an image: {REASON}"),
]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the images; `IMAGE_FOLDER` names one that is kept."""
    return Path(os.environ.get("IMAGE_FOLDER") or tmp_path_factory.mktemp("image"))


def build(folder: Path, target: str) -> dict[str, Any]:
    """Build a target, of which what is there is used again; what the image says of itself."""
    script = Path(__file__).with_name("build_image.sh")
    subprocess.run([str(script), str(folder), target], check=True, env={**os.environ, "PATH": PATH}, timeout=3000)
    told = json.loads(buildah(folder, "inspect", "--type", "image", f"localhost/sparselt_dist:{target}").stdout)
    found: dict[str, Any] = told["Docker"]["config"]
    return found


@contextlib.contextmanager
def container_of(folder: Path, target: str) -> Iterator[str]:
    name = buildah(folder, "from", "--pull-never", f"localhost/sparselt_dist:{target}").stdout.strip()
    try:
        yield name
    finally:
        buildah(folder, "rm", name)


def buildah(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    options = ["--root", f"{folder}/storage", "--runroot", f"{folder}/run", "--storage-driver", "vfs"]
    return subprocess.run(["buildah", *options, *arguments], capture_output=True, text=True, timeout=1500, check=False)


def test_its_entry_point_runs_the_quickstart(storage: Path, tmp_path: Path) -> None:
    image = build(storage, "cpu")
    assert image["User"] == "1000:1000" and image["Healthcheck"]["Test"][-1] == "healthcheck"
    os.chown(tmp_path, 1000, 1000)
    for folder in tmp_path.parents:
        if folder != folder.parent:
            folder.chmod(folder.stat().st_mode | 0o011)
    with container_of(storage, "cpu") as container:
        run = ["run", "--isolation", "chroot", "--volume", f"{tmp_path}:/workspace", "--env", "RANKS=2"]
        done = buildah(storage, *run, container, "--", *image["Entrypoint"], "quickstart", "budget.max_steps=20")
        assert done.returncode == 0, done.stdout + done.stderr
        healthy = buildah(storage, *run, container, "--", "entrypoint.sh", "healthcheck")
        assert healthy.returncode == 0
    summary = json.loads((tmp_path / "runs" / "quickstart" / "summary.json").read_text())
    assert (summary["status"], summary["world_size"]) == ("finished", 2)


def test_the_crammed_image_starts_that_profile(storage: Path) -> None:
    image = build(storage, "crammed")
    with container_of(storage, "crammed") as container:
        command = [*image["Entrypoint"], *image["Cmd"], "--print-config"]
        done = buildah(storage, "run", "--isolation", "chroot", container, "--", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "max_hours: 24" in done.stdout and "crammed-bert" in done.stdout

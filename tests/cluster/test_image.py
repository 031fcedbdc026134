"""docker/Dockerfile built for real without a Docker engine, and its entry point run. Needs root, network and minutes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

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
    """Folder with the image sparselt_dist:cpu; `IMAGE_FOLDER` names one that is kept."""
    folder = Path(os.environ.get("IMAGE_FOLDER") or tmp_path_factory.mktemp("image"))
    script = Path(__file__).with_name("build_image.sh")
    subprocess.run([str(script), str(folder), "cpu"], check=True, env={**os.environ, "PATH": PATH}, timeout=3000)
    return folder


def buildah(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    options = ["--root", f"{folder}/storage", "--runroot", f"{folder}/run", "--storage-driver", "vfs"]
    return subprocess.run(["buildah", *options, *arguments], capture_output=True, text=True, timeout=1500, check=False)


def test_its_entry_point_runs_the_quickstart(storage: Path, tmp_path: Path) -> None:
    image = json.loads(buildah(storage, "inspect", "--type", "image", "localhost/sparselt_dist:cpu").stdout)["Docker"]
    assert image["config"]["User"] == "1000:1000" and image["config"]["Healthcheck"]["Test"][-1] == "healthcheck"
    os.chown(tmp_path, 1000, 1000)
    for folder in tmp_path.parents:
        if folder != folder.parent:
            folder.chmod(folder.stat().st_mode | 0o011)
    container = buildah(storage, "from", "--pull-never", "localhost/sparselt_dist:cpu").stdout.strip()
    try:
        entry = image["config"]["Entrypoint"]
        run = ["run", "--isolation", "chroot", "--volume", f"{tmp_path}:/workspace", "--env", "RANKS=2"]
        done = buildah(storage, *run, container, "--", *entry, "quickstart", "budget.max_steps=20")
        assert done.returncode == 0, done.stdout + done.stderr
        healthy = buildah(storage, *run, container, "--", "entrypoint.sh", "healthcheck")
        assert healthy.returncode == 0
    finally:
        buildah(storage, "rm", container)
    summary = json.loads((tmp_path / "runs" / "quickstart" / "summary.json").read_text())
    assert (summary["status"], summary["world_size"]) == ("finished", 2)

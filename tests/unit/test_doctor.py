"""The findings of `doctor`: each check sees its fault and names a fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparselt_dist import diagnosis, doctor
from sparselt_dist.config import Config
from sparselt_dist.config_loading import load_config
from sparselt_dist.data import storage
from sparselt_dist.data.transports import TransferFault


def load(*overrides: str) -> Config:
    return load_config(["quickstart"], list(overrides))


def test_a_batch_that_does_not_divide_is_an_error() -> None:
    (finding,) = diagnosis.check_split(load(), 3)
    assert finding.level == "error"
    assert "30 or 33" in finding.fix
    assert diagnosis.check_split(load(), 2)[0].level == "ok"


def test_an_output_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (finding,) = diagnosis.check_output(load(f"run.output_dir={tmp_path / 'file' / 'run'}"))
    assert finding.level == "error"
    assert "is a file" in finding.found
    (finding,) = diagnosis.check_output(load(f"run.output_dir={tmp_path / 'new' / 'run'}"))
    assert finding.level != "error"
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**29}))
    (finding,) = diagnosis.check_output(load(f"run.output_dir={tmp_path}"))
    assert (finding.level, finding.found.split()[0]) == ("error", "0.5")


def test_a_tracking_store_that_is_down_is_a_warning(tmp_path: Path) -> None:
    (down,) = diagnosis.check_tracking(load("log.mlflow_uri=http://127.0.0.1:9"))
    assert down.level == "warning"
    assert "mlflow-sync" in down.fix
    (local,) = diagnosis.check_tracking(load(f"log.mlflow_uri=sqlite:///{tmp_path}/mlflow.db"))
    assert local.level == "ok"
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (blocked,) = diagnosis.check_tracking(load(f"log.mlflow_uri=sqlite:///{tmp_path}/file/mlflow.db"))
    assert blocked.level == "warning"


def test_a_scratch_disk_is_checked_as_the_run_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert diagnosis.check_scratch(load()) == []
    monkeypatch.setenv("HOME", str(tmp_path))
    (good,) = diagnosis.check_scratch(load("checkpoint.scratch_dir=~/new/scratch"))
    assert good.level != "error" and f"{tmp_path}/new/scratch" in good.found and not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (blocked,) = diagnosis.check_scratch(load(f"checkpoint.scratch_dir={tmp_path / 'file' / 'scratch'}"))
    assert (blocked.level, blocked.subject) == ("error", "checkpoint.scratch_dir") and "is a file" in blocked.found
    monkeypatch.setattr(diagnosis.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**29}))
    (full,) = diagnosis.check_scratch(load(f"checkpoint.scratch_dir={tmp_path}"))
    assert full.level == "error" and full.found.startswith("0.5 GiB") and "12 bytes a parameter" in full.fix


def test_a_store_for_checkpoints_that_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(url: str, timeout_seconds: float) -> None:
        asked.append(url)
        raise TransferFault("access refused (HTTP 403 AccessDenied)", "refused", advice="give credentials")

    monkeypatch.setattr(storage, "probe_s3", refuse)
    assert diagnosis.check_upload(load()) == [] and asked == []
    (refused,) = diagnosis.check_upload(load("checkpoint.upload=s3://bucket/runs"))
    assert (refused.level, refused.subject, refused.fix) == ("error", "checkpoint.upload", "give credentials")
    assert asked == ["s3://bucket/runs/.sparselt-doctor"]
    monkeypatch.setattr(storage, "probe_s3", lambda url, timeout_seconds: None)
    (good,) = diagnosis.check_upload(load("checkpoint.upload=s3://bucket/runs"))
    assert good.level == "ok"


def test_missing_shards_are_an_error_with_a_fix(tmp_path: Path) -> None:
    (finding,) = diagnosis.check_data(load(f"data.train={tmp_path / 'none'}"), verify=False)
    assert finding.level == "error"
    assert "sparselt prepare" in finding.fix
    (finding,) = diagnosis.check_data(load(), verify=False)
    assert finding.level == "note"


def test_a_missing_compiler_and_a_stale_lock_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "operator").mkdir()
    (tmp_path / "operator" / "lock").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    (tool, *_) = diagnosis.check_build_tools(load())
    assert (tool.subject, tool.level) == ("C++ compiler", "note")  # what does not compile runs without
    findings = {finding.subject: finding for finding in diagnosis.check_build_tools(load("train.compile=true"))}
    assert findings["C++ compiler"].level == "error"
    assert "g++" in findings["C++ compiler"].fix
    assert findings["compiled operators"].level == "warning"
    assert "lock" in findings["compiled operators"].found


@pytest.mark.parametrize(
    ("content", "level"),
    [("from sparselt_dist.launch import main", "ok"), ("import deepspeed", "warning"), (None, "error")],
)
def test_the_deepspeed_command_must_be_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, level: str
) -> None:
    if content is not None:
        script = tmp_path / "deepspeed"
        script.write_text(content, encoding="utf-8")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,) = diagnosis.check_launcher()
    assert finding.level == level


def test_a_version_out_of_range_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = diagnosis.importlib.metadata
    monkeypatch.setattr(metadata, "requires", lambda _: ["torch>=99", "mlflow>=3"])
    monkeypatch.setattr(metadata, "metadata", lambda _: {"Requires-Python": ">=3.11"})
    findings = {finding.subject: finding for finding in diagnosis.check_packages()}
    assert findings["torch"].level == "error"
    assert findings["torch"].fix == "pip install 'torch>=99'"
    assert findings["mlflow"].level == findings["python"].level == "ok"


def _only(monkeypatch: pytest.MonkeyPatch, *findings: diagnosis.Finding) -> None:
    for name in ("packages", "build_tools", "launcher", "memory", "slurm"):
        monkeypatch.setattr(doctor, f"check_{name}", lambda *_: [])
    monkeypatch.setattr(doctor, "check_devices", lambda *_: list(findings))


def test_the_exit_code_follows_the_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _only(monkeypatch, diagnosis.Finding("warning", "GPU", "hot", "cool it"))
    assert doctor.main(["--world", "2"]) == 0
    shown = capsys.readouterr().out
    assert "fit to run: 0 error(s), 1 warning(s)" in shown
    assert "fix: cool it" in shown
    _only(monkeypatch, diagnosis.Finding("error", "GPU", "gone", "find it"))
    assert doctor.main([]) == 2
    assert "not fit to run: 1 error(s)" in capsys.readouterr().out


def test_a_wrong_configuration_is_told_and_the_machine_still_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _only(monkeypatch, diagnosis.Finding("ok", "GPU", "none"))
    assert doctor.main(["budget.max_step=5"]) == 2
    shown = capsys.readouterr().out
    assert "did you mean budget.max_steps?" in shown
    assert "GPU: none" in shown

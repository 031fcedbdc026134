"""Third-party objectives: a throw-away package is built, installed and found by its entry point.

Each check runs in a process of its own, as an installed plug-in would be met.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "0.1"

[project.entry-points."sparselt_dist.objectives"]
{entry_points}

[tool.hatch.build.targets.wheel]
packages = ["{module}"]
"""

# The whole of a working plug-in: predict every token from the others' hidden states, without masking.
COPYING = '''
"""Predict every position's own id."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparselt_dist.data.batch import IGNORE_INDEX, pad_examples
from sparselt_dist.objectives.base import API_VERSION, LossOutput


@dataclass(frozen=True)
class CopyingConfig:
    scale: float = 1.0


@dataclass(frozen=True)
class CopyingCollator:
    pad_id: int

    def __call__(self, examples):
        ids, mask, _ = pad_examples(examples, self.pad_id)
        ids, mask = torch.from_numpy(ids), torch.from_numpy(mask)
        labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
        count = mask.sum()
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "num_targets": count, "num_tokens": count}


class CopyingModule(torch.nn.Module):
    def __init__(self, scale, backbone):
        super().__init__()
        self.scale = scale
        self.head = torch.nn.Linear(backbone.hidden_size, backbone.vocab_size)

    def forward(self, backbone, batch):
        logits = self.head(backbone(batch["input_ids"], attention_mask=batch["attention_mask"])).float()
        labels = batch["labels"].flatten()
        total = F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORE_INDEX, reduction="sum")
        count = (labels != IGNORE_INDEX).sum()
        return LossOutput(self.scale * total / count.clamp(min=1), {"loss": (self.scale * total.detach(), count)})

    def set_progress(self, step, progress):
        pass


class Copying:
    name = "copying"
    api_version = API_VERSION
    config_cls = CopyingConfig

    def needs_lm_head(self, cfg):
        return False

    def build_collator(self, cfg, tokenizer):
        return CopyingCollator(tokenizer.pad_id)

    def build_module(self, cfg, backbone):
        return CopyingModule(cfg.scale, backbone)
'''


def _install(site: Path, work: Path, name: str, entry_points: dict[str, str], code: str) -> None:
    """Build a package of one module from source and install it into a folder, without network."""
    module = name.replace("-", "_")
    source = work / name
    (source / module).mkdir(parents=True)
    points = "\n".join(f'{point} = "{module}:{attribute}"' for point, attribute in entry_points.items())
    (source / "pyproject.toml").write_text(PYPROJECT.format(name=name, module=module, entry_points=points))
    (source / module / "__init__.py").write_text(code)
    options = ["--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(site), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three installed plug-ins: a sound one, one that fails on import, one that takes a built-in's name."""
    site, work = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("work")
    _install(site, work, "copying-objective", {"copying": "Copying"}, COPYING)
    _install(site, work, "broken-objective", {"broken": "Broken"}, "raise RuntimeError('no such driver')\n")
    _install(site, work, "greedy-objective", {"mlm": "Greedy"}, "raise RuntimeError('must not be imported')\n")
    return site


def _python(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


def _succeeds(site: Path, code: str) -> str:
    done = _python(site, code)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plugins_are_listed_without_being_imported(site: Path) -> None:
    out = _succeeds(
        site,
        """
        import sys
        from sparselt_dist.objectives import available
        lines = available()
        print(lines["copying"], "|", lines["broken"], "|", lines["mlm"])
        assert not {"copying_objective", "broken_objective", "greedy_objective", "torch"} & set(sys.modules)
        """,
    )
    copying, broken, mlm = out.strip().split(" | ")
    assert copying == "plug-in of copying-objective (copying_objective:Copying)"
    assert "broken-objective" in broken
    assert "masked language modelling" in mlm  # the built-in is not shadowed


def test_a_plugin_is_used_by_its_name_and_passes_the_contract(site: Path) -> None:
    out = _succeeds(
        site,
        """
        import sys
        from sparselt_dist.objectives import get_objective
        from sparselt_dist.objectives.contract import check_objective
        objective = get_objective("copying")
        check_objective(objective)
        check_objective(objective, objective.config_cls(scale=2.0))
        assert get_objective("copying") is objective
        assert "broken_objective" not in sys.modules
        print(type(objective).__module__)
        """,
    )
    assert out.strip() == "copying_objective"


def test_a_plugin_that_fails_on_import_is_named_with_its_cause(site: Path) -> None:
    out = _succeeds(
        site,
        """
        from sparselt_dist.errors import PluginError
        from sparselt_dist.objectives import get_objective
        try:
            get_objective("broken")
        except PluginError as error:
            print(error)
        """,
    )
    assert "broken-objective failed on import: RuntimeError: no such driver; reinstall or remove" in out


def test_a_plugin_cannot_take_the_name_of_a_built_in(site: Path) -> None:
    out = _succeeds(
        site,
        """
        import sys
        from sparselt_dist.objectives import get_objective
        print(type(get_objective("mlm")).__module__, "greedy_objective" in sys.modules)
        """,
    )
    assert out.split() == ["sparselt_dist.objectives.mlm", "False"]

"""One masked batch and one optimizer step of MLM, compared with stored numbers.

They move only if masking, seeds, the loss or the update change. If that was meant, run `pytest tests/golden
--update-golden`, look at the difference in git, and say in the commit why every run's numbers change.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparselt_dist.objectives.contract import TINY_TOKENIZER, TinyBackbone, tiny_examples
from sparselt_dist.objectives.mlm import MLMCollator, MLMModule
from sparselt_dist.objectives.settings import MLMConfig

FORMS: dict[str, dict[str, Any]] = {
    "bert": {},
    "cramming": {"masking": "exact", "mlm_probability": 0.25, "exempt_special": False},
    "whole_word": {"whole_word": True},
    "whole_word_exact": {"whole_word": True, "masking": "exact"},
}


def _tiny_backbone() -> TinyBackbone:
    """Weights from a formula, so that no generator's version matters."""
    backbone = TinyBackbone()
    with torch.no_grad():
        for number, parameter in enumerate(backbone.parameters()):
            places = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_((torch.sin(places * 12.9898 + number) * 0.3).reshape(parameter.shape))
    return backbone


def _compare(name: str, found: dict[str, Any], update: bool, tolerance: float) -> None:
    path = Path(__file__).parent / f"{name}.json"
    if update:
        path.write_text(json.dumps(found, indent=1) + "\n")
    stored = json.loads(path.read_text())
    assert found.keys() == stored.keys()
    for key, value in found.items():
        changed = f"{path.name}: {key} changed; if that was meant: pytest tests/golden --update-golden"
        assert value == (pytest.approx(stored[key], rel=tolerance) if tolerance else stored[key]), changed


@pytest.mark.parametrize("form", FORMS)
def test_masked_batch(form: str, update_golden: bool) -> None:
    batch = MLMCollator(MLMConfig(**FORMS[form]), TINY_TOKENIZER)(tiny_examples())
    _compare(f"batch_{form}", {key: value.tolist() for key, value in batch.items()}, update_golden, tolerance=0)


def test_one_step(update_golden: bool) -> None:
    backbone, module = _tiny_backbone(), MLMModule()
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-2, betas=(0.9, 0.98), eps=1e-12, weight_decay=0.01)
    batch = MLMCollator(MLMConfig(), TINY_TOKENIZER)(tiny_examples())
    found = {}
    for step in range(2):
        loss, metrics = module(backbone, batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in backbone.parameters()])
        optimizer.step()
        found[f"loss_{step}"] = loss.item()
        found[f"grad_norm_{step}"] = norm.item()
        found[f"accuracy_{step}"] = (metrics["accuracy"][0] / metrics["accuracy"][1]).item()
    _compare("step_mlm", found, update_golden, tolerance=2e-5)

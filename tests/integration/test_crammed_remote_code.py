"""An exported crammed-bert loads where only transformers is installed."""

import json
import os
import subprocess
import sys

import pytest
import torch
from runs import slow

from sparselt_dist.models.crammed import CrammedBertConfig, CrammedBertForMaskedLM

SCRIPT = """
import json, sys
sys.modules["sparselt_dist"] = None  # importing it fails, as where it is not installed
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification
folder, again = sys.argv[1:]
ids = torch.arange(1, 9)[None]
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
bare = AutoModel.from_pretrained(folder, trust_remote_code=True)
classifier = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(again)
twice = AutoModelForMaskedLM.from_pretrained(again, trust_remote_code=True)
print(json.dumps({
    "module": type(model).__module__,
    "logits": model(ids).logits.tolist(),
    "twice": twice(ids).logits.tolist(),
    "hidden": bare(ids).last_hidden_state.tolist(),
    "classes": list(classifier(ids).logits.shape),
}))
"""


@pytest.mark.parametrize(
    "variant",
    [{}, slow({"norm_type": "rms", "position_type": "rope", "gate_activation": "silu"})],
    ids=["official", "new"],
)
def test_exported_folder_loads_without_this_package(tmp_path, variant):
    torch.manual_seed(0)
    config = CrammedBertConfig(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
        **variant,
    )
    model = CrammedBertForMaskedLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "PYTHONPATH": "",
    }
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "model"), str(tmp_path / "again")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["module"].startswith("transformers_modules")
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(torch.tensor(found["logits"]), model(ids).logits)
    torch.testing.assert_close(torch.tensor(found["twice"]), model(ids).logits)
    torch.testing.assert_close(torch.tensor(found["hidden"]), model.encoder(ids).last_hidden_state)
    assert found["classes"] == [1, 2]

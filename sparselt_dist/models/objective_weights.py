"""The objective's own weights out of a Hugging Face folder, to start training from: SLT's typer and decoder, for example.

`export` and `convert` leave them in `objective.safetensors` beside the model, with the objective's name in
`sparselt_export.json`.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from sparselt_dist.errors import CheckpointError

OBJECTIVE_FILE = "objective.safetensors"
MARKER = "sparselt_export.json"


def load_objective_weights(module: nn.Module, folder: Path, name: str) -> None:
    """Load the objective's weights of a folder into `module`, every one of them.

    Args:
        name: of the objective that `module` belongs to.

    Raises:
        CheckpointError: the folder has none, or those of another objective or of other sizes.
    """
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8")).get("objective")
        state = load_file(folder / OBJECTIVE_FILE)
    except (OSError, ValueError, AttributeError, SafetensorError) as cause:
        raise CheckpointError(
            f"model.init_from: {folder} holds no readable weights of an objective ({cause}), expected {OBJECTIVE_FILE} and "
            f"{MARKER} as export and convert write them; give such a folder"
        ) from cause
    sizes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    stored = {key: tuple(value.shape) for key, value in state.items()}
    if found != name or sizes != stored:
        wrong = sorted(key for key in sizes.keys() | stored.keys() if sizes.get(key) != stored.get(key))
        raise CheckpointError(
            f"model.init_from: {folder} holds weights of the objective {found!r} in which {len(wrong)} differ "
            f"({', '.join(wrong[:4]) or 'none'}), expected those of {name!r} as it is configured; set the keys of "
            "the objective as they were (objective.num_types), or give another folder"
        )
    module.load_state_dict(state)

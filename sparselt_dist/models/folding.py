"""What an objective adds to the input embeddings, folded into their table, so that the model alone gives the same outputs.

The head keeps the table it was trained with: a model whose tables were tied is untied by it (`tie_word_embeddings: false`).
Shapes: V rows of the table, D width.
"""

from __future__ import annotations

import torch
from torch import nn

from sparselt_dist.models.backbone import PretrainingModel
from sparselt_dist.objectives.base import ChangesInputs

_IDS_AT_ONCE = 8192


@torch.no_grad()
def fold_inputs(model: PretrainingModel) -> bool:
    """Fold in place, the objective's parts being dropped; whether the backbone alone now gives what the whole did.

    False where the change does not follow from an id alone; the model is then left as it is.
    """
    objective, words = model.objective, model.backbone.get_input_embeddings()
    if not isinstance(objective, ChangesInputs) or objective.input_change == "none":
        return True
    if objective.input_change == "context" or type(words).forward is not nn.Embedding.forward:
        return False
    table_VD = words.get_parameter("weight")
    ids_V = torch.arange(len(table_VD), device=table_VD.device)
    folded_VD = torch.cat([words(ids) for ids in ids_V.split(_IDS_AT_ONCE)]).to(table_VD.dtype)
    objective.release_inputs()
    words.register_parameter("weight", nn.Parameter(folded_VD))  # a new one: a tied head holds on to the old
    if model.backbone.has_head:
        model.backbone.config.tie_word_embeddings = False
        _part(model.backbone.model)
    return True


def _part(model: nn.Module) -> None:
    """Give every name its own parameter: an untied model is read from its files name by name, biases included."""
    seen: set[int] = set()
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) in seen:
            owner, _, last = name.rpartition(".")
            model.get_submodule(owner).register_parameter(last, nn.Parameter(parameter.clone()))
        seen.add(id(parameter))

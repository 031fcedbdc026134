"""Replaced-token detection (Clark et al. 2020, ELECTRA, section 2): an objective of one's own, to be read as an example.

    loss = L_generator + discriminator_weight * L_discriminator                 (their equation at the end of section 2)

A small generator fills masked positions by draws from its predictions; the backbone then says of every token whether it
is the original one. The example shows where the interface leaves room for

- a second model inside an objective: `Generator` is a part of the module, so it is trained, saved and partitioned
  with it, and shares the backbone's word vectors by calling their table;
- fields beside the labels: `rtd/...` in the batch, whatever their shape;
- a weight for each token: `rtd/weights`, of which special tokens have none;
- a loss whose terms are means over different things: the generator's over masked tokens, the discriminator's over all
  it judges, each weighed by its own count;
- draws inside a module: the collator gives one number a draw, hashed from the example's seed, so that a step does not
  depend on how it is split and repeats after a resume.

B rows, L positions, N masked positions, D hidden size, E width of word vectors, G width of the generator, V vocabulary,
H heads.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sparselt_dist.data.batch import IGNORE_INDEX, Batch, Example
from sparselt_dist.data.randomness import random_uniform
from sparselt_dist.objectives.base import API_VERSION, Collator, SplitLossOutput, TokenizerInfo
from sparselt_dist.objectives.mlm import POSITIONS_KEY, MLMCollator
from sparselt_dist.objectives.settings import MLMConfig

TARGETS_KEY = "rtd/targets"  # [N] int64: places of the masked tokens in the flattened [B * L] batch
UNIFORM_KEY = "rtd/uniform"  # [N] float64 in [0, 1): what the generator's draws follow from
WEIGHTS_KEY = "rtd/weights"  # [B, L] float32: weight of each token in the discriminator's loss
NUM_JUDGED_KEY = "rtd/num_judged"  # [] int64: tokens that the discriminator judges


class RTDConfig(MLMConfig):
    """Keys beside `objective.name: rtd`: those of masked language modelling, and these."""

    mask_share: float = Field(1.0, ge=0, le=1, description="share of targets replaced by the mask token")
    random_share: float = Field(0.0, ge=0, le=1, description="share of targets replaced by a random id")
    generator_width: int = Field(32, ge=8, multiple_of=8, description="hidden size of the generator")
    generator_layers: int = Field(1, ge=1, description="layers of the generator")
    discriminator_weight: float = Field(50.0, ge=0, description="lambda: weight of the discriminator's loss")
    target_weight: float = Field(
        1.0, ge=0, description="weight of masked tokens in the discriminator's loss; others: 1"
    )


# --- examples to a batch ---------------------------------------------------------------------------------------------


class RTDCollator:
    """Masked rows for the generator; beside them the original ids, the draws and the weights."""

    def __init__(self, cfg: RTDConfig, tokenizer: TokenizerInfo) -> None:
        self._mask = MLMCollator(cfg, tokenizer)
        self._special_ids = torch.tensor(tokenizer.special_ids, dtype=torch.int64)
        self._target_weight = cfg.target_weight

    def __call__(self, examples: list[Example]) -> Batch:
        batch = self._mask(examples)
        targets_N, is_target_BL = batch.pop(POSITIONS_KEY), batch["labels"] != IGNORE_INDEX
        original_BL = torch.where(is_target_BL, batch["labels"], batch["input_ids"])
        is_judged_BL = (batch["attention_mask"] == 1) & ~torch.isin(original_BL, self._special_ids)
        seeds_B = np.array([example["seed"] for example in examples], dtype=np.uint64)
        uniform_BL = torch.from_numpy(random_uniform(seeds_B, original_BL.shape[1], "rtd draw"))
        return {
            **batch,
            "original_ids": original_BL,
            TARGETS_KEY: targets_N,
            UNIFORM_KEY: uniform_BL.flatten()[targets_N],
            WEIGHTS_KEY: torch.where(is_target_BL, self._target_weight, 1.0) * is_judged_BL,
            NUM_JUDGED_KEY: is_judged_BL.sum(),
        }


# --- the second model ------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden_BLG: Tensor, allowed_B1LL: Tensor) -> Tensor:
        parts_BLG = self.project(self.norm_in(hidden_BLG)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in parts_BLG)  # [B, H, L, 8]
        mixed_BLG = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed_B1LL).transpose(1, 2).flatten(2)
        hidden_BLG = hidden_BLG + self.join(mixed_BLG)
        return cast(Tensor, hidden_BLG + self.narrow(F.gelu(self.widen(self.norm_out(hidden_BLG)))))


class Generator(nn.Module):
    """A small masked language model on the word vectors of another."""

    def __init__(self, cfg: RTDConfig, backbone: Any) -> None:
        super().__init__()
        width = cfg.generator_width
        vector_width = getattr(backbone.get_input_embeddings(), "embedding_dim", backbone.hidden_size)
        self.shrink = nn.Linear(vector_width, width)
        self.places = nn.Embedding(getattr(backbone.config, "max_position_embeddings", 512), width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(cfg.generator_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, backbone.vocab_size)

    def forward(self, vectors_BLE: Tensor, batch: Batch) -> Tensor:
        """Scores [N, V] of the masked positions."""
        segments_BL = batch.get("segment_ids", batch["attention_mask"])  # padding sees padding alone
        places = batch.get("position_ids", torch.arange(vectors_BLE.shape[1], device=vectors_BLE.device))
        allowed_B1LL = segments_BL[:, None, :, None] == segments_BL[:, None, None, :]
        hidden_BLG = self.shrink(vectors_BLE) + self.places(places)
        for layer in self.layers:
            hidden_BLG = layer(hidden_BLG, allowed_B1LL)
        return cast(Tensor, self.head(self.norm(hidden_BLG.flatten(0, 1)[batch[TARGETS_KEY]])))


@torch.no_grad()
def draw(scores_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """An id [N] int64 for each row, as likely as its softmax says: the inverse of its distribution function."""
    cumulative_NV = scores_NV.double().softmax(dim=-1).cumsum(dim=-1)
    found_N1 = torch.searchsorted(cumulative_NV, uniform_N[:, None], right=True)
    return found_N1.squeeze(1).clamp(max=scores_NV.shape[1] - 1)


# --- the module ------------------------------------------------------------------------------------------------------


class RTDModule(nn.Module):
    """Generator, the discriminator's head on the backbone's states, and the loss."""

    counts = (NUM_JUDGED_KEY,)

    def __init__(self, cfg: RTDConfig, backbone: Any) -> None:
        super().__init__()
        self._weight = cfg.discriminator_weight
        self.generator = Generator(cfg, backbone)
        width = backbone.hidden_size
        self.judge = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))

    def set_progress(self, step: int, progress: float) -> None:
        """Nothing here follows the step."""

    def forward(self, backbone: Any, batch: Batch) -> SplitLossOutput:
        targets_N, original_BL = batch[TARGETS_KEY], batch["original_ids"]
        labels_N = batch["labels"].flatten()[targets_N]
        scores_NV = self.generator(backbone.get_input_embeddings()(batch["input_ids"]), batch).float()
        generator_sum = F.cross_entropy(scores_NV, labels_N, ignore_index=IGNORE_INDEX, reduction="sum")
        is_target_N = labels_N != IGNORE_INDEX
        drawn_N = draw(scores_NV, batch[UNIFORM_KEY]).where(is_target_N, original_BL.flatten()[targets_N])
        seen_BL = original_BL.flatten().index_copy(0, targets_N, drawn_N).view_as(original_BL)

        packed = {key: batch[key] for key in ("segment_ids", "position_ids") if key in batch}
        hidden_BLD = backbone(seen_BL, attention_mask=batch["attention_mask"], **packed)
        says_BL = self.judge(hidden_BLD).squeeze(-1).float()
        is_replaced_BL = seen_BL != original_BL  # a draw that hits the original counts as original
        losses_BL = F.binary_cross_entropy_with_logits(says_BL, is_replaced_BL.float(), reduction="none")
        discriminator_sum = (losses_BL * batch[WEIGHTS_KEY]).sum()

        num_targets, num_judged = is_target_N.sum(), batch[NUM_JUDGED_KEY]
        terms = {
            "num_targets": generator_sum / num_targets.clamp(min=1),
            NUM_JUDGED_KEY: self._weight * discriminator_sum / num_judged.clamp(min=1),
        }
        loss = torch.stack(list(terms.values())).sum()
        is_found_BL = is_replaced_BL & (says_BL > 0)
        metrics = {
            "loss": (loss.detach() * num_judged, num_judged),
            "generator_loss": (generator_sum.detach(), num_targets),
            "generator_accuracy": (((drawn_N == labels_N) & is_target_N).sum(), num_targets),
            "discriminator_loss": (discriminator_sum.detach(), num_judged),
            "replaced_share": (is_replaced_BL.sum(), num_judged),
            "found_share": (is_found_BL.sum(), is_replaced_BL.sum()),
        }
        return SplitLossOutput(loss, metrics, terms)


class RTD:
    """The plug-in."""

    name = "rtd"
    api_version = API_VERSION
    config_cls = RTDConfig

    def needs_lm_head(self, cfg: RTDConfig) -> bool:
        return False  # the generator has its own, and is not kept

    def build_collator(self, cfg: RTDConfig, tokenizer: TokenizerInfo) -> Collator:
        return RTDCollator(cfg, tokenizer)

    def build_module(self, cfg: RTDConfig, backbone: nn.Module) -> nn.Module:
        return RTDModule(cfg, backbone)

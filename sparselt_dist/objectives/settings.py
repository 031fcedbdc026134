"""Configuration classes of the built-in objectives, apart from their modules so that checking imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class MLMConfig(BaseModel):
    """Keys beside `objective.name: mlm`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    mlm_probability: float = Field(0.15, gt=0, lt=1, description="share of positions that are targets")
    masking: Literal["bernoulli", "exact"] = Field(
        "bernoulli",
        description="bernoulli: each position on its own (BERT, RoBERTa); "
        "exact: round(p*L) a row, split in exact counts (cramming)",
    )
    mask_share: float = Field(0.8, ge=0, le=1, description="share of targets replaced by the mask token")
    random_share: float = Field(0.1, ge=0, le=1, description="share of targets replaced by a random id")
    whole_word: bool = Field(False, description="choose whole words instead of single pieces")
    exempt_special: bool = Field(True, description="never choose special tokens (cramming: false)")

    @model_validator(mode="after")
    def _shares_fit(self) -> MLMConfig:
        if self.mask_share + self.random_share > 1:
            raise ValueError(f"mask_share + random_share of at most 1 (found {self.mask_share} + {self.random_share})")
        return self


BUILT_IN_SETTINGS: dict[str, type[BaseModel]] = {"mlm": MLMConfig}

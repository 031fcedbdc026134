"""Configuration classes of the built-in objectives, apart from their modules so that checking imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Points = tuple[tuple[float, float], ...]
_Numbers = Annotated[tuple[float, float], Field(strict=False)]
_Lengths = Annotated[tuple[float, Annotated[int, Field(ge=1)]], Field(strict=False)]


def value_at(points: Points, progress: float) -> float:
    """The lines between points [share of the budget, value] at a share; of two points at one place the later holds from
    there."""
    before = [point for point in points if point[0] <= progress]
    after = [point for point in points if point[0] > progress]
    if not before or not after:
        return before[-1][1] if before else after[0][1]
    (start, low), (end, high) = before[-1], after[0]
    return low + (high - low) * (progress - start) / (end - start)


def _are_shares(shares: Sequence[float]) -> bool:
    return list(shares) == sorted(shares) and 0 <= shares[0] <= shares[-1] <= 1


class MLMConfig(BaseModel):
    """Keys beside `objective.name: mlm`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    mlm_probability: (
        Annotated[float, Field(gt=0, lt=1)] | Annotated[tuple[_Numbers, ...], Field(strict=False, min_length=1)]
    ) = Field(
        0.15,
        description="share of positions that are targets: a number, or points [share of the budget, share of positions] with "
        "lines between",
    )
    row_lengths: Annotated[tuple[_Lengths, ...], Field(strict=False, min_length=1)] | None = Field(
        None,
        description="points [share of the budget, tokens]: from each share on, training rows are cut into pieces of so many "
        "tokens; null: never",
    )
    masking: Literal["bernoulli", "exact"] = Field(
        "bernoulli",
        description="bernoulli: each position on its own (BERT, RoBERTa); "
        "exact: round(p*L) a row, split in exact counts (cramming)",
    )
    mask_share: float = Field(0.8, ge=0, le=1, description="share of targets replaced by the mask token")
    random_share: float = Field(0.1, ge=0, le=1, description="share of targets replaced by a random id")
    whole_word: bool = Field(False, description="choose whole words instead of single pieces")
    exempt_special: bool = Field(True, description="never choose special tokens (cramming: false)")
    cross_entropy: Literal["full", "chunked"] = Field(
        "full",
        description="full: the head's scores of all targets at once; chunked: a piece at a time, the same numbers in "
        "less memory",
    )

    @model_validator(mode="after")
    def _shares_fit(self) -> MLMConfig:
        if self.mask_share + self.random_share > 1:
            raise ValueError(f"mask_share + random_share of at most 1 (found {self.mask_share} + {self.random_share})")
        return self

    @model_validator(mode="after")
    def _points_rise(self) -> MLMConfig:
        shares, rates = zip(*self.probability_points(), strict=True)
        if not _are_shares(shares) or not 0 < min(rates) <= max(rates) < 1:
            raise ValueError(
                "mlm_probability with points [share of the budget, share of positions] whose first shares rise from 0 to at "
                f"most 1 and whose second lie between 0 and 1 (found {[list(point) for point in self.probability_points()]})"
            )
        if self.row_lengths is not None and not _are_shares([share for share, _ in self.row_lengths]):
            found = [list(point) for point in self.row_lengths]
            raise ValueError(f"row_lengths with shares of the budget that rise from 0 to at most 1 (found {found})")
        return self

    def probability_points(self) -> Points:
        """The share of targets as points [share of the budget, share of positions]."""
        return ((0.0, self.mlm_probability),) if isinstance(self.mlm_probability, float) else self.mlm_probability

    def probability_at(self, progress: float) -> float:
        """The share of targets at a spent share of the budget in [0, 1]."""
        return value_at(self.probability_points(), progress)

    def mean_probability(self) -> float:
        """The share of targets over the whole budget."""
        points = self.probability_points()
        points = ((0.0, points[0][1]), *points, (1.0, points[-1][1]))
        pairs = pairwise(points)
        return sum((end - start) * (low + high) / 2 for (start, low), (end, high) in pairs)

    def row_length_at(self, progress: float) -> int | None:
        """Tokens that rows are cut to at a spent share of the budget; None: they are left whole."""
        reached = [length for share, length in self.row_lengths or () if share <= progress]
        return reached[-1] if reached else None


class CWTConfig(MLMConfig):
    """Keys beside `objective.name: cwt`: those of masked language modelling, and these."""

    mlm_probability: float = Field(0.15, gt=0, lt=1, description="share of positions that are targets")
    row_lengths: None = Field(None, description="null: only objective mlm cuts its rows")
    masking: Literal["bernoulli", "exact"] = Field(
        "exact",
        description="exact: round(p*L) targets a row, so that every micro-batch has as many negatives; "
        "bernoulli: each position on its own",
    )
    prediction: Literal["masked", "causal"] = Field(
        "masked", description="masked: the masked positions of an encoder; causal: every next token of a decoder"
    )
    corruption: Literal["bert", "headless"] = Field(
        "bert",
        description="bert: as objective mlm; headless: the published code's, random ids on random_share of all positions "
        "and ceil(p*L) targets a row",
    )
    labels_after_random_step: bool = Field(
        False,
        description="cross-entropy predicts what the random step of corruption=headless left, as the published baseline "
        "did; contrast never does",
    )
    temperature: float = Field(1.0, gt=0, description="scores are divided by it (published: 1)")
    form: Literal["full", "deduplicated"] = Field(
        "deduplicated",
        description="a column of scores for every target (full), or for every distinct id, weighted by its count; "
        "the same loss and gradients",
    )
    negatives: Literal["local", "global"] = Field(
        "local",
        description="targets to tell apart: those of the micro-batch on one rank (published), or of all ranks",
    )
    contrastive_weight: float = Field(1.0, ge=0, description="weight of the contrastive loss")
    cross_entropy_weight: float = Field(
        0.0, ge=0, description="weight of the vocabulary head's cross-entropy; at 0 the model has no head"
    )
    recover_from: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of the budget after which a recovered head is trained by cross-entropy; null: never",
    )
    recovered_table: Literal["tied", "copy"] = Field(
        "tied", description="matrix of the recovered head: the input table itself, or a copy (published)"
    )
    recovered_bias: Literal["log_unigram", "none"] = Field(
        "log_unigram", description="bias of the recovered head: from the log unigram on, or none (published)"
    )

    @model_validator(mode="after")
    def _terms_fit(self) -> CWTConfig:
        if self.contrastive_weight == 0 and self.cross_entropy_weight == 0:
            raise ValueError("contrastive_weight or cross_entropy_weight above 0 (found 0 for both)")
        if self.recover_from is not None and self.cross_entropy_weight > 0:
            raise ValueError(
                "recover_from without cross_entropy_weight, whose head needs no recovery "
                f"(found {self.recover_from} and {self.cross_entropy_weight})"
            )
        return self

    @model_validator(mode="after")
    def _corruption_fits(self) -> CWTConfig:
        if self.corruption == "headless" and (self.prediction == "causal" or self.whole_word):
            raise ValueError("corruption=headless with prediction=masked and whole_word=false alone")
        if self.labels_after_random_step and (self.corruption != "headless" or self.cross_entropy_weight == 0):
            raise ValueError("labels_after_random_step with corruption=headless and cross_entropy_weight above 0 alone")
        return self


class SLTConfig(MLMConfig):
    """Keys beside `objective.name: slt`: those of masked language modelling, and these."""

    num_types: int = Field(64, ge=2, description="latent types, the null type included")
    reconstruction_weight: float = Field(0.05, ge=0, description="alpha: weight of the reconstruction loss")
    sparsity_weight: float = Field(0.05, ge=0, description="beta: weight of the sparsity loss")
    diversity_weight: float = Field(0.1, ge=0, description="gamma: weight of the diversity loss")
    draw: Literal["soft", "straight-through"] = Field(
        "soft", description="what training sees of the Gumbel draw: the mixture (official code), or its largest type"
    )
    sparsity_form: Literal["log-mean", "mean-log"] = Field(
        "log-mean", description="-log of the mean null probability (official code), or the mean of its -log"
    )
    diversity_form: Literal["perplexity-gap", "kl"] = Field(
        "perplexity-gap",
        description="distance of the mean distribution from the uniform one: (K-PPL)/K (official code) or KL in nats",
    )
    regularizer_scope: Literal["global-batch", "micro-batch"] = Field(
        "global-batch",
        description="tokens over which the distribution of types is averaged: those of the whole optimizer step, "
        "however it is split, or those of each micro-batch",
    )
    temperature_start: float = Field(5.0, gt=0, description="temperature of the draw at the start of its decay")
    temperature_floor: float = Field(0.5, gt=0, description="lowest temperature")
    temperature_schedule: Literal["steps", "budget"] = Field(
        "steps",
        description="steps: factor temperature_decay an optimizer step; "
        "budget: the floor is reached after temperature_decay_share of the budget",
    )
    temperature_decay: float = Field(0.99997, gt=0, le=1, description="factor a step, for temperature_schedule=steps")
    temperature_decay_share: float = Field(
        0.76753, gt=0, le=1, description="share of the budget, for temperature_schedule=budget"
    )
    first_step_at_floor: bool = Field(
        True, description="the first step runs at temperature_floor, as in the official code"
    )
    decoder_dropout: float | None = Field(
        None, ge=0, lt=1, description="dropout of the decoder; null: hidden and attention dropout of the encoder"
    )
    decoder_layer_drop: float = Field(
        0.1, ge=0, lt=1, description="probability that a training step skips the decoder layer"
    )
    decoder_embedding_passes: Literal[1, 2] = Field(
        2, description="times the decoder's input goes through the encoder's embedding module (official code: 2)"
    )

    @model_validator(mode="after")
    def _temperature_falls(self) -> SLTConfig:
        if self.temperature_floor > self.temperature_start:
            raise ValueError(
                f"temperature_floor of at most temperature_start (found {self.temperature_floor} above "
                f"{self.temperature_start})"
            )
        return self


Family = Literal["A1", "A2", "A3", "A4"]
"""Of agreements; see `DACConfig.families`."""


class DACConfig(MLMConfig):
    """Keys beside `objective.name: dac`: those of masked language modelling, and these."""

    families: tuple[Family, ...] = Field(
        ("A1", "A2", "A3", "A4"),
        min_length=1,
        strict=False,
        description="agreements with a submodel of their own: A1 subject and verb, A2 verb and complement, "
        "A3 noun and modifier, A4 prepositional phrase",
    )
    variant: Literal["static", "contextual"] = Field(
        "static",
        description="static: a piece's embedding is a row of a table; contextual: the state of a small convolutional tagger "
        "that reads the corrupted row",
    )
    table_width: int = Field(64, ge=1, description="width of each family's agreement embedding")
    tables: Literal["trained", "random", "permuted", "shuffled-pairs", "window"] = Field(
        "trained",
        description="trained; or a control: random rows of the trained norms, trained rows permuted among words of like "
        "frequency, trained on pairs with shuffled dependents, trained on pairs of neighbouring words",
    )
    sides: Literal["chunks", "words"] = Field(
        "chunks", description="what a side of a pair is: its chunk, or its root word"
    )
    trainable_tables: bool = Field(False, description="train the tables along with the encoder (an ablation)")
    combination: Literal["add", "gated", "concatenate"] = Field(
        "add",
        description="how the term joins a word's embedding: added, added times a gate that the embedding opens, or joined "
        "to it before one linear layer; all start alike",
    )
    agreements_from: str | None = Field(
        None, description="prepared shard folder whose agreements to use; null: that of data.train"
    )
    stage1_pairs_per_step: int = Field(8192, ge=2, description="pairs of a step of stage 1")
    stage1_max_passes: int = Field(3, ge=1, description="passes over the pairs of a family")
    stage1_max_minutes: float = Field(
        10.0, ge=0, description="wall clock of one family's submodel; 0: the tables stay as they are drawn"
    )
    stage1_total_minutes: float = Field(40.0, ge=0, description="wall clock of all of stage 1")
    stage1_max_share: float = Field(
        0.1, gt=0, lt=1, description="most that stage 1 takes of budget.max_hours, to which its seconds belong"
    )
    stage1_table_lr: float = Field(5e-3, gt=0, description="peak learning rate of the tables in stage 1")
    stage1_peak_lr: float = Field(1e-3, gt=0, description="peak learning rate of the rest of a submodel")
    stage1_label_weight: float = Field(0.1, ge=0, description="weight of the relation label's cross-entropy")

    @model_validator(mode="after")
    def _families_differ(self) -> DACConfig:
        if len(set(self.families)) < len(self.families):
            raise ValueError(f"families that differ (found {', '.join(self.families)})")
        return self

    @model_validator(mode="after")
    def _variant_fits(self) -> DACConfig:
        plain = self.tables in ("trained", "random") and self.sides == "chunks" and not self.trainable_tables
        if self.variant == "contextual" and not plain:
            raise ValueError(
                "variant=contextual with tables=trained or random, sides=chunks and trainable_tables=false alone "
                f"(found {self.tables}, {self.sides} and {str(self.trainable_tables).lower()})"
            )
        return self


class PartConfig(BaseModel):
    """One part of a mixture; beside these keys stand those of the part's own objective."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)
    name: str = Field(..., description="an objective of --list-objectives, other than mix")
    weight: (
        Annotated[float, Field(ge=0)]
        | Annotated[tuple[Annotated[tuple[float, float], Field(strict=False)], ...], Field(strict=False, min_length=1)]
    ) = Field(
        1.0, description="factor of the loss: a number, or points [share of the budget, factor] with lines between"
    )

    @model_validator(mode="after")
    def _points_rise(self) -> PartConfig:
        shares, factors = zip(*self.points(), strict=True)
        if not _are_shares(shares) or min(factors) < 0:
            raise ValueError(
                "weight with points [share of the budget, factor] whose shares rise from 0 to at most 1 and whose factors "
                f"are not below 0 (found {[list(point) for point in self.points()]})"
            )
        return self

    def points(self) -> Points:
        """The weight as points [share of the budget, factor]."""
        return ((0.0, self.weight),) if isinstance(self.weight, float) else self.weight

    def weight_at(self, progress: float) -> float:
        """The factor at a spent share of the budget in [0, 1]; of two points at one place the later holds from there."""
        return value_at(self.points(), progress)

    def own_keys(self) -> dict[str, Any]:
        """The keys for the configuration class of the part's objective."""
        return dict(self.model_extra or {})


class MixConfig(BaseModel):
    """Keys beside `objective.name: mix`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    parts: tuple[PartConfig, ...] = Field(
        ..., strict=False, description="the objectives, each with its weight and its own keys"
    )
    sharing: Literal["batch", "alternate"] = Field(
        "batch",
        description="batch: every step adds up the losses of all parts; "
        "alternate: a step is of one part alone, each in turn as often as its weight says",
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> MixConfig:
        if not self.parts or any(part.name == "mix" for part in self.parts):
            raise ValueError("parts: objectives, one at least, that are no mixtures themselves")
        places = sorted({0.0, 1.0, *(share for part in self.parts for share, _ in part.points())})
        idle = [place for place in places if all(part.weight_at(place) == 0 for part in self.parts)]
        if idle:
            raise ValueError(f"a part with a weight above 0 at all times (all are 0 at {idle[0]:g} of the budget)")
        return self


BUILT_IN_SETTINGS: dict[str, type[BaseModel]] = {
    "mlm": MLMConfig,
    "slt": SLTConfig,
    "cwt": CWTConfig,
    "dac": DACConfig,
    "mix": MixConfig,
}

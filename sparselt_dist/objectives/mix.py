"""Weighted mixtures and schedules of other objectives, trained in one run.

    loss = sum_p w_p(progress) * loss_p

Each part is a whole objective: its collator makes its own batch of the same examples, its module its own loss. A batch holds
all of them: the first part's common keys are the batch's own, all else is under `mix/<label>/`. The loss is split into a
term for each part and each of its counts, so a part is weighed over micro-batches and ranks as it is alone.

With `alternate` a step is of one part, drawn by w_p / W with W = sum_p w_p, and its loss is multiplied by W: over steps
the expected gradient is that of the sum. The draw is a point of the additive recurrence of the golden ratio, a function of
the step, so every part comes as evenly as can be, alike on all ranks and after a resume.

A part without weight, or not in turn, is not computed. Its parameters get zeros for gradients rather than none, which
optimizers and ZeRO stages would each treat in their own way (stage 3 keeps the last step's).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from sparselt_dist.data.batch import IGNORE_INDEX, Batch, Example
from sparselt_dist.data.randomness import combine, purpose_key
from sparselt_dist.errors import ConfigError
from sparselt_dist.objectives.base import (
    API_VERSION,
    ChangesInputs,
    Collator,
    FollowsProgress,
    InputChange,
    LossOutput,
    Objective,
    Prelude,
    PreludeReport,
    PreludeSetting,
    SharesStatistics,
    SplitLossOutput,
    TokenizerInfo,
    get_objective,
    loss_terms,
    register,
)
from sparselt_dist.objectives.cost import Workload, declared_targets, flops_per_token
from sparselt_dist.objectives.cwt_head import HoldsHead
from sparselt_dist.objectives.settings import MixConfig, PartConfig

_COMMON_KEYS = ("input_ids", "attention_mask", "labels", "num_targets", "num_tokens", "original_ids")
_PACKED_KEYS = ("segment_ids", "position_ids")  # added to a batch after its collator
_GOLDEN_RATIO = 0.6180339887498949
_SEED_KEY = purpose_key("mix part")
_SHARE_POINTS = 200  # of the budget, when the cost of a schedule is averaged

Metrics = dict[str, tuple[Tensor, Tensor]]


# --- the parts -------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A part's place in the mixture."""

    number: int
    label: str
    """Its objective's name; the second of a name has `-2` behind it."""

    def key(self, own: str) -> str:
        """Where a key of the part's own batch stands in the mixture's."""
        return own if self.number == 0 and own in _COMMON_KEYS else f"mix/{self.label}/{own}"

    def examples(self, examples: list[Example]) -> list[Example]:
        """The examples with draws of the part's own: two parts never mask alike. The first part's are as they are."""
        if self.number == 0:
            return examples
        return [{**example, "seed": combine(example["seed"] ^ _SEED_KEY, self.number)} for example in examples]

    def batch(self, batch: Batch) -> Batch:
        """The part's own batch; without any target if the whole batch says that nothing of it counts."""
        prefix = self.key("")
        own = {key.removeprefix(prefix): value for key, value in batch.items() if key.startswith(prefix)}
        if self.number == 0:
            own |= {key: batch[key] for key in _COMMON_KEYS if key in batch}
        for key in _PACKED_KEYS:
            if key in batch and key not in own and batch[key].shape == own["input_ids"].shape:
                own[key] = batch[key]
        is_counted = batch["num_tokens"] > 0
        own["labels"] = own["labels"].where(is_counted, IGNORE_INDEX)
        return own | {key: own[key] * is_counted for key in ("num_targets", "num_tokens")}


def parts_of(cfg: MixConfig) -> list[Part]:
    """The parts in their order, each under a label of its own."""
    parts: list[Part] = []
    for number, section in enumerate(cfg.parts):
        taken, label, repeat = {part.label for part in parts}, section.name, 2
        while label in taken:
            label, repeat = f"{section.name}-{repeat}", repeat + 1
        parts.append(Part(number, label))
    return parts


def _objectives(cfg: MixConfig) -> Iterator[tuple[str, Objective, Any]]:
    """Of every part the key path, the plug-in and its checked configuration."""
    for number, section in enumerate(cfg.parts):
        objective = get_objective(section.name)
        own = TypeAdapter(objective.config_cls).validate_python(section.own_keys())
        yield f"objective.parts.{number}", objective, own


class MixCollator:
    """The batches of all parts in one."""

    def __init__(self, parts: Sequence[tuple[Part, Collator]]) -> None:
        self._parts = tuple(parts)

    def __call__(self, examples: list[Example]) -> Batch:
        return {
            part.key(key): value
            for part, collator in self._parts
            for key, value in collator(part.examples(examples)).items()
        }


# --- the module ------------------------------------------------------------------------------------------------------


class MixModule(nn.Module):
    """The modules of all parts; `counts` are the batch keys that the loss's terms are means over."""

    def __init__(self, cfg: MixConfig, modules: Sequence[nn.Module], heads: Sequence[bool]) -> None:
        """`heads`: which parts use the backbone's vocabulary head."""
        super().__init__()
        self._sections: tuple[PartConfig, ...] = cfg.parts
        self._alternates = cfg.sharing == "alternate"
        self._heads = tuple(heads)
        self._places = parts_of(cfg)
        self.parts = nn.ModuleList(modules)
        keys = [
            part.key(own)
            for part, module in zip(self._places, modules, strict=True)
            for own in ("num_targets", "num_tokens", *getattr(module, "counts", ()))
        ]
        self.counts = tuple(key for key in keys if key not in _COMMON_KEYS)
        self._statistics_sizes: list[int] = []
        self.set_progress(0, 0.0)

    def set_progress(self, step: int, progress: float) -> None:
        """The weights of the step, and with `alternate` whose turn it is."""
        self._weights = [section.weight_at(progress) for section in self._sections]
        self._turn = turn_of(step, self._weights)
        for module in self.parts:
            cast(Any, module).set_progress(step, progress)

    def _factors(self) -> dict[int, float]:
        """Number and factor of the parts that are computed; held-out loss is always that of all."""
        if self._alternates and self.training:
            return {self._turn: sum(self._weights)}
        return {number: weight for number, weight in enumerate(self._weights) if weight > 0}

    # ---------------------------------------------------------------- sums over the whole step

    def _sharing(self) -> list[tuple[Part, SharesStatistics]]:
        """Parts of this step that need sums over all of it."""
        found: list[tuple[Part, SharesStatistics]] = []
        for number in self._factors():
            module = self.parts[number]
            if isinstance(module, SharesStatistics) and module.needs_statistics:
                found.append((self._places[number], module))
        return found

    @property
    def needs_statistics(self) -> bool:
        """Whether a part of this step needs sums over all of it."""
        return bool(self._sharing())

    def statistics(self, backbone: nn.Module, batch: Batch) -> Tensor:
        """The sums [S] float64 of all such parts, one after another."""
        found = [module.statistics(backbone, part.batch(batch)) for part, module in self._sharing()]
        self._statistics_sizes = [len(sums) for sums in found]
        return torch.cat(found)

    def set_statistics(self, total: Tensor | None) -> None:
        """The sums over the step; None: it has one micro-batch, which is its own whole."""
        sharing = self._sharing()
        own = [None] * len(sharing) if total is None else total.split(self._statistics_sizes)
        for (_, module), sums in zip(sharing, own, strict=True):
            module.set_statistics(sums)

    # ---------------------------------------------------------------- before the first step, and after the last

    def _with_prelude(self) -> list[tuple[Part, Prelude]]:
        pairs = zip(self._places, self.parts, strict=True)
        return [(part, module) for part, module in pairs if isinstance(module, Prelude) and module.has_prelude]

    @property
    def has_prelude(self) -> bool:
        """Whether a part has one."""
        return bool(self._with_prelude())

    def check_prelude(self, setting: PreludeSetting) -> None:
        """Raises ConfigError or DataError: that of a part cannot run."""
        for _, module in self._with_prelude():
            module.check_prelude(setting)

    def run_prelude(self, setting: PreludeSetting) -> PreludeReport:
        """The preludes of all parts, one after another."""
        whole = PreludeReport({}, {})
        for part, module in self._with_prelude():
            report = module.run_prelude(setting)
            whole.metrics.update({f"{part.label}/{name}": value for name, value in report.metrics.items()})
            whole.facts.update({f"{part.label}/{name}": value for name, value in report.facts.items()})
        return whole

    @property
    def input_change(self) -> InputChange:
        """That of the part that changes inputs most."""
        changes = {module.input_change for module in self.parts if isinstance(module, ChangesInputs)}
        if "context" in changes:
            return "context"
        return "table" if "table" in changes else "none"

    def release_inputs(self) -> None:
        """All parts let the input embeddings be."""
        for module in self.parts:
            if isinstance(module, ChangesInputs):
                module.release_inputs()

    # ---------------------------------------------------------------- the loss

    def forward(self, backbone: nn.Module, batch: Batch) -> SplitLossOutput:
        factors = self._factors()
        terms: dict[str, Tensor] = {}
        metrics: Metrics = {}
        for number, factor in factors.items():
            part = self._places[number]
            output: LossOutput | SplitLossOutput = self.parts[number](backbone, part.batch(batch))
            terms |= {part.key(key): factor * term for key, term in loss_terms(output).items()}
            metrics |= {f"{part.label}/{name}": pair for name, pair in _means(output).items()}
        if torch.is_grad_enabled():
            first = next(iter(terms))
            terms[first] = terms[first] + self._idle(backbone, batch, factors)
        loss = torch.stack(list(terms.values())).sum()
        return SplitLossOutput(loss, metrics | self._own_metrics(loss, batch), terms)

    def exported_head(self, backbone: nn.Module) -> tuple[Tensor, Tensor | None] | None:
        """That of the first part that has one."""
        found = (part.exported_head(backbone) for part in self.parts if isinstance(part, HoldsHead))
        return next((head for head in found if head is not None), None)

    def _idle(self, backbone: nn.Module, batch: Batch, factors: dict[int, float]) -> Tensor:
        """A zero attached to the parameters of the parts that are not computed, the vocabulary head's included."""
        idle = [number for number in range(len(self.parts)) if number not in factors]
        device = batch["input_ids"].device
        modules = [module for number in idle for module in self.parts[number].modules()]
        zeros = [_attached_zero(module) for module in modules if _trainable(module)]
        if any(self._heads[number] for number in idle) and not any(self._heads[number] for number in factors):
            described, dtype = cast(Any, backbone), next(backbone.parameters()).dtype
            zeros.append(described.logits(torch.zeros(0, described.hidden_size, dtype=dtype, device=device)).sum())
        return torch.stack([torch.zeros((), device=device), *(zero.float() for zero in zeros)]).sum()

    def _own_metrics(self, loss: Tensor, batch: Batch) -> Metrics:
        """The total, averaged over micro-batches by their tokens, and the weight of every part."""
        tokens, one = batch["num_tokens"], torch.ones((), device=loss.device)
        weights = {f"{part.label}/weight": (one * self._weights[part.number], one) for part in self._places}
        return {"loss": (loss.detach() * tokens, tokens), **weights}


def _means(output: LossOutput | SplitLossOutput) -> Metrics:
    """A part's metrics; its total only where that is a mean over one count, and so can be summed over micro-batches."""
    if isinstance(output, SplitLossOutput):
        return {name: pair for name, pair in output.metrics.items() if name != "loss"}
    return output.metrics


def turn_of(step: int, weights: Sequence[float]) -> int:
    """Whose step it is: after n steps each part has had its share of them to within a few."""
    point = (0.5 + step * _GOLDEN_RATIO) % 1.0 * sum(weights)
    chosen = 0
    for number, weight in enumerate(weights):
        if weight > 0:
            chosen = number
            if point < weight:
                break
        point -= weight
    return chosen


def computed_share(cfg: MixConfig, number: int) -> float:
    """Share of the budget's steps, in (0, 1], in which a part is computed."""
    shares = []
    for point in range(_SHARE_POINTS):
        weights = [section.weight_at((point + 0.5) / _SHARE_POINTS) for section in cfg.parts]
        alternating = cfg.sharing == "alternate"
        shares.append(weights[number] / sum(weights) if alternating else float(weights[number] > 0))
    return sum(shares) / _SHARE_POINTS


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are a module's own and are trained."""
    return [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]


def _attached_zero(module: nn.Module) -> Tensor:
    """A zero attached to a module's own parameters, at least one.

    They are reached by a call of the module with another forward: under ZeRO-3 they exist only inside its calls.
    """

    def forward() -> Tensor:
        # No value is read, so that one that is not finite cannot spread.
        return torch.stack([parameter.flatten()[:0].sum().float() for parameter in _trainable(module)]).sum()

    lent = vars(module)
    before = {"forward": lent["forward"]} if "forward" in lent else {}  # where a wrapper has put one on the instance
    lent["forward"] = forward
    try:
        return cast(Tensor, module())
    finally:
        del lent["forward"]
        lent.update(before)


# --- the plug-in -----------------------------------------------------------------------------------------------------


class Mix:
    """The plug-in."""

    name = "mix"
    api_version = API_VERSION
    config_cls = MixConfig

    def needs_lm_head(self, cfg: MixConfig) -> bool:
        return any(objective.needs_lm_head(own) for _, objective, own in _objectives(cfg))

    def flops_per_token(self, cfg: MixConfig, work: Workload) -> float:
        """FLOPs of a token: those of each part, by the share of the budget's steps that compute it."""
        total = 0.0
        for number, (_, objective, own) in enumerate(_objectives(cfg)):
            of_part = dataclasses.replace(work, has_head=work.has_head and objective.needs_lm_head(own))
            if number > 0:  # the batch's targets are those of the first part
                targets = declared_targets(own, is_causal=work.is_causal)
                of_part = dataclasses.replace(of_part, targets_per_token=targets)
            total += computed_share(cfg, number) * flops_per_token(objective, own, of_part)
        return total

    def build_collator(self, cfg: MixConfig, tokenizer: TokenizerInfo) -> Collator:
        """Raises ConfigError: the tokenizer cannot serve a part, or the batches of a part follow the budget."""
        collators = []
        for path, objective, own in _objectives(cfg):
            collators.append(objective.build_collator(own, tokenizer))
            if isinstance(collators[-1], FollowsProgress) and collators[-1].follows_progress:
                raise ConfigError(
                    f"{path}: found a share of targets or a row length that follows the budget, expected one number for all "
                    f"of it in a mixture; give {path}.mlm_probability as a number and leave row_lengths out"
                )
        return MixCollator(list(zip(parts_of(cfg), collators, strict=True)))

    def build_module(self, cfg: MixConfig, backbone: nn.Module) -> nn.Module:
        """Raises ConfigError: the backbone cannot serve a part, which is named."""
        modules: list[nn.Module] = []
        for path, objective, own in _objectives(cfg):
            try:
                modules.append(objective.build_module(own, backbone))
            except ConfigError as cause:
                raise ConfigError(f"{path} ({objective.name}): {cause}") from cause
        return MixModule(cfg, modules, [objective.needs_lm_head(own) for _, objective, own in _objectives(cfg)])


register(Mix())

"""What an objective is (api_version 1), and the registry that finds it by name.

An objective decides what is learned. It brings a configuration class, a collator that turns examples into
a batch (in loader workers, without global randomness) and a module that turns a batch into a loss. It sees
batches, the backbone and its own configuration: no trainer, engine, rank or file.

Built-in objectives are found first, then third-party ones through the entry-point group
`sparselt_dist.objectives`. Listing imports no plug-in; only the chosen one is imported.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

from sparselt_dist.errors import PluginError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from sparselt_dist.data.batch import Batch, Example

API_VERSION = 1
ENTRY_POINT_GROUP = "sparselt_dist.objectives"

# name -> (module that registers it on import, one line for --list-objectives)
BUILT_IN: dict[str, tuple[str, str]] = {
    "mlm": ("sparselt_dist.objectives.mlm", "masked language modelling (BERT, RoBERTa, cramming)"),
    "cwt": ("sparselt_dist.objectives.cwt", "contrastive weight tying: headless models, masked or causal"),
    "slt": ("sparselt_dist.objectives.slt", "sparse latent typing: MLM, latent token types and reconstruction"),
    "dac": ("sparselt_dist.objectives.dac", "dependency agreements in the embeddings: a stage of its own, then MLM"),
    "mix": ("sparselt_dist.objectives.mix", "weighted mixtures and schedules of other objectives"),
}


@dataclass(frozen=True)
class TokenizerInfo:
    """What an objective may know of the tokenizer: plain data, picklable. Ids are None where there is no such token."""

    vocab_size: int
    pad_id: int
    mask_id: int | None
    unk_id: int | None = None
    cls_id: int | None = None
    sep_id: int | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    special_ids: tuple[int, ...] = ()
    continues_word_V: np.ndarray | None = field(default=None, compare=False, repr=False)
    """bool [V]: the piece continues the word of the piece before it (for whole-word masking)."""


class LossOutput(NamedTuple):
    """What an objective module returns for one micro-batch."""

    loss: Tensor
    """fp32 scalar: MEAN over this micro-batch's targets; finite and attached to the graph even with no target."""
    metrics: dict[str, tuple[Tensor, Tensor]]
    """Detached (sum, count) of each term, named without the objective's prefix; summed over micro-batches and ranks."""


class SplitLossOutput(NamedTuple):
    """What a module returns in place of `LossOutput` where parts of the loss are means over different things."""

    loss: Tensor
    """fp32 scalar: the sum of the terms; finite and attached to the graph even with no target."""
    metrics: dict[str, tuple[Tensor, Tensor]]
    """As in `LossOutput`."""
    terms: dict[str, Tensor]
    """Batch key of a count ([] int64) -> fp32 scalar: the part of the loss that is a mean over that count.

    Over a step each part is weighed by its own micro-batch's share of its own count. Counts other than `num_targets`
    and `num_tokens` are named by the module's attribute `counts`, a tuple of batch keys.
    """


def loss_terms(output: LossOutput | SplitLossOutput) -> Mapping[str, Tensor]:
    """What to weigh by what: batch key of a count -> the part of the loss that is a mean over it."""
    return output.terms if isinstance(output, SplitLossOutput) else {"num_targets": output.loss}


class Collator(Protocol):
    """Examples to a batch. Pure, CPU, picklable, no global random state: it runs in loader workers."""

    def __call__(self, examples: list[Example]) -> Batch: ...


@runtime_checkable
class FollowsProgress(Protocol):
    """What a collator adds whose batches depend on the spent share of the budget, which loader workers cannot know ahead.

    What the collator itself makes is as at the end of the budget; held-out loss is measured on that.
    """

    follows_progress: bool

    def at_progress(self, batch: Batch, progress: float) -> Batch:
        """A training batch as it is at a share in [0, 1]: a pure function, called on the CPU in the training process."""


class ObjectiveModule(Protocol):
    """An `nn.Module` holding the heads and extra parameters of an objective."""

    def __call__(self, backbone: nn.Module, batch: Batch) -> LossOutput: ...

    def set_progress(self, step: int, progress: float) -> None:
        """Called before each step with the optimizer step (from 0) and the spent share of the budget [0, 1]."""


@runtime_checkable
class SharesStatistics(Protocol):
    """What an objective module adds whose loss is not linear in means over the micro-batch.

    A step of more than one micro-batch, over ranks or in sequence, first sums `statistics` over all of them and hands
    the sum to `set_statistics`; only then do losses and gradients follow. So the update does not depend on the split.
    """

    needs_statistics: bool

    def statistics(self, backbone: nn.Module, batch: Batch) -> Tensor:
        """Sums [S] float64 over the micro-batch; called without gradients."""

    def set_statistics(self, total: Tensor | None) -> None:
        """The sum [S] over the step that begins; None: it has one micro-batch, which is its own whole."""


class PreludeStopped(Exception):
    """A stop was asked for during a prelude, nothing of which is kept."""


@dataclass(frozen=True)
class PreludeSetting:
    """What a prelude may see of the run."""

    shards: str
    """The training shards, for messages."""
    shard_folder: Path | None
    """Where they lie; None unless they are one prepared folder of this machine, and all of it."""
    tokenizer: TokenizerInfo
    tokenizer_sha256: str
    count_pieces: Callable[[], np.ndarray]
    """How often each piece occurs in some millions of ids of the shards, int64 [V]; 0 for special ids."""
    seed: int
    device: torch.device
    budget_seconds: float | None
    """The run's whole budget, if it is one of time."""
    max_seconds: float
    """What the prelude may take whatever its own settings say."""
    keep_going: Callable[[], None]
    """To be called before every step of some seconds at most; raises `PreludeStopped` where a stop was asked for."""
    clock: Callable[[], float]
    """Seconds."""


class PreludeReport(NamedTuple):
    """What a prelude says of itself, named without the objective's prefix."""

    metrics: dict[str, float]
    """Finite numbers for the journal."""
    facts: dict[str, float | str]
    """For the summary."""


@runtime_checkable
class Prelude(Protocol):
    """What an objective module adds that makes something of the training text before the first step of a new run.

    It runs once, on rank 0, before the engine is built; its seconds belong to the budget. Its result is what it leaves in
    the module's parameters and persistent buffers, which all ranks then get and checkpoints keep: a resume runs none.
    """

    has_prelude: bool

    def check_prelude(self, setting: PreludeSetting) -> None:
        """Raise ConfigError or DataError if it cannot run; cheap, before any of the budget is spent."""

    def run_prelude(self, setting: PreludeSetting) -> PreludeReport:
        """Run it. Raises PreludeStopped, ConfigError, DataError."""


InputChange = Literal["none", "table", "context"]


@runtime_checkable
class ChangesInputs(Protocol):
    """What an objective module adds that changes what the backbone's input embeddings give."""

    @property
    def input_change(self) -> InputChange:
        """none; table: to a vector that depends on the id alone, so that it folds into one table; context: to another."""

    def release_inputs(self) -> None:
        """Let the input embeddings be as they are without the objective, and drop the parts that changed them."""


@runtime_checkable
class Objective(Protocol):
    """A plug-in: two factories and a configuration class (a frozen pydantic model or dataclass)."""

    name: str
    api_version: int
    config_cls: type[Any]

    def needs_lm_head(self, cfg: Any) -> bool:
        """Whether the backbone must carry the vocabulary head (a headless model carries none of its parameters)."""

    def build_collator(self, cfg: Any, tokenizer: TokenizerInfo) -> Collator: ...

    def build_module(self, cfg: Any, backbone: nn.Module) -> nn.Module: ...


_registered: dict[str, Objective] = {}


def register(objective: Objective) -> Objective:
    """Add an objective under its name and return it.

    Raises:
        PluginError: the interface is incomplete or of another version, or another objective has the name.
    """
    source = type(objective).__module__
    missing = [
        part
        for part in ("name", "api_version", "config_cls", "needs_lm_head", "build_collator", "build_module")
        if not hasattr(objective, part)
    ]
    if missing:
        raise PluginError(
            f"objective {objective!r} from {source}: lacks {', '.join(missing)}; "
            "expected the interface of sparselt_dist.objectives.base.Objective"
        )
    if objective.api_version != API_VERSION:
        raise PluginError(
            f"objective {objective.name!r} from {source}: api_version is {objective.api_version}, expected {API_VERSION}; "
            "update the plug-in or install a matching sparselt_dist"
        )
    built_in_module = BUILT_IN.get(objective.name, (source, ""))[0]
    if built_in_module != source:
        raise PluginError(
            f"objective {objective.name!r} from {source}: the name belongs to the built-in of {built_in_module}; rename it"
        )
    other = _registered.get(objective.name)
    if other is not None and type(other) is not type(objective):
        raise PluginError(
            f"objective {objective.name!r}: registered by {type(other).__module__} and by {source}; uninstall or rename one"
        )
    _registered[objective.name] = objective
    return objective


def _entry_points() -> Mapping[str, list[EntryPoint]]:
    """Plug-ins by name; more than one of a name is a clash."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        found.setdefault(point.name, []).append(point)
    return found


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "an unknown distribution"


def available() -> dict[str, str]:
    """Every objective's name and one line about it; imports no plug-in."""
    lines = {name: text for name, (_, text) in BUILT_IN.items()}
    for name, objective in _registered.items():
        lines.setdefault(name, f"registered by {type(objective).__module__}")
    for name, points in sorted(_entry_points().items()):
        lines.setdefault(name, " and ".join(f"plug-in of {_distribution(point)} ({point.value})" for point in points))
    return lines


def get_objective(name: str) -> Objective:
    """The objective of that name; imports only its own module.

    Raises:
        PluginError: unknown name (the nearest is named), a name that two packages claim,
            or a plug-in that fails on import (its distribution and the cause are named).
    """
    if name in _registered:
        return _registered[name]
    if name in BUILT_IN:
        importlib.import_module(BUILT_IN[name][0])
        return _registered[name]
    points = _entry_points().get(name, [])
    if len(points) > 1:
        claims = " and ".join(_distribution(point) for point in points)
        raise PluginError(f"objective.name: {name!r} is claimed by {claims}; uninstall one or rename its entry point")
    if not points:
        near = difflib.get_close_matches(name, available(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise PluginError(f"objective.name: found {name!r}, expected one of {', '.join(available())}{hint}")
    return register(_load(name, points[0]))


def _load(name: str, point: EntryPoint) -> Objective:
    distribution = _distribution(point)
    try:
        loaded = point.load()
    except Exception as cause:  # a plug-in may fail in any way on import; all are the plug-in's
        raise PluginError(
            f"objective {name!r}: plug-in {point.value} of {distribution} failed on import: "
            f"{type(cause).__name__}: {cause}; reinstall or remove {distribution}"
        ) from cause
    objective: Objective = loaded() if isinstance(loaded, type) else loaded
    if getattr(objective, "name", None) != name:
        raise PluginError(
            f"objective {name!r}: plug-in {point.value} of {distribution} calls itself {getattr(objective, 'name', None)!r}; "
            "the entry point's name and the objective's must be equal"
        )
    return objective

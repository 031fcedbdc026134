"""The tasks of GLUE as they are scored, and the metrics (Wang et al. 2019, arXiv 1804.07461).

Nine numbers make the average: WNLI is left out and MNLI counts twice, matched and mismatched, as in cramming (Geiping &
Goldstein 2022, arXiv 2212.14034, section 5). A task of any other name is a classification, scored by accuracy. Scores are
shares: 0.807 for what tables call 80.7. N examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

Metric = Literal["accuracy", "f1", "matthews", "pearson"]


@dataclass(frozen=True)
class Kind:
    """What is known of a task by its name."""

    metric: Metric = "accuracy"
    classes: int | None = None
    """1: a regression; None: as many as the labels tell."""
    is_pair: bool | None = None
    """None: as the examples tell."""
    splits: tuple[str, ...] = ("validation",)
    """Names of the files that are scored."""

    def score_name(self, task: str, split: str) -> str:
        """Such as `cola_matthews` and `mnli_matched_accuracy`."""
        part = split.removeprefix("validation")
        return f"{task}{part}_{self.metric}"


GLUE: dict[str, Kind] = {
    "cola": Kind("matthews", 2, is_pair=False),
    "sst2": Kind("accuracy", 2, is_pair=False),
    "mrpc": Kind("f1", 2, is_pair=True),
    "stsb": Kind("pearson", 1, is_pair=True),
    "qqp": Kind("f1", 2, is_pair=True),
    "mnli": Kind("accuracy", 3, is_pair=True, splits=("validation_matched", "validation_mismatched")),
    "qnli": Kind("accuracy", 2, is_pair=True),
    "rte": Kind("accuracy", 2, is_pair=True),
}
GLUE_SCORES = tuple(kind.score_name(task, split) for task, kind in GLUE.items() for split in kind.splits)
"""Names of the nine numbers."""


def task_name(folder: str) -> str:
    """GLUE's tasks by one name however they are spelled (`SST-2`, `sts_b`); any other name as it is."""
    plain = folder.lower().replace("-", "").replace("_", "")
    return plain if plain in GLUE else folder


def glue_average(scores: Mapping[str, float]) -> float | None:
    """Mean of the nine numbers, in their unit, from scores by the names of GLUE_SCORES; None unless all are there."""
    if not set(GLUE_SCORES) <= set(scores):
        return None
    return sum(scores[name] for name in GLUE_SCORES) / len(GLUE_SCORES)


# --- metrics ---------------------------------------------------------------------------------------------------------


def accuracy(found_N: np.ndarray, labels_N: np.ndarray) -> float:
    """Share of labels that were found."""
    return float((found_N == labels_N).mean())


def f1(found_N: np.ndarray, labels_N: np.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1; 0 where it neither is nor was found."""
    hits = np.sum((found_N == 1) & (labels_N == 1))
    sizes = np.sum(found_N == 1) + np.sum(labels_N == 1)
    return float(2 * hits / sizes) if sizes else 0.0


def correlation(found_N: np.ndarray, labels_N: np.ndarray) -> float:
    """Pearson's, which of two classes 0 and 1 is Matthews'; 0 where one side is constant."""
    if np.ptp(found_N) == 0 or np.ptp(labels_N) == 0:
        return 0.0
    return float(np.corrcoef(found_N, labels_N)[0, 1])


METRICS: dict[Metric, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": correlation,
    "pearson": correlation,
}

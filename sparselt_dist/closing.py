"""What a run says when it ends: the summary file's content, in words a newcomer understands."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sparselt_dist.metrics import format_count, format_duration
from sparselt_dist.redaction import shown


def closing_text(summary: dict[str, Any], run_dir: Path, times: dict[str, float], mlflow_uri: str | None) -> str:
    """What was learned, where the time went, where everything lies and which command to try next."""
    lines = [
        "",
        f"{summary['name']}: {summary['status']} after {summary['steps']:,} steps, {format_count(summary['tokens'])} tokens, "
        f"{format_duration(summary['seconds'])} of training on {summary['world_size']} rank(s); "
        f"peak memory {summary['peak_memory_gib']:.2f} GiB over all ranks",
        *_learned(summary),
        *_prelude(summary),
        *_landing(summary),
        _ledger(times),
        f"  run folder   {run_dir} (metrics.jsonl, checkpoints/, summary.json)",
    ]
    if summary.get("model_dir"):
        lines.append(f"  model        {summary['model_dir']} (Hugging Face format)")
    if mlflow_uri:
        lines.append(f"  MLflow       mlflow ui --backend-store-uri {shown(mlflow_uri)}")
    if summary["status"] == "stopped":
        lines.append("  next         the same command continues this run")
    else:
        lines.append(f"  next         sparselt compare {run_dir}")
    return "\n".join(lines)


def _learned(summary: dict[str, Any]) -> list[str]:
    """Held-out losses against the floors that need no model."""
    lines = []
    loss, masked, floor = (summary.get(key) for key in ("eval/loss", "yardstick/masked_ce", "yardstick/unigram_ce"))
    if loss is not None:
        lines.append(f"  held-out {summary['objective']} loss  {loss:.3f}")
    if masked is not None and floor is not None:
        gain = floor - masked
        lines.append(
            f"  masked words on held-out text: {masked:.3f} nats with the model, {floor:.3f} by word frequency alone "
            f"(the model is {math.exp(abs(gain)):.2f} times {'more' if gain > 0 else 'less'} certain of the right word); "
            f"{100 * summary['yardstick/masked_accuracy']:.1f} % right"
        )
    if (probe := summary.get("yardstick/probe_accuracy")) is not None:
        lines.append(
            f"  telling replaced words from real ones by its frozen features: {100 * probe:.1f} % "
            f"(by chance {100 * summary['yardstick/majority_accuracy']:.1f} %)"
        )
    return lines


def _prelude(summary: dict[str, Any]) -> list[str]:
    """How the budget was split between what the objective did before the first step and training."""
    if "prelude_seconds" not in summary:
        return []
    before, training = (format_duration(summary[key]) for key in ("prelude_seconds", "training_seconds"))
    return [f"  budget       {before} before the first step, {training} of training after it"]


def _landing(summary: dict[str, Any]) -> list[str]:
    """How a budget of time was met, and what it took from the wall."""
    lines = []
    limit = summary.get("budget_seconds")
    if (
        limit is not None and summary["status"] == "finished" and summary["seconds"] > 0.9 * limit
    ):  # else another ended it
        lines.append(
            f"  budget       last save and evaluation ended at {100 * summary['seconds'] / limit:.1f} % of {limit:.0f} s"
        )
    if summary.get("energy_kwh") is not None:
        lines.append(f"  energy       {summary['energy_kwh']:.3g} kWh of the devices, restarts included")
    return lines


def _ledger(times: dict[str, float]) -> str:
    """Where all of the wall clock went, earlier starts included, largest first."""
    total = sum(times.values())
    shares = sorted(((seconds / (total or 1.0), phase) for phase, seconds in times.items()), reverse=True)
    return f"  time         {total:.2f} s: " + ", ".join(
        f"{phase} {100 * share:.0f} %" for share, phase in shares if share >= 0.005
    )

"""A profile's reference curve, `log.expected_loss`, from runs of it.

    python tests/benchmarks/reference_curve.py runs/faithful-0 runs/faithful-1 --faster 2

At each share of the budget: the mean of the runs' losses, smoothed as the guard smooths them, and their spread over runs and over
the lines near it. A faster machine makes more steps in the same share: `--faster 2` puts the point half-way to what these runs
reach at twice the share, and widens sigma by as much, so that machines of one to two times the speed are as they should be.
That leaves out that the rate would then be another one; and beyond half of the budget these runs do not tell what twice the speed
reaches, so sigma stays as wide as it was there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean, pstdev

from sparselt_dist.expected_curve import SMOOTHED_LINES

SHARES = (0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
NEAR = 0.02  # share of the budget on either side
Curve = list[tuple[float, float]]


def smoothed(run: Path) -> Curve:
    """(share, mean loss of the last lines) of each line with a loss."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["progress/fraction"], line["train/loss"]) for line in lines if "train/loss" in line]
    return [
        (losses[at][0], fmean(loss for _, loss in losses[at - SMOOTHED_LINES + 1 : at + 1]))
        for at in range(SMOOTHED_LINES - 1, len(losses))
    ]


def near(curves: list[Curve], share: float) -> list[float]:
    """All smoothed losses about a share."""
    return [loss for curve in curves for at, loss in curve if abs(at - share) <= NEAR]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--faster", type=float, default=2.0, help="how much faster a machine may be")
    args = parser.parse_args()
    curves = [smoothed(run) for run in args.runs]
    print("  expected_loss:")
    last_told = 0.0
    for share in SHARES:
        here, there = near(curves, share), near(curves, min(1.0, share * args.faster))
        apart = abs(fmean(here) - fmean(there)) / 2
        centre, sigma = (fmean(here) + fmean(there)) / 2, max(pstdev(here), pstdev(there)) + apart
        if share * args.faster > 1:
            sigma = max(sigma, last_told)
        else:
            last_told = sigma
        print(f"    - [{share:g}, {centre:.3f}, {sigma:.3f}]")


if __name__ == "__main__":
    main()

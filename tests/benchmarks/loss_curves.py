"""Held-out loss of runs against the share of their budget, drawn as an SVG.

python tests/benchmarks/loss_curves.py --output docs/hour.svg faithful=runs/faithful-0 2026=runs/2026-0
"""

from __future__ import annotations

import argparse
import json
from html import escape
from pathlib import Path

WIDTH, HEIGHT, MARGIN = 720, 400, 48
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")
TICKS = 5
Curve = list[tuple[float, float]]


def held_out(run: Path) -> Curve:
    """(share of the budget, held-out loss) of each evaluation."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["progress/fraction"], line["eval/loss"]) for line in lines if "eval/loss" in line]


class Frame:
    """Where shares and losses lie in the picture."""

    def __init__(self, curves: list[Curve]) -> None:
        losses = [loss for curve in curves for _, loss in curve]
        self.low, self.high = min(losses), max(losses)

    def x(self, share: float) -> float:
        return MARGIN + share * (WIDTH - 2 * MARGIN)

    def y(self, loss: float) -> float:
        return HEIGHT - MARGIN - (loss - self.low) / (self.high - self.low) * (HEIGHT - 2 * MARGIN)


def axes(frame: Frame) -> list[str]:
    """Lines and numbers at equal distances, on both axes."""
    drawn = []
    for tick in range(TICKS + 1):
        share = tick / TICKS
        loss = frame.low + share * (frame.high - frame.low)
        x, y = frame.x(share), frame.y(loss)
        drawn += [
            f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>',
            f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{loss:.2f}</text>',
            f'<text x="{x:.1f}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">{share:.0%}</text>',
        ]
    return [*drawn, f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">share of the budget</text>']


def picture(curves: dict[str, Curve]) -> str:
    """The whole SVG."""
    frame = Frame(list(curves.values()))
    parts = axes(frame)
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(f"{frame.x(share):.1f},{frame.y(loss):.1f}" for share, loss in curve)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        y = MARGIN + 18 * number
        parts.append(f'<text x="{WIDTH - MARGIN - 6}" y="{y}" text-anchor="end" fill="{colour}">{escape(name)}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="NAME=RUN_FOLDER")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    named = (run.partition("=") for run in args.runs)
    args.output.write_text(picture({name: held_out(Path(folder)) for name, _, folder in named}))


if __name__ == "__main__":
    main()

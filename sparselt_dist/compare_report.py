"""The HTML report of `compare`: the table and curves as inline SVG; one file, no script, nothing loaded."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from sparselt_dist.comparison import AXIS_METRIC, Axis, Line, Row, footnotes, table_cells
from sparselt_dist.errors import ConfigError
from sparselt_dist.metrics import format_count, format_duration

Curve = list[tuple[float, float]]
_CHARTS: Final = ("train/loss", "eval/loss", "yardstick/masked_ce", "perf/tokens_per_second")
_AXES: Final[tuple[Axis, ...]] = ("step", "tokens", "seconds")
_COLORS: Final = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 460, 260, 56, 34, 12
_MAX_POINTS: Final = 400
_STYLE: Final = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .7em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:nth-child(-n+5):not(:first-child), td:nth-child(-n+5):not(:first-child) { text-align: left; }
.scroll { overflow-x: auto; } .charts { display: flex; flex-wrap: wrap; gap: 1em; }
figure { margin: 0; } figcaption { font-weight: 600; } svg text { font-size: 11px; fill: #555; }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px; }
"""


def write_report(path: Path, rows: Sequence[Row], point: tuple[Axis, float] | None) -> None:
    """Write the report. Raises ConfigError if the file cannot be written."""
    try:
        path.write_text(report(rows, point), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html: {path} cannot be written ({error.strerror}); choose another file") from error


def report(rows: Sequence[Row], point: tuple[Axis, float] | None) -> str:
    """The whole document."""
    histories = [row.run.history() for row in rows]
    sections = []
    for metric in _CHARTS:
        figures = [_figure(metric, axis, histories, rows) for axis in _AXES]
        if any(figures):
            sections.append(f'<h2>{html.escape(metric)}</h2><div class="charts">{"".join(figures)}</div>')
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in footnotes(rows, point))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Comparison of runs</title>'
        f"<style>{_STYLE}</style></head><body><h1>Comparison of {len(rows)} runs</h1>"
        f'<div class="scroll">{_table(rows)}</div>{notes}{"".join(sections)}</body></html>\n'
    )


def _table(rows: Sequence[Row]) -> str:
    headings, lines = table_cells(rows)
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = []
    for number, (row, line) in enumerate(zip(rows, lines, strict=True)):
        cells = [f"<td>{html.escape(cell)}</td>" for cell in line]
        key = f'<span class="key" style="background:{_color(number)}"></span>'
        cells[1] = f'<td title="{html.escape(row.run.source, quote=True)}">{key}{html.escape(line[1])}</td>'
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _color(number: int) -> str:
    return _COLORS[number % len(_COLORS)]


# ---- curves --------------------------------------------------------------------------------------------------------


def curve(lines: Sequence[Line], metric: str, axis: Axis) -> Curve:
    """The metric's finite values over the axis, thinned to a few hundred points (the last one is kept)."""
    points: Curve = []
    for line in lines:
        x, y = line.get(AXIS_METRIC[axis]), line.get(metric)
        if isinstance(x, int | float) and isinstance(y, int | float):
            points.append((float(x), float(y)))
    stride = math.ceil(len(points) / _MAX_POINTS) or 1
    return points[::-1][::stride][::-1]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers inside [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _figure(metric: str, axis: Axis, histories: Sequence[Sequence[Line]], rows: Sequence[Row]) -> str:
    """One chart; empty if no run has the metric."""
    curves = [curve(lines, metric, axis) for lines in histories]
    points = [point for one in curves for point in one]
    if not points:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    frame = _Frame(min(0.0, *xs), max(*xs, 1e-9), min(ys), max(ys))
    label = format_duration if axis == "seconds" else format_count
    parts = [frame.grid(label)]
    for number, (one, row) in enumerate(zip(curves, rows, strict=True)):
        if one:
            parts.append(frame.draw(one, _color(number), row.run.name))
    return (
        f"<figure><figcaption>over {'time' if axis == 'seconds' else axis}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img" '
        f'aria-label="{html.escape(metric, quote=True)} over {axis}">{"".join(parts)}</svg></figure>'
    )


class _Frame:
    """Maps values to the chart's place."""

    def __init__(self, left: float, right: float, low: float, high: float) -> None:
        self._left, self._right = left, right
        margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
        self._low, self._high = low - margin, high + margin

    def x(self, value: float) -> float:
        return _LEFT + (value - self._left) / (self._right - self._left) * (_WIDTH - _LEFT - 12)

    def y(self, value: float) -> float:
        share = (value - self._low) / (self._high - self._low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)

    def grid(self, label_x: Callable[[float], str]) -> str:
        parts = []
        for value in ticks(self._low, self._high):
            y = self.y(value)
            text = format_count(value) if abs(value) >= 1000 else f"{value:.4g}"
            parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - 12}" stroke="#eee"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        for value in ticks(self._left, self._right):
            x = self.x(value)
            parts.append(f'<path d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}" stroke="#eee"/>')
            parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{label_x(value)}</text>')
        return "".join(parts)

    def draw(self, points: Curve, color: str, name: str) -> str:
        title = f"<title>{html.escape(name)}</title>"
        if len(points) == 1:
            x, y = points[0]
            return f'<circle cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="4" fill="{color}">{title}</circle>'
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5">{title}</polyline>'

"""The reports of `typing`: plain tables in the terminal, and one HTML file with the text coloured by type, no script in it."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from sparselt_dist.errors import ConfigError
from sparselt_dist.evaluation.latent_types import NO_WORD, NULL_TYPE, Reconstruction, TypedText
from sparselt_dist.evaluation.type_census import TypeFigures, TypeReport
from sparselt_dist.metrics import format_count

if TYPE_CHECKING:
    from rich.console import Console

_GOLDEN_ANGLE: Final = 137.508  # degrees; neighbouring numbers get distant hues
_STYLE: Final = """
body { font: 14px/1.6 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em;
  color: #222; background: #fff; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .7em; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
td.n, th.n { text-align: right; white-space: nowrap; }
.scroll { overflow-x: auto; } .text { white-space: pre-wrap; font-size: 16px; line-height: 2; }
.text span.w > span { padding: .1em 0; border-radius: 3px; } .special { font-size: 11px; padding: 0 .3em; border-radius: 3px; }
.null { color: #767676; } sub { font-size: 9px; color: #555; }
.key { display: inline-block; padding: 0 .5em; margin: 0 .4em .4em 0; border-radius: 3px; }
"""


class Shown(NamedTuple):
    """A text that is shown token by token."""

    typed: TypedText
    rebuilt: Reconstruction | None


@dataclass(frozen=True)
class Findings:
    """All that there is to tell."""

    source: str
    """The checkpoint and the text, for the heading."""
    report: TypeReport
    shown: Sequence[Shown]
    notes: Sequence[str]


def type_name(kind: int) -> str:
    """`null` or the number."""
    return "null" if kind == NULL_TYPE else str(kind)


def summary(report: TypeReport) -> str:
    """The figures over all types, in one line."""
    texts = f"{format_count(report.texts)} text{'s' * (report.texts != 1)}"
    return (
        f"{format_count(report.tokens)} tokens in {texts}; null share {report.null_share:.1%}, "
        f"mean null probability {report.null_probability:.3f}; {report.types_used} of {report.num_types - 1} types in use; "
        f"perplexity {report.perplexity:.2f} of all {report.num_types}, {report.used_perplexity:.2f} of those in use"
    )


class _Column(NamedTuple):
    title: str
    is_number: bool


def _type_table(report: TypeReport) -> tuple[list[_Column], list[list[str]]]:
    """Columns and rows of the per-type table; what no type has is left out."""
    columns = [_Column("type", True), _Column("tokens", True), _Column("share", True), _Column("mean p", True)]
    rows = [
        [type_name(one.type), str(one.tokens), f"{one.share:.1%}", f"{one.mean_probability:.3f}"]
        for one in report.types
    ]
    optional = [
        ("parts of speech", [", ".join(f"{part} {share:.0%}" for part, share in one.parts) for one in report.types]),
        ("top words", [", ".join(f"{word} {count}" for word, count in one.words) for one in report.types]),
        ("words most often of it", [_typical(one) for one in report.types]),
    ]
    for title, cells in optional:
        if any(cells):
            columns.append(_Column(title, False))
            rows = [[*row, cell] for row, cell in zip(rows, cells, strict=True)]
    return columns, rows


def _typical(figures: TypeFigures) -> str:
    return ", ".join(f"{word} {share:.0%}" for word, share in figures.typical)


def _keyword_table(report: TypeReport) -> tuple[list[_Column], list[list[str]]]:
    columns = [_Column("keyword", False), _Column("score", True), _Column("selected", True), _Column("types", False)]
    rows = [
        [one.word, f"{one.score:.3f}", f"{one.selected} of {one.occurrences}", ", ".join(map(str, one.types))]
        for one in report.keywords
    ]
    return columns, rows


def _token_rows(typed: TypedText) -> Iterator[list[str]]:
    """Word, piece, type and probability of each piece; the word stands beside its first piece."""
    texts = typed.word_texts
    before = NO_WORD
    for word, piece, kind, share in zip(
        typed.row.words, typed.pieces, typed.types.tolist(), typed.probabilities.tolist(), strict=True
    ):
        yield ["" if word in (NO_WORD, before) else texts[word], piece, type_name(kind), f"{share:.3f}"]
        before = word


# ---------------------------------------------------------------- terminal


def print_findings(found: Findings) -> None:
    """Everything on standard output; whole lines where that is a file or a pipe."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, width=100_000)
    console.print(found.source)
    tokens = [_Column("word", False), _Column("piece", False), _Column("type", True), _Column("probability", True)]
    for shown in found.shown:
        _print_table(console, "", tokens, _token_rows(shown.typed))
        if shown.rebuilt is not None:
            console.print(f"rebuilt ({shown.rebuilt.accuracy:.0%} of the tokens): {shown.rebuilt.text}")
    if found.report.keywords:
        _print_table(console, "keywords", *_keyword_table(found.report))
    _print_table(console, "types", *_type_table(found.report))
    for line in [summary(found.report), *found.notes]:
        console.print(line)


def _print_table(console: Console, title: str, columns: Sequence[_Column], rows: Iterable[Sequence[str]]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.title, justify="right" if column.is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


# ---------------------------------------------------------------- HTML


def write_html(path: Path, found: Findings) -> None:
    """Write the page. Raises ConfigError if the file cannot be written."""
    try:
        path.write_text(page(found), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html: {path} cannot be written ({error.strerror}); choose another file") from error


def page(found: Findings) -> str:
    """The whole document."""
    report = found.report
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Latent types</title>'
        f"<style>{_STYLE}</style></head><body><h1>Latent types</h1><p>{html.escape(found.source)}</p>",
        *(f"<p>{html.escape(line)}</p>" for line in [summary(report), *found.notes]),
        f"<h2>Text</h2><p>{_legend(found)}</p>" if found.shown else "",
        *(_text(shown) for shown in found.shown),
        f"<h2>Keywords</h2>{_html_table(*_keyword_table(report))}" if report.keywords else "",
        f'<h2>Types</h2><div class="scroll">{_html_table(*_type_table(report), colored=report.types)}</div>',
        "</body></html>\n",
    ]
    return "".join(parts)


def color(kind: int) -> str:
    """The background of a type; the null type has none."""
    return (
        "transparent" if kind == NULL_TYPE else f"hsl({kind * _GOLDEN_ANGLE % 360:.0f} 75% {(80, 86, 74)[kind % 3]}%)"
    )


def _legend(found: Findings) -> str:
    """A key for each type in the texts that are shown, with its most frequent words as hover title."""
    present = {kind for shown in found.shown for kind in shown.typed.types.tolist()}
    keys = []
    for figures in found.report.types:
        if figures.type in present:
            words = html.escape(", ".join(word for word, _ in figures.words), quote=True)
            name = "null" if figures.type == NULL_TYPE else f"type {figures.type}"
            style = f'class="key{" null" * (figures.type == NULL_TYPE)}" style="background:{color(figures.type)}"'
            keys.append(f'<span {style} title="{words}">{name} ({figures.share:.1%})</span>')
    return "".join(keys)


def _text(shown: Shown) -> str:
    """One text with its white space; the pieces of a word stand together in one element."""
    row = shown.typed.row
    parts: list[str] = []
    at, open_word = 0, NO_WORD
    for place, (word, (start, end)) in enumerate(zip(row.words, row.spans, strict=True)):
        if word != open_word and open_word != NO_WORD:
            parts.append("</span>")
        if end > start:
            parts.append(html.escape(row.text[at : max(at, start)]))
        if word not in (NO_WORD, open_word):
            parts.append('<span class="w">')
        # pieces may share a character, as the bytes of one letter do; it is shown once
        surface = row.text[max(at, start) : end]
        parts.append(_piece(shown.typed, place, surface))
        at, open_word = max(at, end), word
    parts.append("</span>" if open_word != NO_WORD else "")
    rebuilt = shown.rebuilt
    if rebuilt is not None:
        made = f"rebuilt ({rebuilt.accuracy:.0%} of the tokens): {rebuilt.text}"
        return f'<p class="text">{"".join(parts)}</p><p>{html.escape(made)}</p>'
    return f'<p class="text">{"".join(parts)}</p>'


def _piece(typed: TypedText, place: int, surface: str) -> str:
    kind = int(typed.types[place])
    is_special = typed.row.words[place] == NO_WORD
    title = (
        f"{typed.pieces[place]}: {'null' if kind == NULL_TYPE else f'type {kind}'}, "
        f"probability {typed.probabilities[place]:.3f}, null {typed.null_probabilities[place]:.3f}"
    )
    names = " ".join(name for name, applies in (("special", is_special), ("null", kind == NULL_TYPE)) if applies)
    number = "" if kind == NULL_TYPE else f"<sub>{kind}</sub>"
    content = html.escape(typed.pieces[place] if is_special else surface or "·")
    return (
        f'<span class="{names}" style="background:{color(kind)}" title="{html.escape(title, quote=True)}">'
        f"{content}{number}</span>"
    )


def _html_table(columns: Sequence[_Column], rows: Sequence[Sequence[str]], colored: Sequence[TypeFigures] = ()) -> str:
    """A table; the first cell of each row has the colour of its type, if the rows are types."""
    classes = [' class="n"' if column.is_number else "" for column in columns]
    head = "".join(f"<th{kind}>{html.escape(column.title)}</th>" for kind, column in zip(classes, columns, strict=True))
    body = []
    for number, row in enumerate(rows):
        cells = [f"<td{kind}>{html.escape(cell)}</td>" for kind, cell in zip(classes, row, strict=True)]
        if colored:
            cells[0] = f'<td class="n" style="background:{color(colored[number].type)}">{html.escape(row[0])}</td>'
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"

"""`sparselt typing`: the latent types that a checkpoint of sparse latent typing gives to any text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sparselt_dist import cli
from sparselt_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from sparselt_dist.evaluation.latent_types import Row, TypedText, TypeReader
    from sparselt_dist.evaluation.parts_of_speech import Tagger
    from sparselt_dist.typing_report import Findings, Shown

_STDIN = "-"
_SHOWN_OF_A_CORPUS = 3
_HTML_TEXTS = 200  # more make a page that browsers are slow with

_DESCRIPTION = """\
Latent types of a text under a checkpoint of objective slt: of each word piece its type, or null (not selected), and that
type's probability; keywords, which are words with a piece that is not null, by their mean probability not to be null; and a
report of each type over all of the text: share, top words and, where spaCy is installed, parts of speech. Each line is typed
by itself. The text is TEXT, standard input (-), a file, or samples of a shard folder.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = cli.make_parser(
        "typing", _DESCRIPTION, 'sparselt typing runs/slt "Sparse types select words." --reconstruct --html types.html'
    )
    parser.add_argument(
        "checkpoint", metavar="RUN_OR_CHECKPOINT", type=Path, help="a checkpoint; or a run folder: its newest"
    )
    parser.add_argument("text", metavar="TEXT", nargs="?", help="the text; -: read it from standard input")
    parser.add_argument("--text-file", metavar="FILE", type=Path, help="a UTF-8 text file, one text a line")
    parser.add_argument("--shards", metavar="DIR", help="shards of the checkpoint's own tokenizer")
    parser.add_argument("--samples", metavar="N", type=_count, default=256, help="samples of --shards, evenly spread")
    parser.add_argument("--keywords", metavar="K", type=_count, default=10, help="keywords to list; 0: none")
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write a self-contained page, coloured by type")
    parser.add_argument("--reconstruct", action="store_true", help="rebuild the shown texts from their typed tokens")
    parser.add_argument(
        "--show",
        metavar="N",
        type=_count,
        help=f"texts shown token by token, and rebuilt; none: all of TEXT, {_SHOWN_OF_A_CORPUS} of a file or of shards",
    )
    parser.add_argument(
        "--tagger", metavar="MODEL", help="spaCy model of the parts of speech; none: en_core_web_sm where installed"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = cli.parse_arguments(build_parser(), argv)
    return cli.run_command(lambda: _run(args))


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number of at least 0")
    return int(text)


def _run(args: argparse.Namespace) -> int:
    _check_source(args)
    import torch

    from sparselt_dist.evaluation.latent_types import open_reader
    from sparselt_dist.typing_report import print_findings, write_html

    reader = open_reader(args.checkpoint, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    tagger, notes = _tagger(args.tagger)
    found, for_page = _survey(reader, args, tagger, notes)
    print_findings(found)
    if args.html is not None:
        write_html(args.html, for_page)
        print(f"report: {args.html}")
    return cli.EXIT_DONE


def _tagger(model: str | None) -> tuple[Tagger | None, list[str]]:
    """The tagger; where there is none, and none was asked for, a note that says why."""
    from sparselt_dist.evaluation.parts_of_speech import load_tagger

    if model is not None:
        return load_tagger(model), []
    try:
        return load_tagger(), []
    except ConfigError as reason:
        return None, [f"left out: {reason}"]


# ---------------------------------------------------------------- the text


def _check_source(args: argparse.Namespace) -> None:
    """Raises ConfigError: no text is named, or several are."""
    named = [
        name
        for name, value in (("TEXT", args.text), ("--text-file", args.text_file), ("--shards", args.shards))
        if value is not None
    ]
    if len(named) != 1:
        raise ConfigError(
            f"typing: found {' and '.join(named) or 'no text'}, expected one of TEXT, - (standard input), "
            "--text-file FILE and --shards DIR"
        )


def _source(args: argparse.Namespace) -> str:
    """What is typed, for headings and messages."""
    if args.text is not None:
        return "standard input" if args.text == _STDIN else "TEXT"
    return str(args.text_file or args.shards)


def _rows(reader: TypeReader, args: argparse.Namespace) -> Iterator[Row]:
    from sparselt_dist.evaluation.latent_types import rows_of_lines, rows_of_shards

    if args.shards is not None:
        return rows_of_shards(reader, args.shards, max(1, args.samples))
    return rows_of_lines(reader, _lines(args))


def _lines(args: argparse.Namespace) -> Iterator[str]:
    """The lines to type. Raises DataError: they cannot be read, or are not UTF-8."""
    try:
        if args.text_file is not None:
            with args.text_file.open(encoding="utf-8") as file:
                yield from (line.rstrip("\n") for line in file)
        else:
            content = sys.stdin.buffer.read() if args.text == _STDIN else args.text.encode("utf-8", "surrogateescape")
            yield from content.decode("utf-8").splitlines()
    except OSError as cause:
        raise DataError(f"--text-file: {args.text_file} cannot be read ({cause.strerror}); name a text file") from cause
    except UnicodeDecodeError as cause:
        raise DataError(f"{_source(args)}: found bytes that are no UTF-8 ({cause}); convert it to UTF-8") from cause


# ---------------------------------------------------------------- what is found


def _survey(
    reader: TypeReader, args: argparse.Namespace, tagger: Tagger | None, notes: list[str]
) -> tuple[Findings, Findings]:
    """What to print and what to write on the page, which shows more texts.

    Raises:
        DataError: there is no text.
    """
    from sparselt_dist.evaluation.latent_types import type_rows
    from sparselt_dist.evaluation.type_census import TypeCensus
    from sparselt_dist.typing_report import Findings

    census, texts, wanted = TypeCensus(reader.num_types), 0, _wanted(args)
    shown: list[Shown] = []
    for typed in type_rows(reader, _rows(reader, args)):
        census.add(typed, None if tagger is None else tagger(typed.row.text, typed.row.spans))
        if texts < max(wanted, _HTML_TEXTS):
            shown.append(_shown(reader, typed, rebuilt=args.reconstruct and texts < wanted))
        texts += 1
    if not texts:
        raise DataError(f"{_source(args)}: found no text, expected at least one line with a word")
    report = census.report(args.keywords)
    source = f"{reader.loaded.path} (step {reader.loaded.meta['step']}) on {_source(args)}"
    printed, on_page = shown[:wanted], shown[: max(wanted, _HTML_TEXTS)]
    return (
        Findings(source, report, printed, [*notes, *_left_out(len(printed), texts)]),
        Findings(source, report, on_page, [*notes, *_left_out(len(on_page), texts)]),
    )


def _wanted(args: argparse.Namespace) -> int:
    """How many texts are shown token by token."""
    if args.show is not None:
        return int(args.show)
    return sys.maxsize if args.text is not None else _SHOWN_OF_A_CORPUS


def _shown(reader: TypeReader, typed: TypedText, *, rebuilt: bool) -> Shown:
    from sparselt_dist.evaluation.latent_types import rebuild
    from sparselt_dist.typing_report import Shown

    return Shown(typed, rebuild(reader, typed.row) if rebuilt else None)


def _left_out(shown: int, texts: int) -> list[str]:
    return [] if shown == texts else [f"{shown} of {texts} texts are shown token by token; --show N shows more"]


if __name__ == "__main__":
    sys.exit(main())

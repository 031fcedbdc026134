"""`sparselt prepare`: text sources to WebDataset shards, tokenizer and manifest."""

from __future__ import annotations

import argparse
import sys

from sparselt_dist import cli

_DESCRIPTION = """\
Text sources to WebDataset shards, tokenizer and manifest: normalise, filter, remove duplicates, train or take a
tokenizer, tokenize in parallel, pack, shuffle, write. Run again after a kill, it continues where it was; complete
shards of the same configuration are left as they are.

prepare.source is `embedded` (public-domain English that comes with the installation), a file, folder or glob of text,
JSON lines or Parquet (.gz .bz2 .xz .zst too), or a Hugging Face data set: NAME, NAME:CONFIG or NAME:CONFIG:SPLIT, or a
folder of save_to_disk. Several: prepare.source='[a.jsonl.gz, texts/]'.

On several machines: the same command with --part 0/N, 1/N, ... on a shared folder gives the same bytes as one process;
slurm/prepare.sh starts them.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = cli.make_parser(
        "prepare",
        _DESCRIPTION,
        "sparselt prepare prepare.source=texts/ prepare.output_dir=shards/mine prepare.validation_fraction=0.02",
    )
    cli.add_config_arguments(parser)
    parser.add_argument(
        "--part", default="0/1", metavar="I/N", help="do part I of N, from 0, with N - 1 other such processes"
    )
    parser.add_argument(
        "--wait-minutes", type=float, default=30.0, metavar="M", help="how long another part may give no sign of life"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = cli.parse_arguments(build_parser(), argv)
    return cli.run_command(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    from sparselt_dist.config_loading import load_config

    config = load_config(args.config, args.overrides, for_training=False)
    from sparselt_dist.data.parts import Part
    from sparselt_dist.data.preparation import prepare

    part = Part.parse(args.part, args.wait_minutes)
    report = prepare(config, part=part)
    if report.reused:
        print(f"{report.output_dir} holds complete shards of this configuration; nothing to do")
    print(report.table())
    if part.number > 0:
        return cli.EXIT_DONE
    print(f"next: sparselt pretrain data.train={report.train_dir}" + _validation(report.validation_dir))
    return cli.EXIT_DONE


def _validation(folder: object) -> str:
    return "" if folder is None else f" data.validation={folder}"


if __name__ == "__main__":
    sys.exit(main())

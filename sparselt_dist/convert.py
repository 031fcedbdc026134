"""`sparselt convert`: official checkpoints of SparseLT, cramming and headless-lm to a folder of ours."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from sparselt_dist import cli

if TYPE_CHECKING:
    from sparselt_dist.models.conversion import Conversion

_KINDS = ("auto", "sparselt", "cramming", "headless")

_DESCRIPTION = """\
Weights written by the official code to a Hugging Face folder that AutoModel.from_pretrained and model.init_from load.
Every tensor is accounted for: an unknown one, a missing one or one of another shape is refused. Nothing that a pickle
names is run. conversion.json in OUTPUT tells what became of each tensor.

kinds:
  sparselt   the folder of its training (encoder, typer, decoder), or the encoder extracted from it
  cramming   model.safetensors with model_config.json, a folder from the hub, or a training checkpoint (.pth)
  headless   a Lightning checkpoint of its encoder or decoder (.ckpt), or a published folder
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = cli.make_parser(
        "convert", _DESCRIPTION, "sparselt convert checkpoints/bert_base_voa_sparseLT sparselt-voa"
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help="file of weights, or a folder with one")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to write: absent or empty")
    parser.add_argument("--kind", choices=_KINDS, default="auto", help="whose; auto: told by the tensors' names")
    parser.add_argument(
        "--model-config", metavar="FILE", type=Path, help="the model's configuration; none: beside the weights"
    )
    parser.add_argument("--tokenizer", metavar="FOLDER", type=Path, help="its tokenizer; none: beside the weights")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = cli.parse_arguments(build_parser(), argv)
    return cli.run_command(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    from sparselt_dist.models.conversion import convert

    done = convert(
        args.source,
        args.output,
        kind=None if args.kind == "auto" else args.kind,
        model_config=args.model_config,
        tokenizer=args.tokenizer,
    )
    print(report(done))
    return cli.EXIT_DONE


def report(done: Conversion) -> str:
    """The account as text: a line for each tensor, then what was not taken over, notes and totals."""
    width = max(len(row.source) for row in done.tensors)
    lines = [f"{done.source}: {done.layout}"]
    for row in done.tensors:
        shape = "x".join(map(str, row.shape)) or "scalar"
        end = " ".join(part for part in (row.target, f"({row.reason})" if row.reason else "") if part)
        lines.append(f"  {row.source:<{width}}  {shape:>12} {row.dtype:<8}  {row.action:<7}  {end}")
    lines += [f"  entry {name}: not weights, left out" for name in done.others]
    lines += [f"note: {note}" for note in done.notes]
    counts = Counter(row.action for row in done.tensors)
    lines.append(", ".join(f"{count} tensors {action}" for action, count in counts.items()))
    lines.append(f"{done.class_name} -> {done.output}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

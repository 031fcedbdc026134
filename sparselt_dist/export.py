"""`sparselt export`: a checkpoint to a Hugging Face folder that `from_pretrained` loads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sparselt_dist import cli

if TYPE_CHECKING:
    from collections.abc import Mapping

_DESCRIPTION = """\
A checkpoint to a Hugging Face folder: weights as safetensors, tokenizer, pipeline settings and a model card. It loads
with AutoModelForMaskedLM.from_pretrained; crammed-bert also where only transformers is installed, with
trust_remote_code=True. An earlier export of the same run is replaced; any other folder that is not empty is refused.
"""


def export_checkpoint(checkpoint: Path, output_dir: Path, *, metrics: Mapping[str, float] | None = None) -> Path:
    """See `models.exporting.export_checkpoint`, which this imports late."""
    from sparselt_dist.models import exporting

    return exporting.export_checkpoint(checkpoint, output_dir, metrics=metrics)


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = cli.make_parser("export", _DESCRIPTION, "sparselt export runs/quickstart my-model")
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT_OR_RUN", type=Path, help="a checkpoint; or a run folder: its newest"
    )
    parser.add_argument(
        "output", metavar="OUTPUT", type=Path, nargs="?", help="folder to write; none: model/ in the run folder"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = cli.parse_arguments(build_parser(), argv)
    return cli.run_command(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    from sparselt_dist import checkpoint

    found = checkpoint.find_intact(args.checkpoint)
    output = args.output or found.resolve().parent.parent / "model"
    export_checkpoint(found, output)
    print(f"{found} -> {output}")
    return cli.EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())

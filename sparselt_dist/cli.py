"""What the command lines share, and the console script `sparselt NAME ...`, which imports only the command it runs."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from sparselt_dist.errors import RunFailureError, SparseltError

EXIT_DONE = 0
EXIT_CRASH = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # the shell's code for SIGINT

COMMANDS: dict[str, str] = {
    "prepare": "text sources to WebDataset shards, tokenizer and manifest",
    "shards": "inspect or verify a shard folder",
    "pretrain": "the main job: train, evaluate, export",
    "doctor": "is this machine, configuration and shard folder fit to run?",
    "plan": "memory, FLOPs, hours and cost before queueing",
    "evaluate": "a checkpoint or exported model on named tasks",
    "typing": "latent types of any text under a checkpoint of slt",
    "export": "a checkpoint to a Hugging Face folder",
    "convert": "official checkpoints of SparseLT, cramming and headless-lm to ours",
    "compare": "runs side by side",
    "mlflow-sync": "run folders' journals into an MLflow store",
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, where there is one to show, and keeps the line breaks of the example."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def make_parser(command: str, description: str, example: str) -> argparse.ArgumentParser:
    """A parser whose help shows defaults and one example."""
    return argparse.ArgumentParser(
        prog=f"sparselt {command}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--config NAME_OR_FILE` (repeatable, as `arguments.config`) and `key.path=value` (`arguments.overrides`)."""
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="NAME_OR_FILE",
        help="a shipped profile or a YAML file; repeatable, later wins",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="sets one key, such as budget.max_steps=100"
    )


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse with options and overrides in any order; a wrong option leaves with exit code 2."""
    return parser.parse_intermixed_args(argv)


def run_command(function: Callable[[], int]) -> int:
    """Run a command's body; an error the user can mend becomes one message and exit code 2."""
    try:
        return function()
    except SparseltError as error:
        if not error.silent:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except RunFailureError as error:
        if not error.silent:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_CRASH
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, is gone
        sys.stderr.close()
        return EXIT_DONE


def leave(command: Callable[[], int]) -> NoReturn:
    """Run a command and end the process with its code, without tearing the interpreter down.

    A thread of gloo drops the tensors of a finished collective only after it has woken whoever waited for it, and
    needs the interpreter for that. Met by the teardown, it aborts the process (SIGABRT), whatever its exit code was to
    be. Leaving the process group would not end these threads: DeepSpeed holds references to its groups. A process that
    never needed torch has none of them and ends as usual.
    """
    try:
        code = command()
    except Exception:
        sys.excepthook(*sys.exc_info())  # as the interpreter would
        code = EXIT_CRASH
    if "torch" not in sys.modules:
        sys.exit(code)
    atexit._run_exitfuncs()  # ends loader processes, flushes logs
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader is gone, or it is closed
            stream.flush()
    os._exit(code)


def _usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sparselt COMMAND [arguments]",
            "",
            "Pretrain language models with any objective on any cluster.",
            "",
            "commands:",
            *lines,
            "",
            "example:",
            "  sparselt pretrain --config quickstart budget.max_steps=100",
            "",
            "Each command has --help, and runs as `python -m sparselt_dist.NAME` too.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The console script: hand over to the named command's `main`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(_usage())
        return EXIT_DONE if arguments else EXIT_USER_ERROR
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"error: found command {name!r}, expected one of {', '.join(COMMANDS)}{hint}", file=sys.stderr)
        return EXIT_USER_ERROR
    module = importlib.import_module(f"sparselt_dist.{name.replace('-', '_')}")
    if name == "pretrain" and argv is None:
        leave(lambda: module.main(rest))
    code: int = module.main(rest)
    return code


if __name__ == "__main__":
    sys.exit(main())

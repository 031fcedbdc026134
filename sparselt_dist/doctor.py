"""`doctor`: is this machine, cluster, configuration and shard folder fit to run? Each finding with its fix.

python -m sparselt_dist.doctor --config quickstart --world 2
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from functools import partial

from sparselt_dist import cli
from sparselt_dist.config import Config
from sparselt_dist.config_loading import load_config
from sparselt_dist.diagnosis import (
    Finding,
    check_build_tools,
    check_data,
    check_devices,
    check_launcher,
    check_memory,
    check_output,
    check_packages,
    check_scratch,
    check_slurm,
    check_split,
    check_tracking,
    check_upload,
)
from sparselt_dist.errors import SparseltError

_MARKS = {"ok": "ok     ", "note": "note   ", "warning": "WARNING", "error": "ERROR  "}


def build_parser() -> argparse.ArgumentParser:
    """The command line of `doctor`."""
    parser = cli.make_parser(
        "doctor",
        "Is this machine, cluster, configuration and shard folder fit to run? Exit code 2 if anything must be mended.",
        "sparselt doctor --config quickstart --world 2",
    )
    cli.add_config_arguments(parser)
    parser.add_argument("--world", type=int, default=1, metavar="N", help="ranks the run will have")
    parser.add_argument("--verify", action="store_true", help="also check every checksum and token id of the shards")
    return parser


def _show(title: str, findings: Iterable[Finding]) -> list[Finding]:
    """Print a section as soon as it is known."""
    shown = list(findings)
    print(f"\n{title}")
    for finding in shown:
        print(f"  {_MARKS[finding.level]} {finding.subject}: {finding.found}")
        if finding.fix:
            print(f"          fix: {finding.fix}")
    sys.stdout.flush()
    return shown


def _load(args: argparse.Namespace) -> tuple[Config | None, list[Finding]]:
    try:
        config = load_config(args.config, args.overrides, default_profile="quickstart")
    except SparseltError as error:
        return None, [Finding("error", "configuration", str(error), "change the keys named above")]
    names = ", ".join(args.config) or "quickstart"
    return config, [Finding("ok", "configuration", names), *check_split(config, args.world)]


def _run(args: argparse.Namespace) -> int:
    config, loaded = _load(args)
    findings = _show("configuration", loaded)
    if config is not None:
        places: list[Callable[[], list[Finding]]] = [
            lambda: check_output(config),
            lambda: check_tracking(config),
            lambda: check_scratch(config),
            lambda: check_upload(config),
        ]
        findings += _show("places", (finding for check in places for finding in check()))
    machine = (check_packages, partial(check_build_tools, config), check_launcher, check_memory, check_slurm)
    findings += _show("machine", (finding for check in machine for finding in check()))
    if config is not None:
        findings += _show("data", check_data(config, verify=args.verify))
    findings += _show("devices", check_devices(config, args.world))
    errors = sum(finding.level == "error" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    verdict = "fit to run" if not errors else "not fit to run"
    print(f"\n{verdict}: {errors} error(s), {warnings} warning(s)")
    return cli.EXIT_USER_ERROR if errors else cli.EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 2 if any finding is an error."""
    args = cli.parse_arguments(build_parser(), argv)
    if args.world < 1:
        build_parser().error(f"--world: found {args.world}, expected a whole number >= 1")
    return cli.run_command(lambda: _run(args))


if __name__ == "__main__":
    sys.exit(main())

"""`pretrain`: the main job. Prepare if asked to, train, evaluate, export, sum up.

deepspeed --num_gpus 8 -m sparselt_dist.pretrain --config base run.name=first
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

from sparselt_dist import cli, extensions, rank_log, rank_report
from sparselt_dist.config_loading import dump, list_profiles, load_config
from sparselt_dist.distributed import StopFlag, ranks_from_environment
from sparselt_dist.errors import SparseltError
from sparselt_dist.follower import resolve_store_uri
from sparselt_dist.launcher_watch import Launcher
from sparselt_dist.objectives.base import available
from sparselt_dist.run_plan import make_plan

STOPPED = 75


def build_parser() -> argparse.ArgumentParser:
    """The command line of `pretrain`."""
    parser = cli.make_parser(
        "pretrain",
        "Pretrain a language model. Without --config: the profile quickstart.",
        "deepspeed --num_gpus 2 -m sparselt_dist.pretrain --config crammed-cpu run.name=first optim.peak_lr=2e-3",
    )
    cli.add_config_arguments(parser)
    parser.add_argument(
        "--resume",
        action="append",
        metavar="auto|never|must|PATH",
        help="continue which checkpoint (default: auto); later wins, auto behind a PATH: that one until the run has its own",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, take two steps, evaluate, save and export, then remove the run folder",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--list-objectives", action="store_true", help="print the objectives and stop")
    parser.add_argument("--list-profiles", action="store_true", help="print the shipped profiles and stop")
    parser.add_argument(
        "--local_rank", type=int, default=None, help=argparse.SUPPRESS
    )  # put there by DeepSpeed's launcher
    return parser


def _print_list(entries: dict[str, str]) -> None:
    width = max(len(name) for name in entries)
    for name, text in entries.items():
        print(f"{name:<{width}}  {text}")


def _answer(args: argparse.Namespace) -> bool:
    """Answer the flags that only print; whether one was given."""
    if args.list_objectives:
        _print_list(available())
    elif args.list_profiles:
        _print_list(list_profiles())
    else:
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    started = time.monotonic()
    args = cli.parse_arguments(build_parser(), argv)
    try:
        code = cli.run_command(lambda: _run(args, started))
    except Exception as error:
        rank_log.stop(error)
        raise
    rank_log.stop()
    rank_report.record_exit(code)
    return code


def _run(args: argparse.Namespace, started: float) -> int:
    ranks = ranks_from_environment()
    if not ranks.is_main and (args.list_objectives or args.list_profiles or args.print_config):
        return cli.EXIT_DONE  # rank 0 prints it
    if _answer(args):
        return cli.EXIT_DONE
    try:
        config = load_config(args.config, args.overrides, default_profile="quickstart")
        if args.print_config:
            print(dump(config), end="")
            return cli.EXIT_DONE
        # Faults of these show before anything heavy is imported.
        make_plan(config, ranks.world_size)
        if config.log.mlflow_uri is not None:
            resolve_store_uri(config.log.mlflow_uri)
    except SparseltError:
        if ranks.is_main:
            raise
        return cli.EXIT_USER_ERROR  # rank 0 says it for all
    extensions.prepare_environment()
    stop_flag = StopFlag()
    stop_flag.install()
    launcher = Launcher(os.environ)
    rank_report.announce()
    if not args.dry_run:
        rank_log.start(ranks.rank)
    from sparselt_dist.dry_run import dry_run
    from sparselt_dist.run import pretrain

    profile = ",".join(args.config) or "quickstart"
    shared: dict[str, Any] = {"profile": profile, "started": started, "launcher": launcher}
    if args.dry_run:
        outcome = dry_run(config, ranks, stop_flag, **shared)
    else:
        outcome = pretrain(config, ranks, stop_flag, resume=args.resume or ["auto"], **shared)
    return STOPPED if outcome == "stopped" else cli.EXIT_DONE


if __name__ == "__main__":
    cli.leave(main)

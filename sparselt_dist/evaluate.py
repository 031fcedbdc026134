"""`sparselt evaluate`: a checkpoint or an exported model on named tasks."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselt_dist import cli
from sparselt_dist.errors import CheckpointError, ConfigError
from sparselt_dist.redaction import scrubbed, shown

if TYPE_CHECKING:
    from sparselt_dist.evaluation.tasks import Shards, Subject

TASKS = {
    "heldout": "loss and terms of the checkpoint's objective on held-out rows; of an exported model, its masked tokens",
    "yardsticks": "masked tokens through a recovered head, and the replaced-token probe: comparable over objectives",
    "last-word": "of causal models: the last word of passages, as in LAMBADA; from --last-word, else cut from held-out text",
    "fine-tune": "of encoders: trained on the labelled texts in --fine-tune, GLUE's tasks or any other, and scored",
}
_USUAL = ("heldout", "yardsticks")

_DESCRIPTION = """\
A run's checkpoint (or the newest of a run folder) or an exported model on named tasks. Writes results.json into the
run's folder, or into the model's where it belongs to no run, and adds the metrics to the run's MLflow run.

tasks:
""" + "\n".join(f"  {name:<12}{text}" for name, text in TASKS.items())


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = cli.make_parser("evaluate", _DESCRIPTION, "sparselt evaluate runs/quickstart --tasks yardsticks")
    parser.add_argument(
        "model", metavar="CHECKPOINT_OR_MODEL", type=Path, help="a checkpoint, run folder or exported model"
    )
    parser.add_argument("--data", metavar="SHARDS", help="training shards; none: those of the run")
    parser.add_argument("--validation", metavar="SHARDS", help="held-out shards; none: those of the run")
    parser.add_argument("--tasks", metavar="NAME[,NAME]", help=f"what to measure; none: {','.join(_USUAL)}")
    parser.add_argument(
        "--last-word", type=Path, metavar="FILE", help="passages, one a line or .jsonl with text, for task last-word"
    )
    parser.add_argument(
        "--fine-tune",
        type=Path,
        metavar="FOLDER",
        help="for task fine-tune: a folder for each task (cola, sst2, ..., any name) with train.jsonl and validation.jsonl "
        "(mnli: validation_matched.jsonl, validation_mismatched.jsonl) of text, text_pair where there is one, and label",
    )
    parser.add_argument(
        "--trials",
        type=int,
        metavar="N",
        help="times to fine-tune on each task, by seeds 0 to N-1; the median counts",
        default=1,
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="results file; none: results.json as told above")
    parser.add_argument(
        "--mlflow-uri", metavar="URI", help="store to log to; none: the one the run was logged to, if any"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = cli.parse_arguments(build_parser(), argv)
    return cli.run_command(lambda: _run(args))


def parse_tasks(text: str, *implied: str) -> list[str]:
    """Task names from `NAME,NAME` and those that other options imply, each once.

    Raises:
        ConfigError: an unknown name; the nearest is named.
    """
    from sparselt_dist.config_layers import nearest

    names = list(dict.fromkeys([*(part.strip() for part in text.split(",") if part.strip()), *implied]))
    for name in names:
        if name not in TASKS:
            near = nearest(name, TASKS)
            hint = f"; did you mean {near!r}?" if near else ""
            raise ConfigError(f"--tasks: found {name!r}, expected one of {', '.join(TASKS)}{hint}")
    if not names:
        raise ConfigError(f"--tasks: names no task, expected one of {', '.join(TASKS)}")
    return names


def _run(args: argparse.Namespace) -> int:
    names = _task_names(args)
    import torch

    from sparselt_dist.evaluation.fine_tuning import FineTuning
    from sparselt_dist.evaluation.tasks import open_shards, open_subject, run_tasks

    started = time.time()
    subject = open_subject(args.model)
    output = args.output or (subject.run_dir or subject.folder) / "results.json"
    needed = not set(names) <= {"fine-tune", *(["last-word"] if args.last_word is not None else [])}
    labelled = None if args.fine_tune is None else FineTuning(args.fine_tune, args.trials, _tell)
    shards = open_shards(subject, args.data, args.validation, args.last_word, labelled, needed=needed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    metrics = run_tasks(subject, shards, names, device)
    print(_table(metrics))
    _write(output, _results(subject, shards, names, metrics, time.time() - started))
    print(f"results: {output}")
    _log_to_mlflow(subject, metrics, args)
    return cli.EXIT_DONE


def _task_names(args: argparse.Namespace) -> list[str]:
    files = {"last-word": args.last_word, "fine-tune": args.fine_tune}
    implied = [name for name, path in files.items() if path is not None]
    usual = () if implied else _USUAL
    names = parse_tasks(args.tasks if args.tasks is not None else ",".join(usual), *implied)
    if "fine-tune" in names and args.fine_tune is None:
        raise ConfigError("--tasks: task fine-tune needs labelled texts; name their folder by --fine-tune")
    if args.trials < 1:
        raise ConfigError(f"--trials: found {args.trials}, expected 1 or more")
    return names


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _table(metrics: dict[str, float]) -> str:
    width = max(map(len, metrics), default=0)
    return "\n".join(f"{name:<{width}}  {value:>9.4f}" for name, value in sorted(metrics.items()))


def _results(
    subject: Subject, shards: Shards, names: list[str], metrics: dict[str, float], seconds: float
) -> dict[str, Any]:
    return {
        "model": str(subject.folder),
        "step": subject.step,
        "tasks": names,
        "data": None if shards.train is None else shards.train.name,
        "validation": None if shards.held_out is None else shards.held_out.name,
        "validation_manifest_sha256": None if shards.held_out is None else shards.held_out.manifest.sha256,
        "last_word": None if shards.passages is None else str(shards.passages),
        "fine_tune": None if shards.fine_tuning is None else str(shards.fine_tuning.folder),
        "trials": None if shards.fine_tuning is None else shards.fine_tuning.trials,
        "seconds": round(seconds, 1),
        "time": time.time(),
        "metrics": metrics,
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    import json

    from sparselt_dist.journal import replace_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise CheckpointError(f"--output: {path} cannot be written ({cause}); name another file") from cause
    replace_file(path, (json.dumps(content, indent=1) + "\n").encode())


def _log_to_mlflow(subject: Subject, metrics: dict[str, float], args: argparse.Namespace) -> None:
    """Add the points to the run's MLflow run, where the store lacks them. A store that is down only costs a warning.

    Other text than the run's own is named in the metric, whose point at this step is the run's.
    """
    from sparselt_dist.follower import read_json, resolve_store_uri

    if subject.run_dir is None:
        return
    uri = args.mlflow_uri or read_json(subject.run_dir / "mlflow.json").get("uri")
    if uri is None:
        return
    named = {f"{name}{_text_name(name, args)}": value for name, value in metrics.items()}
    line = named | {"step": subject.step, "time": time.time()}
    from sparselt_dist.mlflow_sink import MlflowSink

    sink = MlflowSink(subject.run_dir, resolve_store_uri(uri))
    try:
        sink.connect()
        sink.deliver([line])
    except Exception as cause:  # stores fail with errors of many libraries
        print(
            scrubbed(f"warning: MLflow at {uri} was not told ({type(cause).__name__}: {cause}); run it again later"),
            file=sys.stderr,
        )
    else:
        print(f"MLflow: {sink.sent} new metrics in {shown(uri)}")


def _text_name(metric: str, args: argparse.Namespace) -> str:
    """What is appended to a metric's name: empty for the run's own text."""
    if metric.startswith("last_word/") and args.last_word is not None:
        return f"/{args.last_word.stem}"
    if metric.startswith("fine_tune/"):
        return f"/{args.fine_tune.resolve().name}"
    return "" if args.validation is None else f"/{Path(args.validation).name}"


if __name__ == "__main__":
    sys.exit(main())

"""Text sources to shard folders: the whole of `sparselt prepare`, as a function.

Work in progress lies in `<output_dir>/.work` and is removed at the end; a call that was killed is continued by the same
call. What stands in the manifest depends on the text and the configuration alone: no time, path of output or number of
workers, so the same preparation gives the same bytes anywhere.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselt_dist.config import Config
from sparselt_dist.data import stages
from sparselt_dist.data.collection import Collected, collect_documents, held_out_below
from sparselt_dist.data.context import Context
from sparselt_dist.data.packing import SPLITS, Split
from sparselt_dist.data.shards import (
    MANIFEST,
    TOKENIZER,
    Manifest,
    SourceEntry,
    file_sha256,
    read_manifest,
    write_atomically,
    write_manifest,
)
from sparselt_dist.data.sources import Item, find_items, fingerprint
from sparselt_dist.data.stage_progress import StageProgress
from sparselt_dist.data.stages import Tokenized
from sparselt_dist.data.tokenizer import TOKENIZER_FILE, TRAINED_KINDS, tokenizer_info
from sparselt_dist.data.workspace import Workers, locked
from sparselt_dist.errors import DataError, SparseltError

WORK = ".work"
FAILED = "failed"  # in the work folder: the last start ended with an error that the user has to mend
NOT_IN_IDENTITY = {"output_dir", "num_workers"}  # they do not change what is in the shards


@dataclass(frozen=True)
class PrepareReport:
    """Where the shards are and what became of the text."""

    output_dir: Path
    train_dir: Path
    validation_dir: Path | None
    reused: bool  # complete shards of this configuration were there
    rows: tuple[tuple[str, str], ...]  # of the closing table: what, how much

    def table(self) -> str:
        """The closing table, as text."""
        width = max(len(name) for name, _ in self.rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.rows)


def prepare(config: Config, progress: bool = True) -> PrepareReport:
    """Make the shards that `prepare` and `data.sequence_length` ask for, or return those that are there.

    Args:
        config: the whole configuration.
        progress: show a progress bar, or lines, on stderr.

    Raises:
        ConfigError: no source, or a vocabulary too small for the text.
        DataError: a source or the output folder cannot be used, or the folder holds shards of another configuration.
    """
    started = time.monotonic()
    output = Path(config.prepare.output_dir)
    folders = _folders(output, config.prepare.validation_fraction)
    wanted = identity(config)
    existing = _existing(output, wanted)
    if set(folders.values()) <= set(existing):
        _check_unchanged(config, existing[folders["train"]])
        shutil.rmtree(output / WORK, ignore_errors=True)
        rows = _stored_rows(existing, folders)
        return PrepareReport(output, folders["train"], folders.get("validation"), True, rows)
    items = find_items(config.prepare.source, text_key=config.prepare.text_key, license=config.prepare.license)
    work = output / WORK
    try:
        work.mkdir(parents=True, exist_ok=True)
        with locked(work):
            _open_work(work, {"prepare": wanted, "source": fingerprint(items)})
            workers = Workers(config.prepare.num_workers or os.cpu_count() or 1)
            with workers, StageProgress(progress) as bar:
                context = Context(config, work, workers, bar)
                collected, tokenized = _noting_failure(context, items, folders, wanted)
        shutil.rmtree(work)
    except OSError as cause:
        raise DataError(
            f"prepare.output_dir: {cause.filename or output}: cannot be written: {cause.strerror or cause}; "
            "choose another folder, or free it, and run the same command again"
        ) from cause
    rows = _closing_rows(context, collected, tokenized, folders, time.monotonic() - started)
    return PrepareReport(output, folders["train"], folders.get("validation"), False, rows)


def _folders(output: Path, validation_fraction: float) -> dict[Split, Path]:
    if validation_fraction == 0:
        return {"train": output}
    return {split: output / split for split in SPLITS}


def _noting_failure(
    context: Context, items: list[Item], folders: dict[Split, Path], wanted: dict[str, Any]
) -> tuple[Collected, Tokenized]:
    try:
        return _run_stages(context, items, folders, wanted)
    except SparseltError:
        (context.work / FAILED).touch()
        raise


def _run_stages(
    context: Context, items: list[Item], folders: dict[Split, Path], wanted: dict[str, Any]
) -> tuple[Collected, Tokenized]:
    collected = collect_documents(context, items)
    near = stages.remove_near_duplicates(context, collected)
    held_out = held_out_below(collected, context.config.prepare.validation_fraction)
    stages.make_tokenizer(context, collected, near, held_out)
    tokenized = stages.tokenize_documents(context, collected, near, held_out)
    for split in folders:
        stages.check_enough(context, tokenized, split)
    entries = {split: stages.write_split(context, tokenized, split, folder) for split, folder in folders.items()}
    source = fingerprint(items)
    for split in reversed(folders):  # train last: its manifest says that all is there
        folder = folders[split]
        _copy_tokenizer(context.tokenizer, folder / TOKENIZER)
        totals = tokenized.splits[split]
        write_manifest(
            folder,
            entries[split],
            kind=context.kind,
            sequence_length=context.row_length,
            dtype=tokenized.dtype,
            vocab_size=tokenizer_info(context.tokenizer).vocab_size,
            tokenizer_sha256=file_sha256(context.tokenizer / TOKENIZER_FILE),
            sources=[
                SourceEntry(name, license, totals.documents[number], totals.characters[number])
                for number, (name, license) in enumerate(collected.sources)
                if totals.documents[number]
            ],
            prepare=wanted,
            statistics=_statistics(context, collected, tokenized, split) | {"source_fingerprint": source},
        )
    return collected, tokenized


def _copy_tokenizer(source: Path, target: Path) -> None:
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


# --- is it there already ---------------------------------------------------------------------------------------------


def identity(config: Config) -> dict[str, Any]:
    """Everything in the configuration that decides what is in the shards; as JSON gives it back."""
    values = config.prepare.model_dump(mode="json", exclude=NOT_IN_IDENTITY)
    values["sequence_length"] = config.data.sequence_length
    if config.prepare.tokenizer not in TRAINED_KINDS:
        path = Path(config.prepare.tokenizer).expanduser() / TOKENIZER_FILE
        values["tokenizer_sha256"] = file_sha256(path) if path.is_file() else None
    return values


def _existing(output: Path, wanted: dict[str, Any]) -> dict[Path, Manifest]:
    """The complete shard folders of this configuration in the output folder.

    Raises:
        DataError: one there was prepared otherwise, or its manifest is corrupt.
    """
    found = {}
    for folder in (output, *(output / split for split in SPLITS)):
        if (folder / MANIFEST).is_file():
            manifest = read_manifest(folder)
            _refuse_other(folder, manifest.prepare, wanted)
            found[folder] = manifest
    return found


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    keys = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    return ", ".join(f"{key} is {found.get(key)!r} there and {wanted.get(key)!r} here" for key in keys)


def _refuse_other(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    differences = _differences(found, wanted)
    if differences:
        raise DataError(
            f"prepare.output_dir: {folder}: holds shards of another preparation: {differences}; nothing was "
            "overwritten: choose another prepare.output_dir, or remove the folder"
        )


def _check_unchanged(config: Config, manifest: Manifest) -> None:
    """Refuse to reuse shards of a text that has changed; a text that is gone cannot be compared, and need not be."""
    try:
        items = find_items(config.prepare.source, text_key=config.prepare.text_key, license=config.prepare.license)
    except SparseltError:
        return
    if manifest.statistics.get("source_fingerprint", fingerprint(items)) != fingerprint(items):
        raise DataError(
            f"prepare.source: the files have changed since {config.prepare.output_dir} was prepared from them; "
            "nothing was overwritten: choose another prepare.output_dir, or remove the folder"
        )


def _open_work(work: Path, wanted: dict[str, Any]) -> None:
    """Continue work of the same configuration and source, or begin it.

    Work for something else is discarded if it ended with an error, for the change is then the remedy. If it was killed
    it is refused, for it may have taken hours.
    """
    path = work / "config.json"
    found = json.loads(path.read_bytes()) if path.exists() else None
    if found is not None and found != wanted:
        if not (work / FAILED).exists():
            raise DataError(_other_work(work, found, wanted))
        _discard(work)
    (work / FAILED).unlink(missing_ok=True)
    if not path.exists():
        write_atomically(path, json.dumps(wanted).encode())


def _other_work(work: Path, found: dict[str, Any], wanted: dict[str, Any]) -> str:
    differences = _differences(found["prepare"], wanted["prepare"]) or "the source files have changed"
    return (
        f"prepare.output_dir: {work.parent}: holds an unfinished preparation of something else: {differences}; finish "
        f"that one, choose another prepare.output_dir, or remove {work} to begin anew"
    )


def _discard(work: Path) -> None:
    """Remove unfinished work and the shards it may have written; a folder with a manifest is not touched."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()
    for folder in (work.parent, *(work.parent / split for split in SPLITS)):
        if not (folder / MANIFEST).exists():
            for path in folder.glob("shard-[0-9]*"):
                path.unlink()


# --- the account -----------------------------------------------------------------------------------------------------


def _statistics(context: Context, collected: Collected, tokenized: Tokenized, split: Split) -> dict[str, Any]:
    counts, totals = collected.counts, tokenized.splits[split]
    return {
        "documents_read": counts["read"],
        "characters_read": counts["read_characters"],
        "too_short": counts["too_short"],
        "too_long": counts["too_long"],
        "exact_duplicates": counts["exact_duplicates"],
        "near_duplicates": tokenized.near_duplicates,
        "incompressible": tokenized.incompressible,
        "documents": totals.samples,
        "tokens": totals.ids,
        "tokens_dropped": stages.row_remainder(context, totals),
        "text_bytes": totals.text_bytes,
        "bytes_per_token": round(totals.text_bytes / max(1, totals.text_tokens), 4),
    }


def _filter_rows(statistics: dict[str, Any]) -> list[tuple[str, str]]:
    """The documents that went in, were dropped for each reason, and are left."""
    rows = [("documents read", f"{statistics['documents_read']:,}")]
    left = statistics["documents_read"]
    for name in ("too_short", "too_long", "exact_duplicates", "near_duplicates", "incompressible"):
        dropped = statistics[name]
        left -= dropped
        rows.append((f"  {name.replace('_', ' ')}", f"-{dropped:,} -> {left:,}"))
    return rows


def _split_row(statistics: dict[str, Any], samples: int, shards: int, kind: str, vocab_size: int) -> str:
    tokens = f"{statistics['tokens']:,} tokens ({statistics['tokens_dropped']} dropped)"
    return (
        f"{statistics['documents']:,} documents, {tokens}, {samples:,} {kind} in {shards} shards, "
        f"{statistics['bytes_per_token']:.2f} bytes a token, vocabulary {vocab_size:,}"
    )


def _stored_rows(manifests: dict[Path, Manifest], folders: dict[Split, Path]) -> tuple[tuple[str, str], ...]:
    rows = _filter_rows(manifests[folders["train"]].statistics)
    for split, folder in folders.items():
        manifest = manifests[folder]
        size, shards = manifest.vocab_size, len(manifest.shards)
        rows.append((split, _split_row(manifest.statistics, manifest.samples, shards, manifest.kind, size)))
        rows.append(("", str(folder)))
    return tuple(rows)


def _closing_rows(
    context: Context, collected: Collected, tokenized: Tokenized, folders: dict[Split, Path], seconds: float
) -> tuple[tuple[str, str], ...]:
    manifests = {folder: read_manifest(folder) for folder in folders.values()}
    megabytes = sum(totals.text_bytes for totals in tokenized.splits.values()) / 1e6
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return (
        *_stored_rows(manifests, folders),
        ("text kept", f"{megabytes:,.1f} MB"),
        ("seconds", f"{seconds:.1f} ({megabytes / max(seconds, 1e-9):.2f} MB of text a second)"),
        ("peak memory", f"{own:.2f} GiB, the largest worker {worker:.2f} GiB"),
    )

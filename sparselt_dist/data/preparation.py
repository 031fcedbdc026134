"""Text sources to shard folders: the whole of `sparselt prepare`, as a function.

Work in progress lies in `<output_dir>/.work` and is removed at the end; a call that was killed is continued by the same
call. What stands in the manifest depends on the text and the configuration alone: no time, path of output or number of
workers and parts, so the same preparation gives the same bytes anywhere.
"""

from __future__ import annotations

import resource
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselt_dist.config import Config
from sparselt_dist.data import pair_files, pair_stages, stages
from sparselt_dist.data.agreement_sentences import parsing_reader
from sparselt_dist.data.collection import Collected, collect_documents, held_out_below
from sparselt_dist.data.context import Context
from sparselt_dist.data.manifest import (
    MANIFEST,
    TOKENIZER,
    Manifest,
    ShardEntry,
    SourceEntry,
    file_sha256,
    read_manifest,
    write_manifest,
)
from sparselt_dist.data.parts import Crew, OtherPartError, Part, heartbeat, note_failure, wait_for_goodbye
from sparselt_dist.data.sources import Item, find_items, fingerprint
from sparselt_dist.data.stage_progress import StageProgress
from sparselt_dist.data.stages import Tokenized
from sparselt_dist.data.tokenization import SPLITS, Split
from sparselt_dist.data.tokenizer import TOKENIZER_FILE, TRAINED_KINDS
from sparselt_dist.data.work_folder import WORK, differences, opened
from sparselt_dist.data.workspace import Workers, available_cores
from sparselt_dist.errors import DataError, SparseltError

NOT_IN_IDENTITY = {"output_dir", "num_workers"}  # they do not change what is in the shards
ONE_PART = Part()


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


def prepare(config: Config, progress: bool = True, part: Part = ONE_PART) -> PrepareReport:
    """Make the shards that `prepare` and `data.sequence_length` ask for, or return those that are there.

    Args:
        config: the whole configuration.
        progress: show a progress bar, or lines, on stderr.
        part: do this part of the work together with others that run on the same output folder.

    Raises:
        ConfigError: no source, a vocabulary too small for the text, or no parser for the parser track.
        DataError: a source or the output folder cannot be used, or the folder holds shards of another configuration.
    """
    started = time.monotonic()
    output = Path(config.prepare.output_dir).expanduser()
    folders = _folders(output, config.prepare.validation_fraction)
    wanted = identity(config)
    existing = _existing(output, wanted)
    if set(folders.values()) <= set(existing):
        _check_unchanged(config, existing[folders["train"]])
        if part.number == 0:
            shutil.rmtree(output / WORK, ignore_errors=True)
        rows = _stored_rows(existing, folders)
        return PrepareReport(output, folders["train"], folders.get("validation"), True, rows)
    if config.prepare.agreements == "parser":
        parsing_reader(config.prepare.agreement_parser)  # a missing parser would be met after hours
    items = find_items(config.prepare.source, text_key=config.prepare.text_key, license=config.prepare.license)
    work = output / WORK
    try:
        with opened(work, {"prepare": wanted, "source": fingerprint(items)}, part), heartbeat(work, part):
            workers = Workers(config.prepare.num_workers or available_cores())
            with workers, StageProgress(progress) as bar:
                context = Context(config, work, Crew(work, part, workers, bar), bar)
                done = _noting_failure(context, items, folders, wanted)
        if done is not None:
            wait_for_goodbye(work, part)
            shutil.rmtree(work, ignore_errors=part.count > 1)  # a network file system keeps what others still hold
    except OSError as cause:
        raise DataError(
            f"prepare.output_dir: {cause.filename or output}: cannot be written: {cause.strerror or cause}; "
            "choose another folder, or free it, and run the same command again"
        ) from cause
    seconds = time.monotonic() - started
    rows = (("part", f"{part}: done, part 0 completes the folder"), *_cost_rows(seconds))
    if done is not None:
        rows = _closing_rows(*done, folders, seconds)
    return PrepareReport(output, folders["train"], folders.get("validation"), False, rows)


def _folders(output: Path, validation_fraction: float) -> dict[Split, Path]:
    if validation_fraction == 0:
        return {"train": output}
    return {split: output / split for split in SPLITS}


def _noting_failure(
    context: Context, items: list[Item], folders: dict[Split, Path], wanted: dict[str, Any]
) -> tuple[Collected, Tokenized] | None:
    try:
        return _run_stages(context, items, folders, wanted)
    except OtherPartError:
        raise
    except SparseltError as error:
        note_failure(context.work, context.crew.part, str(error))
        raise


def _run_stages(
    context: Context, items: list[Item], folders: dict[Split, Path], wanted: dict[str, Any]
) -> tuple[Collected, Tokenized] | None:
    """All stages; then part 0 completes the folders, and only it returns what became of the text."""
    collected = collect_documents(context, items)
    survivors = stages.remove_duplicates(context, collected)
    held_out = held_out_below(collected, context.config.prepare.validation_fraction)
    stages.make_tokenizer(context, collected, survivors, held_out)
    tokenized = stages.tokenize_documents(context, collected, survivors, held_out)
    pairs = pair_stages.find_pairs(context, collected, survivors, held_out, tokenized)
    samples = {split: stages.make_samples(context, tokenized, split) for split in folders}
    entries = {
        split: stages.write_split(context, tokenized, samples[split], split, folder)
        for split, folder in folders.items()
    }
    pair_stages.store_pairs(context, collected, tokenized, pairs, entries["train"])
    if context.crew.part.number != 0:
        return None
    statistics = {"source_fingerprint": fingerprint(items)}
    for split in reversed(folders):  # train last: its manifest says that all is there
        described = statistics | _statistics(context, collected, tokenized, split, entries[split])
        _complete(context, collected, tokenized, split, folders[split], entries[split], wanted, described)
    return collected, tokenized


def _complete(
    context: Context,
    collected: Collected,
    tokenized: Tokenized,
    split: Split,
    folder: Path,
    entries: list[ShardEntry],
    wanted: dict[str, Any],
    statistics: dict[str, Any],
) -> None:
    _copy_folder(context.tokenizer, folder / TOKENIZER)
    if split == "train" and context.config.prepare.agreements != "none":
        _copy_folder(context.work / pair_files.FOLDER, folder / pair_files.FOLDER)
    totals = tokenized.splits[split]
    write_manifest(
        folder,
        entries,
        kind=context.kind,
        sequence_length=context.row_length,
        dtype=tokenized.dtype,
        vocab_size=tokenized.tokenizer.vocab_size,
        tokenizer_sha256=file_sha256(context.tokenizer / TOKENIZER_FILE),
        sources=[
            SourceEntry(name, license, totals.sources[number], totals.characters[number])
            for number, (name, license) in enumerate(collected.sources)
            if totals.sources[number]
        ],
        prepare=wanted,
        statistics=statistics,
    )


def _copy_folder(source: Path, target: Path) -> None:
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
    if config.prepare.agreements != "parser":
        del values["agreement_parser"]
    if config.prepare.agreements == "none":
        del values["agreements"], values["agreement_words"]
    if config.prepare.tokenizer not in TRAINED_KINDS:
        path = Path(config.prepare.tokenizer).expanduser() / TOKENIZER_FILE
        values["tokenizer_sha256"] = file_sha256(path) if path.is_file() else None
    return values


def _existing(output: Path, wanted: dict[str, Any]) -> dict[Path, Manifest]:
    """The complete shard folders of this configuration in the output folder; without wanted pairs one is not.

    Raises:
        DataError: one there was prepared otherwise, or its manifest is corrupt.
    """
    found = {}
    for folder in (output, *(output / split for split in SPLITS)):
        if (folder / MANIFEST).is_file():
            manifest = read_manifest(folder)
            _refuse_other(folder, manifest.prepare, wanted)
            if folder == output / SPLITS[1] or "agreements" not in wanted or pair_files.has_pairs(folder):
                found[folder] = manifest
    return found


def _refuse_other(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if "agreements" not in wanted:  # then pairs that are there do no harm
        found = {key: value for key, value in found.items() if not key.startswith("agreement")}
    other = differences(found, wanted)
    if other:
        raise DataError(
            f"prepare.output_dir: {folder}: holds shards of another preparation: {other}; nothing was "
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


# --- the account -----------------------------------------------------------------------------------------------------


def _statistics(
    context: Context, collected: Collected, tokenized: Tokenized, split: Split, entries: list[ShardEntry]
) -> dict[str, Any]:
    counts, totals = collected.counts, tokenized.splits[split]
    statistics = {
        "documents_read": counts["read"],
        "characters_read": counts["read_characters"],
        "too_short": counts["too_short"],
        "too_long": counts["too_long"],
        "exact_duplicates": tokenized.exact_duplicates,
        "near_duplicates": tokenized.near_duplicates,
        "incompressible": tokenized.incompressible,
        "documents": totals.samples,
        "tokens": totals.ids,
        "tokens_dropped": stages.row_remainder(context, totals),
        "text_bytes": totals.text_bytes,
        "bytes_per_token": round(totals.text_bytes / max(1, totals.text_tokens), 4),
    }
    if context.kind == "packed" and context.row_length:
        places = context.row_length * sum(entry.samples for entry in entries)
        statistics["fill"] = round(totals.ids / places, 6)
    return statistics


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
    what = "rows" if kind == "packed" else kind
    full = f" {100 * statistics['fill']:.2f} % full" if "fill" in statistics else ""
    return (
        f"{statistics['documents']:,} documents, {tokens}, {samples:,} {what}{full} in {shards} shards, "
        f"{statistics['bytes_per_token']:.2f} bytes a token, vocabulary {vocab_size:,}"
    )


def _stored_rows(manifests: dict[Path, Manifest], folders: dict[Split, Path]) -> tuple[tuple[str, str], ...]:
    rows = _filter_rows(manifests[folders["train"]].statistics)
    for split, folder in folders.items():
        manifest = manifests[folder]
        size, shards = manifest.vocab_size, len(manifest.shards)
        rows.append((split, _split_row(manifest.statistics, manifest.samples, shards, manifest.kind, size)))
        rows.append(("", str(folder)))
    train = folders["train"]
    if pair_files.has_pairs(train):
        pairs = pair_files.read_pair_manifest(train, manifests[train].tokenizer_sha256)
        rows.append(("agreements", pair_files.describe_pairs(pairs)))
    return tuple(rows)


def _closing_rows(
    collected: Collected, tokenized: Tokenized, folders: dict[Split, Path], seconds: float
) -> tuple[tuple[str, str], ...]:
    manifests = {folder: read_manifest(folder) for folder in folders.values()}
    megabytes = sum(totals.text_bytes for totals in tokenized.splits.values()) / 1e6
    return (
        *_stored_rows(manifests, folders),
        ("text kept", f"{megabytes:,.1f} MB ({megabytes / max(seconds, 1e-9):.2f} MB of text a second)"),
        *_cost_rows(seconds),
    )


def _cost_rows(seconds: float) -> tuple[tuple[str, str], ...]:
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return (
        ("seconds", f"{seconds:.1f}"),
        ("peak memory", f"{own:.2f} GiB, the largest worker {worker:.2f} GiB"),
    )

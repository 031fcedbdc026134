"""`sparselt shards inspect|verify DIR`: what is in a shard folder, and whether all of it is sound."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sparselt_dist import cli

if TYPE_CHECKING:
    import numpy as np

    from sparselt_dist.data.corpora import Corpora
    from sparselt_dist.data.manifest import Manifest

HISTOGRAM_BINS = 8
HISTOGRAM_WIDTH = 40
SAMPLE_CHARACTERS = 400
MEASURED_TEXTS = 10_000
_KINDS = {
    "rows": "rows",
    "packed": "rows of whole documents",
    "documents": "documents",
    "text": "pieces of raw text",
}


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = cli.make_parser(
        "shards",
        "Look into shard folders, or check every checksum, count and token id.",
        "sparselt shards verify shards/mine/train",
    )
    parser.add_argument(
        "action", choices=["inspect", "verify"], help="inspect: show; verify: check, exit code 2 on a fault"
    )
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="DIR",
        help="a shard folder, local or at http(s):// or s3://, or one that holds train/ and validation/; "
        "inspect: also a folder or pattern of tars of raw text",
    )
    parser.add_argument("--samples", type=int, default=2, help="inspect: sample texts to show")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = cli.parse_arguments(build_parser(), argv)
    return cli.run_command(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    folders = [folder for name in args.folders for folder in _shard_folders(name)]
    codes = [_verify(folder) if args.action == "verify" else _inspect(folder, args.samples) for folder in folders]
    return max(codes)


def _shard_folders(folder: str) -> list[str]:
    """The folder itself, or the two splits that a preparation with held-out text wrote into it."""
    splits = [f"{folder.rstrip('/')}/{split}" for split in ("train", "validation")]
    if (Path(folder) / "manifest.json").exists():
        return [folder]
    return [split for split in splits if (Path(split) / "manifest.json").exists()] or [folder]


def _verify(folder: str) -> int:
    from sparselt_dist.data.shards import ShardFolder
    from sparselt_dist.data.verification import verify

    faults = verify(folder)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if faults:
        print(f"{folder}: {len(faults)} faults; restore the files named, or prepare the folder again", file=sys.stderr)
        return cli.EXIT_USER_ERROR
    manifest = ShardFolder(folder).manifest
    print(f"{folder}: sound: {len(manifest.shards)} shards, {manifest.samples:,} samples, {manifest.tokens:,} tokens")
    return cli.EXIT_DONE


def _inspect(folder: str, samples: int) -> int:
    import numpy as np

    from sparselt_dist.data.corpora import open_folder
    from sparselt_dist.data.tokenizer import load_for_text, tokenizer_faults

    corpora = open_folder(folder)
    manifest = corpora.manifest
    length = f"sequence length {manifest.sequence_length}" if manifest.sequence_length else "kept whole"
    tokens = f"{manifest.tokens:,} tokens" if manifest.tokens else "tokens not counted"
    print(f"{folder}: {manifest.samples:,} {_KINDS[manifest.kind]}, {tokens}, {length}")
    tokenizer_kind = manifest.prepare.get("tokenizer", "unknown")
    print(f"vocabulary {manifest.vocab_size:,} ({tokenizer_kind}), manifest {manifest.sha256[:12]}")
    if manifest.kind == "packed":
        filled = manifest.tokens / (manifest.samples * (manifest.sequence_length or 1))
        print(f"fill {100 * filled:.2f} % of all places hold a token")
    _print_pairs(Path(folder), manifest)
    for fault in tokenizer_faults(corpora.tokenizer, manifest):
        print(f"warning: {fault}")
    _print_sources(manifest)
    _print_shards(manifest)
    _print_lengths(corpora)
    tokenizer = load_for_text(corpora.tokenizer)
    numbers = np.array(_spread(manifest.samples, samples), dtype=np.int64)
    for key, ids in zip(corpora.keys(numbers), corpora.ids(numbers), strict=True):
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        print(f"\n{key}:\n  {text[:SAMPLE_CHARACTERS]!r}")
    return cli.EXIT_DONE


def _print_pairs(folder: Path, manifest: Manifest) -> None:
    from sparselt_dist.data.pair_files import describe_pairs, has_pairs, read_pair_manifest
    from sparselt_dist.errors import DataError

    if has_pairs(folder):
        try:
            print(f"agreements: {describe_pairs(read_pair_manifest(folder, manifest.tokenizer_sha256))}")
        except DataError as fault:
            print(f"warning: {fault}")


def _print_sources(manifest: Manifest) -> None:
    print("\nsource                            licence                                documents    characters")
    for source in manifest.sources:
        print(f"{source.name:<32.32}  {source.license:<36.36} {source.documents:>11,} {source.characters:>13,}")


def _print_shards(manifest: Manifest) -> None:
    print("\nshard               samples       tokens  members        bytes  sha256")
    for shard in manifest.shards:
        counts = f"{shard.samples:>9,} {shard.tokens:>12,} {shard.members:>8,} {shard.bytes:>12,}"
        print(f"{shard.name:<17} {counts}  {shard.sha256[:12]}")


def _print_lengths(corpora: Corpora) -> None:
    """Histogram of the samples' lengths; of raw text, which must be tokenized for it, those of the first shards."""
    import numpy as np

    found = []
    for folder in corpora.folders:
        for shard in range(len(folder.shards)):
            found.append(folder.lengths(shard))
            if folder.manifest.kind == "text" and sum(map(len, found)) >= MEASURED_TEXTS:
                break
    lengths = np.concatenate(found)
    print(f"\nlength: median {int(np.median(lengths)):,}, mean {lengths.mean():,.1f}, longest {lengths.max():,} tokens")
    edges = _edges(lengths)
    counts, _ = np.histogram(lengths, bins=edges)
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        bar = "#" * round(HISTOGRAM_WIDTH * count / counts.max())
        print(f"{int(low):>10,} to {int(high) - 1:>10,} {count:>10,} {bar}")


def _edges(lengths: np.ndarray) -> np.ndarray:
    """Whole-number bin edges, each bin twice as wide as the one below where lengths differ much."""
    import numpy as np

    low, high = int(lengths.min()), int(lengths.max()) + 1
    spaced = np.geomspace(low, high, HISTOGRAM_BINS + 1) if low > 0 else np.linspace(low, high, HISTOGRAM_BINS + 1)
    return np.unique(np.concatenate(([low], spaced[1:-1].round().astype(np.int64), [high])))


def _spread(total: int, count: int) -> list[int]:
    """`count` sample numbers at even distances."""
    return [number * total // max(1, count) for number in range(min(count, total))]


if __name__ == "__main__":
    sys.exit(main())

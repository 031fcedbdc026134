"""The stages of a preparation that find agreement pairs and store them for the training shards, if they are wanted."""

from __future__ import annotations

import functools
from typing import Any

from sparselt_dist.data import pair_sample
from sparselt_dist.data.collection import Collected
from sparselt_dist.data.context import Context
from sparselt_dist.data.duplicates import Survivors
from sparselt_dist.data.manifest import ShardEntry, file_sha256
from sparselt_dist.data.pair_extraction import PairRules, extract_block, merge_blocks
from sparselt_dist.data.pair_files import PairOrigin, shards_identity
from sparselt_dist.data.stages import Tokenized
from sparselt_dist.data.tokenizer import TOKENIZER_FILE


def find_pairs(
    context: Context, collected: Collected, survivors: Survivors, held_out: int, tokenized: Tokenized
) -> list[dict[str, Any]]:
    """Find agreement pairs in a sample of the training documents; what each block gave, nothing if none are wanted."""
    prepare = context.config.prepare
    if prepare.agreements == "none":
        return []
    context.progress.start("agreements")
    train = tokenized.splits["train"]
    share = pair_sample.share_to_read(
        prepare.agreement_words, sum(train.characters.values()), collected.originals_share
    )
    rules = PairRules(
        documents=collected.folder,
        output=context.folder("pairs"),
        tokenizer=context.tokenizer,
        tokenizer_sha256=file_sha256(context.tokenizer / TOKENIZER_FILE),
        vocab_size=tokenized.tokenizer.vocab_size,
        survivors=survivors,
        normalization=prepare.normalize,
        max_tokens_per_character=prepare.max_tokens_per_character,
        held_out_below=held_out,
        share=share,
        text_share=pair_sample.share_to_label(share, train.text_tokens),
        track=prepare.agreements,
        parser=prepare.agreement_parser,
    )
    return context.crew.run("pairs", functools.partial(extract_block, rules), collected.blocks, "blocks")


def store_pairs(
    context: Context, collected: Collected, tokenized: Tokenized, found: list[dict[str, Any]], entries: list[ShardEntry]
) -> None:
    """Thin the pairs that were found, and put them together in the work folder, for the training shards given.

    Raises:
        DataError: there is not a single pair.
    """
    track = context.config.prepare.agreements
    if track == "none":
        return
    context.progress.start("storing agreements")
    origin = PairOrigin(
        track=track,
        tokenizer_sha256=file_sha256(context.tokenizer / TOKENIZER_FILE),
        shards_sha256=shards_identity(entries),
        vocab_size=tokenized.tokenizer.vocab_size,
        **{key: sum(record[key] for record in found) for key in ("documents", "unaligned", "words")},
    )
    folder = context.folder("pairs")
    read = zip(collected.blocks, found, strict=True)
    blocks = [folder / f"{block.name}.npz" for block, record in read if record["documents"]]
    seconds = sum(record["seconds"] for record in found)
    context.crew.run("agreements", functools.partial(merge_blocks, blocks, origin, seconds), [context.work])

"""Near-duplicate removal: datatrove's MinHash, over the blocks of cleaned documents.

Three of datatrove's blocks are used as they are (signatures, buckets, clusters), with its defaults: word 5-grams, 14
buckets of 8 hashes, so two documents that share 0.8 of their 5-grams meet with probability 0.92. Its readers and
writers are not needed. Its English word splitter would ask for spaCy; after datatrove's own simplification (lower
case, no punctuation) splitting at spaces gives the same words. Its default xxhash fails with xxhash 4, hence SHA-1.

One document of each cluster stays. Signatures lie on disk; memory holds one block's, and the duplicates found.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparselt_dist.errors import DataError


def _datatrove() -> Any:
    try:
        from datatrove.pipeline.dedup import minhash
    except ImportError as cause:
        raise DataError(
            "prepare.deduplicate_near: needs datatrove; run `pip install 'sparselt_dist[dedup]'`, or set it to false"
        ) from cause
    from loguru import logger

    logger.disable("datatrove")
    return minhash


def _minhash_config() -> Any:
    minhash = _datatrove()
    from datatrove.utils.hashing import HashConfig

    return minhash.MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))


def _word_splitter() -> Any:
    from datatrove.utils.word_tokenizers import WordTokenizer

    class _Words(WordTokenizer):  # type: ignore[misc]
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            return [text]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(0, len(text))]

    return _Words()


def write_signatures(folder: Path, number: int, texts: Iterable[str]) -> None:
    """Write the MinHash signatures of one block. A repeated call overwrites."""
    minhash = _datatrove()
    from datatrove.data import Document

    block = minhash.MinhashDedupSignature(str(folder / "signatures"), _minhash_config(), language=_word_splitter())
    block.run((Document(text=text, id=str(place)) for place, text in enumerate(texts)), rank=number)


def find_duplicates(folder: Path, bucket: int) -> dict[str, Any]:
    """Find the pairs of documents that agree in one bucket."""
    minhash = _datatrove()
    block = minhash.MinhashDedupBuckets(str(folder / "signatures"), str(folder / "pairs"), config=_minhash_config())
    block.run(rank=bucket, world_size=num_buckets())
    return {}


def num_buckets() -> int:
    """Buckets of the configuration, each a job of its own."""
    return int(_minhash_config().num_buckets)


def cluster_duplicates(folder: Path) -> dict[str, Any]:
    """Join pairs to clusters and write, for each block, which documents go."""
    minhash = _datatrove()
    shutil.rmtree(folder / "remove", ignore_errors=True)
    with contextlib.redirect_stderr(io.StringIO()):  # its own progress bar would cross ours
        block = minhash.MinhashDedupCluster(str(folder / "pairs"), str(folder / "remove"), _minhash_config())
        block.run(world_size=1)
    return {}


def removed_documents(folder: Path, block: int) -> frozenset[int]:
    """The documents to leave out, by their place among those of the block whose signatures were written."""
    path = folder / "remove" / f"{block:06d}.remove"
    if not path.exists():
        return frozenset()
    data = path.read_bytes()
    return frozenset(struct.unpack(f"<{len(data) // 4}I", data))

"""Near-duplicate removal: datatrove's MinHash, over the chunks of cleaned documents.

Three of datatrove's blocks are used as they are (signatures, buckets, clusters), with its defaults: word 5-grams, 14
buckets of 8 hashes, so two documents that share 0.8 of their 5-grams meet with probability 0.92. Its readers and
writers are not needed. Its English word splitter would ask for spaCy; after datatrove's own simplification (lower
case, no punctuation) splitting at spaces gives the same words. Its default xxhash fails with xxhash 4, hence SHA-1.

One document of each cluster stays. Signatures lie on disk; memory holds one chunk's, and the duplicates found.
"""

from __future__ import annotations

import contextlib
import io
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselt_dist.data.cleaning import parse_records
from sparselt_dist.errors import DataError


@dataclass(frozen=True)
class Chunk:
    """A range of the file of cleaned documents."""

    number: int
    start: int  # bytes
    size: int  # bytes

    def read(self, path: Path) -> bytes:
        with path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


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


def write_signatures(documents: Path, folder: Path, chunk: Chunk) -> int:
    """Write the MinHash signatures of one chunk; returns its number. A repeated call overwrites."""
    minhash = _datatrove()
    from datatrove.data import Document

    block = minhash.MinhashDedupSignature(str(folder / "signatures"), _minhash_config(), language=_word_splitter())
    records = enumerate(parse_records(chunk.read(documents)))
    block.run((Document(text=record.text, id=str(number)) for number, record in records), rank=chunk.number)
    return chunk.number


def find_duplicates(folder: Path, bucket: int) -> int:
    """Find the pairs of documents that agree in one bucket; returns its number."""
    minhash = _datatrove()
    block = minhash.MinhashDedupBuckets(str(folder / "signatures"), str(folder / "pairs"), config=_minhash_config())
    block.run(rank=bucket, world_size=num_buckets())
    return bucket


def num_buckets() -> int:
    """Buckets of the configuration, each a job of its own."""
    return int(_minhash_config().num_buckets)


def cluster_duplicates(folder: Path) -> None:
    """Join pairs to clusters and write, for each chunk, which documents go."""
    minhash = _datatrove()
    with contextlib.redirect_stderr(io.StringIO()):  # its own progress bar would cross ours
        block = minhash.MinhashDedupCluster(str(folder / "pairs"), str(folder / "remove"), _minhash_config())
        block.run(world_size=1)


def removed_documents(folder: Path, chunk: int) -> frozenset[int]:
    """The numbers, within a chunk, of the documents to leave out."""
    path = folder / "remove" / f"{chunk:06d}.remove"
    if not path.exists():
        return frozenset()
    data = path.read_bytes()
    return frozenset(struct.unpack(f"<{len(data) // 4}I", data))

"""The text of the loader benchmark: the embedded corpus cut into documents, tokenized once by `sparselt prepare`.

Every reader gets the same documents in the same order. The corpus is repeated, each copy in another order, so that an
epoch lasts for seconds and what libraries do at its ends weighs little.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sparselt_dist.data.embedded import CORPORA

VOCAB_SIZE = 8192


def texts(characters: int) -> Iterator[str]:
    """Consecutive paragraphs of at least so many characters together; the short rest of a text is left out."""
    for read in CORPORA.values():
        for text in read():
            parts: list[str] = []
            for paragraph in text.split("\n"):
                parts.append(paragraph)
                if sum(map(len, parts)) >= characters:
                    yield "\n".join(parts)
                    parts = []


def tokenize(folder: Path, characters: int) -> Path:
    """A shard folder of whole documents, with its tokenizer."""
    output = folder / "tokenized"
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": body}) + "\n" for body in texts(characters)))
    command = [sys.executable, "-m", "sparselt_dist.prepare", f"prepare.source={text}", f"prepare.output_dir={output}"]
    command += ["data.sequence_length=null", "prepare.tokenizer=wordpiece", f"prepare.vocab_size={VOCAB_SIZE}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return output


def repeated(documents: list[np.ndarray], copies: int) -> list[np.ndarray]:
    """All documents so many times, each time in another order."""
    generator = np.random.default_rng(0)
    return [documents[number] for _ in range(copies) for number in generator.permutation(len(documents))]

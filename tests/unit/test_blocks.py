"""Blocks of documents: what is written is read back, a kill costs one block, duplicates are found in any number of ranges."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from sparselt_dist.data import blocks
from sparselt_dist.data.blocks import Block, BlockWriter, read_texts
from sparselt_dist.data.cleaning import CleaningRules, clean_batch
from sparselt_dist.data.collection import collect_segment
from sparselt_dist.data.duplicates import DOCUMENTS_A_RANGE, Survivors, find_repeats, hash_bits
from sparselt_dist.data.sources import find_items
from sparselt_dist.errors import DataError

RULES = CleaningRules("nfc", 1, None)


def _write(folder: Path, number: int, first: int, texts: list[str]) -> Block:
    with BlockWriter(folder, str(number)) as writer:
        writer.add(clean_batch(RULES, [(0, text) for text in texts]))
    return Block(number, str(number), first, len(texts), (0,))


@pytest.mark.parametrize("at_once", [1, 9, 30, 10_000])
def test_chosen_documents_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(blocks, "READ_BYTES", at_once)
    texts = ["one", "zwei \u00df", "\U0001f600", "4" * 40, "five"]
    block = _write(tmp_path, 0, 0, texts)
    for chosen in ([0, 1, 2, 3, 4], [1, 3], [4], []):
        batches = list(read_texts(tmp_path, block, block.index(tmp_path), np.array(chosen, dtype=np.int64)))
        assert [text for batch in batches for text in batch.texts] == [texts[number] for number in chosen]
        assert [number for batch in batches for number in batch.numbers.tolist()] == chosen
    everything = list(read_texts(tmp_path, block, block.index(tmp_path), np.arange(5)))
    assert [len(batch.texts) for batch in everything] == {1: [1] * 5, 9: [2, 2, 1], 30: [4, 1], 10_000: [5]}[at_once]


@pytest.mark.parametrize("bits", [0, 1, 3])
def test_the_first_of_equal_documents_stays(tmp_path: Path, bits: int) -> None:
    draw = np.random.default_rng(0)
    words = [[str(word) for word in draw.integers(0, 40, count)] for count in (30, 1, 50, 9)]
    firsts = np.cumsum([0, *map(len, words)])
    written = [_write(tmp_path, number, int(firsts[number]), texts) for number, texts in enumerate(words)]
    found = sum(find_repeats(tmp_path, tmp_path, written, bits, part)["repeats"] for part in range(2**bits))
    survivors = Survivors(tmp_path, 2**bits, found)
    left = [words[block.number][place] for block in written for place in survivors.of(block).tolist()]
    assert left == list(dict.fromkeys(word for texts in words for word in texts))
    assert found == sum(map(len, words)) - len(left)


def test_ranges_of_hashes_keep_memory_bounded() -> None:
    assert [hash_bits(count) for count in (1, DOCUMENTS_A_RANGE, DOCUMENTS_A_RANGE + 1)] == [0, 0, 1]
    assert all(count / 2 ** hash_bits(count) <= DOCUMENTS_A_RANGE for count in (10**7, 10**9, 10**12))


def test_reading_goes_on_after_the_last_block_that_is_noted(tmp_path: Path) -> None:
    texts = [f"{number} {'x' * 3000}" for number in range(600)]
    source = tmp_path / "c.jsonl.gz"
    source.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    job = (7, tuple(find_items(str(source), text_key="text", license="")))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    expected = collect_segment(RULES, whole, 400_000, job)
    assert len(expected["blocks"]) > 2
    source.write_bytes(source.read_bytes()[:-40])
    with pytest.raises(DataError, match="cannot be read"):
        collect_segment(RULES, broken, 400_000, job)
    assert 1 <= len(list(broken.glob("*.json"))) < len(expected["blocks"])
    source.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    resumed = collect_segment(RULES, broken, 400_000, job)
    assert json.dumps(resumed) == json.dumps(expected)
    for path in whole.iterdir():
        assert (broken / path.name).read_bytes() == path.read_bytes(), path.name

"""Agreement pairs as a stage of a preparation: what they come from, restarts and parts, and when they are refused."""

from __future__ import annotations

import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepare_helpers import TEXTS, all_ids, arguments_of, file_hashes, run_prepare, write_jsonl

from sparselt_dist import shards as shards_command
from sparselt_dist.config_loading import load_config
from sparselt_dist.data import pair_sample, pair_stages, sources
from sparselt_dist.data.agreements import FAMILIES
from sparselt_dist.data.blocks import Block
from sparselt_dist.data.manifest import file_sha256, read_manifest
from sparselt_dist.data.pair_extraction import PairRules, extract_block
from sparselt_dist.data.pair_files import FOLDER, read_labelled_text, read_pair_manifest, read_pairs
from sparselt_dist.data.parts import Part
from sparselt_dist.data.preparation import ONE_PART, prepare
from sparselt_dist.data.tokenizer import load_for_text, tokenizer_info
from sparselt_dist.data.verification import verify
from sparselt_dist.errors import ConfigError, DataError

ORDERED = [
    *("The dogs were chasing a small cat in the garden. ", "These old men have a new house. "),
    *("She gives him the red book. ", "The king was happy in winter. ", "Two birds sing. "),
]
SIDES = ("heads", "dependents", "flipped_heads", "flipped_dependents")


def document(number: int) -> str:
    """At least 200 characters; no two are equal."""
    return f"Page {number}. " + "".join(ORDERED[(number + place * place) % len(ORDERED)] for place in range(9))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", [*(document(number) for number in range(60)), *TEXTS[:2]])


def test_pairs_are_stored_with_the_training_shards(corpus: Path, tmp_path: Path) -> None:
    report = run_prepare(
        corpus,
        tmp_path / "out",
        prepare__agreements="strict",
        prepare__validation_fraction=0.2,
        prepare__normalize="crammed",
    )
    train = report.train_dir
    manifest = read_pair_manifest(train, read_manifest(train).tokenizer_sha256)
    info = tokenizer_info(train)
    assert manifest.track == "strict" and manifest.extraction_seconds > 0 and manifest.unaligned == 0
    kept = read_manifest(train).statistics["documents"]
    assert manifest.words > 1000 and kept - 5 < manifest.documents <= kept  # a hundredth is left out on purpose
    for family in FAMILIES:
        for kind in ("agreements", "window"):
            arrays = read_pairs(train, manifest, family, kind)
            assert len(arrays["labels"]) == manifest.pairs[family] > 10
            for side in SIDES:
                assert not np.isin(arrays[f"{side}_ids"], info.special_ids).any()
                assert (np.diff(arrays[f"{side}_ends"].astype(int), prepend=0) > 0).all()
    text = read_labelled_text(train, manifest)
    assert len(text["ids"]) == text["ends"][-1] == manifest.text_pieces > 1000
    assert "the dogs were chasing a small cat" in load_for_text(train / "tokenizer").decode(text["ids"].tolist())
    assert not (tmp_path / "out/validation" / FOLDER).exists()
    assert dict(report.rows)["agreements"].startswith(f"A1 {manifest.pairs['A1']:,}, A2 ")
    assert run_prepare(
        corpus, tmp_path / "out", prepare__validation_fraction=0.2, prepare__normalize="crammed"
    ).reused, "pairs do not disturb a run that wants none"


def test_held_out_text_and_what_was_filtered_give_no_pair(tmp_path: Path) -> None:
    """Words that stand in one document alone show where pairs come from."""
    texts = [f"{document(number)} The word{number} word barks." for number in range(60)]
    source = write_jsonl(tmp_path / "c.jsonl", [*texts, "The tiny dog barks.", *texts[:10]])
    report = run_prepare(
        source,
        tmp_path / "out",
        prepare__agreements="strict",
        prepare__validation_fraction=0.3,
        prepare__order="source",
        prepare__vocab_size=400,
    )
    tokenizer = load_for_text(report.train_dir / "tokenizer")

    def named(ids: np.ndarray) -> set[str]:
        return set(re.findall(r"word(\d+)", tokenizer.decode(ids.tolist()).replace(" ", "")))

    assert report.validation_dir is not None
    train, validation = (named(np.concatenate(all_ids(folder))) for folder in (report.train_dir, report.validation_dir))
    manifest = read_pair_manifest(report.train_dir, read_manifest(report.train_dir).tokenizer_sha256)
    read = named(read_labelled_text(report.train_dir, manifest)["ids"])
    assert len(read & train) > 20 and len(validation) > 5
    assert not read & validation
    barks = tokenizer.token_to_id("barks")
    pairs = read_pairs(report.train_dir, manifest, "A1")
    assert (pairs["heads_ids"] == barks).sum() == manifest.documents  # once a document, repeats are not read


def test_the_sample_has_about_the_words_wanted(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "c.jsonl", [document(number) for number in range(400)])
    report = run_prepare(source, tmp_path / "out", prepare__agreements="strict", prepare__agreement_words=4000)
    manifest = read_pair_manifest(report.train_dir, read_manifest(report.train_dir).tokenizer_sha256)
    assert 2500 < manifest.words < 5500
    draws = pair_sample.places(np.random.default_rng(0).integers(0, 2**64, 5000, dtype=np.uint64))
    assert np.quantile(draws, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.03)
    assert pair_sample.share_to_read(10**9, 10, pair_sample.share_to_keep(10**9, 10)) == 0.99


def _without_cost(folder: Path) -> dict[str, str]:
    return {name: found for name, found in file_hashes(folder).items() if not name.endswith("cost.json")}


def test_parts_workers_and_an_end_in_between_give_the_same_bytes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MIN_SEGMENT_BYTES", 4_000)
    settings = {"prepare.agreements": "strict", "prepare.normalize": "crammed", "prepare.agreement_words": 3000}

    def run(name: str, part: Part = ONE_PART, workers: int = 1) -> None:
        arguments = arguments_of(corpus, tmp_path / name, settings | {"prepare.num_workers": workers})
        prepare(load_config([], arguments, for_training=False), progress=False, part=part)

    run("alone")
    expected = _without_cost(tmp_path / "alone")
    assert {f"{FOLDER}/A1.npz", f"{FOLDER}/A4.window.npz", f"{FOLDER}/text.npz"} < set(expected)
    run("workers", workers=2)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda number: run("parts", Part(number, 2, 1.0)), range(2)))
    begun: list[int] = []

    def extract(rules: PairRules, block: Block) -> dict[str, Any]:
        begun.append(block.number)
        if len(begun) == 3:
            raise InterruptedError
        return extract_block(rules, block)

    monkeypatch.setattr(pair_stages, "extract_block", extract)
    with pytest.raises(DataError, match="cannot be written"):  # an OSError
        run("ended")
    run("ended")
    assert begun[3:] == list(range(2, max(begun) + 1)), "blocks that were done are not done again"
    for name in ("workers", "parts", "ended"):
        assert _without_cost(tmp_path / name) == expected


def test_shards_without_their_pairs_are_not_complete(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run_prepare(corpus, out, prepare__agreements="strict")
    assert shards_command.main(["inspect", str(out), "--samples", "0"]) == 0
    assert "agreements: A1 " in capsys.readouterr().out
    before = _without_cost(out)
    with pytest.raises(DataError, match="agreement_words is 20000000 there and 900 here"):
        run_prepare(corpus, out, prepare__agreements="strict", prepare__agreement_words=900)
    (out / FOLDER / "A2.npz").write_bytes(b"")
    assert [fault.partition(":")[0] for fault in verify(out)] == [str(out / FOLDER / "A2.npz")]
    shutil.rmtree(out / FOLDER)
    assert "holds no agreement pairs" in verify(out)[0]
    assert not run_prepare(corpus, out, prepare__agreements="strict").reused
    assert _without_cost(out) == before and verify(out) == []
    run_prepare(corpus, tmp_path / "other", prepare__order="source")
    shutil.copytree(out / FOLDER, tmp_path / "other" / FOLDER)
    with pytest.raises(DataError, match="the pairs belong to shards"):
        read_pair_manifest(tmp_path / "other", file_sha256(out / "tokenizer/tokenizer.json"))
    assert "the pairs belong to shards" in verify(tmp_path / "other")[0]


def test_a_missing_parser_is_refused_before_any_work(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ConfigError, match=r"pip install 'sparselt_dist\[parser\]'"):
        run_prepare(corpus, tmp_path / "out", prepare__agreements="parser", prepare__agreement_parser="no_such")
    assert not (tmp_path / "out").exists()


def test_text_without_agreement_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "c.jsonl", [f"{number} " + "+ - = * " * 40 for number in range(20)])
    with pytest.raises(DataError, match=r"prepare\.agreements: found no agreement in the .* words"):
        run_prepare(source, tmp_path / "out", prepare__agreements="strict", prepare__vocab_size=64)

"""Real runs on shards at a failing web server, raw text and mixtures: the same steps on any ranks; skipped shards counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from corpus_files import write_text_tar
from faulty_http import FaultyServer, Reply
from runs import Finished, run_ranks

pytestmark = pytest.mark.distributed

BUDGET = "budget.max_steps=6"


def assert_same_steps(ours: Finished, theirs: Finished) -> None:
    for mine, other in zip(ours.journal, theirs.journal, strict=True):
        assert mine["batch_digest"] == other["batch_digest"], mine["step"]
        assert mine["train/loss"] == pytest.approx(other["train/loss"], abs=2e-5), mine["step"]
        assert mine["progress/tokens"] == other["progress/tokens"]


def mixture(prepared: str, raw: str) -> str:
    return f"data.train=[{{shards: '{prepared}', weight: 3}}, {{shards: '{raw}', weight: 1}}]"


def test_a_mixture_from_a_failing_server_gives_the_same_steps_on_two_ranks(shards: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(shards / "train", site / "train")
    write_text_tar(site / "raw" / "part-0.tar", [body for _, body in sorted(topics.items())][:20])
    local = f"prepare.tokenizer={site / 'train' / 'tokenizer'}"
    settings = (BUDGET, local, "data.sequence_length=32", f"data.cache_dir={tmp_path / 'cache'}")
    alone = run_ranks(
        1, shards, tmp_path / "alone", *settings, mixture(str(site / "train"), str(site / "raw" / "*.tar"))
    )
    assert alone.code == 0, alone.output
    with FaultyServer(site).running() as server:
        server.plan("/train/shard-000000.tar", Reply(status=500), Reply(close_after=5000))
        server.plan("/train/shard-000001.tar", Reply(corrupt=True))
        server.plan("/raw/part-0.tar", Reply(stall_after=1000))
        remote = mixture(f"{server.root}/train", f"{server.root}/raw/part-{{0..0}}.tar")
        quick = ("data.download_timeout_seconds=1.0", "data.num_workers=1")
        both = run_ranks(2, shards, tmp_path / "both", *settings, *quick, remote)
        asked = server.times_asked("/train/shard-000002.tar")
    assert both.code == 0, both.output
    assert_same_steps(both, alone)
    assert asked == 1  # by two ranks, each with a loader process


def test_bad_shards_stop_all_ranks_with_one_message_or_are_counted(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "train"
    shutil.copytree(shards / "train", folder)
    entries = json.loads((folder / "manifest.json").read_text())["shards"]
    for entry in entries[::3]:
        path = folder / entry["name"]
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    where = (f"data.train={folder}", BUDGET, "data.num_workers=1")
    stopped = run_ranks(2, shards, tmp_path / "stopped", *where, fresh=True)
    assert stopped.codes == (2, 2) and "terminate called" not in stopped.output
    assert stopped.output.count("error:") == 1 and "Traceback" not in stopped.output, stopped.output
    assert "changed: found sha256" in stopped.output and "data.on_bad_shard=skip" in stopped.output
    skipping = run_ranks(2, shards, tmp_path / "skipping", *where, "data.on_bad_shard=skip")
    assert skipping.code == 0, skipping.output
    skipped = [line["progress/skipped_samples"] for line in skipping.journal]
    assert 0 < skipped[-1] < 48 and skipped == sorted(skipped)
    assert skipping.journal[-1]["progress/tokens"] == (48 - skipped[-1]) * 32
    assert "warning: skipping a shard of" in skipping.output


def test_a_held_out_row_that_one_rank_cannot_read_ends_all_of_them(shards: Path, tmp_path: Path) -> None:
    run = run_ranks(2, shards, tmp_path / "run", BUDGET, "train.evaluate_every_steps=2", fault="1,0,0,unreadable")
    assert run.codes == (2, 2), run.output
    assert run.output.count("error: a held-out row that cannot be read") == 1 and "Traceback" not in run.output

"""DAC in a run: stage 1 on one rank and its tables on all, resume without it, a stop during it, and the exported model."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from agreement_shards import with_agreements
from runs import Finished, free_port, pretrain_arguments, rank_environment, run_ranks, slow

from sparselt_dist import checkpoint
from sparselt_dist.models.loading import load_checkpoint, load_exported

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

RUN = (
    "objective.name=dac",
    "objective.table_width=8",
    "objective.stage1_pairs_per_step=64",
    "budget.max_steps=4",
    "checkpoint.every_steps=2",
    "schedule.name=constant",
    "train.micro_batch_size=4",
)
TABLES = "objective.agreement.tables_VRM"


@pytest.fixture(scope="module")
def agreeing(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_agreements(shards, tmp_path_factory.mktemp("agreeing") / "shards")


@pytest.fixture(scope="module")
def two(agreeing: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two ranks under ZeRO 3."""
    run = run_ranks(2, agreeing, tmp_path_factory.mktemp("two") / "run", *RUN, "train.zero_stage=3")
    assert run.code == 0, run.output
    return run


def cut_to_step_2(run: Finished, folder: Path) -> Path:
    shutil.copytree(run.folder, folder)
    shutil.rmtree(folder / "checkpoints" / checkpoint.folder_name(4))
    return folder


def test_the_record_tells_of_both_stages(two: Finished) -> None:
    line, summary = two.journal[0], two.summary
    assert line["budget/elapsed_seconds"] > line["budget/prelude_seconds"] > line["dac/stage1_seconds"] > 0
    assert line["time/prelude_seconds"] >= line["budget/prelude_seconds"]
    assert line["dac/A1/steps"] == 18 and line["dac/A3/contrast"] > 0
    assert summary["dac/track"] == "strict" and summary["dac/parse_seconds"] == 2.5
    assert summary["prelude_seconds"] + summary["training_seconds"] == pytest.approx(summary["seconds"])
    assert "before the first step" in two.output


def test_tables_stay_as_stage_1_left_them(two: Finished) -> None:
    first, last = (
        checkpoint.load_weights(two.folder / "checkpoints" / checkpoint.folder_name(step)) for step in (2, 4)
    )
    assert first[TABLES].abs().sum() > 0
    assert torch.equal(first[TABLES], last[TABLES])
    assert not torch.equal(first["objective.agreement.gains_R"], last["objective.agreement.gains_R"])
    special = last[TABLES][:5]
    assert (special == 0).all()


def test_a_resume_is_bitwise_and_has_no_stage_1(agreeing: Path, two: Finished, tmp_path: Path) -> None:
    shutil.move(agreeing / "train" / "agreements", agreeing / "aside")  # nothing of it is needed any more
    try:
        folder = cut_to_step_2(two, tmp_path / "run")
        again = run_ranks(2, agreeing, folder, *RUN, "train.zero_stage=3", flags=("--resume", "must"))
    finally:
        shutil.move(agreeing / "aside", agreeing / "train" / "agreements")
    assert again.code == 0, again.output
    expected = two.tensors()
    assert [name for name, value in again.tensors().items() if not torch.equal(value, expected[name])] == []
    for key in ("prelude_seconds", "dac/track", "dac/A1/sha256"):
        assert again.summary[key] == two.summary[key]


@pytest.mark.parametrize(("ranks", "zero_stage"), [(1, 0), slow(2, 1), slow(2, 2)])
def test_ranks_and_stages_give_the_same_run(
    agreeing: Path, two: Finished, tmp_path: Path, ranks: int, zero_stage: int
) -> None:
    other = run_ranks(ranks, agreeing, tmp_path / "run", *RUN, f"train.zero_stage={zero_stage}")
    assert other.code == 0, other.output
    for mine, theirs in zip(other.journal, two.journal, strict=True):
        assert mine["batch_digest"] == theirs["batch_digest"]
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=2e-6)
    assert torch.equal(other.weights()[TABLES], two.weights()[TABLES])


def test_the_exported_model_is_folded(two: Finished) -> None:
    loaded = load_checkpoint(checkpoint.find(two.folder)).model.backbone
    exported, _ = load_exported(two.folder / "model")
    ids = torch.randint(5, 512, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = (model.logits(model(ids)[0]) for model in (loaded, exported))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not exported.config.tie_word_embeddings
    assert not torch.equal(exported.model.decoder.weight, exported.get_input_embeddings().weight)
    assert not (two.folder / "model" / "objective.safetensors").exists()


def test_a_stop_of_any_rank_ends_stage_1_and_leaves_nothing(agreeing: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    codes, outputs = stopped_in_stage_1(agreeing, folder)
    assert codes == [75, 75], outputs
    assert checkpoint.complete_checkpoints(folder) == []
    assert "stopped before the first step" in outputs
    assert Finished(75, "", folder).summary["status"] == "stopped"
    assert Finished(75, "", folder).journal == []

    codes, outputs = stopped_in_stage_1(
        agreeing, folder
    )  # as a job that is requeued with a time limit that is too short
    assert codes == [2, 2] and outputs.count("two starts in a row were stopped before the first step") == 1, outputs


def stopped_in_stage_1(shards: Path, folder: Path) -> tuple[list[int], str]:
    """Codes and outputs of two ranks of which one got SIGUSR1 in an endless stage 1; they must end soon."""
    endless = ("objective.stage1_max_passes=1000000", "objective.stage1_max_minutes=4")
    command = [sys.executable, "-m", "sparselt_dist.pretrain", *pretrain_arguments(shards, folder, *RUN, *endless)]
    (folder / "data_manifest.json").unlink(missing_ok=True)
    port = free_port()
    processes = [
        subprocess.Popen(
            command,
            env=rank_environment(rank, 2, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in range(2)
    ]
    try:
        deadline = time.monotonic() + 120
        while not (folder / "data_manifest.json").exists():  # written just before
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            time.sleep(0.1)
        time.sleep(3)
        processes[1].send_signal(signal.SIGUSR1)
        sent = time.monotonic()
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert time.monotonic() - sent < 20
    return [process.returncode for process in processes], "".join(outputs)


@pytest.mark.slow
def test_shards_without_agreements_are_refused(shards: Path, tmp_path: Path) -> None:
    refused = run_ranks(2, shards, tmp_path / "run", *RUN)
    assert refused.code == 2 and "Traceback" not in refused.output
    assert refused.output.count("prepare.agreements=strict") == 1


@pytest.mark.slow
def test_a_mixture_has_the_stage_of_its_part(agreeing: Path, tmp_path: Path) -> None:
    parts = "objective.parts=[{name: mlm}, {name: dac, table_width: 8, stage1_pairs_per_step: 64}]"
    run = run_ranks(2, agreeing, tmp_path / "run", *RUN[3:], "objective.name=mix", parts, "train.zero_stage=3")
    assert run.code == 0, run.output
    assert run.journal[0]["mix/dac/A1/steps"] == 18 and run.summary["mix/dac/track"] == "strict"
    assert run.weights()["objective.parts.1.agreement.tables_VRM"].abs().sum() > 0

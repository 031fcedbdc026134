"""What DAC does before the first step: which agreements it takes, how long, what it leaves in the module, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement_shards import add_agreements
from toy_run import LENGTH, VOCABULARY, make_data, markov_rows, toy_config, write_shards

from sparselt_dist import distributed, prelude
from sparselt_dist.config import CorpusSection
from sparselt_dist.data.corpora import open_corpora
from sparselt_dist.data.tokenizer import tokenizer_info
from sparselt_dist.errors import DataError
from sparselt_dist.models.assembly import build_model
from sparselt_dist.models.backbone import PretrainingModel
from sparselt_dist.objectives.base import Prelude, PreludeSetting, PreludeStopped
from sparselt_dist.objectives.dac_prelude import stage1_seconds
from sparselt_dist.objectives.settings import DACConfig

DAC_KEYS: dict[str, Any] = {"name": "dac", "table_width": 8, "stage1_pairs_per_step": 64, "mlm_probability": 0.3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    make_data(folder)
    add_agreements(folder / "train")
    return folder


def setting_of(root: Path, **changes: Any) -> PreludeSetting:
    config = toy_config(root)
    train = open_corpora(str(root / "train"), config)
    made = prelude.make_setting(config, train, tokenizer_info(root / "tokenizer"), torch.device("cpu"))
    return dataclasses.replace(made, **changes)


def model_of(root: Path, objective: dict[str, Any], setting: PreludeSetting, vocab_size: int = 208) -> PretrainingModel:
    config = toy_config(root, vocab_size=vocab_size)
    return build_model(config.model_copy(update={"objective": type(config.objective)(**objective)}), setting.tokenizer)


def prepared(root: Path, **changes: Any) -> tuple[PretrainingModel, dict[str, float], dict[str, float | str]]:
    setting = setting_of(root)
    model = model_of(root, DAC_KEYS | changes, setting)
    assert isinstance(model.objective, Prelude)
    model.objective.check_prelude(setting)
    return model, *model.objective.run_prelude(setting)


def test_tables_come_from_the_agreements_and_end_with_the_vocabulary(root: Path) -> None:
    model, metrics, facts = prepared(root)
    tables_VRM = model.objective.agreement.tables_VRM
    assert tables_VRM.shape == (208, 4, 8)
    assert (tables_VRM[:5] == 0).all() and (tables_VRM[VOCABULARY:] == 0).all()
    assert tables_VRM[5:65].abs().sum() > 0
    assert facts["track"] == "strict" and facts["parse_seconds"] == 2.5 and facts["A2/pairs"] == 400
    assert metrics["A1/steps"] == 18 and metrics["stage1_seconds"] > 0
    again, _, same = prepared(root)
    assert torch.equal(again.objective.agreement.tables_VRM, tables_VRM)
    assert [same[f"{family}/sha256"] for family in ("A1", "A4")] == [facts["A1/sha256"], facts["A4/sha256"]]


@pytest.mark.parametrize(
    "changes",
    [{"tables": "window"}, {"tables": "random"}, {"sides": "words"}, {"stage1_max_minutes": 0.0}],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_controls_are_other_tables(root: Path, changes: dict[str, Any]) -> None:
    usual, (model, metrics, _) = prepared(root)[0], prepared(root, **changes)
    tables_VRM = model.objective.agreement.tables_VRM
    assert not torch.equal(tables_VRM, usual.objective.agreement.tables_VRM)
    assert (tables_VRM[4] == 0).all() and tables_VRM.abs().sum() > 0
    if "stage1_max_minutes" in changes:  # as they were drawn
        assert metrics["A1/steps"] == 0 and "A1/contrast" not in metrics


def test_one_family_less_is_a_narrower_term(root: Path) -> None:
    model, metrics, _ = prepared(root, families=("A1", "A2", "A4"))
    assert model.objective.agreement.weight_DC.shape == (32, 24)
    assert "A4/steps" in metrics and "A3/steps" not in metrics


def test_the_contextual_variant_has_its_own_stage(root: Path) -> None:
    model, metrics, facts = prepared(root, variant="contextual", stage1_max_passes=1)
    assert metrics["A1/steps"] >= 1 and facts["text_pieces"] == 400
    ids = torch.randint(5, 60, (2, LENGTH))
    assert model.objective.agreement(ids).abs().sum() > 0


def test_a_mixture_runs_the_preludes_of_its_parts(root: Path) -> None:
    setting = setting_of(root)
    model = model_of(root, {"name": "mix", "parts": [{"name": "mlm"}, DAC_KEYS]}, setting)
    assert isinstance(model.objective, Prelude) and model.objective.has_prelude
    report = model.objective.run_prelude(setting)
    assert report.metrics["dac/A1/steps"] == 18 and report.facts["dac/track"] == "strict"
    assert model.objective.input_change == "table"
    assert not model_of(root, {"name": "mix", "parts": [{"name": "mlm"}]}, setting).objective.has_prelude


@pytest.mark.parametrize(
    ("budget", "cap", "changes", "expected"),
    [
        (None, math.inf, {}, 2400),
        (86_400.0, math.inf, {}, 2400),
        (600.0, math.inf, {}, 60),
        (600.0, math.inf, {"stage1_max_share": 0.5}, 300),
        (None, 5.0, {}, 5),
        (None, math.inf, {"stage1_total_minutes": 0.0}, 0),
    ],
)
def test_seconds_of_stage_1(
    root: Path, budget: float | None, cap: float, changes: dict[str, float], expected: float
) -> None:
    setting = setting_of(root, budget_seconds=budget, max_seconds=cap)
    assert stage1_seconds(DACConfig(**changes), setting) == pytest.approx(expected)


# --- refusals --------------------------------------------------------------------------------------------------------


def no_agreements(folder: Path) -> None:
    shutil.rmtree(folder / "train" / "agreements")


def no_a4(folder: Path) -> None:
    path = folder / "train" / "agreements" / "manifest.json"
    stored = json.loads(path.read_text())
    stored["pairs"]["A4"] = 0
    path.write_text(json.dumps(stored))


def other_vocabulary(folder: Path) -> None:
    path = folder / "train" / "agreements" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 77}))


def of_other_shards(folder: Path) -> None:
    shutil.move(folder / "train" / "agreements", folder / "aside")
    shutil.rmtree(folder / "train")
    write_shards(folder / "train", markov_rows(40, 9), folder / "tokenizer")
    shutil.move(folder / "aside", folder / "train" / "agreements")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_agreements, r"holds no agreement pairs.*prepare\.agreements=strict"),
        (no_a4, r"objective\.families: found A4, expected families that have pairs in .*: A1, A2, A3; choose"),
        (other_vocabulary, r"a vocabulary of 77, expected the 200 of the training shards"),
        (of_other_shards, r"the pairs belong to shards"),
    ],
)
def test_agreements_that_do_not_fit_are_refused(
    root: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    copy = tmp_path / "toy"
    shutil.copytree(root, copy)
    damage(copy)
    setting = setting_of(copy)
    with pytest.raises(DataError, match=message):
        model_of(copy, DAC_KEYS, setting).objective.check_prelude(setting)


def test_shards_that_no_agreements_can_lie_beside_are_refused(root: Path) -> None:
    config = toy_config(root)
    both = open_corpora([CorpusSection(shards=str(root / name)) for name in ("train", "validation")], config)
    setting = prelude.make_setting(config, both, tokenizer_info(root / "tokenizer"), torch.device("cpu"))
    with pytest.raises(DataError, match=r"is a mixture, .*objective\.agreements_from=FOLDER"):
        model_of(root, DAC_KEYS, setting).objective.check_prelude(setting)
    named = DAC_KEYS | {"agreements_from": str(root / "train")}
    model_of(root, named, setting).objective.check_prelude(setting)


# --- over ranks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> distributed.Ranks:
    """One rank, without a process group."""
    monkeypatch.setattr(distributed, "agreed", lambda ranks, function: function())
    monkeypatch.setattr(distributed, "on_main", lambda ranks, function: function())
    for name in ("reduce_sum", "broadcast"):
        monkeypatch.setattr(distributed, name, lambda values: values)
    return distributed.Ranks(0, 1, 0)


def test_its_seconds_are_those_of_the_clock(root: Path, alone: distributed.Ranks) -> None:
    now = iter(range(10_000))
    setting = setting_of(root, clock=lambda: 0.001 * next(now))
    objective = model_of(root, DAC_KEYS, setting).objective
    done = prelude.run_prelude(objective, setting, alone, distributed.StopFlag())
    assert done is not None and done.seconds == pytest.approx(0.001 * (next(now) - 2), abs=0.0021)
    plain = model_of(root, {"name": "mlm"}, setting).objective
    assert prelude.run_prelude(plain, setting, alone, distributed.StopFlag()) is None


def test_a_stop_ends_it(root: Path, alone: distributed.Ranks) -> None:
    setting, stop = setting_of(root), distributed.StopFlag()
    objective = model_of(root, DAC_KEYS, setting).objective
    stop.signal_name = "SIGUSR1"
    with pytest.raises(PreludeStopped):
        prelude.run_prelude(objective, setting, alone, stop)
    assert objective.agreement.tables_VRM.abs().sum() == 0


_STAGE_2 = """
import sys
sys.modules["spacy"] = None  # an import of it fails
import torch
from sparselt_dist.models.folding import fold_inputs
from sparselt_dist.models.loading import load_exported
from sparselt_dist.models.backbone import PretrainingModel
from sparselt_dist.objectives import get_objective
dac = get_objective("dac")
backbone, tokenizer = load_exported(__import__("pathlib").Path(sys.argv[1]))
model = PretrainingModel(backbone, dac.build_module(dac.config_cls(table_width=8), backbone))
collate = dac.build_collator(dac.config_cls(mlm_probability=0.5), tokenizer)
batch = collate([{"key": "a", "ids": torch.arange(5, 15).numpy(), "seed": 1}])
model(batch).loss.backward()
assert fold_inputs(model)
loaded = {name.rpartition(".")[2] for name in sys.modules if name.startswith("sparselt_dist.data.")}
assert not loaded & {"agreements", "chunking", "parsing", "pair_files", "strict_tagging"}, loaded
"""


@pytest.mark.slow
def test_training_and_inference_need_no_parser(root: Path, tmp_path: Path) -> None:
    setting = setting_of(root)
    model = model_of(root, {"name": "mlm"}, setting, VOCABULARY)
    model.backbone.model.save_pretrained(tmp_path / "model")
    for path in (root / "tokenizer").iterdir():
        shutil.copy(path, tmp_path / "model")
    subprocess.run([sys.executable, "-c", _STAGE_2, str(tmp_path / "model")], check=True, timeout=120)

"""Layers, overrides and the checks of `load_config`: every fault in one message, with source and nearest name."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from sparselt_dist.config import Config
from sparselt_dist.config_loading import dump, load_config, nearest, objective_settings
from sparselt_dist.errors import ConfigError
from sparselt_dist.objectives import base

SOUND = ["budget.max_steps=10", "data.train=shards"]


def load(*overrides: str) -> Config:
    return load_config([], [*SOUND, *overrides])


def fault(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    return str(caught.value)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_defaults_give_way_to_files_in_order_and_files_to_overrides(tmp_path: Path) -> None:
    first = write(tmp_path / "first.yaml", "run: {seed: 1}\nmodel: {config: {hidden_size: 64, num_hidden_layers: 2}}\n")
    second = write(tmp_path / "second.yaml", "run: {seed: 2, name: second}\nmodel: {config: {num_hidden_layers: 3}}\n")
    config = load_config([first, second], [*SOUND, "run.name=last"])
    assert (config.run.seed, config.run.name) == (2, "last")
    assert config.model.config == {"hidden_size": 64, "num_hidden_layers": 3}
    assert config.optim.peak_lr == 1e-3


def test_the_default_profile_stands_only_where_no_config_is_named(tmp_path: Path) -> None:
    assert load_config([], [], default_profile="quickstart").run.name == "quickstart"
    own = write(tmp_path / "own.yaml", "budget: {max_steps: 5}\ndata: {train: shards}\n")
    assert load_config([own], [], default_profile="quickstart").run.name == "run"


@pytest.mark.parametrize(
    ("text", "section", "key", "value"),
    [
        ("optim.peak_lr=1e-3", "optim", "peak_lr", 0.001),
        ("optim.peak_lr=1", "optim", "peak_lr", 1.0),
        ("budget.max_tokens=3e9", "budget", "max_tokens", 3_000_000_000),
        ("budget.max_tokens=1.5e9", "budget", "max_tokens", 1_500_000_000),
        ("budget.max_tokens=1_000", "budget", "max_tokens", 1000),
        ("optim.clip_norm=null", "optim", "clip_norm", None),
        ("optim.betas=[0.8, 0.95]", "optim", "betas", (0.8, 0.95)),
        ("train.compile=true", "train", "compile", True),
        ("run.name=5", "run", "name", "5"),
        ("run.name=null", "run", "name", "null"),
        ("run.name=a: b", "run", "name", "a: b"),
        ("run.name=x=y", "run", "name", "x=y"),
        ("run.output_dir=null", "run", "output_dir", None),
        ("run.output_dir=1e3", "run", "output_dir", "1e3"),
        ("prepare.source=[a, b]", "prepare", "source", ["a", "b"]),
        ("prepare.source=2024", "prepare", "source", "2024"),
        ("train.micro_batch_size=8", "train", "micro_batch_size", 8),
    ],
)
def test_an_override_is_read_as_its_field_wants(text: str, section: str, key: str, value: object) -> None:
    found = getattr(getattr(load(text), section), key)
    assert found == value
    assert type(found) is type(value)


def test_yaml_reads_numbers_as_people_write_them_and_words_as_words(tmp_path: Path) -> None:
    text = "optim: {peak_lr: 2e-3, eps: 1E-6}\nbudget: {max_tokens: 1e9}\nrun: {name: on}\ndata: {train: shards}\n"
    config = load_config([write(tmp_path / "a.yaml", text)])
    assert (config.optim.peak_lr, config.optim.eps, config.budget.max_tokens) == (0.002, 1e-6, 10**9)
    assert config.run.name == "on"


def test_every_fault_is_in_one_message_with_its_source(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "train: {precision: bf32, global_batch: 8}\nbudget: {max_steps: soon}\n")
    with pytest.raises(ConfigError) as caught:
        load_config([path], ["data.train=shards", "optim.peak_lr=-1", "modle.architecture=bert"])
    message = str(caught.value)
    assert message.startswith("5 faults")
    assert f'{path}: train.precision: found "bf32", expected one of fp32, bf16, fp16; did you mean fp32?' in message
    assert f"{path}: train.global_batch: found an unknown key" in message
    assert "did you mean train.global_batch_size?" in message
    assert f'{path}: budget.max_steps: found "soon", expected a whole number or null' in message
    assert "command line: optim.peak_lr: found -1, expected a number > 0" in message
    assert "command line: modle: found an unknown key" in message
    assert "did you mean model?" in message


def test_a_key_of_another_section_is_found_there() -> None:
    assert "did you mean budget.max_steps?" in fault("train.max_steps=5")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.compile=1", "found 1, expected true or false"),
        ("train.global_batch_size=64.5", "found 64.5, expected a whole number >= 1"),
        ("train.global_batch_size=true", "found true, expected a whole number >= 1"),
        ("train.micro_batch_size=0", "found 0, expected a whole number >= 1 or one of auto, fastest"),
        ("train.zero_stage=4", "found 4, expected one of 0, 1, 2, 3 or null"),
        ("optim.peak_lr=.inf", "expected a number > 0"),
        ("optim.betas=[0.9]", "found [0.9], expected a list of 2 numbers"),
        ("data=5", "data: found 5, expected a mapping"),
        ("objective.mlm_probability=2", "found 2, expected a number > 0 and < 1"),
        ("objective.masking=exakt", "expected one of bernoulli, exact; did you mean exact?"),
        ("objective.mlm_probabilty=0.2", "did you mean objective.mlm_probability?"),
        ("run.seed=[1", "expected a YAML value"),
    ],
)
def test_wrong_types_and_ranges_say_what_was_expected(override: str, expected: str) -> None:
    message = fault(override)
    assert expected in message
    assert message.startswith("command line: ")


def test_an_override_without_value_is_explained() -> None:
    assert 'found "run.name", expected key.path=value' in fault("run.name")


def test_an_unknown_profile_names_the_nearest_and_nothing_that_follows_from_it() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["quikstart"], [])
    message = str(caught.value)
    assert "did you mean quickstart?" in message
    assert "budget" not in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run: [1\n", "malformed YAML"),
        ("run: {seed: 1}\nrun: {seed: 2}\n", "the key run stands twice (line 2, column 1)"),
        ("- run\n", "expected a mapping of sections"),
        ("? [1]\n: 2\n", "malformed YAML"),
    ],
)
def test_a_broken_file_is_one_fault_line(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path / "broken.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_config([path])
    message = str(caught.value)
    assert expected in message
    assert message.startswith(path)
    assert "\n" not in message


def test_a_missing_or_binary_file_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected an existing YAML file"):
        load_config([str(tmp_path / "none.yaml")])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match=r"binary\.yaml: found an unreadable file"):
        load_config([str(tmp_path / "binary.yaml")])


def test_an_empty_section_and_an_empty_file_change_nothing(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.yaml", "run:\n  # name: x\n"), write(tmp_path / "b.yaml", "")]
    assert load_config(paths, SOUND) == load()


def test_a_run_needs_a_budget_and_data_but_prepare_does_not() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([], [])
    assert "budget: found no limit, expected at least one of max_steps, max_tokens, max_hours" in str(caught.value)
    assert "data.train: found null" in str(caught.value)
    assert load_config([], [], for_training=False) == Config()


@pytest.mark.parametrize(
    "override", ["budget.max_steps=0", "budget.max_tokens=-5", "budget.max_hours=0", "budget.max_hours=-1"]
)
def test_a_budget_must_be_positive(override: str) -> None:
    key = override.partition("=")[0]
    assert f"command line: {key}: found" in fault(override)
    assert "expected a number > 0, or null" in fault(override)


@pytest.mark.parametrize("hours", [".nan", ".inf", "1e400"])
def test_a_budget_is_a_finite_number(hours: str) -> None:
    assert "budget.max_hours: found" in fault(f"budget.max_hours={hours}")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.validation=./shards/"], "data.validation"),
        (["schedule.name=cosin"], "did you mean cosine?"),
        (["schedule.name=budget-triangle2", "schedule.warmup=0.1"], "budget-triangle2 is a fixed shape"),
        (["schedule.name=budget-triangle2", "schedule.min_lr_ratio=0.1"], "schedule.min_lr_ratio=0"),
        (["schedule.name=wsd", "schedule.warmup=0.9", "schedule.decay=0.5"], "expected at most 0.1"),
        (["optim.betas=[0.9, 1.0]"], "two numbers >= 0 and < 1"),
        (["train.micro_batch_size=7"], "nearest that fit: 63 or 70"),
        (["train.micro_batch_size=100"], "nearest that fit: 100;"),
        (["train.deepspeed_config=zero4"], "single_gpu, zero1, zero2, zero3, zero3_offload; did you mean zero"),
        (["train.deepspeed_config=zero3", "train.zero_stage=2"], "zero_optimization.stage: found 3, expected 2"),
        (["optim.name=muon", "train.zero_stage=1"], "train.zero_stage: found 1, expected 0: optim.name=muon needs"),
        (
            ["optim.name=muon", "train.deepspeed_config=zero2"],
            "zero_optimization.stage: found 2, expected 0: optim.name=muon",
        ),
        (["prepare.max_characters=10"], "at least prepare.min_characters (200)"),
        (["model.init_from=/no/such/folder"], "a local checkpoint folder with config.json"),
    ],
)
def test_contradictions_are_refused(overrides: list[str], expected: str) -> None:
    assert expected in fault(*overrides)


def test_a_faulty_key_is_not_reported_again_as_a_contradiction(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([], ["budget.max_steps=x", "data.train=shards"])
    assert str(caught.value).count("budget") == 1


def test_model_fields_are_checked_against_the_architecture() -> None:
    message = fault("model.architecture=bert", "model.config.hiden_size=4", "model.config.num_hidden_layers=two")
    assert "model.config.hiden_size: found an unknown key" in message
    assert "did you mean hidden_size?" in message
    assert 'model.config.num_hidden_layers: found "two", expected a whole number' in message
    assert "did you mean intermediate_size?" in fault("model.config.intermediate_sise=4")
    assert load("model.architecture=gpt2", "model.config.n_embd=8", "model.config.hidden_size=8").model.config


def test_an_unknown_architecture_names_the_nearest(tmp_path: Path) -> None:
    assert "did you mean modernbert?" in fault("model.architecture=modernbrt")
    assert "config.json" in fault(f"model.architecture={tmp_path}")
    write(tmp_path / "config.json", '{"model_type": "bert"}')
    assert load(f"model.architecture={tmp_path}", "model.config.hidden_size=8").model.config == {"hidden_size": 8}


def test_fields_for_another_architecture_are_kept_only_where_the_new_one_has_them(tmp_path: Path) -> None:
    config = load_config(["quickstart"], ["model.architecture=distilbert", "model.config.dropout=0.2"])
    assert "intermediate_size" not in config.model.config
    assert config.model.config["hidden_size"] == 128
    assert config.model.config["dropout"] == 0.2
    write(tmp_path / "config.json", '{"model_type": "bert"}')
    assert load_config(["quickstart"], [f"model.architecture={tmp_path}"]).model.config == {}


def test_a_dump_is_complete_and_reads_back_as_the_same_configuration(tmp_path: Path) -> None:
    config = load("optim.clip_norm=null", "optim.eps=1e-12", "model.config.hidden_size=64", "run.name=1e3")
    text = dump(config)
    again = load_config([write(tmp_path / "resolved.yaml", text)])
    assert dump(again) == text
    assert again.optim == config.optim
    assert again.run.name == "1e3"
    assert again.objective.own_keys()["mlm_probability"] == 0.15


def test_the_nearest_name() -> None:
    assert nearest("hiden", ["hidden", "layers"]) == "hidden"
    assert nearest("xyz", ["hidden", "layers"]) is None


def test_checking_imports_neither_torch_nor_transformers() -> None:
    source = Path(sys.modules["sparselt_dist.config_loading"].__file__ or "").read_text(encoding="utf-8")
    assert "torch" not in [line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))]


# --- plug-ins ---


@dataclasses.dataclass(frozen=True)
class PlainSettings:
    weight: float = 1.0
    layers: int = 2

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError("layers must be positive")


class PydanticSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    weight: float = 1.0


class _Objective:
    api_version = base.API_VERSION

    def __init__(self, name: str, config_cls: type) -> None:
        self.name = name
        self.config_cls = config_cls

    def needs_lm_head(self, cfg: object) -> bool:
        return True

    def build_collator(self, cfg: object, tokenizer: object) -> None: ...

    def build_module(self, cfg: object, backbone: object) -> None: ...


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(base, "_registered", dict(base._registered))
    base.register(_Objective("plain", PlainSettings))  # type: ignore[arg-type]
    base.register(_Objective("strict", PydanticSettings))  # type: ignore[arg-type]
    return


@pytest.mark.usefixtures("plugins")
def test_a_plugins_keys_are_checked_by_its_own_class() -> None:
    settings = objective_settings(load("objective.name=plain", "objective.weight=0.5"))
    assert settings == PlainSettings(weight=0.5)
    assert "weight: 0.5" in dump(load("objective.name=plain", "objective.weight=0.5"))
    assert objective_settings(load("objective.name=strict")) == PydanticSettings()


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["objective.name=plain", "objective.wieght=1"], "did you mean objective.weight?"),
        (["objective.name=plain", "objective.layers=many"], "objective.layers: found"),
        (["objective.name=plain", "objective.layers=0"], "objective: found {"),
        (["objective.name=plain", "objective.layers=0"], "layers must be positive"),
        (["objective.name=strict", "objective.wieght=1"], "did you mean objective.weight?"),
        (["objective.name=plian"], "did you mean plain?"),
    ],
)
def test_faults_in_a_plugins_keys_are_reported_like_ours(overrides: list[str], expected: str) -> None:
    assert expected in fault(*overrides)


@pytest.mark.usefixtures("plugins")
def test_keys_of_a_profiles_objective_do_not_stand_in_the_way_of_another() -> None:
    config = load_config(["quickstart"], ["objective.name=plain"])
    assert config.objective.own_keys() == {}


def test_a_warmup_for_another_schedule_is_not_inherited_by_a_fixed_shape(tmp_path: Path) -> None:
    assert load_config(["quickstart"]).schedule.warmup > 0
    assert load_config(["quickstart"], ["schedule.name=budget-triangle2"]).schedule.warmup == 0
    assert load_config(["quickstart"], ["schedule.name=linear"]).schedule.warmup > 0
    with pytest.raises(ConfigError, match=r"schedule\.warmup: found 0.2, expected 0"):
        load_config(["quickstart"], ["schedule.name=budget-triangle2", "schedule.warmup=0.2"])


def test_a_checkpoint_to_start_from_inherits_no_sizes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "crammed-bert"}')
    start = f"model.init_from={tmp_path}"
    assert load_config(["quickstart"], [start]).model.config == {}
    kept = load_config(["quickstart"], [start, "model.config.hidden_dropout_prob=0.1"]).model.config
    assert kept == {"hidden_dropout_prob": 0.1}


def test_a_checkpoint_to_start_from_may_lie_in_the_users_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "crammed-bert"}')
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert load(f"model.init_from=~/{tmp_path.name}").model.init_from == str(tmp_path)


@pytest.mark.parametrize("address", ["bucket/prefix", "s3://", "https://host/bucket"])
def test_checkpoints_are_uploaded_to_s3_addresses_alone(address: str) -> None:
    assert "an address s3://bucket/prefix, or null" in fault(f"checkpoint.upload={address}")
    assert load("checkpoint.upload=s3://bucket/runs").checkpoint.upload == "s3://bucket/runs"

"""Every shipped profile and DeepSpeed file; the split of the batch; one owner per quantity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparselt_dist.config import Config
from sparselt_dist.config_loading import list_profiles, load_config, make_plan, profile_text, resolve_deepspeed
from sparselt_dist.ds_config import find_ds_config, list_ds_configs
from sparselt_dist.errors import ConfigError

SOUND = ["budget.max_steps=10", "data.train=shards"]


def load(*overrides: str) -> Config:
    return load_config([], [*SOUND, *overrides])


def ds_file(tmp_path: Path, values: object) -> str:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return f"train.deepspeed_config={path}"


def test_the_shipped_names() -> None:
    crammed = {"crammed", "crammed-cpu", "crammed-2026", "crammed-cpu-2026"}
    assert set(list_profiles()) == {"quickstart", "base", "large", "slt-continue", *crammed}
    assert list_ds_configs() == ["single_gpu", "zero1", "zero2", "zero3", "zero3_offload"]


@pytest.mark.parametrize("name", list_profiles())
def test_every_profile_loads_splits_and_resolves(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    config = load_config([name], [f"model.init_from={tmp_path}"] if name == "slt-continue" else [])
    plan = make_plan(config, 2)
    assert plan.micro_batch_size * plan.accumulation_steps * 2 == config.train.global_batch_size
    assert resolve_deepspeed(config, plan)["train_batch_size"] == config.train.global_batch_size
    assert config.run.name == name
    assert profile_text(name).startswith("# ")
    assert len(list_profiles()[name]) > 20


def test_the_profile_that_continues_a_checkpoint_never_starts_from_nothing() -> None:
    with pytest.raises(ConfigError, match=r'model\.init_from: found "CHECKPOINT", expected a local checkpoint'):
        load_config(["slt-continue"], [])
    assert load_config(["slt-continue"], [], for_training=False).prepare.packing == "documents"  # `prepare` needs none


def test_the_crammed_profile_is_the_published_recipe() -> None:
    config = load_config(["crammed"], [])
    assert config.optim.model_dump() == {
        "name": "adamw",
        "peak_lr": 1e-3,
        "betas": (0.9, 0.98),
        "eps": 1e-12,
        "muon_momentum": 0.95,  # of another optimizer
        "weight_decay": 0.01,
        "encoder_lr_ratio": 1.0,
        "clip_norm": 0.5,
    }
    assert (config.schedule.name, config.budget.max_hours) == ("budget-triangle2", 24)
    assert (config.train.global_batch_size, config.train.micro_batch_size) == (8192, 128)
    assert config.train.batch_ramp_end == 0.6
    assert config.objective.own_keys() == {
        "mlm_probability": 0.25,
        "masking": "exact",
        "mask_share": 0.8,
        "random_share": 0.1,
        "exempt_special": False,
    }
    assert (config.prepare.order, config.prepare.max_tokens_per_character) == ("sentence-length", 0.25)


@pytest.mark.parametrize("suffix", ["", "-cpu"])
def test_the_later_recipe_differs_from_the_published_one_only_by_its_switches(suffix: str) -> None:
    published, later = (load_config([f"crammed{suffix}{year}"], []).model_dump() for year in ("", "-2026"))
    changed = {
        f"{section}.{key}"
        for section, values in later.items()
        for key, value in values.items()
        if value != published[section].get(key)
    }
    names = {"run.name", "data.train", "data.validation", "prepare.output_dir", "log.expected_loss"}
    assert changed - names == {
        "prepare.packing",
        "model.config",
        "objective.cross_entropy",
        "optim.name",
        "schedule.name",
        "schedule.warmup",
        "schedule.decay",
    }
    sizes = published["model"]["config"]
    assert {key: later["model"]["config"][key] for key in sizes} == sizes


@pytest.mark.parametrize("name", list_ds_configs())
def test_every_ds_config_says_only_how_a_run_is_executed(name: str) -> None:
    path = find_ds_config(name)
    assert path is not None
    values = json.loads(path.read_text(encoding="utf-8"))
    assert set(values) == {"zero_optimization"}
    config = load(f"train.deepspeed_config={name}")
    plan = make_plan(config, 1)
    resolved = resolve_deepspeed(config, plan)
    expected = {"single_gpu": 0, "zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}[name]
    assert plan.zero_stage == expected
    assert resolved["zero_optimization"] == values["zero_optimization"]


def test_a_ds_config_is_found_by_name_file_name_and_path(tmp_path: Path) -> None:
    shipped = find_ds_config("zero2")
    assert shipped is not None
    assert find_ds_config("zero2.json") == find_ds_config("ds_configs/zero2") == shipped
    assert find_ds_config("elsewhere/zero2.json") is None
    own = tmp_path / "zero2.json"
    own.write_text("{}", encoding="utf-8")
    assert find_ds_config(str(own)) == own


# --- the split ---


@pytest.mark.parametrize(
    ("batch", "micro", "world", "expected"),
    [
        (64, "auto", 1, (32, 2)),
        (64, "auto", 2, (32, 1)),
        (36, "auto", 1, (18, 2)),
        (37, "auto", 1, (1, 37)),
        (64, 8, 2, (8, 4)),
    ],
)
def test_the_global_batch_is_split(batch: int, micro: object, world: int, expected: tuple[int, int]) -> None:
    plan = make_plan(load(f"train.global_batch_size={batch}", f"train.micro_batch_size={micro}"), world)
    assert (plan.micro_batch_size, plan.accumulation_steps) == expected


def test_a_batch_that_does_not_divide_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"found 64, expected a multiple of 3 \(3 ranks\); nearest that fit: 63 or 66"
    ):
        make_plan(load(), 3)
    config = load("train.micro_batch_size=32")
    with pytest.raises(ConfigError, match=r"a multiple of 128 .*nearest that fit: 128, or train\.micro_batch_size=16"):
        make_plan(config, 4)


def test_the_output_folder_follows_the_name() -> None:
    assert make_plan(load("run.name=x"), 1).output_dir == "runs/x"
    assert make_plan(load("run.name=x", "run.output_dir=/tmp/y"), 1).output_dir == "/tmp/y"
    assert make_plan(load("run.output_dir=~/y"), 1).output_dir == str(Path.home() / "y")


# --- DeepSpeed's JSON ---


def test_everything_that_deepspeed_would_default_is_passed() -> None:
    config = load("optim.clip_norm=null", "train.zero_stage=2", "train.precision=bf16")
    resolved = resolve_deepspeed(config, make_plan(config, 2))
    assert resolved["gradient_clipping"] == 0.0
    assert resolved["torch_autocast"]["enabled"] is True
    assert resolved["torch_autocast"]["dtype"] == "bfloat16"
    assert resolved["zero_optimization"] == {"stage": 2}
    assert (resolved["train_micro_batch_size_per_gpu"], resolved["gradient_accumulation_steps"]) == (32, 1)
    assert resolved["zero_force_ds_cpu_optimizer"] is False
    assert resolved["zero_allow_untested_optimizer"] is True


@pytest.mark.parametrize(("precision", "enabled", "dtype"), [("fp32", False, "bfloat16"), ("fp16", True, "float16")])
def test_precision_is_autocast(precision: str, enabled: bool, dtype: str) -> None:
    config = load(f"train.precision={precision}")
    autocast = resolve_deepspeed(config, make_plan(config, 1))["torch_autocast"]
    assert (autocast["enabled"], autocast["dtype"]) == (enabled, dtype)


def test_auto_and_equal_values_are_accepted(tmp_path: Path) -> None:
    values = {"train_batch_size": 64, "gradient_clipping": "auto", "bf16": {"enabled": False}, "optimizer": "auto"}
    config = load(ds_file(tmp_path, values))
    resolved = resolve_deepspeed(config, make_plan(config, 1))
    assert resolved["gradient_clipping"] == 0.5
    assert not {"optimizer", "bf16"} & set(resolved)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"train_batch_size": 8}, "train_batch_size: found 8, expected 64 (train.global_batch_size)"),
        ({"gradient_clipping": 1.0}, "gradient_clipping: found 1.0, expected 0.5 (optim.clip_norm)"),
        ({"bf16": {"enabled": True}}, "set train.precision in YAML"),
        ({"optimizer": {"type": "Adam"}}, "YAML's `optim` owns it"),
        ({"scheduler": {"type": "WarmupLR"}}, "YAML's `schedule` owns it"),
        ({"gradient_cliping": 1.0}, "did you mean gradient_clipping?"),
        ({"zero_optimization": {"stge": 2}}, "zero_optimization.stge: found an unknown key"),
        ({"zero_optimization": {"stage": 5}}, "expected 0, 1, 2 or 3"),
        ([1], "expected a JSON object"),
    ],
)
def test_what_yaml_owns_and_what_nobody_knows_is_refused(tmp_path: Path, values: object, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(ds_file(tmp_path, values))
    assert expected in str(caught.value)


def test_a_micro_batch_in_the_json_is_checked_once_the_world_is_known(tmp_path: Path) -> None:
    config = load(ds_file(tmp_path, {"train_micro_batch_size_per_gpu": 8}))
    with pytest.raises(ConfigError, match=r"found 8, expected 32 \(train\.micro_batch_size\)"):
        resolve_deepspeed(config, make_plan(config, 1))

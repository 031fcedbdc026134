"""The arithmetic of `plan`, and the command on a tiny model."""

from __future__ import annotations

import pytest

from sparselt_dist import plan
from sparselt_dist.config_loading import load_config, make_plan
from sparselt_dist.planning import (
    GIB,
    Layout,
    ModelFacts,
    estimate_memory,
    estimate_work,
    fitting_world_sizes,
    layouts,
)

FACTS = ModelFacts(
    parameters=GIB, backbone_parameters=GIB, num_layers=10, hidden_size=1024, vocab_size=0, targets_per_token=0.15
)
TINY = ["model.config.hidden_size=32", "model.config.num_hidden_layers=1", "model.config.num_attention_heads=2"]


def layout(stage: int, world: int = 4, **changes: object) -> Layout:
    values: dict[str, object] = {
        "world_size": world,
        "stage": stage,
        "offload_optimizer": False,
        "offload_parameters": False,
        "precision": "bf16",
        "micro_batch_size": 1,
        "sequence_length": 128,
        **changes,
    }
    return Layout(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"), [(0, 4, 4, 8), (1, 4, 4, 3), (2, 4, 1, 3), (3, 1, 1, 3)]
)
def test_each_stage_divides_its_part_over_the_ranks(
    stage: int, weights: float, gradients: float, optimizer: float
) -> None:
    memory = estimate_memory(FACTS, layout(stage), overhead_gib=1.0)
    assert (memory.weights, memory.gradients, memory.optimizer) == (weights, gradients, optimizer)
    assert memory.total == pytest.approx(weights + gradients + optimizer + memory.activations + memory.buffers + 1.0)


def test_offload_moves_memory_to_the_host() -> None:
    plain = estimate_memory(FACTS, layout(3), overhead_gib=0)
    moved = estimate_memory(FACTS, layout(3, offload_optimizer=True, offload_parameters=True), overhead_gib=0)
    assert (plain.host, moved.host) == (0, plain.optimizer + plain.weights)
    assert moved.total < plain.total - plain.optimizer


def test_activations_grow_with_the_micro_batch_and_precision() -> None:
    one = estimate_memory(FACTS, layout(0, precision="fp32"), overhead_gib=0).activations
    eight = estimate_memory(FACTS, layout(0, precision="fp32", micro_batch_size=8), overhead_gib=0).activations
    assert eight == pytest.approx(8 * one)
    half = estimate_memory(FACTS, layout(0), overhead_gib=0).activations
    assert half == pytest.approx(one / 2 + 2)  # GiB: the 16-bit copy of 2**30 weights


def test_the_configurations_own_layout_follows_its_deepspeed_file() -> None:
    config = load_config(["large"], [])
    from sparselt_dist.config_loading import resolve_deepspeed

    run_plan = make_plan(config, 8)
    own, *others = layouts(config, run_plan, 8, resolve_deepspeed(config, run_plan), 512)
    assert (own.stage, own.offload_optimizer, own.offload_parameters) == (3, True, True)
    assert own in others
    assert len(others) == 5


def test_the_first_budget_spent_ends_the_run() -> None:
    config = load_config(["quickstart"], ["budget.max_steps=100", "budget.max_hours=1", "train.global_batch_size=64"])
    run_plan = make_plan(config, 1)
    fast = estimate_work(config, run_plan, 1, 128, tokens_per_second=1e6)
    assert (fast.limit, fast.steps, fast.tokens) == ("max_steps", 100, 100 * 64 * 128)
    slow = estimate_work(config, run_plan, 1, 128, tokens_per_second=64 * 128 / 100)
    assert (slow.limit, slow.steps, slow.seconds) == ("max_hours", 36, 3600)


def test_the_batch_ramp_gives_more_steps_for_the_same_tokens() -> None:
    config = load_config(["crammed"], [])
    ramped = estimate_work(config, make_plan(config, 1), 1, 128, tokens_per_second=43.2e6 * 128 / 86400)
    # 64 equal shares of the ramp's 60 % with 128, 256, ... 8192 sequences a step, then 40 % at 8192
    expected = 43.2e6 / 8192 * (0.6 * sum(1 / k for k in range(1, 65)) + 0.4)
    assert ramped.steps == pytest.approx(expected, rel=0.01)


def test_fitting_numbers_of_ranks_divide_the_batch() -> None:
    config = load_config(["quickstart"], ["train.micro_batch_size=8", "train.global_batch_size=64"])
    assert fitting_world_sizes(config) == [1, 2, 4, 8]


def test_the_command_prints_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    budget = ["budget.max_steps=1200", "train.global_batch_size=64"]
    assert plan.main(["--device", "a100", "--devices", "2", "--price", "3", *TINY, *budget]) == 0
    shown = capsys.readouterr().out
    assert "parameters" in shown
    assert "ends by max_steps: 1,200 steps, 9.83M tokens" in shown
    assert "* ZeRO-0" in shown
    assert "x 3 an hour" in shown


def test_what_does_not_fit_is_code_2_with_advice(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["train.global_batch_size=65536", "train.micro_batch_size=65536", *TINY]
    assert plan.main(["--device", "rtx4090", *overrides]) == 2
    assert "use train.micro_batch_size=32768" in capsys.readouterr().err


def test_a_split_that_does_not_divide_is_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--device", "a100", "--devices", "3"]) == 2
    assert "nearest that fit: 30 or 33" in capsys.readouterr().err


def test_the_full_crammed_model_is_counted_exactly(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--config", "crammed", "--device", "a6000"]) == 0
    assert "119,589,889 parameters" in capsys.readouterr().out

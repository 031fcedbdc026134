"""The arithmetic of `plan`, and the command on small models."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sparselt_dist import plan
from sparselt_dist.config_loading import load_config, make_plan, resolve_deepspeed
from sparselt_dist.device import Device, find_device
from sparselt_dist.errors import ConfigError
from sparselt_dist.planning import (
    GIB,
    Layout,
    Machine,
    ModelFacts,
    SavedBytes,
    Traffic,
    estimate_memory,
    estimate_step,
    estimate_traffic,
    estimate_work,
    fitting_world_sizes,
    formula_saved,
    layouts,
    loss_bytes,
)

FACTS = ModelFacts(
    parameters=GIB,
    backbone_parameters=GIB,
    num_layers=10,
    hidden_size=1024,
    vocab_size=0,
    targets_per_token=0.25,
    chunked_loss=False,
    saved=SavedBytes(fixed=2.0 * GIB, per_row=GIB / 2, traced=True),
)
GPU = find_device("a100-80gb")
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
        "bucket_elements": GIB // 8,
        "prefetch_elements": GIB // 16,
        **changes,
    }
    return Layout(**values)  # type: ignore[arg-type]


# ---- memory


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer", "buffers"),
    [(0, 4, 4, 8, 500e6 * 4 / GIB), (1, 4, 4, 3, 1.5), (2, 4, 1, 3, 1.5), (3, 1, 1, 3, 0.75)],
)
def test_each_stage_divides_its_part_over_the_ranks(
    stage: int, weights: float, gradients: float, optimizer: float, buffers: float
) -> None:
    memory = estimate_memory(FACTS, layout(stage), GPU)
    assert (memory.weights, memory.gradients, memory.optimizer) == (weights, gradients, optimizer)
    assert memory.buffers == pytest.approx(buffers)
    assert memory.activations == 2 + 0.5 + 0.05  # 16-bit weights, one row, gradients of one layer of it
    during = {0: 0.0, 1: 0.0, 2: 0.5, 3: 0.75}[stage]
    peak = max(memory.activations + during, memory.buffers)
    assert memory.total == pytest.approx(weights + gradients + optimizer + peak + GPU.overhead_gib)


def test_a_rank_alone_joins_no_gradients() -> None:
    assert estimate_memory(FACTS, layout(0, world=1), GPU).buffers == 0


def test_the_copy_of_a_checkpoint_lies_in_host_memory() -> None:
    for stage in range(4):
        plain, copying = (estimate_memory(FACTS, layout(stage, copies_checkpoints=each), GPU) for each in (False, True))
        assert (plain.host, copying.host) == (0, 3)  # 12 bytes a parameter, a fourth of them
        assert copying.total == plain.total


@pytest.mark.parametrize(
    ("override", "copies"),
    [
        ("checkpoint.every_steps=10", True),
        ("checkpoint.every_steps=null", False),
        ("checkpoint.asynchronous=false", False),
        ("checkpoint.scratch_dir=/tmp/x", False),
    ],
)
def test_a_copy_in_memory_follows_from_how_checkpoints_are_saved(override: str, copies: bool) -> None:
    config = load_config(["base"], ["checkpoint.every_steps=5", "data.train=none", override])
    run_plan = make_plan(config, 8)
    found = layouts(config, run_plan, 8, resolve_deepspeed(config, run_plan), 512)
    assert {each.copies_checkpoints for each in found} == {copies}


def test_offload_moves_memory_to_the_host() -> None:
    plain = estimate_memory(FACTS, layout(3), GPU)
    moved = estimate_memory(FACTS, layout(3, offload_optimizer=True, offload_parameters=True), GPU)
    assert (plain.host, moved.host) == (0, 3 + 1 + 1)  # moments and copies, gradients, weights
    assert moved.total == pytest.approx(plain.total - 3 - 1 + 0.2)  # two of ten layers pass through


def test_a_cpu_offloads_to_its_own_memory_and_keeps_what_is_freed() -> None:
    cpu = find_device("cpu")
    memory = estimate_memory(FACTS, layout(1), cpu)
    parts = memory.weights + memory.gradients + memory.optimizer + memory.activations + memory.buffers
    assert memory.total == pytest.approx(parts + cpu.overhead_gib)
    moved = estimate_memory(FACTS, layout(1, offload_optimizer=True), cpu)
    assert moved.total == pytest.approx(memory.total + 1)  # gradients cross over, too


def test_activations_grow_with_the_micro_batch() -> None:
    one, nine = (estimate_memory(FACTS, layout(0, micro_batch_size=rows), GPU).activations for rows in (1, 9))
    assert nine - one == pytest.approx(8 * 0.55)


def test_the_formula_is_the_published_34_bytes_a_hidden_unit_and_a_little() -> None:
    half = formula_saved((100, 3, 64, 256), "bf16", 10)
    assert (half.fixed, half.per_row) == (200, 10 * 3 * 64 * 38)  # two bytes of a copy; 34, and fp32 inputs of norms
    full = formula_saved((100, 3, 64, 256), "fp32", 10)
    assert (full.fixed, full.per_row) == (0, 10 * 3 * 64 * 68)


def test_scores_are_of_targets_and_chunks_bound_them() -> None:
    facts = replace(FACTS, vocab_size=32768, targets_per_token=0.25)
    many = layout(0, micro_batch_size=512)
    assert loss_bytes(facts, many) == 512 * 32 * 32768 * 6
    chunked = replace(facts, chunked_loss=True)
    assert loss_bytes(chunked, many) == 512 * 32768 * 6 + 3 * 32768 * 1024 * 4
    assert loss_bytes(chunked, replace(many, stage=3)) == 512 * 32768 * 6 + 32768 * 1024 * 4
    assert loss_bytes(FACTS, many) == 0


# ---- communication and time


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (0, Traffic(6, 0, 0, 0)),  # 2 (4-1)/4 of 4 GiB
        (1, Traffic(6, 0, 3, 0)),
        (2, Traffic(30, 0, 3, 0)),  # reduced in each of 5 micro-steps
        (3, Traffic(0, 15, 30, 0)),  # and gathered twice in each
    ],
)
def test_bytes_that_a_rank_sends_by_stage(stage: int, expected: Traffic) -> None:
    sent = estimate_traffic(FACTS, layout(stage), micro_steps=5)
    assert sent == Traffic(
        *(part * GIB for part in (expected.all_reduce, expected.reduce_scatter, expected.all_gather)), 0
    )


def test_reduction_to_owners_halves_it_and_one_rank_sends_nothing() -> None:
    owners = estimate_traffic(FACTS, layout(2, reduces_to_all=False), micro_steps=5)
    assert (owners.all_reduce, owners.reduce_scatter) == (0, 15 * GIB)
    for stage in range(4):
        assert estimate_traffic(FACTS, layout(stage, world=1), micro_steps=5).links == 0


def test_offload_crosses_the_host_link() -> None:
    assert estimate_traffic(FACTS, layout(1, offload_optimizer=True), 5).host == 2 * GIB  # gradients down, weights up
    both = layout(3, offload_optimizer=True, offload_parameters=True)
    assert estimate_traffic(FACTS, both, 5).host == (2 + 2 * 5) * GIB


def test_a_step_is_compute_update_and_what_communication_shows() -> None:
    machine = Machine(GPU, count=4, per_node=8)
    step = estimate_step(FACTS, layout(1), machine, flops_per_token=6e9, batch_size=8)
    assert step.compute == pytest.approx(2 * 128 * 6e9 / (312e12 * 0.4))
    assert step.optimizer == pytest.approx(GIB / 4 * 40 / 2039e9)
    assert step.communication == step.exposed == pytest.approx(9 * GIB / 300e9)
    assert step.total == step.compute + step.optimizer + step.exposed
    hidden = estimate_step(FACTS, layout(1, overlaps=True), machine, 6e9, 8)
    assert hidden.exposed == pytest.approx(step.exposed - step.compute * 2 / 3)
    across = estimate_step(FACTS, layout(1), Machine(GPU, count=4, per_node=2), 6e9, 8)
    assert across.communication == pytest.approx(9 * GIB / 25e9)


def test_the_configurations_own_layout_follows_its_deepspeed_file() -> None:
    config = load_config(["large"], [])
    run_plan = make_plan(config, 8)
    own, *others = layouts(config, run_plan, 8, resolve_deepspeed(config, run_plan), 512)
    assert (own.stage, own.offload_optimizer, own.offload_parameters, own.overlaps) == (3, True, True, True)
    assert (own.bucket_elements, own.prefetch_elements) == (200_000_000, 50_000_000)
    assert own in others
    assert len(others) == 5


# ---- how far a budget reaches


def test_the_first_budget_spent_ends_the_run() -> None:
    config = load_config(["quickstart"], ["budget.max_steps=100", "budget.max_hours=1", "train.global_batch_size=64"])
    run_plan = make_plan(config, 1)
    fast = estimate_work(config, run_plan, 1, 128, lambda batch: batch / 1000)
    assert (fast.limit, fast.steps, fast.tokens) == ("max_steps", 100, 100 * 64 * 128)
    slow = estimate_work(config, run_plan, 1, 128, lambda batch: 100.0)
    assert (slow.limit, slow.steps, slow.seconds) == ("max_hours", 36, 3600)


def test_the_batch_ramp_gives_more_steps_for_the_same_tokens() -> None:
    config = load_config(["crammed"], [])
    ramped = estimate_work(config, make_plan(config, 1), 1, 128, lambda batch: batch * 86400 / 43.2e6)
    # 64 equal shares of the ramp's 60 % with 128, 256, ... 8192 sequences a step, then 40 % at 8192
    expected = 43.2e6 / 8192 * (0.6 * sum(1 / k for k in range(1, 65)) + 0.4)
    assert ramped.steps == pytest.approx(expected, rel=0.01)
    assert ramped.tokens == pytest.approx(43.2e6 * 128, rel=0.001)


def test_what_a_step_costs_besides_its_tokens_takes_tokens_from_the_ramp() -> None:
    config = load_config(["crammed"], [])
    slower = estimate_work(config, make_plan(config, 1), 1, 128, lambda batch: 1.0 + batch * 86400 / 43.2e6)
    assert slower.tokens < 0.9 * 43.2e6 * 128


def test_fitting_numbers_of_ranks_divide_the_batch() -> None:
    config = load_config(["quickstart"], ["train.micro_batch_size=8", "train.global_batch_size=64"])
    assert fitting_world_sizes(config) == [1, 2, 4, 8]


# ---- where devices stand


@pytest.mark.parametrize(
    ("device", "given", "expected"),
    [
        ("a100", (None, None, None), (1, 8)),
        ("a100", (32, None, None), (32, 8)),
        ("a100", (None, 4, None), (32, 8)),
        ("a100", (None, 4, 2), (8, 2)),
        ("a100", (10, 3, None), (10, 4)),
        ("cpu", (6, None, None), (6, 6)),
    ],
)
def test_the_number_of_devices_follows_from_what_is_given(
    device: str, given: tuple[int | None, int | None, int | None], expected: tuple[int, int]
) -> None:
    machine = plan.place(find_device(device), *given)
    assert (machine.count, machine.per_node) == expected


def test_numbers_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="found 32 on 2 nodes of 8, expected 9 to 16"):
        plan.place(GPU, 32, 2, 8)


# ---- the command


def test_the_command_prints_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    budget = ["budget.max_steps=1200", "train.global_batch_size=64"]
    assert plan.main(["--device", "a100", "--devices", "2", "--price", "3", *TINY, *budget]) == 0
    shown = capsys.readouterr().out
    assert "parameters" in shown
    assert "ends by max_steps: 1,200 steps, 9.83M tokens" in shown
    assert "* ZeRO-0" in shown
    assert "x 3 an hour" in shown
    assert "activations counted on the model" in shown


def test_a_model_that_cannot_be_traced_is_planned_by_the_formula(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise RuntimeError("a value was asked for")

    monkeypatch.setattr("sparselt_dist.models.footprint.trace_saved", refuse)
    assert plan.main(["--device", "a100", *TINY]) == 0
    assert "activations by the formula for transformers" in capsys.readouterr().out


def test_what_an_objective_adds_to_one_pass_adds_to_activations() -> None:
    objective = ["objective.name=mix", "objective.parts=[{name: mlm}, {name: mlm, mlm_probability: 0.3}]"]
    machine, small = Machine(GPU, 1, 8), [*TINY, "prepare.vocab_size=64"]
    one, two = (plan.predict(load_config(["quickstart"], [*small, *extra]), machine) for extra in ([], objective))
    assert 1.5 < two.facts.saved.per_row / one.facts.saved.per_row < 2.5


def test_what_does_not_fit_is_code_2_with_advice(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["train.global_batch_size=65536", "train.micro_batch_size=65536", *TINY]
    assert plan.main(["--device", "rtx4090", *overrides]) == 2
    message = capsys.readouterr().err
    assert "GiB a rank, expected at most 21.7 of one rtx-4090" in message
    assert "use train.micro_batch_size=32768" in message


def test_advice_names_the_stage_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    wide = [
        "model.config.hidden_size=2048",
        "model.config.num_attention_heads=16",
        "model.config.intermediate_size=8192",
    ]
    wide += ["model.config.num_hidden_layers=32", "train.global_batch_size=8", "train.micro_batch_size=1"]
    assert plan.main(["--device", "rtx-4090", "--devices", "8", *wide, "train.precision=bf16"]) == 2
    assert "; use train.deepspeed_config=zero1" in capsys.readouterr().err


def test_a_split_that_does_not_divide_is_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--device", "a100", "--devices", "3"]) == 2
    assert "nearest that fit: 30 or 33" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--utilization", "1.5"], ["--price", "-1"], ["--devices", "0"]])
def test_numbers_out_of_range_are_code_2(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        plan.main(option)
    assert left.value.code == 2
    assert "expected a" in capsys.readouterr().err


def test_a_device_without_the_runs_precision_is_refused() -> None:
    half_only = Device.model_validate({**GPU.model_dump(), "peak_tflops": {"bf16": 312.0}})
    config = load_config(["quickstart"], TINY)
    with pytest.raises(ConfigError, match=r"peak_tflops has bf16, expected fp32 \(train.precision\)"):
        plan.known_peak(half_only, config)


def test_the_full_crammed_model_is_counted_exactly(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--config", "crammed", "--device", "a6000"]) == 0
    shown = capsys.readouterr().out
    assert "119,589,889 parameters" in shown
    assert "ends by max_hours" in shown

"""A compiled pass beside an eager one, with made-up compilers: what agrees is told, what does not is refused."""

import pytest
import torch

from sparselt_dist import compile_check
from sparselt_dist.compile_check import Comparison, check, compare
from sparselt_dist.config_loading import load_config
from sparselt_dist.data.batch import Batch
from sparselt_dist.errors import ConfigError
from sparselt_dist.models.assembly import build_collator, build_model
from sparselt_dist.models.backbone import PretrainingModel
from sparselt_dist.objectives.contract import TINY_TOKENIZER, tiny_examples

SIZES = ("hidden_size=32", "num_hidden_layers=2", "num_attention_heads=2", "intermediate_size=64")


def tiny(*overrides: str) -> tuple[PretrainingModel, Batch]:
    options = [
        "model.architecture=crammed-bert",
        *(f"model.config.{size}" for size in SIZES),
        "data.sequence_length=64",
    ]
    config = load_config(["quickstart"], [*options, *overrides])
    model = build_model(config, TINY_TOKENIZER).train()
    model.set_progress(0, 0.0)
    return model, build_collator(config, TINY_TOKENIZER)(tiny_examples())


def compile_by(model: PretrainingModel, fault: str = "") -> None:
    """Compile the body by a compiler that changes nothing, but for the fault."""

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        def run(*args: torch.Tensor) -> object:
            results = graph(*args)
            first = results[0]
            if fault == "values":
                first = first * 1.05
            elif fault == "gradients":
                first = first + 0.2 * (first - first.detach())
            elif fault == "nan":
                first = first * float("nan")
            return (first, *results[1:])

        return run

    torch._dynamo.reset()
    model.backbone.body.compile(backend=backend)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_true_compiler_passes_and_leaves_nothing_behind(precision: str) -> None:
    model, batch = tiny()
    compile_by(model)
    state = torch.get_rng_state()
    told = check(model, batch, precision, with_gradients=True)
    assert f"compiled equals eager on the first micro-batch ({len(batch['input_ids'])} rows, {precision})" in told
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("fault", "precision"), [("values", "fp32"), ("values", "bf16"), ("gradients", "bf16"), ("nan", "fp32")]
)
def test_a_compiler_that_changes_results_is_refused(fault: str, precision: str) -> None:
    model, batch = tiny()
    compile_by(model, fault)
    with pytest.raises(
        ConfigError, match=r"train\.compile: compiled and eager passes disagree.*set train\.compile=false"
    ):
        check(model, batch, precision, with_gradients=True)


def test_without_gradients_losses_alone_are_compared() -> None:
    model, batch = tiny()
    compile_by(model, "gradients")
    assert "gradients" not in check(model, batch, "fp32", with_gradients=False)
    compile_by(model, "values")
    with pytest.raises(ConfigError, match="disagree"):
        check(model, batch, "fp32", with_gradients=False)


def test_dropout_is_no_disagreement_and_is_on_again_after() -> None:
    model, batch = tiny("model.config.hidden_dropout_prob=0.3")
    compile_by(model)
    assert compare(model, batch, "fp32", with_gradients=True).is_within("fp32")
    assert all(module.training for module in model.modules())


def test_eager_passes_that_do_not_fit_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("of a made-up device")

    monkeypatch.setattr(compile_check, "_pass", full)
    assert "do not fit" in check(*tiny(), "fp32", with_gradients=True)


@pytest.mark.parametrize(
    ("compiled", "share", "precision", "expected"),
    [
        (9.9, 0.0, "fp32", True),
        (9.9002, 0.0, "fp32", False),
        (9.9002, 0.0, "bf16", True),
        (9.92, 0.0, "bf16", False),
        (9.9, 0.002, "fp32", False),
        (9.9, 0.02, "bf16", True),
        (9.9, 0.2, "fp16", False),
        (float("nan"), 0.0, "bf16", False),
        (9.9, float("nan"), "bf16", False),
    ],
)
def test_what_is_allowed(compiled: float, share: float, precision: str, expected: bool) -> None:
    assert Comparison(9.9, compiled, share, "any").is_within(precision) is expected


def test_a_large_loss_is_allowed_more_in_proportion() -> None:
    assert Comparison(1000.0, 1000.9, 0.0, "any").is_within("bf16")
    assert not Comparison(1000.0, 1001.1, 0.0, "any").is_within("bf16")

"""The yardsticks of small models, trained or not, on a toy language."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toy_run import LENGTH, make_data

from sparselt_dist.config import ModelSection
from sparselt_dist.data.batch import IGNORE_INDEX
from sparselt_dist.data.corpora import Corpora
from sparselt_dist.data.loader import Loader
from sparselt_dist.evaluation.yardsticks import Size, run_yardsticks
from sparselt_dist.models.backbone import Backbone, build_backbone
from sparselt_dist.objectives import get_objective
from sparselt_dist.objectives.base import TokenizerInfo
from sparselt_dist.objectives.settings import MLMConfig

SMALL = Size(heldout_tokens=6000, training_tokens=8000, probe_tokens=4000, counted_tokens=20_000, head_steps=40)
CPU = torch.device("cpu")
Data = tuple[Corpora, Corpora, TokenizerInfo]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Matrices this small are slower on two threads, and far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return make_data(tmp_path_factory.mktemp("toy"), train_rows=3000)


def _backbone(tokenizer: TokenizerInfo, architecture: str, seed: int = 0) -> Backbone:
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    torch.manual_seed(seed)
    section = ModelSection(architecture=architecture, config=sizes)
    return build_backbone(section, tokenizer, sequence_length=LENGTH, with_head=True)


def _train(backbone: Backbone, data: Data, steps: int, contrastive: bool) -> None:
    """Masked tokens by cross-entropy over the vocabulary, or over the targets of the batch."""
    collator = get_objective("mlm").build_collator(MLMConfig(), data[2])
    loader = Loader(
        data[0],
        collator,
        seed=0,
        window=16,
        micro_batch_size=64,
        rank=0,
        world_size=1,
        num_workers=0,
        start_position=0,
    )
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=4e-3)
    for step, (batch, *_) in zip(range(steps), loader, strict=False):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        chosen = batch["labels"] != IGNORE_INDEX
        hidden, targets = backbone(batch["input_ids"])[chosen], batch["labels"][chosen]
        if contrastive:
            rows = backbone.get_input_embeddings()(targets)
            loss = F.cross_entropy(hidden @ rows.T, torch.arange(len(targets)))
        else:
            loss = F.cross_entropy(backbone.logits(hidden), targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def _own_head(backbone: Backbone, data: Data) -> float:
    """Cross-entropy of held-out masked targets by the backbone's own head."""
    collator = get_objective("mlm").build_collator(MLMConfig(masking="exact"), data[2])
    examples = [{"key": str(n), "ids": data[1].ids(np.array([n]))[0], "seed": n} for n in range(200)]
    batch = collator(examples)  # type: ignore[arg-type]
    chosen = batch["labels"] != IGNORE_INDEX
    logits = backbone.logits(backbone.eval()(batch["input_ids"])[chosen])
    return F.cross_entropy(logits, batch["labels"][chosen]).item()


def test_a_recovered_head_is_as_good_as_the_one_that_was_trained(data: Data) -> None:
    backbone = _backbone(data[2], "crammed-bert")
    _train(backbone, data, 250, contrastive=False)
    found = run_yardsticks(backbone, *data, device=CPU, size=SMALL)
    assert found["yardstick/masked_ce"] < found["yardstick/unigram_ce"] - 0.3
    assert found["yardstick/masked_ce"] < _own_head(backbone, data) + 0.05


def test_a_contrastive_model_is_measured_with_the_unigrams_that_it_never_learned(data: Data) -> None:
    backbone = _backbone(data[2], "crammed-bert")
    _train(backbone, data, 250, contrastive=True)
    found = run_yardsticks(backbone, *data, device=CPU, size=SMALL)
    assert found["yardstick/masked_ce"] < found["yardstick/unigram_ce"] - 1.5
    assert found["yardstick/masked_ce"] < _own_head(backbone, data) - 0.3
    assert found["yardstick/masked_accuracy"] > 0.4
    assert found["yardstick/probe_accuracy"] > found["yardstick/majority_accuracy"] == 0.5


def test_targets_do_not_depend_on_model_seed_or_global_state(data: Data) -> None:
    """The floor is a function of the held-out targets, so equal floors mean equal targets."""
    first = run_yardsticks(_backbone(data[2], "crammed-bert", seed=1), *data, device=CPU, size=SMALL)
    torch.manual_seed(99)
    second = run_yardsticks(_backbone(data[2], "bert", seed=2), *data, device=CPU, size=SMALL)
    assert first["yardstick/unigram_ce"] == second["yardstick/unigram_ce"]
    assert first["yardstick/masked_ce"] != second["yardstick/masked_ce"]


def test_measuring_twice_gives_the_same_and_leaves_the_model_and_the_generator_alone(data: Data) -> None:
    backbone = _backbone(data[2], "bert").train()  # dropout would show
    weights = {name: value.clone() for name, value in backbone.state_dict().items()}
    random_state = torch.get_rng_state()
    first = run_yardsticks(backbone, *data, device=CPU, size=SMALL)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert backbone.training and backbone.model.base_model.training
    assert all(torch.equal(weights[name], value) for name, value in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert run_yardsticks(backbone, *data, device=CPU, size=SMALL) == first


def test_untrained_hidden_states_know_nothing_of_replaced_tokens(data: Data) -> None:
    found = run_yardsticks(_backbone(data[2], "crammed-bert"), *data, device=CPU, size=SMALL)
    assert abs(found["yardstick/probe_accuracy"] - 0.5) < 0.06


def test_a_decoder_in_half_precision_is_measured_too(data: Data) -> None:
    backbone = _backbone(data[2], "gpt_neox").to(torch.bfloat16)
    found = run_yardsticks(backbone, *data, device=CPU, size=SMALL)
    assert len(found) == 5 and all(value == value for value in found.values())


def test_without_a_mask_token_the_masked_ones_are_left_out_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train, validation, tokenizer = make_data(tmp_path, mask=False)
    assert tokenizer.mask_id is None
    found = run_yardsticks(_backbone(tokenizer, "crammed-bert"), train, validation, tokenizer, device=CPU, size=SMALL)
    assert set(found) == {"yardstick/probe_accuracy", "yardstick/majority_accuracy"}
    assert "the tokenizer has no mask token" in caplog.text

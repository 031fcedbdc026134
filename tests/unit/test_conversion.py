"""Official layouts: every tensor finds its place, numbers stay, and what is not exactly a layout is refused unread.

The references of `official_states` compute the official forward passes from official names alone.
"""

import builtins
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from official_states import (
    ARCH,
    BERT_CONFIG,
    LAYERS,
    NEOX_CONFIG,
    SPARSELT_CONFIG,
    TYPES,
    Runs,
    State,
    V,
    bert_hidden,
    bert_logits,
    bert_state,
    cramming_hidden,
    cramming_logits,
    cramming_state,
    neox_hidden,
    neox_state,
    save_lightning,
    sparselt_reconstruction,
    sparselt_state,
    write_bare_pickle,
    write_folder,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from sparselt_dist.errors import CheckpointError, SparseltError
from sparselt_dist.models.backbone import Backbone
from sparselt_dist.models.conversion import Conversion, convert
from sparselt_dist.models.objective_weights import load_objective_weights
from sparselt_dist.models.official_layouts import find_layout
from sparselt_dist.objectives.settings import SLTConfig
from sparselt_dist.objectives.slt import SLT, SLTModule


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _ids() -> Tensor:
    return torch.randint(0, V, (2, 9))


def _rows(done: Conversion, action: str) -> dict[str, str]:
    return {row.source: row.target or row.reason for row in done.tensors if row.action == action}


def _refused(source: Path, tmp_path: Path, **options: Any) -> str:
    """The message of a refusal, which leaves nothing behind."""
    with pytest.raises(SparseltError) as refusal:
        convert(source, tmp_path / "out", **options)
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))
    return str(refusal.value)


# --- numbers ---------------------------------------------------------------------------------------------------------


def _telling_apart(states_KD: Tensor) -> Tensor:
    """A classifier [K, D] that gives these states several types, and to half of them none."""
    middle_D = states_KD.mean(0)
    along_D = middle_D / middle_D.square().sum()
    apart_KD = states_KD - middle_D
    level_KD = apart_KD - (apart_KD @ middle_D)[:, None] * along_D
    return level_KD - (states_KD @ level_KD.T)[:, 1:].amax(1).median() * along_D


@torch.no_grad()
def test_sparselt_whole(tmp_path: Path) -> None:
    state, ids = sparselt_state(), _ids()
    encoder = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    state["sa_pm.weight_proj.weight"] = _telling_apart(bert_hidden(encoder, ids)[0, :TYPES])
    done = convert(write_folder(tmp_path / "in", state, SPARSELT_CONFIG), tmp_path / "out")
    assert [row.source for row in done.tensors] == [*state]
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(model(input_ids=ids).logits, bert_logits(encoder, ids))

    backbone = Backbone(model, has_head=True)
    module = SLT().build_module(SLTConfig(num_types=TYPES), backbone).eval()
    assert isinstance(module, SLTModule)
    load_objective_weights(module, tmp_path / "out", "slt")
    types, logits = sparselt_reconstruction(state, ids)
    hidden, mask = backbone(ids), torch.ones_like(ids)
    typed = module.typer(hidden, mask, temperature=1.0)
    assert torch.equal(typed.types, types) and len(types.unique()) > 2 and (types == 0).any()
    states = module.decoder(backbone, ids[:, :-1], hidden * typed.type_vectors, mask)
    torch.testing.assert_close(
        module.decoder.head(states, backbone.get_input_embeddings()), logits, atol=1e-5, rtol=1e-5
    )


def test_progress_bars_are_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    controls = transformers.utils.logging
    monkeypatch.setattr(controls, "_tqdm_active", True)
    convert(write_folder(tmp_path / "in", sparselt_state(), SPARSELT_CONFIG), tmp_path / "out")
    assert controls.is_progress_bar_enabled()


def test_sparselt_report_tells_of_every_tensor(tmp_path: Path) -> None:
    done = convert(write_folder(tmp_path / "in", sparselt_state(), SPARSELT_CONFIG), tmp_path / "out")
    renamed, dropped = _rows(done, "renamed"), _rows(done, "dropped")
    assert renamed["model.bert.encoder.layer.1.output.dense.bias"] == "bert.encoder.layer.1.output.dense.bias"
    assert (
        renamed["decoder.layers.0.encoder_attn.k_proj.weight"] == "objective:decoder.layer.cross_attention.key.weight"
    )
    assert renamed["sa_pm.vars"] == "objective:typer.type_vectors"
    assert dropped["glm_head.weight"] == "tied: the same tensor as model.bert.embeddings.word_embeddings.weight"
    assert dropped["decoder.embeddings.position_ids"] == "a constant, computed anew"
    stored = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert [row["source"] for row in stored["tensors"]] == [row.source for row in done.tensors]
    assert "objective.safetensors" in " ".join(done.notes) and "no fast tokenizer" in " ".join(done.notes)


@torch.no_grad()
@pytest.mark.parametrize("kind", [None, "sparselt", "headless"])
def test_an_extracted_encoder_with_its_head(kind: Any, tmp_path: Path) -> None:
    state = bert_state(has_head=True)
    done = convert(write_folder(tmp_path / "in", state, BERT_CONFIG), tmp_path / "out", kind=kind)
    assert len(_rows(done, "kept")) == len(state) - 3 and not _rows(done, "renamed")
    assert not (tmp_path / "out" / "objective.safetensors").exists()
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    ids = _ids()
    torch.testing.assert_close(model(input_ids=ids).logits, bert_logits(state, ids))


@torch.no_grad()
@pytest.mark.parametrize("wrapper", ["", "_orig_mod.", "module._orig_mod."])
def test_cramming_as_its_engine_saves_it(wrapper: str, tmp_path: Path) -> None:
    state = {wrapper + name: value for name, value in cramming_state().items()}
    folder = write_folder(tmp_path / "in", {}, ARCH, weights="intermediate.pth")
    torch.save({"optim": {"state": {}}, "model": state, "scheduler": {}, "metadata": None}, folder / "intermediate.pth")
    done = convert(folder, tmp_path / "out", kind="cramming")
    assert done.others == ("optim", "scheduler", "metadata")
    assert _rows(done, "dropped")[f"{wrapper}decoder.weight"].startswith("tied")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    ids = _ids()
    torch.testing.assert_close(model(input_ids=ids).logits, cramming_logits(cramming_state_of(state, wrapper), ids))


def cramming_state_of(state: State, wrapper: str) -> State:
    return {name.removeprefix(wrapper): value for name, value in state.items()}


@torch.no_grad()
@pytest.mark.parametrize("absent", ["decoder.weight", "encoder.embedding.word_embedding.weight"])
def test_cramming_from_the_hub_stores_a_tied_tensor_once(absent: str, tmp_path: Path) -> None:
    state = cramming_state()
    folder = write_folder(tmp_path / "in", {}, {"model_type": "crammedBERT", "arch": ARCH})
    (folder / "pytorch_model.bin").unlink()
    save_file({name: value for name, value in state.items() if name != absent}, folder / "model.safetensors")
    done = convert(folder, tmp_path / "out")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    ids = _ids()
    torch.testing.assert_close(model(input_ids=ids).logits, cramming_logits(state, ids))
    alone = (
        next(row for row in done.tensors if "only stored copy" in row.reason) if absent != "decoder.weight" else None
    )
    assert alone is None or alone.source == "decoder.weight"


@torch.no_grad()
def test_cramming_classifier_and_bare_encoder(tmp_path: Path) -> None:
    state, ids = cramming_state(labels=4), _ids()
    convert(write_folder(tmp_path / "in", state, ARCH, weights="model.pth"), tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    pooled = cramming_hidden(state, ids).mean(1) @ state["pooler.dense.weight"].T + state["pooler.dense.bias"]
    expected = pooled.tanh() @ state["head.weight"].T + state["head.bias"]
    torch.testing.assert_close(model(input_ids=ids).logits, expected)

    bare = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    convert(write_folder(tmp_path / "bare", bare, ARCH, weights="model.pth"), tmp_path / "encoder")
    hidden = AutoModel.from_pretrained(tmp_path / "encoder").eval()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(hidden, cramming_hidden(state, ids))


@torch.no_grad()
@pytest.mark.parametrize("has_head", [False, True])
def test_headless_decoder_in_a_lightning_checkpoint(has_head: bool, tmp_path: Path) -> None:
    state, ids = neox_state(has_head=has_head), _ids()
    save_lightning(tmp_path / "last.ckpt", state, NEOX_CONFIG, model="lm_model")
    done = convert(tmp_path / "last.ckpt", tmp_path / "out")
    assert set(done.others) >= {"task", "optimizer_states", "epoch"} and len(done.tensors) == len(state)
    assert len(_rows(done, "dropped")) == 3 * LAYERS
    if has_head:
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(input_ids=ids).logits
        torch.testing.assert_close(logits, neox_hidden(state, ids) @ state["embed_out.weight"].T)
    hidden = AutoModel.from_pretrained(tmp_path / "out").eval()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(hidden, neox_hidden(state, ids))


@torch.no_grad()
@pytest.mark.parametrize("is_published", [False, True])
def test_headless_encoder(is_published: bool, tmp_path: Path) -> None:
    state, ids = bert_state(has_head=False), _ids()
    source = tmp_path / "step.ckpt"
    if is_published:
        source = write_folder(tmp_path / "in", state, BERT_CONFIG)
    else:
        save_lightning(source, state, BERT_CONFIG, model="mlm_model")
    done = convert(source, tmp_path / "out")
    assert done.class_name == "BertModel"
    model = AutoModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).eval()
    torch.testing.assert_close(model(input_ids=ids).last_hidden_state, bert_hidden(state, ids))


def test_half_precision_is_widened_without_loss(tmp_path: Path) -> None:
    state = {name: value.bfloat16() for name, value in cramming_state().items()}
    convert(write_folder(tmp_path / "in", state, ARCH, weights="model.pth"), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    name = "encoder.final_norm.bias"
    assert stored[name].dtype == torch.float32 and torch.equal(stored[name], state[name].float())


def test_full_sizes_are_the_published_ones() -> None:
    """Parameters of SparseLT's whole model and of crammed-bert, each tied tensor once."""
    bert = {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    bert |= {"intermediate_size": 3072, "max_position_embeddings": 512}
    arch = {**ARCH, "num_transformer_layers": 16, "hidden_size": 768, "intermed_size": 3072}
    arch["attention"] = {**ARCH["attention"], "num_attention_heads": 12}
    word_table = {"encoder.embedding.word_embedding.weight": (32768, 768), "layers.0.attn.": ()}
    with torch.device("meta"):
        sparselt = find_layout(["model.bert.", "sa_pm."]).expect({"sa_pm.vars": (64, 768)}, {**SPARSELT_CONFIG, **bert})
        crammed = find_layout([*word_table]).expect(word_table, arch)
    assert sparselt.objective is not None
    parameters = [*sparselt.model.parameters(), *sparselt.objective.parameters()]
    assert sum(value.numel() for value in parameters) == 119_096_436
    assert sum(value.numel() for value in crammed.model.parameters()) == 119_589_889
    assert len(sparselt.weights) + len(sparselt.objective_weights) == 233


# --- what is not exactly a layout ------------------------------------------------------------------------------------


def _change(state: State, how: str) -> None:
    name = "encoder.layers.1.ffn.dense_in.weight"
    if how == "unknown":
        state["prediction_head.dense.weight"] = torch.ones(2)
    elif how == "missing":
        del state[name]
    elif how == "shape":
        state[name] = state[name][:-2]
    elif how == "type":
        state[name] = state[name].double()
    elif how == "finite":
        state[name][3, 4] = torch.nan
    elif how == "tied":
        state["decoder.weight"] = state["decoder.weight"] + 1
    elif how == "constant":
        state["encoder.layers.1.attn.self_attention.norm_factor"] *= 2
    elif how == "twice":
        state["module.decoder.weight"] = state["decoder.weight"]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("unknown", "1 unknown (prediction_head.dense.weight)"),
        ("missing", "1 missing (encoder.layers.1.ffn.dense_in.weight)"),
        ("shape", "encoder.layers.1.ffn.dense_in.weight has shape (18, 12), expected (20, 12)"),
        ("type", "encoder.layers.1.ffn.dense_in.weight has type torch.float64, expected float32"),
        ("finite", "encoder.layers.1.ffn.dense_in.weight holds numbers that are not finite"),
        ("tied", "decoder.weight differs from encoder.embedding.word_embedding.weight, to which it is tied"),
        ("constant", "encoder.layers.1.attn.self_attention.norm_factor is another constant"),
        ("twice", "2 tensors named decoder.weight"),
    ],
)
def test_another_state_is_refused(how: str, told: str, tmp_path: Path) -> None:
    state = cramming_state()
    _change(state, how)
    message = _refused(write_folder(tmp_path / "in", state, ARCH, weights="model.pth"), tmp_path)
    assert told in message and "give its undamaged checkpoint" in message


def test_all_faults_are_told_together(tmp_path: Path) -> None:
    state = sparselt_state()
    del state["sa_pm.weight_proj.weight"], state["glm_head.bias"]
    state["decoder.layers.1.fc1.bias"] = torch.ones(3)
    state["sa_pm.vars"] = torch.ones(TYPES, 5)
    message = _refused(write_folder(tmp_path / "in", state, SPARSELT_CONFIG), tmp_path)
    assert "1 unknown (decoder.layers.1.fc1.bias); 2 missing (glm_head.bias, sa_pm.weight_proj.weight)" in message
    assert "sa_pm.vars has shape (6, 5), expected (6, 12)" in message


def test_unknown_layouts_and_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    other = write_folder(tmp_path / "gpt2", {"transformer.wte.weight": torch.ones(3, 2)}, {"model_type": "gpt2"})
    message = _refused(other, tmp_path)
    assert (
        "1 tensors such as transformer.wte.weight, which are of no known layout, expected SparseLT's whole" in message
    )
    crammed = write_folder(tmp_path / "in", cramming_state(), ARCH, weights="model.pth")
    assert "it looks like cramming's crammed-bert" in _refused(crammed, tmp_path, kind="headless")


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("attention", "rotary_embedding"), True, "attention.rotary_embedding is True, expected False"),
        (("nonlin",), "GELU", "nonlin is 'GELU', expected 'GELUglu'"),
        (("embedding", "pos_embedding"), "learned", "embedding.pos_embedding is 'learned'"),
        (("attention", "num_attention_heads"), None, "attention.num_attention_heads is missing"),
        (("attention", "num_attention_heads"), 5, "crammed-bert refuses the fields"),
    ],
)
def test_cramming_configurations_that_we_do_not_compute_are_refused(
    path: tuple[str, ...], value: Any, told: str, tmp_path: Path
) -> None:
    arch = json.loads(json.dumps(ARCH))
    part = arch
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    assert told in _refused(write_folder(tmp_path / "in", cramming_state(), arch, weights="model.pth"), tmp_path)


def test_configurations_of_transformers_are_checked(tmp_path: Path) -> None:
    state = sparselt_state()
    (tmp_path / "bare").mkdir()
    torch.save(state, tmp_path / "bare" / "pytorch_model.bin")
    assert "found no configuration beside" in _refused(tmp_path / "bare", tmp_path)
    for field, value, told in (
        ("model_type", "roberta", "model_type is 'roberta', expected 'bert'"),
        ("decoder_layers", 2, "decoder_layers is 2, expected 1"),
        ("num_hidden_layers", LAYERS + 1, "16 missing (model.bert.encoder.layer.2."),
        ("max_position_embeddings", 9, "position_embeddings.weight has shape (16, 12), expected (9, 12)"),
    ):
        (tmp_path / f"{field}.json").write_text(json.dumps({**SPARSELT_CONFIG, field: value}))
        assert told in _refused(tmp_path / "bare", tmp_path, model_config=tmp_path / f"{field}.json")
    done = convert(write_folder(tmp_path / "in", state, SPARSELT_CONFIG), tmp_path / "done")
    assert done.class_name == "BertForMaskedLM"
    assert "is there already" in _told(lambda: convert(tmp_path / "in", tmp_path / "done"))


def _told(call: Any) -> str:
    with pytest.raises(CheckpointError) as refusal:
        call()
    return str(refusal.value)


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_file_of_weights_must_be_one(tmp_path: Path) -> None:
    assert "found nothing at" in _refused(tmp_path / "nowhere", tmp_path)
    folder = write_folder(tmp_path / "in", cramming_state(), ARCH, weights="model.pth")
    torch.save({}, folder / "a.ckpt")
    assert "several files of weights (model.pth, a.ckpt)" in _refused(folder, tmp_path)
    (folder / "model.pth").unlink()
    (folder / "a.ckpt").unlink()
    assert "no file of weights (model_config.json), expected one of model.safetensors" in _refused(folder, tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_refused(name: str, share: float, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", sparselt_state(), SPARSELT_CONFIG)
    if name == "model.safetensors":
        (folder / "pytorch_model.bin").unlink()
        save_file({key: value.clone() for key, value in sparselt_state().items()}, folder / name)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * share)])
    message = _refused(folder, tmp_path)
    assert f"{name} cannot be read" in message and "get the file again" in message


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {"a": 3}}, {"epoch": 1}, {}])
def test_what_holds_no_tensors_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    message = _refused(tmp_path / "x.ckpt", tmp_path)
    assert "expected a dictionary of tensors" in message or "where tensors were expected" in message


def test_a_program_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.ckpt")
    assert "names torch.nn.modules.linear.Linear" in _refused(tmp_path / "module.ckpt", tmp_path)


_CALLS = [
    (os.system, "touch {}", "posix.system"),
    (builtins.exec, "open('{}', 'w')", "exec"),
    (Path.touch, Path("{}"), "pathlib"),
]


@pytest.mark.parametrize(("function", "argument", "name"), _CALLS)
@pytest.mark.parametrize("where", ["bare", "archive", "weights"])
def test_a_pickle_with_code_is_refused_and_not_run(
    function: Any, argument: Any, name: str, where: str, tmp_path: Path
) -> None:
    mark, source = tmp_path / "mark", tmp_path / "pytorch_model.bin"
    call = Runs(function, type(argument)(str(argument).format(mark)))
    state = {**cramming_state(), "encoder.final_norm.bias": call}
    if where == "bare":
        write_bare_pickle(source, call)
    else:
        torch.save(call if where == "archive" else state, source)
    message = _refused(source, tmp_path)
    assert not mark.exists()
    assert name in message and "nothing of it was run" in message


@pytest.mark.parametrize(("function", "argument", "name"), _CALLS)
def test_code_inside_a_training_task_is_not_run(function: Any, argument: Any, name: str, tmp_path: Path) -> None:
    """What only programs that do harm name is refused; all else stays a stand-in, and the weights are read."""
    mark = tmp_path / "mark"
    call = Runs(function, type(argument)(str(argument).format(mark)))
    save_lightning(tmp_path / "a.ckpt", bert_state(has_head=False), BERT_CONFIG, model="mlm_model", extra=call)
    if name == "pathlib":
        assert convert(tmp_path / "a.ckpt", tmp_path / "out").class_name == "BertModel"
    else:
        message = _refused(tmp_path / "a.ckpt", tmp_path)
        assert name in message and "nothing of it was run" in message
    assert not mark.exists()


def test_objective_weights_must_fit(tmp_path: Path) -> None:
    convert(write_folder(tmp_path / "in", sparselt_state(), SPARSELT_CONFIG), tmp_path / "out")
    backbone = Backbone(AutoModelForMaskedLM.from_pretrained(tmp_path / "out"), has_head=True)
    module = SLT().build_module(SLTConfig(num_types=TYPES + 1), backbone)
    told = _told(lambda: load_objective_weights(module, tmp_path / "out", "slt"))
    assert "2 differ (typer.classifier.weight, typer.type_vectors)" in told
    assert "holds no readable weights" in _told(lambda: load_objective_weights(module, tmp_path / "in", "slt"))

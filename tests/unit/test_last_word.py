"""Last words of passages: how a text is cut into pieces, and scores against greedy decoding one piece at a time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from sparselt_dist.config import ModelSection
from sparselt_dist.errors import ConfigError, DataError
from sparselt_dist.evaluate import parse_tasks
from sparselt_dist.evaluation.last_word import Passage, PassageReader, heads_of, last_word_scores, read_passages
from sparselt_dist.models.backbone import Backbone, build_backbone
from sparselt_dist.objectives import get_objective
from sparselt_dist.objectives.base import TokenizerInfo

TEXT = "the old man walked to the harbour, and there the old woman was waiting for the ship that never came back"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte pairs, in which words have several pieces and begin with their space."""
    trained = Tokenizer(models.BPE(unk_token="[UNK]"))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([TEXT] * 3, trainer)
    return trained


def info(tokenizer: Tokenizer) -> TokenizerInfo:
    size = tokenizer.get_vocab_size()
    return TokenizerInfo(vocab_size=size, pad_id=0, cls_id=2, sep_id=3, mask_id=4, special_ids=(0, 1, 2, 3, 4))


def reader(tokenizer: Tokenizer, *, longest: int = 100, behind_end: bool = False) -> PassageReader:
    return PassageReader(tokenizer, info(tokenizer), begins_behind_end=behind_end, longest=longest)


def test_a_passage_ends_with_the_pieces_of_its_last_word(tokenizer: Tokenizer) -> None:
    passage = reader(tokenizer).passage(TEXT + " \n")
    assert passage is not None
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert passage.ids == [2, *ids] and passage.word_length > 1
    assert tokenizer.decode(passage.ids[-passage.word_length :]) == " back"
    behind_end = reader(tokenizer, behind_end=True).passage(TEXT)
    assert behind_end is not None and behind_end.ids == [3, *ids]
    short = reader(tokenizer, longest=12).passage(TEXT)
    assert short is not None and short.ids == [2, *ids[-11:]]
    assert reader(tokenizer).passage("word") is None and reader(tokenizer).passage(" ") is None
    assert reader(tokenizer, longest=3).passage(TEXT) is None


def test_held_out_rows_are_cut_behind_a_whole_word(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode(TEXT + ", said 17 o", add_special_tokens=False).ids
    passage = reader(tokenizer).cut([*whole[:5], 3, *whole, 3, *whole[:7]])  # the longest document of a row
    assert passage is not None
    text = tokenizer.decode(passage.ids)
    assert text.endswith("back, said")  # neither a number nor what the row's end may have cut
    assert reader(tokenizer).cut(whole[:6]) is None and reader(tokenizer).cut([3]) is None


def test_files_of_passages(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines = tmp_path / "p.txt"
    lines.write_text(f"{TEXT}\n\nthe  old man\n")
    objects = tmp_path / "p.jsonl"
    objects.write_text('{"text": "' + TEXT + '"}\n{"text": "the old man"}\n')
    assert read_passages(lines, reader(tokenizer), "nfc") == read_passages(objects, reader(tokenizer), "nfc")
    for name, content, message in [
        ("a.txt", "word\n", "line 1: found 'word', expected a passage of two words"),
        ("b.txt", "\n", "found no passage"),
        ("c.jsonl", '{"body": "x y"}\n', r"cannot be read \(KeyError"),
        ("d.jsonl", "[\n", "cannot be read"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=message):
            read_passages(tmp_path / name, reader(tokenizer), "nfc")
    with pytest.raises(DataError, match="cannot be read"):
        read_passages(tmp_path / "none.txt", reader(tokenizer), "nfc")


def decoder(tokenizer: Tokenizer, *, with_head: bool) -> Backbone:
    torch.manual_seed(0)
    section = ModelSection(
        architecture="gpt2", config={"n_embd": 32, "n_layer": 1, "n_head": 2, "initializer_range": 0.3}
    )
    return build_backbone(section, info(tokenizer), sequence_length=64, with_head=with_head).eval()


def by_hand(backbone: Backbone, head: nn.Module | None, passage: Passage) -> tuple[float, bool]:
    """-log p of the word, a forward pass for every piece, and whether greedy decoding writes it."""
    logits = head if head is not None else backbone.logits
    start = len(passage.ids) - passage.word_length
    written, nats = list(passage.ids[:start]), 0.0
    for place in range(start, len(passage.ids)):
        scores = logits(backbone(torch.tensor([passage.ids[:place]]))[0, -1:])[0].double().log_softmax(dim=0)
        nats -= float(scores[passage.ids[place]])
        written.append(int(logits(backbone(torch.tensor([written]))[0, -1:])[0].argmax()))
    return nats, written == passage.ids


def passages_that_it_knows(backbone: Backbone, tokenizer: Tokenizer) -> list[Passage]:
    """Of several lengths; one ends with what the model writes itself."""
    words = TEXT.split()
    found = [reader(tokenizer).passage(" ".join(words[:count])) for count in (2, 5, 9, 14, 20)]
    chosen = [passage for passage in found if passage is not None]
    guess = int(backbone.logits(backbone(torch.tensor([chosen[2].ids]))[0, -1:])[0].argmax())
    return [*chosen, Passage([*chosen[2].ids, guess], 1)]


@torch.no_grad()
def test_scores_are_those_of_greedy_decoding_piece_by_piece(tokenizer: Tokenizer) -> None:
    backbone = decoder(tokenizer, with_head=True)
    passages = passages_that_it_knows(backbone, tokenizer)
    found = last_word_scores(backbone, heads_of(backbone, None), passages, 0, torch.device("cpu"))
    expected = [by_hand(backbone, None, passage) for passage in passages]
    nats, pieces = sum(nats for nats, _ in expected), sum(passage.word_length for passage in passages)
    assert found == pytest.approx(
        {
            "last_word/passages": 6,
            "last_word/accuracy": sum(hit for _, hit in expected) / 6,
            "last_word/perplexity": math.exp(nats / 6),
            "last_word/piece_perplexity": math.exp(nats / pieces),
        },
        rel=1e-4,
    )
    assert found["last_word/accuracy"] > 0


@torch.no_grad()
def test_a_model_without_head_is_scored_by_its_table_and_by_the_head_it_recovered(tokenizer: Tokenizer) -> None:
    backbone = decoder(tokenizer, with_head=False)
    cwt = get_objective("cwt")
    module = cwt.build_module(cwt.config_cls(prediction="causal", recover_from=0.5), backbone)
    passages = [Passage([2, 9, 8, 7], 2), Passage([2, 30, 20], 1)]
    raw = last_word_scores(backbone, heads_of(backbone, module), passages, 0, torch.device("cpu"))
    names = ("accuracy", "perplexity", "piece_perplexity")
    assert set(raw) == {"last_word/passages", *(f"last_word/raw_{name}" for name in names)}
    head = nn.Linear(32, backbone.vocab_size)
    head.weight = backbone.get_input_embeddings().weight
    head.bias.zero_()
    assert raw["last_word/raw_perplexity"] == pytest.approx(perplexity_by_hand(backbone, head, passages), rel=1e-4)
    module.head.token_counts += torch.arange(backbone.vocab_size)
    module.head.start(backbone.get_input_embeddings())
    both = last_word_scores(backbone, heads_of(backbone, module), passages, 0, torch.device("cpu"))
    assert both["last_word/raw_perplexity"] == raw["last_word/raw_perplexity"]
    head.bias.copy_(module.head.log_unigram())
    assert both["last_word/perplexity"] == pytest.approx(perplexity_by_hand(backbone, head, passages), rel=1e-4)


def perplexity_by_hand(backbone: Backbone, head: nn.Module, passages: list[Passage]) -> float:
    return math.exp(sum(by_hand(backbone, head, passage)[0] for passage in passages) / len(passages))


def test_passages_name_their_task() -> None:
    assert parse_tasks("", "last-word") == ["last-word"]
    assert parse_tasks("heldout", "last-word") == ["heldout", "last-word"]
    with pytest.raises(ConfigError, match="did you mean 'last-word'"):
        parse_tasks("last-words")

"""Training of tokenizers: WordPiece, BPE, byte-level BPE, Unigram.

A trained tokenizer is self-contained: normaliser, pre-tokenizer, model, template and decoder are in `tokenizer.json`,
and `AutoTokenizer.from_pretrained` loads the folder. Special ids are fixed, pad is 0, and the same text gives the same
file in every process.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselt_dist.data.cleaning import Normalization, normalize
from sparselt_dist.data.tokenizer import CONFIG_FILE, TOKENIZER_FILE, TokenizerKind
from sparselt_dist.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


# role -> token, in the order of the ids; cramming has its own begin and end tokens
SPECIAL_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
CRAMMED_SPECIAL_TOKENS = {
    "pad": "[PAD]",
    "bos": "[BEGIN]",
    "eos": "[END]",
    "unk": "[UNK]",
    "cls": "[CLS]",
    "sep": "[SEP]",
    "mask": "[MASK]",
}
_SPECIAL_SCORE = -1e4
_CONTINUES = "##"


def train_tokenizer(
    texts: Callable[[], Iterator[str]], *, kind: TokenizerKind, vocab_size: int, crammed: bool
) -> Tokenizer:
    """A new tokenizer of `vocab_size` entries, or fewer if the text has no more to give.

    Args:
        texts: gives the training text, the same at each call: it is read once or twice.

    Raises:
        ConfigError: the special tokens and the text's alphabet alone are larger than `vocab_size`.
    """
    if kind == "unigram":
        tokenizer = _train_unigram(texts(), vocab_size, crammed)
    else:
        alphabet = _alphabet(texts(), kind, crammed) if kind in ("wordpiece", "bpe") else []
        tokenizer = _train_merges(texts(), kind, vocab_size, crammed, alphabet)
    if tokenizer.get_vocab_size() > vocab_size:
        raise _too_small(vocab_size, f"take {tokenizer.get_vocab_size()} entries")
    specials = _special_tokens(crammed)
    for number, token in enumerate(specials.values()):
        assert tokenizer.token_to_id(token) == number, f"special token {token} is not id {number}"
    _add_template(tokenizer, specials)
    return tokenizer


def _too_small(vocab_size: int, found: str) -> ConfigError:
    return ConfigError(
        f"prepare.vocab_size: found {vocab_size}, but special tokens and the characters of the text {found}; raise it, "
        "or set prepare.tokenizer=byte-bpe or prepare.normalize=crammed"
    )


def _alphabet(texts: Iterator[str], kind: TokenizerKind, crammed: bool) -> list[str]:
    """Every one-character piece of the text, sorted.

    The trainer numbers continuing characters as it meets them in a hash map of random order, and breaks ties between
    merges by number: without numbers fixed beforehand each process would train another vocabulary.
    """
    tokenizer, trainer = _untrained(kind, 0, crammed, [])
    tokenizer.train_from_iterator(texts, trainer)
    return sorted(set(tokenizer.get_vocab()) - set(_special_tokens(crammed).values()))


def _train_merges(
    texts: Iterator[str], kind: TokenizerKind, vocab_size: int, crammed: bool, alphabet: list[str]
) -> Tokenizer:
    from tokenizers import Tokenizer

    tokenizer, trainer = _untrained(kind, vocab_size, crammed, alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    content = json.loads(tokenizer.to_str())
    specials = set(_special_tokens(crammed).values())  # the alphabet was numbered as if special; it is not
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in specials]
    return Tokenizer.from_str(json.dumps(content))


def _train_unigram(texts: Iterator[str], vocab_size: int, crammed: bool) -> Tokenizer:
    """Trained by sentencepiece: the trainer of `tokenizers` sums over a hash map of random order."""
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models

    specials = list(_special_tokens(crammed).values())
    how: Normalization = "crammed" if crammed else "nfc"
    lines = (line for text in texts for line in normalize(text, how).split("\n") if line)
    # with its characters known, a special token spelled out in a text is read letter by letter, not as that token
    spelled_out = " ".join(sorted(set(normalize("".join(specials), how))))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain(lines, [spelled_out]),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size - len(specials) + 1,  # its unk is one of ours
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="identity",
            max_sentence_length=2**30,
            num_threads=1,
            pad_id=-1,
            bos_id=-1,
            eos_id=-1,
            minloglevel=2,
        )
    except RuntimeError as cause:
        raise _too_small(vocab_size, f"take more ({str(cause).strip().splitlines()[-1]})") from cause
    trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [(trained.id_to_piece(number), trained.get_score(number)) for number in range(1, len(trained))]
    vocabulary = [(token, _SPECIAL_SCORE) for token in specials] + pieces
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=specials.index(_special_tokens(crammed)["unk"])))
    tokenizer.normalizer = _normalizer(crammed)
    tokenizer.pre_tokenizer = _pre_tokenizer("unigram", crammed)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(specials)
    return tokenizer


def _special_tokens(crammed: bool) -> dict[str, str]:
    return CRAMMED_SPECIAL_TOKENS if crammed else SPECIAL_TOKENS


def _untrained(kind: TokenizerKind, vocab_size: int, crammed: bool, alphabet: list[str]) -> tuple[Tokenizer, Any]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    specials = _special_tokens(crammed)
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "special_tokens": [*specials.values(), *alphabet],
        "show_progress": False,
    }
    unk = specials["unk"]
    trainer: Any
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token=unk, continuing_subword_prefix=_CONTINUES))
        trainer = trainers.WordPieceTrainer(continuing_subword_prefix=_CONTINUES, **common)
        tokenizer.decoder = decoders.WordPiece(prefix=_CONTINUES)
    elif kind == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token=unk, continuing_subword_prefix=_CONTINUES))
        trainer = trainers.BpeTrainer(continuing_subword_prefix=_CONTINUES, **common)
        tokenizer.decoder = decoders.WordPiece(prefix=_CONTINUES)
    else:
        tokenizer = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **common)
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.normalizer = _normalizer(crammed)
    tokenizer.pre_tokenizer = _pre_tokenizer(kind, crammed)
    return tokenizer, trainer


def _normalizer(crammed: bool) -> Any:
    """The same text rules as `cleaning.normalize`, so that the tokenizer stands alone; idempotent."""
    from tokenizers import Regex, normalizers

    if not crammed:
        return normalizers.NFC()
    quotes = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    return normalizers.Sequence(
        [
            *quotes,
            normalizers.NFD(),
            normalizers.Lowercase(),
            normalizers.StripAccents(),
            normalizers.Replace(Regex(r"[^\t\n\r\x20-\x7e]+"), ""),
            *quotes,
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )


def own_normalizer(how: Normalization) -> dict[str, Any] | None:
    """The normaliser, as it stands in `tokenizer.json`, that changes nothing in text that `normalize` has gone over."""
    from tokenizers import Tokenizer, models

    if how == "none":
        return None
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = _normalizer(how == "crammed")
    content: dict[str, Any] = json.loads(tokenizer.to_str())["normalizer"]
    return content


def _pre_tokenizer(kind: TokenizerKind, crammed: bool) -> Any:
    from tokenizers import pre_tokenizers

    if kind == "byte-bpe":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "unigram":
        return pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    return pre_tokenizers.Whitespace() if crammed else pre_tokenizers.BertPreTokenizer()


def _add_template(tokenizer: Tokenizer, specials: dict[str, str]) -> None:
    """cls A sep, and cls A sep B sep, as BERT has it."""
    from tokenizers.processors import TemplateProcessing

    cls, sep = specials["cls"], specials["sep"]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )


def save_trained(tokenizer: Tokenizer, folder: Path, *, crammed: bool, model_max_length: int | None) -> None:
    """Write a folder that `AutoTokenizer.from_pretrained` loads."""
    specials = _special_tokens(crammed)
    roles = {"bos": specials["cls"], "eos": specials["sep"], **specials}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length or 1_000_000,
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": token for role, token in roles.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / TOKENIZER_FILE))
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", "utf-8")

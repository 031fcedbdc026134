"""The last word of a passage from all that stands before it, by a causal model: accuracy and perplexity.

The task of LAMBADA (Paperno et al. 2016, arXiv 1606.06031), for any passages: the last word is what follows the last white
space. It counts as predicted where each of its pieces has the largest score given the true pieces before it, which is
where greedy decoding would write it. Perplexity is exp of the mean over passages of -log p(word), as usual for LAMBADA,
and also exp of the mean over pieces. A passage is framed as training rows are; a longer one loses its beginning.

Which head scores the words is told by the metric's name: `last_word/...` is the model's own vocabulary head or the one that
its objective recovered, `last_word/raw_...` the bare input table in place of a head that the backbone does not have (what
Godey et al. 2024, arXiv 2309.08351, call headless).

N pieces of last words, D hidden size, V vocabulary, B rows, L positions.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparselt_dist.data.batch import Example, pad_examples
from sparselt_dist.data.cleaning import Normalization, normalize
from sparselt_dist.errors import DataError
from sparselt_dist.evaluation.features import MAX_LENGTH, chunks, evaluation_mode
from sparselt_dist.objectives.base import TokenizerInfo
from sparselt_dist.objectives.cwt_head import HoldsHead, head_logits, whole_table

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from sparselt_dist.data.corpora import Corpora
    from sparselt_dist.models.backbone import Backbone

Head = Callable[[Tensor], Tensor]
"""Hidden states [N, D] to scores [N, V]."""

_PIECES_AT_ONCE = 256
_LARGEST_EXPONENT = 700.0  # exp beyond it overflows
_FEWEST_WORDS = 8  # before the last word of a passage cut from held-out text
# A word that ends inside the text: what follows shows that it was not cut off.
_WORD = re.compile(r"(?<=\s)[^\W\d_]{2,}(?=\W)")


class Passage(NamedTuple):
    """A passage in pieces."""

    ids: list[int]
    """Framed; the last word's pieces are its end."""
    word_length: int
    """Pieces of the last word."""


# --- passages --------------------------------------------------------------------------------------------------------


class PassageReader:
    """Text to passages, in the tokens of a run."""

    def __init__(self, tokenizer: Tokenizer, info: TokenizerInfo, *, begins_behind_end: bool, longest: int) -> None:
        """
        Args:
            begins_behind_end: rows were cut from running text, in which a document follows the end of another.
            longest: most pieces of a passage.
        """
        self._tokenizer = tokenizer
        end = info.sep_id if info.sep_id is not None else info.eos_id
        begin = info.cls_id if info.cls_id is not None else info.bos_id
        first = end if begins_behind_end or begin is None else begin
        self._begin = [] if first is None else [first]
        self._special = set(info.special_ids)
        self._longest = longest

    def passage(self, text: str) -> Passage | None:
        """None: the text has no last word with something before it, or one longer than a row."""
        text = text.rstrip()
        before = len(text.removesuffix(text.split()[-1]).rstrip()) if text else 0
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        # the white space in front belongs to the word: whoever writes the word writes it
        word_length = sum(end > before for _, end in encoding.offsets)
        if word_length == 0 or word_length == len(encoding.ids):
            return None
        room = self._longest - len(self._begin)
        if word_length >= room:
            return None
        return Passage([*self._begin, *encoding.ids[-room:]], word_length)

    def cut(self, ids: Sequence[int]) -> Passage | None:
        """The passage of a held-out document that ends with its last whole word of letters."""
        longest: list[int] = max(self._stretches(ids), key=len, default=[])
        text = self._tokenizer.decode(longest, skip_special_tokens=True)
        ends = [match.end() for match in _WORD.finditer(text)]
        if not ends or len(text[: ends[-1]].split()) <= _FEWEST_WORDS:
            return None
        return self.passage(text[: ends[-1]])

    def _stretches(self, ids: Sequence[int]) -> Iterator[list[int]]:
        """Between special tokens."""
        stretch: list[int] = []
        for number in ids:
            if number not in self._special:
                stretch.append(number)
            elif stretch:
                yield stretch
                stretch = []
        yield stretch


def read_passages(path: Path, reader: PassageReader, how: Normalization) -> list[Passage]:
    """The passages of a file: one a line, or under `text` of each line's JSON object (.jsonl); blank lines are left out.

    Raises:
        DataError: the file cannot be read, has no passage, or a line that is none.
    """
    passages = []
    for number, text in _lines(path):
        passage = reader.passage(normalize(text, how))
        if passage is None:
            raise DataError(
                f"--last-word: {path}, line {number}: found {text[:60]!r}, expected a passage of two words or more whose last "
                "one is to be predicted; remove the line"
            )
        passages.append(passage)
    if not passages:
        raise DataError(f"--last-word: {path}: found no passage, expected one a line; name another file")
    return passages


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                yield number, json.loads(line)["text"] if path.suffix == ".jsonl" else line
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise DataError(
            f"--last-word: {path} cannot be read ({type(cause).__name__}: {cause}); expected UTF-8 text with a passage a line, "
            'or .jsonl with {"text": ...} a line'
        ) from cause


def cut_passages(corpora: Corpora, reader: PassageReader, *, samples: int) -> list[Passage]:
    """A passage from each of some held-out samples at even distances, where one has any."""
    numbers = np.unique(np.linspace(0, corpora.num_samples - 1, min(samples, corpora.num_samples)).astype(np.int64))
    found = []
    for stored in corpora.read(numbers):
        passage = None if stored is None else reader.cut(stored.ids[: 4 * MAX_LENGTH].tolist())
        if passage is not None:
            found.append(passage)
    return found


# --- scores ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def heads_of(backbone: Backbone, objective: torch.nn.Module | None) -> dict[str, Head]:
    """What can score words, by the prefix of its metrics: empty, or `raw_`.

    Args:
        objective: the module of the run, which may hold a recovered head.
    """
    if backbone.has_head:
        return {"": backbone.logits}
    embedding = backbone.get_input_embeddings()
    device = next(backbone.parameters()).device
    table_VD = whole_table(embedding, backbone.vocab_size, device)
    heads: dict[str, Head] = {"raw_": lambda hidden_ND: head_logits(hidden_ND, table_VD, None)}
    offered = objective.exported_head(backbone) if isinstance(objective, HoldsHead) else None
    if offered is not None:
        recovered_VD, bias_V = offered
        heads[""] = lambda hidden_ND: head_logits(hidden_ND, recovered_VD, bias_V)
    return heads


@torch.no_grad()
def last_word_scores(
    backbone: Backbone,
    heads: dict[str, Head],
    passages: Sequence[Passage],
    pad_id: int,
    device: torch.device,
) -> dict[str, float]:
    """Metrics `last_word/...` over the passages; the backbone, which lies on `device`, is causal."""
    results: dict[str, float] = {"last_word/passages": float(len(passages))}
    ordered = sorted(passages, key=lambda passage: len(passage.ids))
    with evaluation_mode(backbone):
        scored = {prefix: _scored(backbone, head, ordered, pad_id, device) for prefix, head in heads.items()}
    for prefix, (nats, hits) in scored.items():
        pieces = sum(passage.word_length for passage in passages)
        results |= {
            f"last_word/{prefix}accuracy": sum(hits) / len(hits),
            f"last_word/{prefix}perplexity": math.exp(min(sum(nats) / len(nats), _LARGEST_EXPONENT)),
            f"last_word/{prefix}piece_perplexity": math.exp(min(sum(nats) / pieces, _LARGEST_EXPONENT)),
        }
    return results


def _scored(
    backbone: Backbone, head: Head, passages: Sequence[Passage], pad_id: int, device: torch.device
) -> tuple[list[float], list[bool]]:
    """Of each passage -log p(last word) and whether every piece was the first guess."""
    nats: list[float] = []
    hits: list[bool] = []
    for group, nats_N, is_hit_N in _pieces(backbone, head, passages, pad_id, device):
        lengths = [passage.word_length for passage in group]
        nats += [float(part.sum()) for part in nats_N.split(lengths)]
        hits += [bool(part.all()) for part in is_hit_N.split(lengths)]
    return nats, hits


def _pieces(
    backbone: Backbone, head: Head, passages: Iterable[Passage], pad_id: int, device: torch.device
) -> Iterator[tuple[list[Passage], Tensor, Tensor]]:
    """Of each group of passages the pieces of all last words: nats float64 [N] and hits bool [N], on the CPU."""
    examples: list[Example] = [
        {"key": str(number), "ids": np.array(passage.ids, dtype=np.uint32), "seed": number}
        for number, passage in enumerate(passages)
    ]
    waiting = iter(passages)
    for chunk in chunks(examples):
        group = [next(waiting) for _ in chunk]
        ids_BL, attention_BL, _ = pad_examples(chunk, pad_id)
        rows = [row for row, passage in enumerate(group) for _ in range(passage.word_length)]
        places = [
            place for passage in group for place in range(len(passage.ids) - passage.word_length, len(passage.ids))
        ]
        answers_N = torch.from_numpy(ids_BL[rows, places]).to(device)
        hidden_BLD = backbone(
            torch.from_numpy(ids_BL).to(device), attention_mask=torch.from_numpy(attention_BL).to(device)
        )
        hidden_ND = hidden_BLD[torch.tensor(rows), torch.tensor(places) - 1]  # the state before a piece predicts it
        nats, hits = [], []
        for piece_nD, answers_n in zip(hidden_ND.split(_PIECES_AT_ONCE), answers_N.split(_PIECES_AT_ONCE), strict=True):
            log_chances_nV = head(piece_nD).double().log_softmax(dim=-1)
            nats.append(-log_chances_nV.gather(1, answers_n[:, None])[:, 0].cpu())
            hits.append((log_chances_nV.argmax(dim=1) == answers_n).cpu())
        yield group, torch.cat(nats), torch.cat(hits)

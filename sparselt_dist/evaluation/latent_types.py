"""Latent types of any text under a checkpoint of sparse latent typing, and what its decoder makes of them.

Ren et al. 2022, "Language Model Pre-Training with Sparse Latent Typing"; official code github.com/renll/SparseLT, whose
evaluation this follows: the best type without noise, null exactly where no other type scores above 0. A text is read as in
training: normalised and tokenized like the run's shards, each line or document by itself between cls and sep.

Everything is a pure function of checkpoint and text: evaluation mode, no draw. B rows, T positions, S written positions,
D hidden size, K types, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparselt_dist import checkpoint
from sparselt_dist.data.batch import Example, pad_examples
from sparselt_dist.data.cleaning import Normalization, normalize, text_normalization
from sparselt_dist.data.corpora import open_corpora
from sparselt_dist.data.piece_alignment import align
from sparselt_dist.data.shards import Stored
from sparselt_dist.data.tokenizer import load_for_text
from sparselt_dist.errors import CheckpointError, DataError
from sparselt_dist.models.loading import LoadedCheckpoint, load_checkpoint
from sparselt_dist.objectives.slt import SLTModule, TyperOutput

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NULL_TYPE = 0
NO_WORD = -1

_POSITIONS_PER_FORWARD = 4096
_LONGEST_ROW = 512  # where neither the run nor the model says how long a row may be
_SAMPLES_PER_READ = 64


@dataclass(frozen=True)
class TypeReader:
    """A checkpoint that can type text."""

    loaded: LoadedCheckpoint
    slt: SLTModule
    tokenizer: Tokenizer
    normalization: Normalization
    row_length: int
    device: torch.device

    @property
    def num_types(self) -> int:
        """K, the null type included."""
        return self.slt.typer.num_types


class Row(NamedTuple):
    """A stretch of text as the model reads it: T pieces."""

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]
    """Where each piece stands in the text; special tokens are nowhere, (0, 0)."""
    words: list[int]
    """The word of each piece, from 0; -1: a special token."""


class TypedText(NamedTuple):
    """A row and the types of its T pieces."""

    row: Row
    pieces: list[str]
    types: np.ndarray
    """int64 [T]."""
    probabilities: np.ndarray
    """float [T]: of the piece's type, without noise."""
    null_probabilities: np.ndarray
    """float [T]."""
    probability_sums: np.ndarray
    """float64 [K]: sums over the row."""

    @property
    def word_texts(self) -> list[str]:
        """The words as they stand in the text."""
        places: dict[int, tuple[int, int]] = {}
        for word, (start, end) in zip(self.row.words, self.row.spans, strict=True):
            if word != NO_WORD and (end > start or word not in places):
                known = places.get(word, (start, end))
                places[word] = (known[0] if known[1] > known[0] else start, end)
        return [self.row.text[start:end] for start, end in places.values()]


class Reconstruction(NamedTuple):
    """What the decoder writes from the typed states of a row."""

    text: str
    accuracy: float
    """Share of the pieces behind the first that are the row's own."""


# ---------------------------------------------------------------- the checkpoint


def open_reader(path: Path, device: torch.device) -> TypeReader:
    """A checkpoint folder, or the newest checkpoint of a run folder.

    Raises:
        CheckpointError: it is neither, is damaged, or was not trained with latent types.
    """
    loaded = load_checkpoint(checkpoint.find_intact(path))
    slt = next((module for module in loaded.model.modules() if isinstance(module, SLTModule)), None)
    if slt is None:
        raise CheckpointError(
            f"{loaded.path}: found objective {loaded.config.objective.name!r}, which has no latent types, expected a "
            "checkpoint trained with objective.name=slt; name another run, or train one (profile slt-continue goes on "
            "from a model)"
        )
    limits = (
        loaded.config.data.sequence_length,
        getattr(loaded.model.backbone.config, "max_position_embeddings", None),
    )
    loaded.model.to(device).eval()
    return TypeReader(
        loaded=loaded,
        slt=slt,
        tokenizer=load_for_text(loaded.tokenizer_dir),
        normalization=text_normalization(loaded.run_dir, loaded.config.prepare.normalize),
        row_length=next((limit for limit in limits if limit), _LONGEST_ROW),
        device=device,
    )


# ---------------------------------------------------------------- text to rows


def rows_of_lines(reader: TypeReader, lines: Iterable[str]) -> Iterator[Row]:
    """Each line that is not blank as a row of its own; longer ones are cut in front of a word."""
    info, tokenizer = reader.loaded.tokenizer, reader.tokenizer
    begin = [number for number in (info.cls_id if info.cls_id is not None else info.bos_id,) if number is not None]
    end = [number for number in (info.sep_id if info.sep_id is not None else info.eos_id,) if number is not None]
    room = max(1, reader.row_length - len(begin) - len(end))
    for line in lines:
        normalised = normalize(line, reader.normalization)
        encoding = tokenizer.encode(normalised, add_special_tokens=False)
        if not encoding.ids:
            continue
        spans = _original_spans(line, normalised, encoding.offsets)
        starts = _word_starts(reader, encoding.ids)
        for first, last in _cuts(starts, room):
            yield _framed(line, encoding.ids[first:last], spans[first:last], starts[first:last], begin, end)


def _original_spans(original: str, normalised: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Places in the original of places in its normalised form, white space at their start left out."""
    places = align(original, normalised)
    found = []
    for start, end in spans:
        while start < end and normalised[start].isspace():
            start += 1
        found.append((int(places[start]), int(places[end - 1]) + 1) if start < end else (0, 0))
    return found


def _word_starts(reader: TypeReader, ids: Sequence[int]) -> list[bool]:
    continues_V = reader.loaded.tokenizer.continues_word_V
    if continues_V is None:
        return [True] * len(ids)
    return [place == 0 or not bool(continues_V[number]) for place, number in enumerate(ids)]


def _cuts(starts: Sequence[bool], room: int) -> Iterator[tuple[int, int]]:
    """Stretches of at most `room` pieces that end in front of a word, where a word is not longer than that."""
    first = 0
    while first < len(starts):
        last = min(first + room, len(starts))
        if last < len(starts):
            last = next((place for place in range(last, first, -1) if starts[place]), last)
        yield first, last
        first = last


def _framed(
    line: str,
    ids: list[int],
    spans: list[tuple[int, int]],
    starts: list[bool],
    begin: list[int],
    end: list[int],
) -> Row:
    """A row between its special tokens, with the part of the line that it covers."""
    origin = min((span[0] for span in spans if span[1] > span[0]), default=0)
    text = line[origin : max(span[1] for span in spans)]
    moved = [(start - origin, stop - origin) if stop > start else (0, 0) for start, stop in spans]
    words = (np.cumsum([True, *starts[1:]]) - 1).tolist()
    nowhere = (0, 0)
    return Row(
        text=text,
        ids=[*begin, *ids, *end],
        spans=[*(nowhere for _ in begin), *moved, *(nowhere for _ in end)],
        words=[*(NO_WORD for _ in begin), *words, *(NO_WORD for _ in end)],
    )


# ---------------------------------------------------------------- shards to rows


def rows_of_shards(reader: TypeReader, location: str, samples: int) -> Iterator[Row]:
    """The documents of samples at even distances, as they are stored; their text is put together from the pieces.

    Raises:
        DataError: the shards cannot be read, or are of another tokenizer.
    """
    corpora = open_corpora(location, reader.loaded.config)
    if corpora.manifest.tokenizer_sha256 != reader.loaded.meta["tokenizer_sha256"]:
        raise DataError(
            f"--shards: {corpora.name}: tokenized otherwise than what {reader.loaded.path} was trained on; prepare the text "
            f"with the model's own tokenizer (prepare.tokenizer={reader.loaded.tokenizer_dir})"
        )
    numbers = np.unique(np.linspace(0, corpora.num_samples - 1, min(samples, corpora.num_samples)).astype(np.int64))
    for first in range(0, len(numbers), _SAMPLES_PER_READ):
        for stored in corpora.read(numbers[first : first + _SAMPLES_PER_READ]):
            for ids in [] if stored is None else _documents(stored, reader.row_length):
                yield _stored_row(reader, ids)


def _documents(stored: Stored, row_length: int) -> Iterator[list[int]]:
    """The sample's documents, longer ones in several rows."""
    lengths = [len(stored.ids)] if stored.documents is None else stored.documents.tolist()
    for end, length in zip(np.cumsum(lengths).tolist(), lengths, strict=True):
        for first in range(end - length, end, row_length):
            yield stored.ids[first : min(first + row_length, end)].tolist()


def _stored_row(reader: TypeReader, ids: list[int]) -> Row:
    """A stored row with a text of its words, one space between them."""
    special = set(reader.loaded.tokenizer.special_ids)
    starts = _word_starts(reader, ids)
    text, spans, words = "", [], []
    number, word_ids, origin = NO_WORD, list[int](), 0
    for place, piece in enumerate(ids):
        if piece in special:
            spans.append((0, 0))
            words.append(NO_WORD)
            continue
        if starts[place] or place == 0 or words[place - 1] == NO_WORD:
            text += " " if text else ""
            number, word_ids, origin = number + 1, [], len(text)
        word_ids.append(piece)
        so_far = reader.tokenizer.decode(word_ids, skip_special_tokens=False).strip()
        start = len(text)
        text = text[:origin] + so_far if len(so_far) >= start - origin else text
        spans.append((start, len(text)) if len(text) > start else (0, 0))
        words.append(number)
    return Row(text, ids, spans, words)


# ---------------------------------------------------------------- rows to types


def type_rows(reader: TypeReader, rows: Iterable[Row]) -> Iterator[TypedText]:
    """The rows with their types, in order."""
    group: list[Row] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row.ids))
        if group and longest * (len(group) + 1) > _POSITIONS_PER_FORWARD:
            yield from _type_group(reader, group)
            group, longest = [], len(row.ids)
        group.append(row)
    if group:
        yield from _type_group(reader, group)


def _type_group(reader: TypeReader, group: list[Row]) -> list[TypedText]:
    _, _, typed = _forward(reader, group)
    types_BT = typed.types.cpu()
    probabilities_BTK = typed.probabilities.double().cpu()
    best_BT = probabilities_BTK.gather(2, types_BT[..., None])[..., 0]
    found = []
    for number, row in enumerate(group):
        length = len(row.ids)
        found.append(
            TypedText(
                row=row,
                pieces=[reader.tokenizer.id_to_token(piece) or f"<{piece}>" for piece in row.ids],
                types=types_BT[number, :length].numpy(),
                probabilities=best_BT[number, :length].numpy(),
                null_probabilities=probabilities_BTK[number, :length, NULL_TYPE].numpy(),
                probability_sums=probabilities_BTK[number, :length].sum(dim=0).numpy(),
            )
        )
    return found


@torch.no_grad()
def _forward(reader: TypeReader, group: list[Row]) -> tuple[Tensor, Tensor, TyperOutput]:
    """The attention mask [B, T], the gated states [B, T, D] and the types of some rows."""
    examples: list[Example] = [{"key": "", "ids": np.array(row.ids, dtype=np.uint32), "seed": 0} for row in group]
    ids_BT, mask_BT, _ = pad_examples(examples, reader.loaded.tokenizer.pad_id)
    mask = torch.from_numpy(mask_BT).to(reader.device)
    hidden_BTD = reader.loaded.model.backbone(torch.from_numpy(ids_BT).to(reader.device), attention_mask=mask)
    # The temperature is that of a draw, and in evaluation mode nothing is drawn.
    typed: TyperOutput = reader.slt.typer(hidden_BTD, mask, temperature=1.0)
    return mask, hidden_BTD * typed.type_vectors, typed


# ---------------------------------------------------------------- types to text


@torch.no_grad()
def rebuild(reader: TypeReader, row: Row) -> Reconstruction:
    """Greedy decoding from the row's first piece, as many pieces as the row has; it does not end at sep.

    As in the official code: the decoder sees the source through its typed states alone, and its length.
    """
    backbone, decoder = reader.loaded.model.backbone, reader.slt.decoder
    mask_1T, memory_1TD, _ = _forward(reader, [row])
    written_1S = torch.tensor([row.ids[:1]], device=reader.device)
    for _ in range(len(row.ids) - 1):
        states_1SD = decoder(backbone, written_1S, memory_1TD, mask_1T)
        scores_1V: Tensor = decoder.head(states_1SD[:, -1], backbone.get_input_embeddings())
        written_1S = torch.cat([written_1S, scores_1V.argmax(dim=-1, keepdim=True)], dim=1)
    written: list[int] = written_1S[0].tolist()
    hits = [own == made for own, made in zip(row.ids[1:], written[1:], strict=True)]
    text = reader.tokenizer.decode(written, skip_special_tokens=True)
    return Reconstruction(text, sum(hits) / len(hits) if hits else 1.0)

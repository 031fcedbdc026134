"""Sentences in pieces, with what a submodel that reads context learns to tell of each piece.

| array | of each piece |
|---|---|
| `ids` | [N], all pieces end to end; `ends` [S]: where each sentence ends |
| `begins` | bool [N]: it is the first of its chunk, or of the part of a chunk after a gap |
| `roles_A1` ... | uint8 [N]: 0 in no pair of the family, 1 in a head, 2 in a dependent; the first pair's, if in several |
| `distances_A1` ... | uint8 [N]: chunks to that of the partner's root; 0: in no pair, 1 to 4: -4 to -1, 5 to 8: 1 to 4, 9: more |

A3 joins words inside a chunk, so there distances count words. Chunks are counted by their first words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sparselt_dist.data.agreements import FAMILIES, Agreement, Chunk, Family
from sparselt_dist.data.pair_columns import id_type, join_ends

NEAR = 4
FAR = 2 * NEAR + 1
HEAD, DEPENDENT = 1, 2


def label_sentence(
    ids: Sequence[int],
    words: Sequence[int],
    chunks: Sequence[Chunk],
    agreements: Sequence[Agreement],
    vocab_size: int,
) -> dict[str, np.ndarray]:
    """The arrays of one sentence.

    Args:
        ids: of its pieces.
        words: the number in the sentence of the word that each piece belongs to, -1 for none.
        chunks: each word is in exactly one.
        agreements: in order; of two that claim a word the first has it.
    """
    ordered = sorted(chunks, key=lambda chunk: chunk.words[0])
    chunk_of = {word: number for number, chunk in enumerate(ordered) for word in chunk.words}
    arrays = {
        "ids": np.array(ids, dtype=id_type(vocab_size)),
        "ends": np.array([len(ids)], dtype=np.uint32),
        "begins": np.array(_begins([chunk_of.get(word, -1) for word in words]), dtype=bool),
    }
    for family in FAMILIES:
        roles = _roles([agreement for agreement in agreements if agreement.family == family], family, chunk_of)
        of_pieces = [roles.get(word, (0, 0)) for word in words]
        arrays[f"roles_{family}"] = np.array([role for role, _ in of_pieces], dtype=np.uint8)
        arrays[f"distances_{family}"] = np.array([distance for _, distance in of_pieces], dtype=np.uint8)
    return arrays


def _begins(chunks: Sequence[int]) -> list[bool]:
    begins, last = [], -1
    for chunk in chunks:
        begins.append(chunk not in (-1, last))
        last = last if chunk == -1 else chunk
    return begins


def _roles(agreements: Sequence[Agreement], family: Family, chunk_of: Mapping[int, int]) -> dict[int, tuple[int, int]]:
    """Role and bucket of the distance to the partner's root, by word."""
    roles: dict[int, tuple[int, int]] = {}
    for pair in agreements:
        for role, side, partner in (
            (HEAD, pair.head, pair.dependent_root),
            (DEPENDENT, pair.dependent, pair.head_root),
        ):
            for word in side:
                distance = partner - word if family == "A3" else chunk_of[partner] - chunk_of[word]
                roles.setdefault(word, (role, distance))
    return {word: (role, bucket(distance)) for word, (role, distance) in roles.items()}


def bucket(distance: int) -> int:
    """-4 to -1: 1 to 4; 1 to 4: 5 to 8; farther: 9; 0: 0."""
    if abs(distance) > NEAR:
        return FAR
    return distance + NEAR + 1 if distance < 0 else distance + NEAR if distance > 0 else 0


def join_text(parts: Sequence[Mapping[str, np.ndarray]], vocab_size: int, max_pieces: int) -> dict[str, np.ndarray]:
    """Labelled text one after another, cut at the last sentence end within `max_pieces`."""
    parts = [label_sentence([], [], [], [], vocab_size), *parts]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name != "ends"}
    ends = join_ends([part["ends"] for part in parts])[1:]  # the first, an empty sentence, gives the types
    ends = ends[ends <= max_pieces]
    size = int(ends[-1]) if len(ends) else 0
    return {"ends": ends, **{name: array[:size] for name, array in joined.items()}}

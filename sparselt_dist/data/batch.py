"""Examples, batches and the randomness of collators.

A *batch* is a plain dict of CPU tensors (B rows, L positions):

| key | shape, dtype | meaning |
|---|---|---|
| `input_ids` | [B, L] int64 | always; possibly corrupted |
| `attention_mask` | [B, L] int64 | always; 1 attend, 0 pad |
| `labels` | [B, L] int64 | always; target id, or -100 for "not a target" |
| `num_targets`, `num_tokens` | [] int64 | always; targets (the trainer's weight) and non-pad tokens |
| `original_ids` | [B, L] int64 | optional; ids before corruption |
| `segment_ids`, `position_ids` | [B, L] int64 | optional, packed rows: document number (0 = pad), position in it |
| `<objective>/<key>` | documented there | private to one objective |

Randomness is counter-based: a draw is a pure function of (example seed, purpose, position). No generator
is kept anywhere, so masks survive a resume and any change of ranks, workers or micro-batch size.
"""

from __future__ import annotations

import hashlib
from typing import TypedDict

import numpy as np
import torch

IGNORE_INDEX = -100

Batch = dict[str, torch.Tensor]


class Example(TypedDict):
    """One stored row or document on its way to a collator."""

    key: str  # "<shard file>/<number in the shard>", unique in a shard folder
    ids: np.ndarray  # [n] uint16 or uint32
    seed: int  # 64 bits, from (run seed, epoch, sample): the source of all of its randomness


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def mix64(values: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser (Steele, Lea, Flood 2014): uint64 array in, uint64 array out."""
    z = values.astype(np.uint64, copy=True)
    z ^= z >> np.uint64(30)
    z *= _MIX_1
    z ^= z >> np.uint64(27)
    z *= _MIX_2
    z ^= z >> np.uint64(31)
    return z


def purpose_key(purpose: str) -> int:
    """A 64-bit number for a named use of randomness, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")


def random_bits(seeds_B: np.ndarray, length: int, purpose: str) -> np.ndarray:
    """Uniform 64-bit words [B, length] from example seeds [B] uint64; a pure function of its arguments."""
    streams_B1 = mix64(seeds_B.astype(np.uint64) ^ np.uint64(purpose_key(purpose)))[:, None]
    counters_L = np.arange(1, length + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        return mix64(streams_B1 + counters_L[None, :] * _GOLDEN)


def random_uniform(seeds_B: np.ndarray, length: int, purpose: str) -> np.ndarray:
    """Uniform float64 [B, length] in [0, 1), 53 random bits each."""
    return (random_bits(seeds_B, length, purpose) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def pad_examples(examples: list[Example], pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right-pad ids to the longest example.

    Returns ids [B, L] int64, attention mask [B, L] int64 and example seeds [B] uint64.
    """
    lengths = np.array([len(example["ids"]) for example in examples])
    ids_BL = np.full((len(examples), int(lengths.max())), pad_id, dtype=np.int64)
    for row, example in enumerate(examples):
        ids_BL[row, : lengths[row]] = example["ids"]
    mask_BL = (np.arange(ids_BL.shape[1])[None, :] < lengths[:, None]).astype(np.int64)
    seeds_B = np.array([example["seed"] for example in examples], dtype=np.uint64)
    return ids_BL, mask_BL, seeds_B

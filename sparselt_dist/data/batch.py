"""Examples and batches.

A *batch* is a plain dict of CPU tensors (B rows, L positions):

| key | shape, dtype | meaning |
|---|---|---|
| `input_ids` | [B, L] int64 | always; possibly corrupted |
| `attention_mask` | [B, L] int64 | always; 1 attend, 0 pad |
| `labels` | [B, L] int64 | always; target id, or -100 for "not a target" |
| `num_targets`, `num_tokens` | [] int64 | always; targets (the trainer's weight) and non-pad tokens; they stay on the CPU |
| `original_ids` | [B, L] int64 | optional; ids before corruption |
| `segment_ids`, `position_ids` | [B, L] int64 | optional, packed rows: document number (0 = pad), position in it |
| `<objective>/<key>` | documented there | private to one objective |
"""

from __future__ import annotations

from typing import NotRequired, TypedDict

import numpy as np
import torch
import torch.nn.functional as F

IGNORE_INDEX = -100

Batch = dict[str, torch.Tensor]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device, but for its counts (tensors of no dimension), which can so be read without waiting for it.

    Copies from pinned memory are not awaited.
    """
    return {key: value.to(device, non_blocking=True) if value.dim() else value for key, value in batch.items()}


class Example(TypedDict):
    """One stored row or document on its way to a collator."""

    key: str  # "<shard file>/<number in the shard>", unique in a shard folder
    ids: np.ndarray  # [n] uint16 or uint32
    seed: int  # 64 bits, from (run seed, epoch, sample): the source of all of its randomness
    documents: NotRequired[np.ndarray]  # packed rows: lengths of the documents in `ids`, in order


def pad_examples(examples: list[Example], pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right-pad ids to the longest example.

    Returns ids [B, L] int64, attention mask [B, L] int64 and example seeds [B] uint64.
    """
    rows = [example["ids"] for example in examples]
    lengths = [len(ids) for ids in rows]
    longest = max(lengths)
    seeds_B = np.array([example["seed"] for example in examples], dtype=np.uint64)
    if min(lengths) == longest:  # rows of one length, the usual case: nothing to pad
        ids_BL = np.concatenate(rows).reshape(len(rows), longest).astype(np.int64)
        return ids_BL, np.ones_like(ids_BL), seeds_B
    ids_BL = np.full((len(rows), longest), pad_id, dtype=np.int64)
    for row, ids in enumerate(rows):
        ids_BL[row, : len(ids)] = ids
    mask_BL = (np.arange(longest)[None, :] < np.array(lengths)[:, None]).astype(np.int64)
    return ids_BL, mask_BL, seeds_B


def cut_rows(batch: Batch, length: int, pad_id: int) -> Batch:
    """Every row [L] as pieces [length] in order, the last one padded, pieces of padding alone left out.

    No token or target is lost, and counts stay. Attention ends at a cut, and the positions of a document that is cut begin
    anew there. Keys private to an objective stay as they are.
    """
    fill = {"input_ids": pad_id, "original_ids": pad_id, "labels": IGNORE_INDEX}
    fill |= dict.fromkeys(("attention_mask", "segment_ids", "position_ids"), 0)
    surplus = -batch["input_ids"].shape[1] % length
    cut = {
        key: F.pad(batch[key], (0, surplus), value=value).reshape(-1, length)
        for key, value in fill.items()
        if key in batch
    }
    used = cut["attention_mask"].any(dim=1)
    cut = {key: value[used] for key, value in cut.items()}
    if "segment_ids" in cut:
        goes_on = (cut["segment_ids"] == cut["segment_ids"][:, :1]) & (cut["segment_ids"] > 0)
        cut["position_ids"] = cut["position_ids"] - cut["position_ids"][:, :1] * goes_on
    return {**batch, **cut}

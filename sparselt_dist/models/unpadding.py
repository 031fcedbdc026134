"""Rows without padding: the samples of a batch laid side by side in as few rows as hold them, and back.

The samples keep apart (attention inside each, positions from 0), so every hidden state is what it is with padding; only
the work on padding is saved. B rows and L positions with padding, R rows and W positions without, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparselt_dist.data.best_fit import pack_best_fit


class Layout(NamedTuple):
    """Where each token stands with and without padding."""

    padded_T: Tensor  # int64, places in the flattened [B * L]
    packed_T: Tensor  # int64, places in the flattened [R * W]
    segment_ids_RW: Tensor  # int64, 0: unused
    position_ids_RW: Tensor  # int64

    def pack(self, values_BL: Tensor) -> Tensor:
        """Values of the tokens in rows without padding, [R, W]; unused places are 0."""
        packed = values_BL.new_zeros(self.segment_ids_RW.numel())
        packed[self.packed_T] = values_BL.flatten()[self.padded_T]
        return packed.view_as(self.segment_ids_RW)

    def unpack(self, hidden_RWD: Tensor, rows: int, width: int) -> Tensor:
        """Hidden states back in their padded places, [B, L, D]; those of padding are 0."""
        hidden_TD = hidden_RWD.flatten(0, 1).index_select(0, self.packed_T)
        flat = hidden_TD.new_zeros(rows * width, hidden_TD.shape[1])
        return flat.index_copy(0, self.padded_T, hidden_TD).view(rows, width, -1)


def find_layout(attention_mask_BL: Tensor) -> Layout | None:
    """The layout of a batch's samples, best fit first; None where it would save nothing.

    A mask with anything but padding at the end of rows is left as it is. Looks at the mask's values, so on an
    accelerator this waits for it once.
    """
    mask = attention_mask_BL.detach().cpu().numpy()
    lengths = mask.sum(axis=1)
    width = int(lengths.max(initial=0))
    used = lengths > 0
    at_the_end = bool((mask == (np.arange(mask.shape[1]) < lengths[:, None])).all())
    if width == 0 or not at_the_end:
        return None
    samples = np.flatnonzero(used)
    row_S = pack_best_fit(lengths[samples], width)
    if len(np.unique(row_S)) * width >= mask.size:
        return None
    return _layout(samples, lengths[samples], row_S, mask.shape[1], width, attention_mask_BL.device)


def _layout(
    samples_S: np.ndarray, lengths_S: np.ndarray, row_S: np.ndarray, length: int, width: int, device: torch.device
) -> Layout:
    order = np.argsort(row_S, kind="stable")
    samples_S, lengths_S, row_S = samples_S[order], lengths_S[order], row_S[order]
    first_S = np.cumsum(lengths_S) - lengths_S  # of each sample in the tokens end to end
    new_row_S = np.concatenate([[True], row_S[1:] != row_S[:-1]])
    row_first_S = np.maximum.accumulate(np.where(new_row_S, first_S, 0))
    index_S = np.arange(len(row_S))
    segment_S = index_S - np.maximum.accumulate(np.where(new_row_S, index_S, 0)) + 1
    within_T = np.arange(int(lengths_S.sum())) - np.repeat(first_S, lengths_S)
    packed_T = np.repeat(row_S * width + first_S - row_first_S, lengths_S) + within_T
    padded_T = np.repeat(samples_S * length, lengths_S) + within_T
    shape = (int(row_S.max()) + 1, width)
    segments, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    segments.reshape(-1)[packed_T] = np.repeat(segment_S, lengths_S)
    positions.reshape(-1)[packed_T] = within_T
    arrays = (padded_T, packed_T, segments, positions)
    return Layout(*(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays))

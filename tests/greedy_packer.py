"""The yardstick of packing: the online packer of ModernBERT (Warner et al. 2024, section 3.1), which fills rows greedily."""

from __future__ import annotations

import bisect


def greedy_fill(lengths: list[int], capacity: int, buffer_size: int = 5000) -> float:
    """The share filled by an online packer: a row takes the longest piece of a buffer that fits, again and again."""
    waiting = iter(lengths)
    buffer = sorted(length for length, _ in zip(waiting, range(buffer_size), strict=False))
    rows = 0
    while buffer:
        space, rows = capacity, rows + 1
        while (place := bisect.bisect_right(buffer, space)) > 0:
            space -= buffer.pop(place - 1)
            following = next(waiting, None)
            if following is not None:
                bisect.insort(buffer, following)
    return sum(lengths) / (rows * capacity)

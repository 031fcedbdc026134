"""Memory that a training step frees stays with the process, to be used again by the next step (glibc on CPUs).

glibc maps each large block anew and gives it back when it is freed, so every step pays for page faults on the same memory:
10 to 15 % of the processor time of a bf16 step of 25 M parameters (`tests/benchmarks/step_speed.py`).
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
_KEPT_BYTES = 2**31 - 1  # mallopt takes an int
_PAD_BYTES = 2**28


def keep_freed_memory() -> bool:
    """Ask the C library to keep what is freed; returns whether it will (only glibc can be asked)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_THRESHOLD, _KEPT_BYTES), (_TRIM_THRESHOLD, _KEPT_BYTES), (_TOP_PAD, _PAD_BYTES))
    return all(mallopt(name, value) == 1 for name, value in settings)

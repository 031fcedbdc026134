"""On the path of a run, this makes the wall clock of its Python processes jump once a file says by how many seconds.

The file holds the seconds and whose clock it is: `all`, or the number of a rank. The monotonic clock goes on as it did, as
when a real clock is set.
"""

import os
import time

_FILE = os.environ.get("SPARSELT_TESTS_CLOCK", "")
_true_time = time.time


def _shift() -> float:
    try:
        with open(_FILE) as file:
            seconds, whose = file.read().split()
    except (OSError, ValueError):
        return 0.0
    return float(seconds) if whose in ("all", os.environ.get("RANK")) else 0.0


def _shifted_time() -> float:
    return _true_time() + _shift()


if _FILE:
    time.time = _shifted_time
    time.time_ns = lambda: int(_shifted_time() * 1e9)

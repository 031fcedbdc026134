"""Freed memory is used again rather than mapped anew, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
if sys.argv[1] == "keep":
    from sparselt_dist.allocator import keep_freed_memory
    assert keep_freed_memory()
blocks = bytes(64 << 20), bytes(64 << 20)
del blocks
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    bytearray(64 << 20)[::4096]  # written, so every page is there
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone can be asked")
def test_freed_memory_is_used_again() -> None:
    faults = {
        mode: int(subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, check=True).stdout)
        for mode in ("keep", "leave")
    }
    assert faults["keep"] < 0.2 * faults["leave"]

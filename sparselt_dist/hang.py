"""Whether a run hangs, by what its ranks last said, and the message that says which of them hold it up. Free of torch."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

BEAT_SECONDS = 1.0
PATIENCE = 6  # times the limit, in phases that take long as one
PATIENT = frozenset({"compile", "checkpoint"})
UNBOUNDED = frozenset({"other", "prelude", "yardsticks", "export"})
_SHOWN_RANKS = 16


class Report(NamedTuple):
    """Where a rank was when it last said so."""

    step: int
    phase: str
    age: float  # seconds in that phase, by the rank
    silent: float  # seconds since it said so


def hung_ranks(reports: Mapping[int, Report], limit: float) -> list[int]:
    """The ranks that hold up a run in which nobody gets on; none where all is well.

    `limit`: seconds. A rank that says nothing for so long hangs, whatever its phase. Else all must be late, for those
    who wait for one that is still at work are late and sound; of them the one is behind that moved last the longest ago.
    """
    silent = [rank for rank, report in reports.items() if report.silent > limit]
    if silent or not reports:
        return silent
    if not all(_is_late(report, limit) for report in reports.values()):
        return []
    first = min(report.step for report in reports.values())
    behind = {rank: report for rank, report in reports.items() if report.step == first}
    at_work = {rank: report for rank, report in behind.items() if report.phase != "communication"} or behind
    return [max(at_work, key=lambda rank: at_work[rank].age + at_work[rank].silent)]


def _is_late(report: Report, limit: float) -> bool:
    if report.phase in UNBOUNDED:
        return False
    return report.age + report.silent > limit * (PATIENCE if report.phase in PATIENT else 1)


def _described(rank: int, report: Report, peer: Mapping[str, Any]) -> str:
    where = f"rank {rank} on {peer.get('host', '?')} (pid {peer.get('pid', '?')}{_process_state(peer)})"
    silence = f", silent for {report.silent:.0f} s" if report.silent > 3 * BEAT_SECONDS else ""
    return f"{where}: step {report.step}, {report.phase} for {report.age + report.silent:.0f} s{silence}"


def _process_state(peer: Mapping[str, Any]) -> str:
    """What the kernel says of a process of this machine that does not run."""
    if peer.get("host") != socket.gethostname():
        return ""
    with contextlib.suppress(OSError, IndexError):
        letter = Path(f"/proc/{peer['pid']}/stat").read_text().rpartition(")")[2].split()[0]
        return {"T": ", stopped by a signal", "D": ", waiting for a disk", "Z": ", ended"}.get(letter, "")
    return ""


def hang_message(behind: list[int], reports: Mapping[int, Report], peers: Mapping[int, Any], minutes: float) -> str:
    """What rank 0 says of a run that hangs."""
    others = [rank for rank in sorted(reports) if rank not in behind][:_SHOWN_RANKS]
    lines = [
        f"the run hangs: nothing got on for {minutes:g} minutes (train.hang_minutes)",
        *(f"  behind: {_described(rank, reports[rank], peers.get(rank, {}))}" for rank in behind[:_SHOWN_RANKS]),
        *(f"  waits:  {_described(rank, reports[rank], peers.get(rank, {}))}" for rank in others),
    ]
    return "\n".join(lines)

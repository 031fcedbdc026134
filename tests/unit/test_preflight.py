"""The verdict on what the ranks found of themselves."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from corpus_files import numbered_rows, write_folder

from sparselt_dist import preflight
from sparselt_dist.config import Config
from sparselt_dist.data.corpora import open_folder
from sparselt_dist.preflight import Facts, judge

FOLDER = Path("runs/x")


def facts(**changes: object) -> Facts:
    sound = Facts("a", {"python": "3.12.1", "torch": "2.9"}, "c0ffee", 8.0, 100.0, 200.0, "", "", 1.0, "", math.inf, 1)
    return sound._replace(**changes)  # type: ignore[arg-type]


def found(*all_facts: Facts, skews: tuple[float, ...] = (0.0,), reduce_mib: float | None = 500.0) -> list[str]:
    return [f"{each.level}: {each.found}" for each in judge(all_facts, skews, reduce_mib, FOLDER)]


def test_sound_ranks_on_two_hosts() -> None:
    assert found(facts(device="gpu-1"), facts(device="gpu-1", host="b"), skews=(0.0, 0.3)) == []


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"versions": {"python": "3.12.1", "torch": "2.8"}}, "error: torch is 2.8 on rank 1 (a), 2.9 elsewhere"),
        ({"config": "beef"}, "error: configuration is beef on rank 1 (a), c0ffee elsewhere"),
        ({"write_fault": "Read-only"}, "error: runs/x cannot be written on rank 1 (a): Read-only"),
        ({"missing": "/s/shard-0.tar"}, "error: /s/shard-0.tar is not there on rank 1 (a)"),
        ({"memory_gib": 0.5}, "warning: less than 1 GiB free on rank 1 (a)"),
        ({"disk_gib": 0.5}, "warning: less than 1 GiB free in runs/x on rank 1 (a)"),
        ({"write_mib": 2.0}, "warning: runs/x takes 2.0 MiB/s on rank 1 (a)"),
        (
            {"cores": 0.125, "processes": 5},
            "warning: Slurm gives 0.125 a rank, which is 5 process(es) with its loader's workers, on rank 1 (a)",
        ),
        ({"device_free": 0.3}, "warning: more than half of the memory is taken on rank 1 (a)"),
    ],
)
def test_the_odd_one_is_named(odd: dict[str, object], message: str) -> None:
    assert found(facts(), facts(**odd), facts()) == [message]


def test_a_shared_device_is_an_error_and_slow_clocks_and_networks_are_warnings() -> None:
    shared = found(facts(device="gpu-1"), facts(device="gpu-1"))
    assert shared == ["error: ranks 0 (a), 1 (a) share device gpu-1"]
    assert found(facts(), facts(), skews=(0.0, -7.5)) == ["warning: -7.5 s against rank 0 on rank 1 (a)"]
    assert found(facts(), facts(), reduce_mib=3.0) == ["warning: a sum over ranks moves 3.0 MiB/s"]


def test_a_host_without_the_last_shards_is_found_by_a_look_at_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "MOST_SHARDS", 2)
    corpora = open_folder(write_folder(tmp_path, numbered_rows(40)))

    def missing() -> str:
        return preflight.own_facts(Config(), tmp_path, [corpora], torch.device("cpu"), 0).missing

    assert missing() == ""
    for number in (2, 3):  # as a copy that was broken off leaves it
        (tmp_path / f"shard-{number:06d}.tar").unlink()
    assert missing() == str(tmp_path / "shard-000002.tar")

"""A paper model of a large job: what a start, a step, a checkpoint and the data cost by number of ranks, and what gives first.

    python tests/cluster/scaling_model.py --work-dir /tmp/scaling

Prints the unit costs measured here (`scaling_costs.py`; kept in `costs.json` of the work folder, so that the model can be
asked again with other assumptions), what follows from them for 8 to 4,096 ranks, and for each item the number of ranks at which
it exceeds its bound. What cannot be measured here is an assumption with an option: storage, the device, the model, the shards.

Formulas are functions of the ranks, in the unit that their name ends with. docs/scaling.md says where they come from.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scaling_costs import LARGE_BYTES, SMALL_BYTES, Costs, measure

from sparselt_dist.device import Device, find_device
from sparselt_dist.preflight import MOST_SHARDS
from sparselt_dist.tensor_files import LEAST_SHARE_BYTES
from sparselt_dist.watchdog import BEAT_SECONDS, RANKS_A_SECOND

SHOWN = (8, 64, 256, 1024, 4096)
LARGEST = 2**20
SAVED_BYTES = 12  # a parameter: fp32 weight and two moments
WEIGHT_BYTES = 4
MOMENT_FILES = 2  # that hold a rank's own moments, where as many ranks saved them
FILES_A_RANK = 3  # of a checkpoint: weights, moments, random state
GATHERS_AT_START, BROADCASTS_AT_START = 14, 5  # of objects, from the group's start to the first step
BROADCASTS_AT_SAVE = 2  # of objects: whether the step is saved already, whether there is room
SUMS_A_STEP = 3  # what all drew; loss, stop votes and clock; the journal line
STORE_REQUESTS = 2  # of a rank to join, and for NCCL's identity of each group: wait and get
MESH_REQUESTS = 2  # of a rank with gloo, for the address of every other in each group; counted
HASHED_AT_ONCE = 4  # files, by rank 0, before a resume
LEAK_LOOK_SECONDS = 60.0


@dataclass(frozen=True)
class Assumptions:
    """What is not measured here."""

    parameters: float = 1.3e9
    zero_stage: int = 3
    device: str = "h100-80gb"
    ranks_per_host: int = 8
    tokens_per_rank_step: int = 16_384
    shards: int = 100_000
    samples_per_shard: int = 10_000
    tokens_per_sample: int = 1024
    bytes_per_token: int = 2
    storage_gb_s: float = 50.0  # shared storage, all hosts together
    metadata_ops_s: float = 20_000.0  # files opened, made, looked for or deleted a second, all hosts together
    groups: int = 2  # process groups of all ranks: the first, and DeepSpeed's clone of it
    turn_us: float = 0.0  # a message between two ranks; 0: as a sum of two ranks takes here, over the loopback
    save_minutes: float = 30.0
    start_bound_seconds: float = 60.0
    step_bound_share: float = 0.01


class Item(NamedTuple):
    """One thing that grows with ranks, and the bound it should stay below."""

    name: str
    unit: str
    at: Callable[[int], float]
    bound: float


def line(points: dict[int, float], at: float) -> float:
    """The straight line nearest to what was measured, never below 0."""
    slope, start = np.polyfit(list(points), list(points.values()), 1)
    return max(0.0, float(start + slope * at))


class Model:
    """The items by number of ranks."""

    def __init__(self, costs: Costs, assumed: Assumptions) -> None:
        self.costs, self.assumed = costs, assumed
        self.device: Device = find_device(assumed.device)
        self.saved_bytes = SAVED_BYTES * assumed.parameters
        self.store_requests_s = max(costs.store_requests_s.values())

    def hosts(self, ranks: int) -> int:
        return math.ceil(ranks / self.assumed.ranks_per_host)

    def storage_seconds(self, num_bytes: float) -> float:
        return num_bytes / (self.assumed.storage_gb_s * 1e9)

    # ---- collectives

    def turn_seconds(self) -> float:
        """Of a short message between two ranks."""
        return self.assumed.turn_us * 1e-6 or self.costs.step_sum[2]

    def gather_seconds(self, ranks: int, num_bytes: float) -> float:
        """Of an object of every rank, on all: two ranks as here; a ring of n, of the size and of the content, has n - 1
        turns and hands all content past every rank; every rank takes n objects apart."""
        small, large = self.costs.small_gather[2], self.costs.large_gather[2]
        per_byte = max(0.0, large - small) / (LARGE_BYTES - SMALL_BYTES)
        further = (ranks - 2) * (2 * self.turn_seconds() + num_bytes * per_byte)
        return small + max(0.0, further) + line(self.costs.taken_apart, ranks)

    def sum_seconds(self, ranks: int) -> float:
        """Of some numbers over all ranks: by doubling, log2(n) turns."""
        return math.ceil(math.log2(max(ranks, 2))) * self.turn_seconds()

    # ---- the start, seconds

    def import_seconds(self, ranks: int) -> float:
        """Imports and configuration, where each host opens all files of the packages on shared storage."""
        opened = self.hosts(ranks) * self.costs.import_files / self.assumed.metadata_ops_s
        return self.costs.import_seconds + self.costs.config_seconds + opened

    def rendezvous_seconds(self, ranks: int) -> float:
        """What rank 0's store answers, with NCCL."""
        return ranks * (1 + self.assumed.groups) * STORE_REQUESTS / self.store_requests_s

    def mesh_seconds(self, ranks: int) -> float:
        """With gloo, on CPUs: every rank asks for the address of every other, in every group."""
        return MESH_REQUESTS * ranks**2 * self.assumed.groups / self.store_requests_s

    def agreement_seconds(self, ranks: int) -> float:
        """Objects gathered and given out, the largest what each rank found of itself, and rank 0's verdict on them."""
        gathers = GATHERS_AT_START * self.gather_seconds(ranks, self.costs.facts_bytes / GATHERS_AT_START)
        return gathers + 2 * BROADCASTS_AT_START * self.sum_seconds(ranks) + line(self.costs.judge, ranks)

    def manifest_seconds(self, ranks: int) -> float:
        """Every rank reads the manifest."""
        num_bytes, parsed = (line(table, self.assumed.shards) for table in self._manifest_tables())
        return self.storage_seconds(ranks * num_bytes) + parsed

    def _manifest_tables(self) -> tuple[dict[int, float], dict[int, float]]:
        return dict(self.costs.manifest_bytes), self.costs.manifest_parse

    def presence_seconds(self, ranks: int) -> float:
        """Each shard looked for by one rank, and some by every host."""
        looks = self.assumed.shards + self.hosts(ranks) * min(MOST_SHARDS, self.assumed.shards)
        return looks / self.assumed.metadata_ops_s

    def small_file_seconds(self, ranks: int) -> float:
        """Two files a rank in the run's folder, a probe, which is deleted, and a log."""
        return 3 * ranks / self.assumed.metadata_ops_s

    # ---- a resume, seconds

    def verify_seconds(self, ranks: int) -> float:
        """Rank 0 reads and hashes the checkpoint while the others wait."""
        return self.saved_bytes / (HASHED_AT_ONCE * self.costs.hash_bytes_s)

    def load_seconds(self, ranks: int) -> float:
        """Every rank reads all weights, a host once from storage, and its own moments."""
        weights = WEIGHT_BYTES * self.assumed.parameters
        moments = self.saved_bytes - weights
        opened = ranks * (self.weight_files(ranks) + MOMENT_FILES) / self.assumed.metadata_ops_s
        shared = self.storage_seconds(self.hosts(ranks) * weights + moments)
        return opened + max(shared, (weights + moments / ranks) / self.costs.read_bytes_s)

    def weight_files(self, ranks: int) -> float:
        """With ZeRO-3 each rank writes its own elements, else they are shared out."""
        shares = max(1.0, WEIGHT_BYTES * self.assumed.parameters / LEAST_SHARE_BYTES)
        return ranks if self.assumed.zero_stage == 3 else min(ranks, shares)

    # ---- a step

    def tokens_s(self, ranks: int) -> float:
        """Of all ranks: 6 FLOPs a parameter and token, at the device's usual share of its bf16 peak."""
        assert self.device.peak_tflops is not None
        rate = self.device.peak_tflops["bf16"] * 1e12 * self.device.utilization["bf16"]
        return ranks * rate / (6 * self.assumed.parameters)

    def step_seconds(self) -> float:
        return self.assumed.tokens_per_rank_step / self.tokens_s(1)

    def sums_share(self, ranks: int) -> float:
        """Of a step, in the sums that it takes besides DeepSpeed's."""
        return SUMS_A_STEP * self.sum_seconds(ranks) / self.step_seconds()

    def watchdog_share(self, ranks: int) -> float:
        """Of a core of rank 0: a message from and to every rank a beat, and a look at all. It takes turns with training."""
        beat = max(BEAT_SECONDS, ranks / RANKS_A_SECOND)
        return (2 * ranks * self.costs.beat_message + line(self.costs.hung, ranks)) / beat

    def health_share(self, ranks: int) -> float:
        """Of the time of every rank: once a minute all tell their memory, and each looks at all."""
        look = self.gather_seconds(ranks, SMALL_BYTES) + line(self.costs.leaks, ranks)
        return look / LEAK_LOOK_SECONDS

    # ---- a checkpoint

    def stall_seconds(self, ranks: int) -> float:
        """Training stands still while each rank copies what it saves, and while sizes and sums go to rank 0 later."""
        told = self.gather_seconds(ranks, self.costs.written_bytes) + 2 * BROADCASTS_AT_SAVE * self.sum_seconds(ranks)
        return self.share_bytes(ranks) / self.costs.copy_bytes_s + told

    def share_bytes(self, ranks: int) -> float:
        """Of the rank with most to write."""
        weights = WEIGHT_BYTES * self.assumed.parameters
        return weights / self.weight_files(ranks) + (self.saved_bytes - weights) / ranks

    def writer_seconds(self, ranks: int) -> float:
        """The rank with most to write."""
        return max(self.share_bytes(ranks) / self.costs.write_bytes_s, self.storage_seconds(self.saved_bytes))

    def commit_seconds(self, ranks: int) -> float:
        """The files' record, and the deletion of an older checkpoint."""
        made = FILES_A_RANK * 2 * ranks / self.assumed.metadata_ops_s
        return line(self.costs.commit, ranks) + max(line(self.costs.rotate, ranks), made)

    # ---- data

    def read_gb_s(self, ranks: int) -> float:
        """Asked of shared storage: samples of a window are dealt to all ranks, so a host reads a shard that it needs any
        sample of, whole."""
        hosts = self.hosts(ranks)
        needed = 1 - (1 - 1 / hosts) ** self.assumed.samples_per_shard if hosts > 1 else 1.0
        return hosts * needed * self.tokens_s(ranks) * self.assumed.bytes_per_token / 1e9

    def shard_requests_s(self, ranks: int) -> float:
        shard = self.assumed.samples_per_shard * self.assumed.tokens_per_sample * self.assumed.bytes_per_token
        return self.read_gb_s(ranks) * 1e9 / shard

    def hash_share(self, ranks: int) -> float:
        """Of a core of every loader process, which hashes the local shards that it opens: nearly all."""
        return self.tokens_s(ranks) * self.assumed.bytes_per_token / self.costs.hash_bytes_s

    def saved_gb_s(self, ranks: int) -> float:
        """Checkpoints, spread over the time between them."""
        return self.saved_bytes / (60 * self.assumed.save_minutes) / 1e9

    def items(self) -> list[Item]:
        """All, each with the bound that it is held to."""
        start, share = self.assumed.start_bound_seconds, self.assumed.step_bound_share
        save = share * 60 * self.assumed.save_minutes
        written = 60 * self.assumed.save_minutes  # in the background: until the next one
        return [
            Item("start: imports, configuration", "s", self.import_seconds, start),
            Item("start: rendezvous (NCCL)", "s", self.rendezvous_seconds, start),
            Item("start: rendezvous (gloo)", "s", self.mesh_seconds, start),
            Item("start: agreements, pre-flight", "s", self.agreement_seconds, start),
            Item("start: manifest", "s", self.manifest_seconds, start),
            Item("start: looks for shards", "s", self.presence_seconds, start),
            Item("start: small files", "s", self.small_file_seconds, start),
            Item("resume: rank 0 verifies", "s", self.verify_seconds, start),
            Item("resume: all ranks load", "s", self.load_seconds, start),
            Item("step: own sums", "% of a step", lambda n: 100 * self.sums_share(n), 100 * share),
            Item("step: watchdog", "% of rank 0", lambda n: 100 * self.watchdog_share(n), 100 * share),
            Item("step: looks at memory", "% of a rank", lambda n: 100 * self.health_share(n), 100 * share),
            Item("save: training stands still", "s", self.stall_seconds, save),
            Item("save: slowest writer", "s", self.writer_seconds, written),
            Item("save: commit", "s", self.commit_seconds, start),
            Item("save: storage, mean", "GB/s", self.saved_gb_s, self.assumed.storage_gb_s),
            Item("data: storage", "GB/s", self.read_gb_s, self.assumed.storage_gb_s),
            Item("data: shards fetched", "1/s", self.shard_requests_s, self.assumed.metadata_ops_s),
            Item("data: checksums", "% of a core", lambda n: 100 * self.hash_share(n), 100.0),
        ]


# --- text ------------------------------------------------------------------------------------------------------------


def cost_lines(costs: Costs) -> list[str]:
    """The unit costs, as measured."""
    lines = ["| measured here | |", "|---|---|"]
    for field in fields(costs):
        value = getattr(costs, field.name)
        shown = (
            ", ".join(f"{key:,}: {entry:.4g}" for key, entry in value.items())
            if isinstance(value, dict)
            else f"{value:.4g}"
        )
        lines.append(f"| `{field.name}` | {shown} |")
    return lines


def model_lines(model: Model) -> list[str]:
    """What follows, by number of ranks, and where each item exceeds its bound."""
    lines = [f"| ranks | {' | '.join(f'{ranks:,}' for ranks in SHOWN)} | bound | exceeded from |"]
    lines.append("|---" * (len(SHOWN) + 3) + "|")
    for item in model.items():
        row = " | ".join(f"{item.at(ranks):.3g}" for ranks in SHOWN)
        lines.append(f"| {item.name}, {item.unit} | {row} | {item.bound:g} | {exceeded(item)} |")
    return lines


def exceeded(item: Item) -> str:
    """The least power of two of ranks at which an item is above its bound."""
    ranks = first_above(item)
    return f"{ranks:,}" if ranks is not None else "-"


def first_above(item: Item) -> int | None:
    numbers = (2**power for power in range(LARGEST.bit_length()))
    return next((ranks for ranks in numbers if item.at(ranks) > item.bound), None)


def verdict(model: Model) -> str:
    """Which item gives first."""
    found = sorted((ranks, item.name) for item in model.items() if (ranks := first_above(item)) is not None)
    if not found:
        return f"nothing exceeds its bound up to {LARGEST:,} ranks"
    return "in this order: " + "; ".join(f"{name} at {ranks:,} ranks" for ranks, name in found)


def check_lines(costs: Costs, model: Model) -> list[str]:
    """The formulas of collectives beside what more ranks took here, which share the cores of one machine."""
    lines = ["| ranks here | gather: model, measured, ms | sum: model, measured, ms |", "|---|---|---|"]
    for ranks, gathered in costs.small_gather.items():
        pairs = (
            (model.gather_seconds(ranks, SMALL_BYTES), gathered),
            (model.sum_seconds(ranks), costs.step_sum[ranks]),
        )
        lines.append(f"| {ranks} | " + " | ".join(f"{1e3 * ours:.3f}, {1e3 * here:.3f}" for ours, here in pairs) + " |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="on the disk to measure; keeps the unit costs")
    parser.add_argument("--write-mib", type=int, default=512, help="written, hashed and read once")
    parser.add_argument("--again", action="store_true", help="measure anew")
    for field in fields(Assumptions):
        kind = {"int": int, "float": float, "str": str}[str(field.type)]
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    arguments = parser.parse_args()
    assumed = Assumptions(**{field.name: getattr(arguments, field.name) for field in fields(Assumptions)})
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    kept = arguments.work_dir / "costs.json"
    if arguments.again or not kept.exists():
        with tempfile.TemporaryDirectory(dir=arguments.work_dir) as scratch:
            measured = measure(Path(scratch), arguments.write_mib << 20, lambda text: print(text, file=sys.stderr))
        measured.save(kept)
    costs = Costs.read(kept)
    model = Model(costs, assumed)
    step = f"a step: {model.step_seconds():.3f} s; {model.tokens_s(1):,.0f} tokens a second and rank"
    parts = [cost_lines(costs), check_lines(costs, model), [f"{assumed}", step], model_lines(model), [verdict(model)]]
    print("\n\n".join("\n".join(lines) for lines in parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())

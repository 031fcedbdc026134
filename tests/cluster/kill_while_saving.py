"""Kill -9 at random points of saving, again and again, in every ZeRO stage: nothing but the save under way is lost.

    python tests/cluster/kill_while_saving.py --kills 200

For each stage a run of two ranks (gloo) that saves every few steps goes once undisturbed. Then the same run is started, killed
while it saves, and started again; half of the kills meet saves in the background, half saves that are waited for. Only
kills that met a save under way are counted. After every kill all complete checkpoints are verified, and the newest must be the
one before the save under way, or that one. Before the last start every file of the newest checkpoint is damaged in turn, by
flipped bits and cuts: each must be found, and the checkpoint before be used; then one file is left damaged, and the run is
let finish. It must equal the undisturbed one bit by bit: batches, losses, weights, moments. Exit code 0 says that all did.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kill_and_resume import prepare
from runs import Finished, run_ranks
from save_kills import (
    EVERY,
    SPAN_SECONDS,
    Kill,
    damage_every_file,
    finish,
    finish_damaged,
    options,
    same,
    start_and_kill,
)

from sparselt_dist import checkpoint

SHORTER, LONGER = 0.8, 1.1  # so that the span in which kills fall becomes about that of a save
LONGEST_SECONDS = 2.0


@dataclass
class Tally:
    """What was done to one kind of run."""

    kills: list[Kill] = field(default_factory=list)
    late: int = 0
    damages: int = 0
    damaged_starts: int = 0


def disturb(
    shards: Path, work: Path, overrides: list[str], expected: Finished, kills: int, generator: random.Random
) -> Tally:
    """So many kills; a run that ends before them all is begun anew."""
    tally, number, span = Tally(), 0, SPAN_SECONDS
    while len(tally.kills) < kills:
        folder = work / f"killed-{number}"
        number += 1
        while len(tally.kills) < kills:
            kill = start_and_kill(shards, folder, overrides, generator, span)
            if kill is None:
                break
            span = min(span * (LONGER if kill.met_a_save else SHORTER), LONGEST_SECONDS)
            if kill.met_a_save:
                tally.kills.append(kill)
            else:
                tally.late += 1
            print(f"{work.name}, kill {len(tally.kills)}: {kill.point}, {kill.lost} steps to take again", flush=True)
        ended = end(shards, folder, overrides, generator, tally)
        assert same(ended, expected), f"{folder}: another result than undisturbed"
    return tally


def end(shards: Path, folder: Path, overrides: list[str], generator: random.Random, tally: Tally) -> Finished:
    """Damage what was saved last, where there is something before it, and let the run finish."""
    if len(checkpoint.complete_checkpoints(folder)) < 2:
        return finish(shards, folder, overrides)
    tally.damages += damage_every_file(folder, generator, times=10)
    tally.damaged_starts += 1
    return finish_damaged(shards, folder, overrides, generator)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="over all stages, of saves under way")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    kinds = [(stage, asynchronous) for stage in arguments.stages for asynchronous in (True, False)]
    table: list[tuple[int, bool, Tally]] = []
    with tempfile.TemporaryDirectory() as temporary:
        shards = prepare(Path(temporary))
        for number, (stage, asynchronous) in enumerate(kinds):
            done = sum(len(tally.kills) for _, _, tally in table)
            share = (number + 1) * arguments.kills // len(kinds) - done
            work = Path(temporary, f"zero-{stage}-{'background' if asynchronous else 'awaited'}")
            work.mkdir()
            overrides = options(stage, steps=EVERY * min(2 * share + 4, 40), asynchronous=asynchronous)
            expected = run_ranks(2, shards, work / "undisturbed", *overrides)
            assert expected.code == 0, expected.output
            table.append((stage, asynchronous, disturb(shards, work, overrides, expected, share, generator)))
    show(table)
    return 0


def show(table: list[tuple[int, bool, Tally]]) -> None:
    """The table of all kinds of runs."""
    heads = "ZeRO | saves | kills | where they met the save | too late | most steps taken again"
    print(f"| {heads} | damages found | starts on a damaged one |\n|---|---|---|---|---|---|---|---|")
    for stage, asynchronous, tally in table:
        points = ", ".join(
            f"{point} {count}" for point, count in Counter(kill.point for kill in tally.kills).most_common()
        )
        lost = max((kill.lost for kill in tally.kills), default=0)
        print(
            f"| {stage} | {'in the background' if asynchronous else 'awaited'} | {len(tally.kills)} | {points} | {tally.late} "
            f"| {lost} | {tally.damages} | {tally.damaged_starts} |"
        )
    print("all resumed, and ended as undisturbed")


if __name__ == "__main__":
    sys.exit(main())

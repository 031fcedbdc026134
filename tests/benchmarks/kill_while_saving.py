"""Kill -9 at random points of saving, again and again, in every ZeRO stage: nothing but the save under way is lost.

    python tests/benchmarks/kill_while_saving.py --kills 200

For each stage a run of two ranks (gloo) that saves every few steps, in the background, goes once undisturbed. Then the same
run is started, killed while it saves, and started again. After every kill all complete checkpoints that resuming would use
are verified, and the newest must be the one before the save under way, or that one. At the end the run is let finish, and must
equal the undisturbed one bit by bit: batches, losses, weights, moments. Exit code 0 says that all did.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kill_and_resume import prepare
from runs import run_ranks
from save_kills import EVERY, Kill, finish, options, same, start_and_kill


def disturb(shards: Path, work: Path, zero_stage: int, kills: int, generator: random.Random) -> list[Kill]:
    """So many kills in one ZeRO stage; a run that ends before them all is begun anew."""
    overrides = options(zero_stage, steps=EVERY * min(2 * kills, 40))
    expected = run_ranks(2, shards, work / "undisturbed", *overrides)
    assert expected.code == 0, expected.output
    done: list[Kill] = []
    for number in range(kills):
        folder = work / f"killed-{number}"
        while len(done) < kills:
            kill = start_and_kill(shards, folder, overrides, generator)
            if kill is None:
                break
            done.append(kill)
            print(f"ZeRO {zero_stage}, kill {len(done)}: {kill.point}, {kill.lost} steps to take again", flush=True)
        assert same(finish(shards, folder, overrides), expected), f"{folder}: another result than undisturbed"
        if len(done) == kills:
            break
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="over all stages")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    table: list[tuple[int, list[Kill]]] = []
    with tempfile.TemporaryDirectory() as temporary:
        shards = prepare(Path(temporary))
        for number, stage in enumerate(arguments.stages):
            share = (number + 1) * arguments.kills // len(arguments.stages) - sum(len(kills) for _, kills in table)
            work = Path(temporary, str(stage))
            work.mkdir()
            table.append((stage, disturb(shards, work, stage, share, generator)))
    print("| ZeRO | kills | where they met the save | most steps taken again |\n|---|---|---|---|")
    for stage, kills in table:
        points = ", ".join(f"{point} {count}" for point, count in Counter(kill.point for kill in kills).most_common())
        print(f"| {stage} | {len(kills)} | {points} | {max((kill.lost for kill in kills), default=0)} |")
    print("all resumed, and ended as undisturbed")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Tokens a second into ready batches: our loader beside webdataset, datasets, mosaicml-streaming and litdata.

    python tests/benchmarks/loader_throughput.py --work-dir /tmp/throughput
    python tests/benchmarks/loader_throughput.py --python mosaicml-streaming=peers/bin/python   # its own environment

All read the same documents under the same tokenizer and deliver batches of 32 rows. Each runs in a process of its own,
in turns (A B C, A B C); without workers it is held on one core. Columns, each the median over the turns:

- own: the masking its users have (ours, else DataCollatorForLanguageModeling), million tokens a second of wall clock;
- same: our masking for everybody, so that loaders are compared;
- stack: no masking, rows to one int64 tensor;
- per CPU second: of `same`, divided by the processor time of the process, its threads and its workers.

`sparselt_dist-packed` has rows of whole documents by best fit and delivers what keeps them apart (segment_ids,
position_ids), which no other reader here does; tokens are counted without padding.

Before anything is timed, stock webdataset must read our shards and find the same ids.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from peers import BATCH, PEERS, Collate, HuggingFaceMasking, OurMasking, cut, stack

OURS = "sparselt_dist"
PACKED = "sparselt_dist-packed"
SYSTEMS = (OURS, PACKED, *PEERS)
COLLATORS = ("own", "same", "stack")
WARM_UP_BATCHES = 100


# --- the data --------------------------------------------------------------------------------------------------------


def stored_folder(work: Path, system: str, length: int) -> Path:
    """Where a system's own form of the corpus lies."""
    by_length = system not in PEERS or PEERS[system].by_length
    return work / (f"{system}-{length}" if by_length else system)


def make_corpus(work: Path, characters: int, copies: int) -> None:
    """Write the documents once, for all systems and environments."""
    import corpus
    import ours

    if (work / "ids.npy").exists():
        return
    tokenized = corpus.tokenize(work, characters)
    shutil.copytree(tokenized / "tokenizer", work / "tokenizer", dirs_exist_ok=True)
    documents = corpus.repeated(ours.stored_ids(tokenized), copies)
    np.save(work / "lengths.npy", [len(ids) for ids in documents])
    np.save(work / "ids.npy", np.concatenate(documents))


def read_corpus(work: Path) -> list[np.ndarray]:
    """The documents."""
    ends = np.cumsum(np.load(work / "lengths.npy"))
    return np.split(np.load(work / "ids.npy"), ends[:-1])


def write(work: Path, system: str, length: int) -> None:
    """Store the corpus in a system's own form, if it is not."""
    folder = stored_folder(work, system, length)
    if (folder.parent / f"{folder.name}.done").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    documents = read_corpus(work)
    if system in PEERS:
        PEERS[system].write(folder, documents, length)
    else:
        import ours

        if system == PACKED:
            ours.write_packed(folder, documents, length=length)
        else:
            ours.write_shards(folder, cut(documents, length), length=length)
    (folder.parent / f"{folder.name}.done").touch()


def bytes_on_disk(folder: Path) -> int:
    """Sizes of all files, indexes included."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_stock_reader(work: Path, length: int) -> int:
    """Read our shards with stock webdataset and compare every id; returns the number of ids."""
    import ours
    import webdataset

    rows = ours.stored_ids(stored_folder(work, OURS, length))
    tars = [str(path) for path in ours.tar_files(stored_folder(work, OURS, length))]
    members = webdataset.WebDataset(tars, shardshuffle=False).decode()
    found = np.concatenate([member["ids.npy"] for member in members])
    assert np.array_equal(found, np.stack(rows)), "stock webdataset reads other ids than we do"
    return int(found.size)


# --- one measurement, in its own process -----------------------------------------------------------------------------


def collate_of(name: str, tokenizer: Path) -> Collate:
    """The collator of a column, for a peer."""
    if name == "stack":
        return stack
    return HuggingFaceMasking(tokenizer) if name == "own" else OurMasking(tokenizer)


def batches(work: Path, system: str, length: int, collator: str, workers: int) -> Iterator[Any]:
    """Endless batches, dictionaries with `input_ids`."""
    folder, tokenizer = stored_folder(work, system, length), work / "tokenizer"
    if system in PEERS:
        return PEERS[system].batches(folder, length, collate_of(collator, tokenizer), workers)
    import ours

    made = ours.mlm_collator(tokenizer) if collator != "stack" else ours.Stack()
    return (item.batch for item in ours.micro_batches(folder, made, micro_batch_size=BATCH, num_workers=workers))


def stored_fill(work: Path, length: int) -> float:
    """The share of our packed rows that is not padding."""
    manifest = json.loads((stored_folder(work, PACKED, length) / "manifest.json").read_text())
    return float(manifest["tokens"] / (manifest["samples"] * length))


def cpu_seconds() -> float:
    """Processor time of this process and of its living children."""
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return sum(spent.user + spent.system for spent in times)


def measure(work: Path, system: str, length: int, collator: str, workers: int, seconds: float) -> dict[str, Any]:
    """Million tokens a second of wall clock and of processor time."""
    stream = batches(work, system, length, collator, workers)
    for _ in range(WARM_UP_BATCHES):
        batch = next(stream)
    shape, packed = tuple(batch["input_ids"].shape), system == PACKED
    assert shape == (BATCH, length) or (packed and shape[0] == BATCH), shape
    assert batch["input_ids"].dtype == torch.int64 and ("segment_ids" in batch) == packed
    if collator != "stack":
        share = float((batch["labels"] != -100).float().mean())
        assert 0.1 < share < 0.2, share
    fill = stored_fill(work, length) if packed else 1.0
    count, start, cpu = 0, time.perf_counter(), cpu_seconds()
    while time.perf_counter() - start < seconds:
        for _ in range(10):
            next(stream)
        count += 10
    wall, spent = time.perf_counter() - start, cpu_seconds() - cpu
    tokens = count * BATCH * length * fill / 1e6
    return {"length": length, "collator": collator, "wall": tokens / wall, "cpu": tokens / spent}


def run_child(arguments: argparse.Namespace) -> None:
    """Write or measure one system and print the result as the last line."""
    torch.set_num_threads(1)
    lengths = arguments.lengths
    if arguments.child == "write":
        for length in lengths:
            write(arguments.work_dir, arguments.system, length)
        print(json.dumps([bytes_on_disk(stored_folder(arguments.work_dir, arguments.system, n)) for n in lengths]))
        return
    if arguments.workers == 0:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    cells = [(length, collator) for length in lengths for collator in COLLATORS]
    settings = (arguments.workers, arguments.seconds)
    results = [measure(arguments.work_dir, arguments.system, *cell, *settings) for cell in cells]
    print(json.dumps(results), flush=True)
    os._exit(0)  # leave no library's threads and workers to wait for


# --- all of them -----------------------------------------------------------------------------------------------------


def in_child(arguments: argparse.Namespace, task: str, system: str, workers: int = 0) -> Any:
    """Run a task in a fresh process of the system's interpreter; None if the library is missing or fails."""
    interpreters = dict(pair.split("=", 1) for pair in arguments.python)
    command = [interpreters.get(system, sys.executable), __file__, "--child", task, "--system", system]
    command += ["--work-dir", str(arguments.work_dir), "--workers", str(workers), "--seconds", str(arguments.seconds)]
    command += ["--lengths", *map(str, arguments.lengths)]
    root = Path(__file__).resolve().parents[2]
    environment = {"PYTHONPATH": str(root), **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(arguments.work_dir.resolve() / "hf")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    if done.returncode != 0:
        print(f"{system}: left out: {(done.stderr.strip().splitlines() or ['no output'])[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write every form, check ours with the stock reader, measure in turns."""
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    make_corpus(arguments.work_dir, arguments.document_characters, arguments.copies)
    written = {system: in_child(arguments, "write", system) for system in arguments.systems}
    for length in arguments.lengths:
        ids = check_stock_reader(arguments.work_dir, length)
        print(f"stock webdataset reads our shards of {length}-token rows: {ids:,} ids, all equal", file=sys.stderr)
    systems = [system for system in arguments.systems if written[system] is not None]
    runs: list[dict[str, Any]] = []
    for turn in range(arguments.turns):
        for workers in arguments.workers_list:
            for system in systems:
                for result in in_child(arguments, "measure", system, workers) or []:
                    runs.append({"turn": turn, "system": system, "workers": workers, **result})
    lengths = np.load(arguments.work_dir / "lengths.npy")
    return {
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "bytes": {system: dict(zip(map(str, arguments.lengths), written[system], strict=True)) for system in systems},
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "runs": runs,
    }


def median(runs: list[dict[str, Any]], field: str, **wanted: Any) -> float:
    """The median over the turns; NaN without a run."""
    found = [run[field] for run in runs if all(run[key] == value for key, value in wanted.items())]
    return statistics.median(found) if found else float("nan")


def rates_of(runs: list[dict[str, Any]], system: str, cell: dict[str, int]) -> list[float]:
    """Million tokens a second in each column: by wall clock for every collator, then by processor time."""
    by_wall = [median(runs, "wall", system=system, collator=name, **cell) for name in COLLATORS]
    return [*by_wall, median(runs, "cpu", system=system, collator="same", **cell)]


def tables(report: dict[str, Any]) -> Iterator[str]:
    """Markdown: a table for each row length and number of workers."""
    mean = report["tokens"] / report["documents"]
    yield f"{report['documents']:,} documents, {report['tokens']:,} tokens, {mean:.0f} a document; {report['machine']}"
    runs = report["runs"]
    for length, workers in sorted({(run["length"], run["workers"]) for run in runs}):
        cell = {"length": length, "workers": workers}
        yield f"\n**rows of {length}, {workers} workers** (million tokens a second)\n"
        yield "| | own | same | stack | per CPU second | ours ÷ this: own / same / stack / CPU | MB | our bytes ÷ this |"
        yield "|---|---|---|---|---|---|---|---|"
        for system, sizes in report["bytes"].items():
            rates = rates_of(runs, system, cell)
            ratios = " / ".join(
                f"{mine / rate:.1f}" for mine, rate in zip(rates_of(runs, OURS, cell), rates, strict=True)
            )
            size, own_size = sizes[str(length)], report["bytes"].get(OURS, sizes)[str(length)]
            columns = [system, *(f"{rate:.2f}" for rate in rates), ratios]
            yield "| " + " | ".join([*columns, f"{size / 1e6:.1f}", f"{own_size / size:.2f}"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="where the corpus and its forms go; kept")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--python", action="append", default=[], metavar="SYSTEM=PATH", help="interpreter of a system")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512], help="tokens a row")
    parser.add_argument("--workers-list", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--document-characters", type=int, default=800, help="least length of a document")
    parser.add_argument("--copies", type=int, default=8, help="times the corpus is repeated")
    parser.add_argument("--output", type=Path, help="JSON file for all single measurements")
    parser.add_argument("--child", choices=("write", "measure"), help=argparse.SUPPRESS)
    parser.add_argument("--system", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(arguments)
        return
    report = run_all(arguments)
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1))
    print("\n".join(tables(report)))


if __name__ == "__main__":
    main()

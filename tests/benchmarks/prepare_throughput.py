"""How fast `prepare` is on one core beside the same work by others, and whether its memory grows with the text.

    python tests/benchmarks/prepare_throughput.py throughput --megabytes 30 --rounds 3
    python tests/benchmarks/prepare_throughput.py memory --megabytes 200 2000

Text is made from the embedded corpus: documents of some paragraphs, in each copy other words replaced, so that none is a
duplicate. `throughput` runs, one process each and in turn: the tokenizer alone (`encode_batch_fast` and the ids of it,
the least that anyone can take), `prepare` with one worker and a tokenizer folder, the recipe of `run_mlm.py` of
Transformers with `datasets` (map: tokenize; map: concatenate and cut; save_to_disk), and datatrove's
`DocumentTokenizer` (tokenize, write, shuffle documents). Each process reports seconds of its work alone, imports left
out. Rows of 128 tokens; `prepare` also normalises, removes exact duplicates, hashes and shuffles rows over the corpus.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREPARE = """
import json, resource, sys, time
from transformers import AutoTokenizer  # imported by the others too, before their clocks start
from sparselt_dist.config_loading import load_config
from sparselt_dist.data import preparation, stage_progress
marks = []
class Timed(stage_progress.StageProgress):
    def start(self, stage):
        marks.append((stage, time.monotonic()))
        super().start(stage)
preparation.StageProgress = Timed
if __name__ == "__main__":
    config = load_config([], sys.argv[1:], for_training=False)
    start, cpu = time.monotonic(), time.process_time()
    preparation.prepare(config, progress=False)
    marks.append(("end", time.monotonic()))
    stages = {name: after - begun for (name, begun), (_, after) in zip(marks, marks[1:])}
    rss = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({"seconds": marks[-1][1] - start, "cpu": time.process_time() - cpu, "stages": stages, "rss": rss}))
"""

TOKENIZER = """
import json, sys, time
from pathlib import Path
from sparselt_dist.data.tokenizer import load_for_text
source, tokenizer = sys.argv[1:]
texts = [json.loads(line)["text"] for line in open(source)]
encoder, ids = load_for_text(Path(tokenizer)), 0
start, cpu = time.monotonic(), time.process_time()
for first in range(0, len(texts), 250):
    ids += sum(len(e.ids) for e in encoder.encode_batch_fast(texts[first : first + 250], add_special_tokens=False))
print(json.dumps({"seconds": time.monotonic() - start, "cpu": time.process_time() - cpu}))
"""

DATASETS = """
import itertools, json, sys, time
import datasets, transformers
source, tokenizer, output = sys.argv[1:]
datasets.disable_progress_bars()
tokenizer, length = transformers.AutoTokenizer.from_pretrained(tokenizer), 128
def tokenize(rows):
    return tokenizer(rows["text"], return_special_tokens_mask=False)
def group(rows):
    joined = {key: list(itertools.chain.from_iterable(values)) for key, values in rows.items()}
    end = len(joined["input_ids"]) // length * length
    return {key: [values[at : at + length] for at in range(0, end, length)] for key, values in joined.items()}
start, cpu = time.monotonic(), time.process_time()
rows = datasets.load_dataset("json", data_files=source, split="train", cache_dir=output + "/cache")
rows = rows.map(tokenize, batched=True, remove_columns=rows.column_names).map(group, batched=True)
rows.shuffle(seed=0).save_to_disk(output + "/saved")
print(json.dumps({"seconds": time.monotonic() - start, "cpu": time.process_time() - cpu}))
"""

DATATROVE = """
import json, sys, time
from loguru import logger
logger.remove()
from datatrove.data import Document
from datatrove.pipeline.tokens import DocumentTokenizer
source, tokenizer, output = sys.argv[1:]
start, cpu = time.monotonic(), time.process_time()
documents = (Document(json.loads(line)["text"], str(number)) for number, line in enumerate(open(source)))
writer = DocumentTokenizer(output, tokenizer + "/tokenizer.json", eos_token="[SEP]", seed=0)
writer.run(documents)
print(json.dumps({"seconds": time.monotonic() - start, "cpu": time.process_time() - cpu}))
"""


def varied_documents(megabytes: float) -> Iterator[str]:
    """Documents of about two thousand characters, every tenth word of a copy drawn anew."""
    from sparselt_dist.data.embedded import CORPORA

    words = [text.split(" ") for read in CORPORA.values() for text in read()]
    pool = [word for document in words for word in document]
    draw = random.Random(0)
    written = 0.0
    while True:
        for document in words:
            for first in range(0, len(document), 350):
                part = document[first : first + 350]
                for place in range(draw.randrange(10), len(part), 10):
                    part[place] = pool[int(draw.random() * len(pool))]
                text = " ".join(part)
                yield text
                written += len(text.encode()) / 1e6
                if written >= megabytes:
                    return


def write_text(path: Path, megabytes: float) -> float:
    """Write JSON lines and return the megabytes of text in them."""
    size = 0
    with path.open("w") as file:
        for text in varied_documents(megabytes):
            size += len(text.encode())
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return size / 1e6


def run(program: str, *arguments: str) -> dict[str, object]:
    """What a program, started as a process of its own, prints last."""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:  # workers import the program's file
        file.write(program)
        file.flush()
        command = [sys.executable, file.name, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    printed: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return printed


def prepare(source: Path, output: Path, *settings: str) -> dict[str, object]:
    return run(PREPARE, f"prepare.source={source}", f"prepare.output_dir={output}", *settings)


def make_tokenizer(folder: Path) -> Path:
    """A tokenizer of 32,768 entries, trained on the embedded corpus."""
    prepare(Path("embedded"), folder / "first", "prepare.vocab_size=32768")
    return folder / "first" / "tokenizer"


def throughput(folder: Path, megabytes: float, rounds: int) -> None:
    tokenizer, source = make_tokenizer(folder), folder / "text.jsonl"
    size = write_text(source, megabytes)
    settings = [f"prepare.tokenizer={tokenizer}", "prepare.num_workers=1"]
    speeds: dict[str, list[float]] = {}
    stages: dict[str, list[float]] = {}
    for number in range(rounds):
        results = {
            "tokenizer alone": run(TOKENIZER, str(source), str(tokenizer)),
            "prepare, concatenate": prepare(source, folder / f"rows{number}", *settings),
            "prepare, best-fit": prepare(source, folder / f"packed{number}", *settings, "prepare.packing=best-fit"),
            "datasets.map": run(DATASETS, str(source), str(tokenizer), str(folder / f"datasets{number}")),
            "datatrove": run(DATATROVE, str(source), str(tokenizer), str(folder / f"datatrove{number}")),
        }
        for name, result in results.items():
            speeds.setdefault(name, []).append(size / float(str(result["cpu"])))
        timed = results["prepare, concatenate"]["stages"]
        for name, seconds in dict(timed).items():  # type: ignore[call-overload]
            stages.setdefault(name, []).append(seconds)
    ours = speeds["prepare, concatenate"]
    print(f"{size:.0f} MB of text, medians of {rounds} rounds, MB a second of processor time of one core")
    for name, found in speeds.items():
        ratio = statistics.median(mine / other for mine, other in zip(ours, found, strict=True))
        print(f"  {name:<22}{statistics.median(found):7.2f}   prepare is {ratio:.2f} times as fast")
    total = sum(statistics.median(found) for found in stages.values())
    print("stages of prepare, share of its seconds")
    for name, found in stages.items():
        print(f"  {name:<22}{100 * statistics.median(found) / total:6.1f} %")


def memory(folder: Path, sizes: list[float], workers: int, packing: str) -> None:
    tokenizer = make_tokenizer(folder)
    print(f"{'MB of text':>12}{'main, MiB':>12}{'largest worker, MiB':>22}{'seconds':>10}", flush=True)
    for size in sizes:
        source = folder / f"{size:.0f}.jsonl"
        found = write_text(source, size)
        settings = [f"prepare.tokenizer={tokenizer}", f"prepare.num_workers={workers}", f"prepare.packing={packing}"]
        result = prepare(source, folder / f"out{size:.0f}", *settings)
        own, worker = result["rss"]  # type: ignore[misc]
        print(f"{found:12.0f}{own:12.0f}{worker:22.0f}{result['seconds']:10.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["throughput", "memory"])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[30.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--packing", default="best-fit")
    parser.add_argument("--folder", help="where the text and results go; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.what == "throughput":
            throughput(Path(folder), arguments.megabytes[0], arguments.rounds)
        else:
            memory(Path(folder), arguments.megabytes, arguments.workers, arguments.packing)


if __name__ == "__main__":
    main()

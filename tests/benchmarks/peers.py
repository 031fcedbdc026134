"""The other streaming libraries, each used as its own documentation shows, on the same ids.

A peer writes its own format from documents or rows of ids, and reads it as endless batches. Rows reach a collator as
arrays, tensors or lists. Libraries are imported late: not all of them install into one environment.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

BATCH = 32
SHUFFLE_BUFFER = 1000
DOCUMENTS_A_SHARD = 1000

Row = Any  # np.ndarray, torch.Tensor or list of int; one row of ids
Collate = Callable[[list[Row]], Any]


class Peer(NamedTuple):
    """How a library stores ids and how it delivers batches of them."""

    write: Callable[[Path, list[np.ndarray], int], None]
    """(empty folder, documents, row length)"""
    batches: Callable[[Path, int, Collate, int], Iterator[Any]]
    """(folder, row length, collate, workers): endless batches of 32 rows"""
    by_length: bool
    """Whether the stored form depends on the row length."""


# --- collators -------------------------------------------------------------------------------------------------------


class HuggingFaceMasking:
    """`DataCollatorForLanguageModeling`, which the peers' examples use."""

    def __init__(self, tokenizer: Path) -> None:
        import transformers

        loaded = transformers.AutoTokenizer.from_pretrained(str(tokenizer))
        self._collator = transformers.DataCollatorForLanguageModeling(loaded, mlm_probability=0.15)

    def __call__(self, rows: list[Row]) -> Any:
        return self._collator([torch.as_tensor(np.asarray(row, dtype=np.int64)) for row in rows])


class OurMasking:
    """The collator of sparselt_dist, with a fresh seed for each row."""

    def __init__(self, tokenizer: Path) -> None:
        import ours

        self._collator = ours.mlm_collator(tokenizer)
        self._seeds = count()

    def __call__(self, rows: list[Row]) -> Any:
        return self._collator(
            [{"key": "", "ids": np.asarray(row, dtype=np.uint16), "seed": next(self._seeds)} for row in rows]
        )


def stack(rows: list[Row]) -> Any:
    """Rows to one int64 tensor: nothing but loading."""
    return {"input_ids": torch.from_numpy(np.array([np.asarray(row) for row in rows], dtype=np.int64))}


# --- shared pieces ---------------------------------------------------------------------------------------------------


def cut(documents: list[np.ndarray], length: int) -> np.ndarray:
    """All ids end to end in rows [n, length]; the rest is dropped."""
    joined = np.concatenate(documents)
    return joined[: len(joined) // length * length].reshape(-1, length)


def _rows(documents: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Documents on their way to rows; what is left of one begins the next."""
    pending: list[np.ndarray] = []
    held = 0
    for ids in documents:
        pending.append(ids)
        held += len(ids)
        if held >= length:
            joined = np.concatenate(pending)
            whole = held // length * length
            yield from joined[:whole].reshape(-1, length)
            pending, held = [joined[whole:]], held - whole


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def _data_loader(dataset: Any, collate: Collate, workers: int) -> Iterator[Any]:
    options = {"persistent_workers": True, "prefetch_factor": 4} if workers else {}
    return _endless(DataLoader(dataset, batch_size=BATCH, collate_fn=collate, num_workers=workers, **options))


# --- webdataset: one document a member -------------------------------------------------------------------------------


def _write_webdataset(folder: Path, documents: list[np.ndarray], length: int) -> None:
    import webdataset

    with webdataset.ShardWriter(str(folder / "shard-%06d.tar"), maxcount=DOCUMENTS_A_SHARD, verbose=0) as writer:
        for number, ids in enumerate(documents):
            writer.write({"__key__": f"{number:09d}", "ids.npy": ids})


class _PackRows:
    """Samples to rows, for `compose`."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __call__(self, samples: Iterable[dict[str, Any]]) -> Iterator[np.ndarray]:
        return _rows((sample["ids.npy"] for sample in samples), self._length)


def _read_webdataset(folder: Path, length: int, collate: Collate, workers: int) -> Iterator[Any]:
    import webdataset

    tars = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = webdataset.WebDataset(tars, shardshuffle=100, seed=0, repeat=True)
    dataset = dataset.shuffle(SHUFFLE_BUFFER).decode().compose(_PackRows(length))
    dataset = dataset.batched(BATCH, collation_fn=collate, partial=False)
    return iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=workers))


# --- datasets: parquet of documents, streamed ------------------------------------------------------------------------


def _write_datasets(folder: Path, documents: list[np.ndarray], length: int) -> None:
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({"ids": datasets.List(datasets.Value("uint16"))})
    for number, first in enumerate(range(0, len(documents), 4 * DOCUMENTS_A_SHARD)):
        part = {"ids": documents[first : first + 4 * DOCUMENTS_A_SHARD]}
        datasets.Dataset.from_dict(part, features=features).to_parquet(folder / f"part-{number:05d}.parquet")


class _GroupTexts:
    """`group_texts` of the language modelling examples; lists measured faster here than the formats of arrays."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        joined = list(chain(*batch["ids"]))
        end = len(joined) // self._length * self._length
        return {"ids": [joined[first : first + self._length] for first in range(0, end, self._length)]}


def _read_datasets(folder: Path, length: int, collate: Collate, workers: int) -> Iterator[Any]:
    import datasets

    files = sorted(str(path) for path in folder.glob("*.parquet"))
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # else it sleeps for 5 s at the end of each of our short epochs
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    stream = stream.shuffle(seed=0, buffer_size=SHUFFLE_BUFFER)
    stream = stream.map(_GroupTexts(length), batched=True, batch_size=1000)
    return _data_loader(stream, _OfField(collate), workers)


class _OfField:
    """Unwraps samples that are dictionaries."""

    def __init__(self, collate: Collate) -> None:
        self._collate = collate

    def __call__(self, samples: list[dict[str, Any]]) -> Any:
        return self._collate([sample["ids"] for sample in samples])


# --- mosaicml-streaming: MDS of rows ---------------------------------------------------------------------------------


def _streaming() -> Any:
    """The library without its image data sets: they import torchvision, which may be built for another torch."""
    sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))
    import streaming

    return streaming


def _write_streaming(folder: Path, documents: list[np.ndarray], length: int) -> None:
    with _streaming().MDSWriter(out=str(folder), columns={"ids": f"ndarray:uint16:{length}"}) as writer:
        for row in cut(documents, length):
            writer.write({"ids": row})


def _read_streaming(folder: Path, length: int, collate: Collate, workers: int) -> Iterator[Any]:
    streaming = _streaming()
    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=0, batch_size=BATCH)
    return _data_loader(dataset, _OfField(collate), workers)


# --- litdata: chunks of tokens ---------------------------------------------------------------------------------------


class _Tokens:
    """One document's ids, by its number."""

    def __init__(self, documents: list[np.ndarray]) -> None:
        self._documents = documents

    def __call__(self, number: int) -> Iterator[torch.Tensor]:
        yield torch.from_numpy(self._documents[number])


def _write_litdata(folder: Path, documents: list[np.ndarray], length: int) -> None:
    import litdata

    litdata.optimize(
        fn=_Tokens(documents),
        inputs=list(range(len(documents))),
        output_dir=str(folder),
        num_workers=1,
        chunk_size=2**22 // length * length,  # tokens, of whole rows, as its documentation asks
        item_loader=litdata.TokensLoader(block_size=length),
        start_method="fork",
        verbose=False,
    )


def _read_litdata(folder: Path, length: int, collate: Collate, workers: int) -> Iterator[Any]:
    import litdata

    dataset = litdata.StreamingDataset(
        str(folder), item_loader=litdata.TokensLoader(block_size=length), shuffle=True, seed=0
    )
    options = {"persistent_workers": True, "prefetch_factor": 4} if workers else {}
    loader = litdata.StreamingDataLoader(
        dataset, batch_size=BATCH, collate_fn=collate, num_workers=workers, drop_last=True, **options
    )
    return _endless(loader)


PEERS: dict[str, Peer] = {
    "webdataset": Peer(_write_webdataset, _read_webdataset, by_length=False),
    "datasets": Peer(_write_datasets, _read_datasets, by_length=False),
    "mosaicml-streaming": Peer(_write_streaming, _read_streaming, by_length=True),
    "litdata": Peer(_write_litdata, _read_litdata, by_length=True),
}

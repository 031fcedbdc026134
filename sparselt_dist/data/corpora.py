"""From locations to one set of samples: prepared shard folders or raw text, local or remote, alone or mixed.

A corpus is what one location stands for: a folder, or a pattern of folders or tars. Samples are numbered through all
corpora, all folders of a corpus and all shards of a folder.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparselt_dist.config import Config, CorpusSection
from sparselt_dist.data.manifest import MANIFEST, Manifest
from sparselt_dist.data.raw_text import RawText, TextRules
from sparselt_dist.data.raw_tokenizer import TokenizerChoice
from sparselt_dist.data.shard_files import Access
from sparselt_dist.data.shards import ShardFolder, Stored
from sparselt_dist.data.storage import (
    NotFoundError,
    RetryPolicy,
    basename,
    expand,
    is_remote,
    join,
    list_folder,
)
from sparselt_dist.data.storage import parent as parent_of
from sparselt_dist.data.tokenizer import check_tokenizer
from sparselt_dist.errors import DataError
from sparselt_dist.objectives.base import TokenizerInfo
from sparselt_dist.redaction import shown

Folder = ShardFolder | RawText
Location = str | Sequence[CorpusSection]


@dataclass(frozen=True)
class Corpus:
    """What one location stands for, and its weight in the stream."""

    name: str
    folders: tuple[Folder, ...]
    weight: float = 1.0

    @property
    def shard_samples(self) -> list[int]:
        return [samples for folder in self.folders for samples in folder.shard_samples]


class Corpora:
    """Random access to the samples of one corpus or several.

    Raises:
        DataError: corpora that were tokenized differently.
    """

    def __init__(self, corpora: Sequence[Corpus]) -> None:
        self.corpora = tuple(corpora)
        self.folders = [folder for corpus in corpora for folder in corpus.folders]
        self._names = [corpus.name for corpus in corpora for _ in corpus.folders]
        sizes = [folder.shard_samples for folder in self.folders]
        self._shard_ends = np.cumsum([samples for shards in sizes for samples in shards])
        self._shard_starts = np.concatenate([[0], self._shard_ends])
        self._first_shards = np.cumsum([0, *(len(shards) for shards in sizes)])
        self._shard_names = [
            (entry.name if len(self.folders) == 1 else shown(join(folder.location, entry.name))).removesuffix(".tar")
            for folder in self.folders
            for entry in folder.shards
        ]
        self.manifest = _joined_manifest(self.corpora)
        self.tokenizer = self.folders[0].tokenizer
        self.num_samples = int(self._shard_ends[-1])

    @property
    def name(self) -> str:
        """The locations, for messages."""
        return ", ".join(dict.fromkeys(self._names))

    @property
    def shard_samples(self) -> list[list[int]]:
        """Samples of each shard, of each corpus."""
        return [corpus.shard_samples for corpus in self.corpora]

    @property
    def is_remote(self) -> bool:
        """Whether any shard has to be fetched."""
        return any(is_remote(folder.location) for folder in self.folders)

    @property
    def weights(self) -> list[float]:
        return [corpus.weight for corpus in self.corpora]

    @functools.cached_property
    def mean_length(self) -> float:
        """Tokens a sample; of raw text, whose tokens nobody has counted, of some pieces at even distances."""
        if self.manifest.tokens:
            return self.manifest.tokens / self.manifest.samples
        some = self.ids(np.unique(np.linspace(0, self.num_samples - 1, 64).astype(np.int64)))
        return max(1.0, sum(map(len, some)) / max(1, len(some)))

    def check_tokenizer(self) -> TokenizerInfo:
        """The tokenizer, after a check that the shards were made with it. Raises DataError."""
        return check_tokenizer(self.tokenizer, self.manifest)

    def read(self, samples: np.ndarray) -> list[Stored | None]:
        """Samples in the order asked; None for one in a shard that is skipped.

        Raises:
            DataError: a shard is bad and not to be skipped, or an id lies outside the vocabulary.
        """
        if len(samples) == 0:
            return []
        shards, insides = self._locate(samples)
        if len(self.folders) == 1:
            return self.folders[0].read(shards, insides)
        found: list[Stored | None] = [None] * len(samples)
        folders = np.searchsorted(self._first_shards, shards, side="right") - 1
        for folder in np.unique(folders).tolist():
            here = np.flatnonzero(folders == folder)
            own = self.folders[folder].read(shards[here] - self._first_shards[folder], insides[here])
            for place, sample in zip(here.tolist(), own, strict=True):
                found[place] = sample
        return found

    def ids(self, samples: np.ndarray) -> list[np.ndarray]:
        """The ids of samples, those of skipped shards left out."""
        return [stored.ids for stored in self.read(samples) if stored is not None]

    def keys(self, samples: np.ndarray) -> list[str]:
        """`<shard file without .tar>/<number in the shard>` of each sample; of several folders, after the folder."""
        shards, insides = self._locate(samples)
        names = self._shard_names
        return [f"{names[shard]}/{inside}" for shard, inside in zip(shards.tolist(), insides.tolist(), strict=True)]

    def prefetch(self, shards: Iterable[int]) -> None:
        """Start to fetch remote shards, by their numbers through all folders."""
        wanted = np.fromiter(shards, dtype=np.int64)
        folders = np.searchsorted(self._first_shards, wanted, side="right") - 1
        for number, folder in enumerate(self.folders):
            folder.files.prefetch((wanted[folders == number] - self._first_shards[number]).tolist())

    def take_complaints(self) -> list[str]:
        """What there is to say of shards given up since the last call."""
        return [complaint for folder in self.folders for complaint in folder.files.take_complaints()]

    def _locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard numbers through all folders, and numbers in the shards."""
        shards = np.searchsorted(self._shard_ends, samples, side="right")
        return shards, samples - self._shard_starts[shards]


# --- locations -------------------------------------------------------------------------------------------------------


def access_of(config: Config, share: tuple[int, int] = (0, 1)) -> Access:
    """How the configuration says that shards are reached; `share` as in `Access`."""
    data = config.data
    cache = Path(data.cache_dir).expanduser() if data.cache_dir is not None else Access().cache_dir
    return Access(
        cache_dir=cache.absolute(),
        cache_bytes=int(data.cache_gib * 2**30),
        retry=RetryPolicy(attempts=data.download_attempts, timeout_seconds=data.download_timeout_seconds),
        verify_checksums=data.verify_checksums,
        skip_bad=data.on_bad_shard == "skip",
        share=share,
    )


def text_rules(config: Config) -> TextRules:
    """How the configuration says that raw text becomes ids."""
    prepare, length = config.prepare, config.data.sequence_length
    crammed = prepare.normalize == "crammed"
    choice = TokenizerChoice(prepare.tokenizer, prepare.vocab_size, prepare.tokenizer_characters, crammed, length)
    return TextRules(prepare.text_key, prepare.normalize, prepare.license, choice, length)


def open_corpora(where: Location, config: Config, share: tuple[int, int] = (0, 1)) -> Corpora:
    """The corpora of a location, or of several with weights; `share`: of the shards to look for, as in `Access`.

    Raises:
        DataError: a location that cannot be read or matches nothing; tars that no manifest lists; other tokenizers.
    """
    sections = [CorpusSection(shards=where)] if isinstance(where, str) else where
    access, rules = access_of(config, share), text_rules(config)
    try:
        corpora = Corpora(
            [Corpus(shown(part.shards), _folders(part.shards, access, rules), part.weight) for part in sections]
        )
    except OSError as cause:
        raise DataError(
            f"{cause.filename or 'shards'}: {cause.strerror or cause}; correct the path, or set data.cache_dir to a folder that "
            "can be written"
        ) from cause
    _check_cache(corpora, config)
    return corpora


def _check_cache(corpora: Corpora, config: Config) -> None:
    """Refuse a cache that each window of shards would be fetched into again and again."""
    window = config.data.shuffle_window or 1
    remote = [folder for folder in corpora.folders if is_remote(folder.location)]
    needed = sum(sorted(entry.bytes for folder in remote for entry in folder.shards)[-window:])
    if needed > config.data.cache_gib * 2**30:
        raise DataError(
            f"data.cache_gib: {config.data.cache_gib:g} GiB cannot hold the {window} shards of data.shuffle_window, which "
            f"take up to {needed / 2**30:.3g} GiB; raise it, or lower data.shuffle_window"
        )


def open_folder(location: str | Path) -> Corpora:
    """The corpora of one shard folder, with default settings."""
    return open_corpora(str(location), Config())


def _folders(location: str, access: Access, rules: TextRules) -> tuple[Folder, ...]:
    """One folder for each that the location names, or that holds tars that it names."""
    names: dict[str, list[str] | None] = {}
    for place in expand(location, access.retry):
        if basename(place).endswith(".tar"):
            chosen = names.setdefault(parent_of(place), [])
            if chosen is not None:
                chosen.append(basename(place))
        else:
            names[place] = None
    return tuple(_open_folder(folder, chosen, access, rules) for folder, chosen in names.items())


def _open_folder(folder: str, names: list[str] | None, access: Access, rules: TextRules) -> Folder:
    if (prepared := _prepared(folder, names, access)) is not None:
        return prepared
    if names is None and (is_remote(folder) or Path(folder).is_dir()):
        names = [name for name in list_folder(folder, access.retry) if name.endswith(".tar")]
    if not names:
        return ShardFolder(folder, access=access)  # raises, saying what is wrong with it
    return RawText(folder, sorted(names), rules, access)


def _prepared(folder: str, names: list[str] | None, access: Access) -> ShardFolder | None:
    """The folder's shards; None where no manifest lists them. A remote manifest, which may be large, is read once."""
    if not is_remote(folder) and not (Path(folder) / MANIFEST).is_file():
        return None
    try:
        return ShardFolder(folder, names=names, access=access)
    except NotFoundError:
        return None


# --- one manifest ----------------------------------------------------------------------------------------------------


def _joined_manifest(corpora: Sequence[Corpus]) -> Manifest:
    """The manifest of all: of a whole folder alone its own; of more, totals, and a hash over folders and weights."""
    folders = [folder for corpus in corpora for folder in corpus.folders]
    first = folders[0].manifest
    if len(folders) == 1 and folders[0].shards == first.shards:
        return first
    for folder in folders[1:]:
        if folder.manifest.tokenizer_sha256 != first.tokenizer_sha256:
            raise DataError(
                f"{folder.location}: tokenized otherwise than {folders[0].location}; corpora of one run share a tokenizer: "
                "prepare them with prepare.tokenizer=<folder of the first>/tokenizer"
            )
    identity = [
        (corpus.weight, folder.manifest.sha256, [entry.name for entry in folder.shards])
        for corpus in corpora
        for folder in corpus.folders
    ]
    shards = tuple(entry for folder in folders for entry in folder.shards)
    lengths = [folder.manifest.sequence_length for folder in folders]
    kinds = {folder.manifest.kind for folder in folders}
    known = [length for length in lengths if length is not None]
    return dataclasses.replace(
        first,
        kind=first.kind if len(kinds) == 1 else "documents",
        sequence_length=max(known) if len(known) == len(lengths) else None,
        samples=sum(entry.samples for entry in shards),
        tokens=0 if "text" in kinds else sum(entry.tokens for entry in shards),
        shards=shards,
        sources=tuple(source for folder in folders for source in folder.manifest.sources),
        sha256=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
    )

"""What the stages of a preparation share: the configuration, the work folder, the crew and the progress display."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparselt_dist.config import Config
from sparselt_dist.data.manifest import Kind
from sparselt_dist.data.parts import Crew
from sparselt_dist.data.stage_progress import StageProgress


@dataclass(frozen=True)
class Context:
    """What every stage needs."""

    config: Config
    work: Path
    crew: Crew
    progress: StageProgress

    def folder(self, name: str) -> Path:
        """A folder of the work folder, made if need be."""
        path = self.work / name
        path.mkdir(exist_ok=True)
        return path

    @property
    def documents(self) -> Path:
        return self.folder("documents")

    @property
    def tokenizer(self) -> Path:
        return self.work / "tokenizer"

    @property
    def crammed(self) -> bool:
        return self.config.prepare.normalize == "crammed"

    @property
    def kind(self) -> Kind:
        if self.config.data.sequence_length is None or self.config.prepare.packing == "documents":
            return "documents"
        return "packed" if self.config.prepare.packing == "best-fit" else "rows"

    @property
    def row_length(self) -> int | None:
        """Tokens a row; None where documents are kept whole."""
        return None if self.kind == "documents" else self.config.data.sequence_length

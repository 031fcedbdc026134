"""What the stages of a preparation share: the configuration, the work folder, the workers and the progress display."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparselt_dist.config import Config
from sparselt_dist.data.manifest import Kind
from sparselt_dist.data.stage_progress import StageProgress
from sparselt_dist.data.workspace import Workers


@dataclass(frozen=True)
class Context:
    """What every stage needs."""

    config: Config
    work: Path
    workers: Workers
    progress: StageProgress

    @property
    def documents(self) -> Path:
        return self.work / "documents.bin"

    @property
    def tokenizer(self) -> Path:
        return self.work / "tokenizer"

    @property
    def near(self) -> Path:
        return self.work / "near"

    @property
    def crammed(self) -> bool:
        return self.config.prepare.normalize == "crammed"

    @property
    def row_length(self) -> int | None:
        """Tokens a row; None where documents are kept whole."""
        return None if self.config.prepare.packing == "documents" else self.config.data.sequence_length

    @property
    def kind(self) -> Kind:
        return "documents" if self.row_length is None else "rows"

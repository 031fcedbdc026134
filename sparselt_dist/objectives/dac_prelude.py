"""What a run does for DAC before its first step: the agreements beside its shards, through stage 1, into the module.

The one place that says which stage 1 a configuration asks for. Nothing of it is imported in stage 2.

A reconstruction; see `objectives/dac_submodels.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from sparselt_dist.data.pair_files import PairKind, PairManifest, read_labelled_text, read_pair_manifest, read_pairs
from sparselt_dist.errors import DataError
from sparselt_dist.objectives.base import PreludeReport, PreludeSetting
from sparselt_dist.objectives.dac_contextual_embedding import ContextualAgreement
from sparselt_dist.objectives.dac_contextual_stage1 import make_submodels
from sparselt_dist.objectives.dac_embedding import AgreementEmbedding
from sparselt_dist.objectives.dac_stage1 import StoredFamily, make_tables
from sparselt_dist.objectives.settings import DACConfig, Family

REMEDY = "prepare them with prepare.agreements=strict"


def check_agreements(cfg: DACConfig, setting: PreludeSetting) -> PairManifest:
    """The manifest of the pairs that stage 1 is to learn from.

    Raises:
        DataError: there are none, they are of another tokenizer or vocabulary, or lack a family.
    """
    folder = agreements_folder(cfg, setting)
    manifest = read_pair_manifest(folder, setting.tokenizer_sha256)
    if manifest.vocab_size != setting.tokenizer.vocab_size:
        raise DataError(
            f"{folder}: its agreements are in pieces of a vocabulary of {manifest.vocab_size}, expected the "
            f"{setting.tokenizer.vocab_size} of the training shards; {REMEDY}"
        )
    lacking = [family for family in cfg.families if not manifest.pairs.get(family)]
    if lacking:
        there = ", ".join(family for family, count in sorted(manifest.pairs.items()) if count) or "none"
        raise DataError(
            f"objective.families: found {', '.join(lacking)}, expected families that have pairs in {folder}: {there}; "
            "choose among them, or prepare more text"
        )
    return manifest


def agreements_folder(cfg: DACConfig, setting: PreludeSetting) -> Path:
    """The prepared folder that has the agreements beside it. Raises DataError: the training shards are no such folder."""
    if cfg.agreements_from is not None:
        return Path(cfg.agreements_from)
    if setting.shard_folder is None:
        raise DataError(
            f"objective dac: data.train ({setting.shards}) is a mixture, a part of a folder, remote or raw text, which no "
            "agreements lie beside, expected one prepared folder of this machine; name one of the same tokenizer by "
            "objective.agreements_from=FOLDER, prepared with prepare.agreements=strict"
        )
    return setting.shard_folder


def run_stage1(
    cfg: DACConfig, term: AgreementEmbedding | ContextualAgreement, setting: PreludeSetting
) -> PreludeReport:
    """Make what the module of the term needs and hand it over, within the minutes and the share of the budget that are set.

    Raises:
        PreludeStopped: a stop was asked for.
        DataError: no agreements, or hardly any.
    """
    deadline = setting.clock() + stage1_seconds(cfg, setting)
    stored = _Stored(agreements_folder(cfg, setting), check_agreements(cfg, setting))
    if isinstance(term, AgreementEmbedding):
        return _static(cfg, term, setting, stored, deadline)
    return _contextual(cfg, term, setting, stored, deadline)


class _Stored(NamedTuple):
    """The agreements beside the shards."""

    folder: Path
    manifest: PairManifest

    def facts(self) -> dict[str, float | str]:
        manifest = self.manifest
        return {"track": manifest.track, "parse_seconds": manifest.extraction_seconds, "parsed_words": manifest.words}


def _static(
    cfg: DACConfig, term: AgreementEmbedding, setting: PreludeSetting, stored: _Stored, deadline: float
) -> PreludeReport:
    # rows of the model beyond the tokenizer's vocabulary have no pairs, so their tables are zero
    frequencies_V = torch.zeros(len(term.tables_VRM), dtype=torch.int64)
    frequencies_V[: stored.manifest.vocab_size] = torch.from_numpy(setting.count_pieces())
    kind: PairKind = "window" if cfg.tables == "window" else "agreements"

    def read(family: Family) -> StoredFamily:
        setting.keep_going()
        arrays = read_pairs(stored.folder, stored.manifest, family, kind)
        return StoredFamily(arrays, len(stored.manifest.labels[family]))

    result = make_tables(
        read,
        cfg,
        frequencies_V=frequencies_V,
        special_ids=setting.tokenizer.special_ids,
        seed=setting.seed,
        max_seconds=deadline - setting.clock(),
        device=setting.device,
        clock=setting.clock,
        keep_going=setting.keep_going,
    )
    term.load(result.tables)
    facts = stored.facts()
    for family, table in zip(result.reports, result.tables, strict=True):
        facts |= {f"{family}/pairs": stored.manifest.pairs[family], f"{family}/sha256": table.sha256}
    return PreludeReport(result.metrics(), facts)


def _contextual(
    cfg: DACConfig, term: ContextualAgreement, setting: PreludeSetting, stored: _Stored, deadline: float
) -> PreludeReport:
    result = make_submodels(
        read_labelled_text(stored.folder, stored.manifest),
        cfg,
        setting.tokenizer,
        seed=setting.seed,
        max_seconds=deadline - setting.clock(),
        device=setting.device,
        clock=setting.clock,
        keep_going=setting.keep_going,
    )
    term.load(result.submodels, result.present_V)
    return PreludeReport(result.metrics(), {**stored.facts(), "text_pieces": stored.manifest.text_pieces})


def stage1_seconds(cfg: DACConfig, setting: PreludeSetting) -> float:
    """What all of stage 1 may take."""
    limits = [60 * cfg.stage1_total_minutes, setting.max_seconds]
    if setting.budget_seconds is not None:
        limits.append(cfg.stage1_max_share * setting.budget_seconds)
    return min(limits)

"""A toy language, its shards and tokenizer, and a run folder with a checkpoint that no training was needed for."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from sparselt_dist.checkpoint import sha256
from sparselt_dist.config import Config
from sparselt_dist.config_loading import dump
from sparselt_dist.data.corpora import Corpora, open_folder
from sparselt_dist.data.manifest import SourceEntry, write_copy, write_manifest
from sparselt_dist.data.shard_writer import ShardWriter
from sparselt_dist.data.tokenizer import tokenizer_info
from sparselt_dist.models.assembly import build_model
from sparselt_dist.models.backbone import PretrainingModel
from sparselt_dist.objectives.base import TokenizerInfo

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = 195
VOCABULARY = len(SPECIAL) + WORDS
LENGTH = 16


def write_tokenizer(folder: Path, *, mask: bool = True) -> None:
    """One word a token; the template is BERT's."""
    names = [*SPECIAL, *(f"w{number}" for number in range(WORDS))]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(list(SPECIAL if mask else SPECIAL[:-1]))
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]"} | ({"mask": "[MASK]"} if mask else {})
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **{f"{role}_token": name for role, name in roles.items()}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def markov_rows(rows: int, seed: int) -> np.ndarray:
    """An order-1 chain in which each word has four successors, frequent words being successors of many."""
    shape = np.random.default_rng(0)
    frequency = 1 / np.arange(1, WORDS + 1)
    successors = np.stack([shape.choice(WORDS, 4, replace=False, p=frequency / frequency.sum()) for _ in range(WORDS)])
    draw = np.random.default_rng(seed)
    ids = np.empty((rows, LENGTH), dtype=np.uint16)
    ids[:, 0] = draw.integers(0, WORDS, rows)
    for position in range(1, LENGTH):
        ids[:, position] = successors[ids[:, position - 1], draw.choice(4, rows, p=[0.6, 0.25, 0.1, 0.05])]
    return ids + len(SPECIAL)


def write_shards(folder: Path, rows: np.ndarray, tokenizer_dir: Path) -> Corpora:
    """The rows as a shard folder."""
    writer = ShardWriter(folder, kind="rows", dtype="uint16")
    writer.extend(rows)
    write_manifest(
        folder,
        writer.close(),
        kind="rows",
        sequence_length=LENGTH,
        dtype="uint16",
        vocab_size=VOCABULARY,
        tokenizer_sha256=tokenizer_sha256(tokenizer_dir),
        sources=[SourceEntry("toy|chain", "CC0-1.0", 7, 12345)],
    )
    return open_folder(folder)


def tokenizer_sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def make_data(root: Path, *, train_rows: int = 600, mask: bool = True) -> tuple[Corpora, Corpora, TokenizerInfo]:
    """Training shards, held-out shards and the tokenizer (in `root/tokenizer`)."""
    write_tokenizer(root / "tokenizer", mask=mask)
    train = write_shards(root / "train", markov_rows(train_rows, 1), root / "tokenizer")
    validation = write_shards(root / "validation", markov_rows(300, 2), root / "tokenizer")
    return train, validation, tokenizer_info(root / "tokenizer")


def toy_config(root: Path, architecture: str = "crammed-bert", **model_fields: Any) -> Config:
    """A configuration for the shards that `make_data` left in `root`."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return Config.model_validate(
        {
            "run": {"name": "toy", "output_dir": str(root / "run")},
            "data": {
                "train": str(root / "train"),
                "validation": str(root / "validation"),
                "sequence_length": LENGTH,
            },
            "model": {"architecture": architecture, "config": {**sizes, **model_fields}},
            "train": {"global_batch_size": 16, "evaluate_samples": 64},
            "budget": {"max_steps": 7},
            "log": {"mlflow_uri": None},
        }
    )


def save_weights(model: PretrainingModel, checkpoint: Path) -> None:
    """Put the model's weights into a checkpoint, in place of those that are there."""
    path, meta = checkpoint / "weights-00000.safetensors", json.loads((checkpoint / "meta.json").read_text())
    save_file({name: value.detach().clone() for name, value in model.named_parameters()}, path)
    meta["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (checkpoint / "meta.json").write_text(json.dumps(meta))


def write_run(config: Config, root: Path, *, step: int = 7, run_id: str = "1" * 32) -> tuple[Path, PretrainingModel]:
    """A run folder with one complete checkpoint of initial weights, the norms' moved; and the model in memory."""
    run_dir = Path(config.run.output_dir or "")
    tokenizer = tokenizer_info(root / "tokenizer")
    model = build_model(config, tokenizer).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    meta = {
        "format": 1,  # whole tensors, as they were saved before they were cut
        "step": step,
        "tokens": step * 16 * LENGTH,
        "world_size": 1,
        "progress": {"step": step, "tokens": step * 16 * LENGTH, "position": step * 16, "seconds": 12.0},
        "config": config.model_dump(mode="json"),
        "data_manifest_sha256": open_folder(root / "train").manifest.sha256,
        "tokenizer_sha256": tokenizer_sha256(root / "tokenizer"),
        "files": {},
    }
    (folder / "config.json").write_text(json.dumps(model.backbone.config.to_dict()))
    (folder / "meta.json").write_text(json.dumps(meta))
    save_weights(model, folder)
    (folder / "COMPLETE").write_text(f"{step}\n")
    (run_dir / "run_id").write_text(run_id)
    write_copy(open_folder(root / "train").manifest, run_dir)
    (run_dir / "config.resolved.yaml").write_text(dump(config))
    lines = [{"step": step, "eval/loss": 4.25, "yardstick/masked_ce": 3.5}, {"step": step + 1, "eval/loss": 9.0}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run_dir / "tokenizer").symlink_to(root / "tokenizer")
    return run_dir, model

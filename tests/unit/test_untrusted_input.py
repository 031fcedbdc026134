"""Shards, checkpoints, tokenizers and configurations of others: none runs code, reads or writes outside its folder.

Pickles of weights are in test_conversion.py.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus_files import numbered_rows, write_folder
from official_states import Runs, write_bare_pickle

from sparselt_dist import checkpoint, run_folder
from sparselt_dist.config import ModelSection
from sparselt_dist.config_loading import load_config
from sparselt_dist.data.cache import ShardCache
from sparselt_dist.data.corpora import open_folder
from sparselt_dist.data.manifest import MANIFEST, file_sha256, parse_manifest
from sparselt_dist.data.shard_files import Access
from sparselt_dist.data.shard_index import scan_tar
from sparselt_dist.data.shards import ShardFolder
from sparselt_dist.data.storage import NotFoundError, RetryPolicy
from sparselt_dist.data.tokenizer import copy_tokenizer
from sparselt_dist.data.verification import verify
from sparselt_dist.errors import CheckpointError, ConfigError, DataError

NO_RETRY = RetryPolicy(attempts=1)


def change_manifest(folder: Path, **changes: Any) -> bytes:
    """Change fields of a manifest, `shard` in each of its shards."""
    path = folder / MANIFEST
    content = json.loads(path.read_bytes())
    for entry in content["shards"]:
        entry |= changes.get("shard", {})
    content |= {key: value for key, value in changes.items() if key != "shard"}
    path.write_text(json.dumps(content))
    return path.read_bytes()


@pytest.mark.parametrize("suffix", ["pkl", "pth", "pyd"])
def test_verifying_a_shard_unpickles_nothing(tmp_path: Path, suffix: str) -> None:
    folder, mark = write_folder(tmp_path / "s", numbered_rows(4)), tmp_path / "mark"
    shard = folder / "shard-000000.tar"
    write_bare_pickle(tmp_path / "harm", Runs(os.system, f"touch {mark}"))
    with tarfile.open(shard, "a") as tar:
        tar.add(tmp_path / "harm", arcname=f"shard000000-00000.{suffix}")
    change_manifest(folder, shard={"bytes": shard.stat().st_size, "sha256": file_sha256(shard)})
    assert verify(folder) == []
    assert not mark.exists()


def test_verifying_a_shard_takes_no_array_of_objects(tmp_path: Path) -> None:
    folder, mark = write_folder(tmp_path / "s", numbered_rows(4)), tmp_path / "mark"
    harm = np.array([Runs(os.system, f"touch {mark}")], dtype=object)
    buffer = io.BytesIO()
    np.save(buffer, harm, allow_pickle=True)
    with tarfile.open(folder / "shard-000000.tar", "w") as tar:
        info = tarfile.TarInfo("shard000000-00000.ids.npy")
        info.size = len(buffer.getvalue())
        tar.addfile(info, io.BytesIO(buffer.getvalue()))
    assert any("cannot be read" in fault for fault in verify(folder))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../secret.tar", "/etc/passwd", "sub/shard.tar", "..", "", "a\\b.tar"])
def test_a_manifest_names_files_beside_it_alone(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "s", numbered_rows(4))
    content = change_manifest(folder, shard={"name": name})
    with pytest.raises(DataError, match="expected the name of a file beside it"):
        parse_manifest(content, "http://h/manifest.json")
    with pytest.raises(DataError, match="expected the name of a file beside it"):
        open_folder(folder)


@pytest.mark.parametrize("sha256", ["../../../home", "/tmp/elsewhere", "0" * 64])
def test_a_remote_tokenizer_is_kept_under_its_true_hash_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sha256: str
) -> None:
    """The manifest's writer chooses neither a folder of this machine nor what others' shards find there."""
    folder, cache = write_folder(tmp_path / "s", numbered_rows(4)), tmp_path / "a" / "b" / "cache"
    change_manifest(folder, tokenizer_sha256=sha256)
    site = "http://h/s"

    def read(url: str, retry: RetryPolicy) -> bytes:
        path = folder / url.removeprefix(f"{site}/")
        if not path.exists():
            raise NotFoundError(url)
        return path.read_bytes()

    monkeypatch.setattr("sparselt_dist.data.shards.read_bytes", read)
    opened = ShardFolder(site, access=Access(cache_dir=cache, retry=NO_RETRY))
    with pytest.raises(DataError, match="sha256"):
        _ = opened.tokenizer
    assert not list(tmp_path.rglob("tokenizer.json"))[1:]


def test_a_tokenizers_links_out_of_its_folder_are_not_followed(tmp_path: Path) -> None:
    secret, source, run_dir = tmp_path / "secret", tmp_path / "tokenizer", tmp_path / "run"
    secret.write_text("of somebody")
    for folder in (source, run_dir):
        folder.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "linked.json").symlink_to("tokenizer.json")
    (source / "vocab.txt").symlink_to(secret)
    run_folder.copy_tokenizer(source, run_dir)
    assert sorted(path.name for path in (run_dir / "tokenizer").iterdir()) == ["linked.json", "tokenizer.json"]


def test_links_in_a_shard_are_not_followed(tmp_path: Path) -> None:
    np.save(tmp_path / "outside.npy", np.zeros((3, 16), np.uint16))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind, name in ((tarfile.SYMTYPE, "a.ids.npy"), (tarfile.LNKTYPE, "b.ids.npy"), (tarfile.DIRTYPE, "c.npy")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "outside.npy")
            tar.addfile(info)
    assert scan_tar(tmp_path / "a.tar", "rows") == []


@pytest.mark.parametrize("name", ["..%2F..%2Foutside.tar", "a%00b.tar", "%F0%9F%98%80" * 150 + ".tar"])
def test_a_copy_lies_in_the_cache_whatever_its_address_spells(tmp_path: Path, name: str) -> None:
    copy = ShardCache(tmp_path, 1, NO_RETRY)._copy((f"http://h/{name}", None, None))
    assert copy.parent == tmp_path and copy.name.endswith(".tar") and len(os.fsencode(copy.name)) < 200
    assert not copy.exists()  # a name that the file system takes


@pytest.mark.parametrize("name", ["../weights", "/etc/hostname"])
def test_a_checkpoint_names_files_of_its_own_folder_alone(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    outside = (folder / name).resolve()
    if not outside.exists():
        outside.write_bytes(b"x")
    noted = {"bytes": outside.stat().st_size, "sha256": checkpoint.sha256(outside)}
    meta = {"format": checkpoint.FORMAT, "step": 1, "files": {name: noted, "config.json": noted}}
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "config.json").write_bytes(outside.read_bytes())
    (folder / "COMPLETE").write_text(checkpoint.complete_mark(1, folder / "meta.json"))
    with pytest.raises(CheckpointError, match="expected files of its own folder"):
        checkpoint.verify(folder)


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "..", "a/b", "", "  "])
def test_a_runs_name_is_one_folder(name: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.name: found .* expected a name that can be that of one folder"):
        load_config([], [f"run.name='{name}'", "budget.max_steps=1"], for_training=False)


def test_a_runs_name_is_free_where_its_folder_is_given() -> None:
    named = load_config([], ["run.name=a/b", "run.output_dir=runs/x"], for_training=False)
    assert named.run.name == "a/b"


CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import PretrainedConfig, PreTrainedTokenizerFast
class Harm(PretrainedConfig): model_type = "harm"
class HarmTokenizer(PreTrainedTokenizerFast): pass
"""


def load_classifier(folder: Path) -> None:
    from sparselt_dist.models.classifier import load_classifier

    load_classifier(folder, outputs=2, dropout=0.0, pad_id=0)


def load_tokenizer(folder: Path) -> None:
    copy_tokenizer(str(folder), folder / "copied")


@pytest.mark.parametrize("load", [load_classifier, load_tokenizer])
def test_a_folders_own_code_is_not_run_even_if_the_terminal_says_yes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[[Path], None]
) -> None:
    """transformers asks where it is not told; a `yes |` in front of a command is an answer."""
    folder, mark = tmp_path / "model", tmp_path / "mark"
    write_folder(tmp_path / "s", numbered_rows(4))
    (tmp_path / "s" / "tokenizer").rename(folder)
    (folder / "harm.py").write_text(CODE.format(mark=str(mark)))
    (folder / "config.json").write_text(json.dumps({"model_type": "harm", "auto_map": {"AutoConfig": "harm.Harm"}}))
    kind = {"tokenizer_class": "HarmTokenizer", "auto_map": {"AutoTokenizer": [None, "harm.HarmTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(builtins, "input", lambda prompt="": "y")
    with contextlib.suppress(CheckpointError, DataError):
        load(folder)
    assert not mark.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_configuration_fetches_no_kernels(tmp_path: Path, key: str) -> None:
    from sparselt_dist.models.construction import make_model
    from sparselt_dist.objectives.base import TokenizerInfo

    fields = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps({**fields, "intermediate_size": 8, key: "owner/kernel"}))
    tokenizer = TokenizerInfo(vocab_size=96, pad_id=0, mask_id=4, special_ids=(0, 1, 2, 3, 4))
    section = ModelSection(architecture=str(tmp_path))
    with pytest.raises(ConfigError, match="code of a repository"):
        make_model(section, tokenizer, sequence_length=8, with_head=True)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system [touch mark]", "!!python/name:os.system"])
def test_no_tag_of_a_configuration_file_makes_an_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tag: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(f"run:\n  name: {tag}\n")
    with pytest.raises(ConfigError, match="malformed YAML"):
        load_config(["a.yaml"], for_training=False)
    assert not Path("mark").exists()


def test_nothing_of_the_environment_is_filled_into_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "s3cret")
    for text in ("${TOKEN}", "$TOKEN", "${oc.env:TOKEN}"):
        assert load_config([], [f"log.experiment={text}"], for_training=False).log.experiment == text

"""The checks of `doctor`. Each returns findings; none raises for what it finds.

The order in `doctor.py` is from fast to slow: what needs torch comes last.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple
from urllib.parse import urlsplit

from sparselt_dist import extensions
from sparselt_dist.config import Config
from sparselt_dist.config_loading import make_plan, resolve_deepspeed
from sparselt_dist.errors import SparseltError
from sparselt_dist.redaction import shown
from sparselt_dist.run_plan import run_dir

if TYPE_CHECKING:
    from sparselt_dist.data.corpora import Corpora, Location

GIB = 2**30
_PACKAGES = ("torch", "deepspeed", "transformers", "mlflow", "datasets", "webdataset")
_HTTP_SECONDS = 3.0
_LOW_DISK_GIB, _LEAST_DISK_GIB = 10.0, 1.0
_LOW_MEMORY_GIB = 2.0


class Finding(NamedTuple):
    """One line of the report; `fix` says what to do where something is not in order."""

    level: Literal["ok", "note", "warning", "error"]
    subject: str
    found: str
    fix: str = ""


def _from_error(subject: str, error: SparseltError) -> Finding:
    """Our messages end in `; what to do`."""
    found, _, fix = str(error).rpartition("; ")
    return Finding("error", subject, found, fix) if found else Finding("error", subject, fix, "correct the value named")


# --- the configuration and what it names -----------------------------------------------------------------------------


def check_split(config: Config, world_size: int) -> list[Finding]:
    """The global batch over so many ranks, and the DeepSpeed file."""
    try:
        plan = make_plan(config, world_size)
        resolve_deepspeed(config, plan)
    except SparseltError as error:
        return [_from_error("batch split", error)]
    found = (
        f"{config.train.global_batch_size} sequences = {world_size} ranks x {plan.micro_batch_size} x "
        f"{plan.accumulation_steps} micro-steps, ZeRO-{plan.zero_stage}"
    )
    return [Finding("ok", "batch split", found)]


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _write_fault(folder: Path) -> str | None:
    """Why no file can be written in a folder that may not exist yet; None if it can."""
    parent = _existing_parent(folder)
    if not parent.is_dir():
        return f"{parent} is a file"
    try:
        with tempfile.TemporaryFile(dir=parent):
            return None
    except OSError as cause:
        return f"{parent}: {cause.strerror}"


def check_output(config: Config) -> list[Finding]:
    """The run's folder can be written, and its disk has room."""
    fix = "free space, lower checkpoint.keep, or set run.output_dir elsewhere"
    return [_folder_finding("run.output_dir", Path(run_dir(config)), fix)]


def _folder_finding(key: str, folder: Path, more_room: str) -> Finding:
    """A folder that may not exist yet: it can be written, and its disk has room."""
    fault = _write_fault(folder)
    if fault is not None:
        fix = f"set {key} to a folder you may write, or change its rights"
        return Finding("error", key, f"{folder} cannot be written: {fault}", fix)
    free = shutil.disk_usage(_existing_parent(folder)).free / GIB
    found = f"{free:.1f} GiB free for {folder}"
    if free >= _LOW_DISK_GIB:
        return Finding("ok", key, found)
    return Finding("error" if free < _LEAST_DISK_GIB else "warning", key, found, more_room)


def check_scratch(config: Config) -> list[Finding]:
    """The disk that a checkpoint is copied to before it is written; how large the copy is, `plan` says."""
    section = config.checkpoint
    if section.scratch_dir is None:
        return []
    fix = "free space (12 bytes a parameter, shared out over the ranks), or set checkpoint.scratch_dir=null"
    return [_folder_finding("checkpoint.scratch_dir", Path(section.scratch_dir).expanduser(), fix)]


def check_upload(config: Config) -> list[Finding]:
    """The store that checkpoints are copied to takes an object, which is removed again."""
    from sparselt_dist.data.storage import RetryPolicy, try_writing

    target = config.checkpoint.upload
    if target is None:
        return []
    try:
        try_writing(target, RetryPolicy(attempts=2, timeout_seconds=_HTTP_SECONDS))
    except SparseltError as error:
        return [_from_error("checkpoint.upload", error)]
    return [Finding("ok", "checkpoint.upload", f"{target} can be written")]


def check_tracking(config: Config) -> list[Finding]:
    """The MLflow store answers, or its file can be written. A run outlives a store that is down: never an error."""
    uri = config.log.mlflow_uri
    if uri is None:
        return [Finding("note", "log.mlflow_uri", "null: the journal only")]
    scheme = urlsplit(uri).scheme
    if scheme == "sqlite":
        database = Path(uri.partition("sqlite:///")[2])
        locked = database.exists() and not os.access(database, os.W_OK)
        fault = f"{database} is read-only" if locked else _write_fault(database.parent)
        if fault is None:
            return [Finding("ok", "log.mlflow_uri", uri)]
        return [Finding("warning", "log.mlflow_uri", f"{uri}: {fault}", "set log.mlflow_uri to a file you may write")]
    if scheme in ("http", "https"):
        return [_http_finding(shown(uri))]  # an answer that asks for a password is one
    return [Finding("note", "log.mlflow_uri", f"{shown(uri)}: not checked")]


def _http_finding(uri: str) -> Finding:
    request = urllib.request.Request(uri, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_HTTP_SECONDS) as answer:
            return Finding("ok", "log.mlflow_uri", f"{uri}: answers {answer.status}")
    except urllib.error.HTTPError as answer:  # it speaks HTTP, so it is there
        return Finding("ok", "log.mlflow_uri", f"{uri}: answers {answer.code}")
    except (OSError, ValueError) as cause:
        fix = "start the server, correct log.mlflow_uri, or bring the journals in later with `sparselt mlflow-sync`"
        return Finding("warning", "log.mlflow_uri", f"{uri}: {cause}", fix)


def check_data(config: Config, *, verify: bool) -> list[Finding]:
    """The shard folders open, fit the tokenizer and the configuration; with `verify` every checksum."""
    if config.data.train is None:
        found = f"none yet: `pretrain` prepares them from prepare.source={config.prepare.source}"
        return [Finding("note", "data.train", found)]
    findings: list[Finding] = []
    for key, where in (("data.train", config.data.train), ("data.validation", config.data.validation)):
        if where is not None:
            findings += _shard_findings(key, where, config, verify)
    return findings


def _shard_findings(key: str, where: Location, config: Config, verify: bool) -> list[Finding]:
    from sparselt_dist.data.corpora import open_corpora

    try:
        corpora = open_corpora(where, config)
        corpora.check_tokenizer()
    except SparseltError as error:
        return [_from_error(key, error)]
    manifest = corpora.manifest
    content = f"{corpora.num_samples:,} {manifest.kind} in {len(manifest.shards)} shards"
    found = f"{corpora.name}: {content}, vocabulary {manifest.vocab_size:,}"
    findings = [Finding("ok", key, found)]
    wanted = config.data.sequence_length
    if manifest.kind in ("rows", "packed") and wanted is not None and manifest.sequence_length != wanted:
        found = f"rows of {manifest.sequence_length} tokens, data.sequence_length is {wanted}"
        findings.append(
            Finding("error", key, found, f"set data.sequence_length={manifest.sequence_length}, or prepare anew")
        )
    if key == "data.train" and corpora.num_samples < config.train.global_batch_size:
        found = f"{corpora.num_samples} samples, fewer than one step of {config.train.global_batch_size}"
        findings.append(Finding("warning", key, found, "prepare more text, or lower train.global_batch_size"))
    if verify:
        findings += _checksum_findings(key, corpora)
    return findings


def _checksum_findings(key: str, corpora: Corpora) -> list[Finding]:
    from sparselt_dist.data.verification import verify

    faults = [fault for folder in corpora.folders for fault in verify(folder.location)]
    if not faults:
        return [Finding("ok", key, "every checksum, count and token id is right")]
    return [Finding("error", key, fault, "restore the file, or prepare the folder again") for fault in faults]


# --- the machine -----------------------------------------------------------------------------------------------------


def check_packages() -> list[Finding]:
    """Python and the packages that matter, against the ranges that this package declares."""
    from packaging.requirements import Requirement

    findings = []
    try:
        wanted = importlib.metadata.metadata("sparselt_dist")["Requires-Python"]
        lines = importlib.metadata.requires("sparselt_dist") or []
    except importlib.metadata.PackageNotFoundError:
        lines, wanted = [], ""
        found = "sparselt_dist itself is not installed: ranges not checked"
        findings.append(Finding("warning", "packages", found, "pip install -e ."))
    findings.append(_range_finding("python", platform.python_version(), wanted))
    ranges = {parsed.name.lower(): parsed.specifier for parsed in map(Requirement, lines) if parsed.marker is None}
    for name in _PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding("error", name, "not installed", "pip install -e ."))
            continue
        findings.append(_range_finding(name, version, str(ranges.get(name, ""))))
    return findings


def _range_finding(name: str, version: str, wanted: str) -> Finding:
    from packaging.specifiers import SpecifierSet

    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Finding("ok", name, version)
    fix = "use another Python" if name == "python" else f"pip install '{name}{wanted}'"
    return Finding("error", name, f"{version}, expected {wanted}", fix)


def check_build_tools(config: Config | None) -> list[Finding]:
    """Compiler and ninja, which `train.compile` and DeepSpeed's operators need, and the locks of killed builds."""
    findings = []
    compiler = next(
        (found for name in (os.environ.get("CXX"), "c++", "g++") if name and (found := shutil.which(name))), None
    )
    if compiler is None:
        is_needed = config is not None and config.train.compile
        fix = "apt-get install g++, or load a compiler module"
        findings.append(
            Finding("error" if is_needed else "note", "C++ compiler", "none on PATH; train.compile needs one", fix)
        )
    else:
        findings.append(Finding("ok", "C++ compiler", compiler))
    beside_python = os.path.dirname(sys.executable)
    ninja = shutil.which("ninja") or shutil.which("ninja", path=beside_python)
    findings.append(
        Finding("ok", "ninja", ninja) if ninja else Finding("error", "ninja", "not found", "pip install ninja")
    )
    return findings + _extension_findings()


def _extension_findings() -> list[Finding]:
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(chosen) if chosen else extensions.private_folder(os.environ)
    if folder is None:
        fix = "set TORCH_EXTENSIONS_DIR to a folder you may write"
        return [Finding("error", "compiled operators", "no folder for them can be written", fix)]
    locks = sorted(folder.glob("*/lock"))
    if locks:
        found = f"{len(locks)} build lock(s), such as {locks[0]}; a build is running, or was killed"
        return [Finding("warning", "compiled operators", found, "if no other run is starting, remove the lock files")]
    return [Finding("ok", "compiled operators", f"none is being built in {folder}")]


def check_launcher() -> list[Finding]:
    """The `deepspeed` on PATH is the superset that this package installs."""
    found = shutil.which("deepspeed")
    beside_python = shutil.which("deepspeed", path=os.path.dirname(sys.executable))
    if found is None:
        fix = "activate the environment" if beside_python else "pip install -e ., in the active environment"
        return [Finding("error", "deepspeed command", "not on PATH", fix)]
    if b"sparselt_dist" in Path(found).read_bytes():
        return [Finding("ok", "deepspeed command", found)]
    fix = "reinstall this package after deepspeed: pip install --force-reinstall --no-deps -e ."
    return [Finding("warning", "deepspeed command", f"{found} is the stock one: no -m, no clean stop on signals", fix)]


def check_memory() -> list[Finding]:
    """Main memory that is available now."""
    import psutil

    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available, {extensions.usable_cores()} cores"
    if memory.available / GIB < _LOW_MEMORY_GIB:
        return [Finding("warning", "memory", found, "end other programs, or lower train.micro_batch_size")]
    return [Finding("ok", "memory", found)]


def check_slurm() -> list[Finding]:
    """Whether this host can submit to Slurm."""
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        return [Finding("note", "slurm", "not here: start with deepspeed or torchrun")]
    try:
        answer = subprocess.run(
            [sbatch, "--version"], capture_output=True, text=True, timeout=_HTTP_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as cause:
        return [Finding("warning", "slurm", f"{sbatch} does not answer: {cause}", "ask the cluster's administrators")]
    return [Finding("ok", "slurm", answer.stdout.strip() or sbatch)]


def check_devices(config: Config | None, world_size: int) -> list[Finding]:
    """GPUs, and whether they can do what the configuration asks. Imports torch."""
    import torch

    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees none"
        return [Finding("note", "GPU", f"none ({built}): ranks run on the CPU over gloo")]
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    findings = [Finding("ok", "GPU", ", ".join(names))]
    if (
        config is not None
        and config.train.precision == "bf16"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        findings.append(Finding("error", "GPU", "no bf16 arithmetic", "set train.precision=fp16"))
    if world_size > len(names):
        found = f"{len(names)} here for --world {world_size}"
        findings.append(Finding("note", "GPU", f"{found}: several nodes are needed"))
    return findings

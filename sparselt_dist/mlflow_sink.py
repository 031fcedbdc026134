"""One run folder as one MLflow run: parameters, tags, points, artifacts, model, final status.

Invariants: a (metric, step) is in the store at most once, whoever was killed in the middle of what; everything here may
be repeated after any failure, for it asks the store what it has and sends the rest. The run is found again by the tag
`sparselt.run_id`, the folder's lasting identity. Only MLflow's public client is used.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import logging
import math
import os
import re
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import yaml

from sparselt_dist.config import LogSection
from sparselt_dist.errors import DataError
from sparselt_dist.follower import SUMMARY_NAME, read_json
from sparselt_dist.journal import replace_file
from sparselt_dist.redaction import shown_in

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

FinalStatus = Literal["FINISHED", "FAILED", "KILLED"]
STATUS_OF: Final[dict[str, FinalStatus]] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
CONFIG_NAME: Final = "config.resolved.yaml"
RUN_ID_TAG: Final = "sparselt.run_id"
STEPS_TAG: Final = "sparselt.steps"
_ARTIFACTS_TAG: Final = "sparselt.artifacts"
_SMALL_ARTIFACTS: Final = (CONFIG_NAME, "ds_config.resolved.json", "environment.json")
_MODEL: Final = "model"
_PROFILE: Final = "profile"
# MLflow's limits on one request and one value.
_METRICS_PER_BATCH: Final = 1000
_PARAMS_PER_BATCH: Final = 100
_PARAM_CHARACTERS: Final = 6000
_TAG_CHARACTERS: Final = 5000
_KEY_CHARACTERS: Final = 250
_TASKS: Final = (("ForMaskedLM", "fill-mask"), ("ForCausalLM", "text-generation"), ("LMHeadModel", "text-generation"))


def open_client(uri: str) -> MlflowClient:
    """A client of this store and no other; a SQLite store is made if it is not there. MLflow's own telemetry is off,
    its retries are short (the callers here retry) and it says nothing that is not a warning."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["DO_NOT_TRACK"] = "true"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):  # after the import, which sets levels of its own
        logging.getLogger(name).setLevel(logging.WARNING)
    database = sqlite_file(uri)
    if database is not None:
        database.parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def sqlite_file(uri: str) -> Path | None:
    """The file of a `sqlite:///` store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"a": {"b": None}}` to `{"a.b": "null"}`; lists as JSON."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{path}.")
        else:
            flat[path] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def read_config(run_dir: Path) -> dict[str, Any]:
    """The resolved configuration; empty where there is none. Raises DataError if it is not YAML."""
    path = run_dir / CONFIG_NAME
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(
            f"{path}: cannot be read as YAML ({error}); expected the run's resolved configuration"
        ) from error
    return content if isinstance(content, dict) else {}


def run_identity(run_dir: Path) -> str:
    """The folder's lasting identity (`run_id`), made if missing."""
    path = run_dir / "run_id"
    try:
        identity = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        identity = ""
    if not identity:
        identity = uuid.uuid4().hex
        replace_file(path, identity.encode())
    return identity


def _legal_key(key: str) -> str:
    """The journal's name, with what MLflow does not allow in a key replaced."""
    return re.sub(r"[^\w./: -]", "_", key)[:_KEY_CHARACTERS]


class StepSet:
    """A set of step numbers at one bit each: a long run has millions of points."""

    def __init__(self, steps: Iterable[int] = ()) -> None:
        self._bits = bytearray()
        for step in steps:
            self.add(step)

    def add(self, step: int) -> None:
        byte = step >> 3
        if byte >= len(self._bits):
            self._bits.extend(bytes(byte + 1 - len(self._bits) + 1024))
        self._bits[byte] |= 1 << (step & 7)

    def __contains__(self, step: int) -> bool:
        byte = step >> 3
        return byte < len(self._bits) and bool(self._bits[byte] >> (step & 7) & 1)


class MlflowSink:
    """Feeds one store from one run folder. Methods raise whatever the store fails with; call them again later.

    `sent` and `already_there` count points (one value of one metric at one step).
    """

    def __init__(self, run_dir: Path, uri: str, experiment: str | None = None) -> None:
        self.run_dir = run_dir
        self.uri = uri
        self.config = read_config(run_dir)
        section = self.config.get("log") or {}
        default: str = LogSection.model_fields["experiment"].default
        self.experiment = experiment or str(section.get("experiment") or default)
        self.identity = run_identity(run_dir)
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self.sent = 0
        self.already_there = 0
        self._store: MlflowClient | None = None
        self._status = ""
        self._tags: dict[str, str] = {}
        self._stored_keys: set[str] = set()
        self._seen: dict[str, StepSet] = {}

    # -- the run ------------------------------------------------------------------------------------------------------

    def connect(self) -> str:
        """Find the folder's MLflow run or make it; send the parameters and tags that it lacks."""
        run = self._find() or self._create()
        self.run_id, self._status = run.info.run_id, run.info.status
        self._tags = dict(run.data.tags)
        self._stored_keys, self._seen = set(run.data.metrics), {}
        self._describe(run)
        return self.run_id

    def show_configuration(self) -> None:
        """Send the configuration's files; a store whose artifacts cannot be written from here has the figures all the same."""
        for name in _SMALL_ARTIFACTS:
            self._log_file(name)

    def set_running(self) -> None:
        """The run is being trained (again)."""
        if self._status != "RUNNING":
            self._client.update_run(self._run, status="RUNNING")
            self._status = "RUNNING"

    def finish(self, status: FinalStatus, end_time: float | None = None) -> None:
        """Summary, final status, then a profile and the exported model, which may take long."""
        if self._status != status:
            seconds = time.time() if end_time is None else end_time
            self._client.set_terminated(self._run, status=status, end_time=int(seconds * 1000))
            self._status = status
        self.show_configuration()
        self._log_file(SUMMARY_NAME)
        self._log_profile()
        self._log_model()

    @property
    def _client(self) -> MlflowClient:
        if self._store is None:
            self._store = open_client(self.uri)
        return self._store

    @property
    def _run(self) -> str:
        assert self.run_id is not None, "connect() first"
        return self.run_id

    def _find(self) -> Run | None:
        experiment = self._client.get_experiment_by_name(self.experiment)
        if experiment is None:
            return None
        if experiment.lifecycle_stage == "deleted":
            self._client.restore_experiment(experiment.experiment_id)
        self.experiment_id = experiment.experiment_id
        found = self._client.search_runs(
            [experiment.experiment_id],
            f"tags.`{RUN_ID_TAG}` = '{self.identity}'",
            order_by=["attributes.start_time ASC"],
        )
        return self._client.get_run(found[0].info.run_id) if found else None

    def _create(self) -> Run:
        if self.experiment_id is None:
            database = sqlite_file(self.uri)
            # MLflow's default would be a folder of the working directory, wherever that happens to be.
            location = (database.parent / "mlartifacts").absolute().as_uri() if database is not None else None
            self.experiment_id = self._client.create_experiment(self.experiment, artifact_location=location)
        name = (self.config.get("run") or {}).get("name") or self.run_dir.name
        return self._client.create_run(
            self.experiment_id,
            start_time=int(self._start_time() * 1000),
            run_name=str(name),
            tags={RUN_ID_TAG: self.identity, "mlflow.user": _user(), "mlflow.source.name": "sparselt_dist.pretrain"},
        )

    def _start_time(self) -> float:
        try:
            return (self.run_dir / CONFIG_NAME).stat().st_mtime
        except OSError:
            return time.time()

    def _describe(self, run: Run) -> None:
        """Parameters, which MLflow never changes: what a resumed run has changed stands in a tag
        `sparselt.changed.<key>`."""
        from mlflow.entities import Param, RunTag

        wanted = {_legal_key(key): text[:_PARAM_CHARACTERS] for key, text in flatten(shown_in(self.config)).items()}
        stored = run.data.params
        new = [Param(key, text) for key, text in wanted.items() if key not in stored]
        for begin in range(0, len(new), _PARAMS_PER_BATCH):
            self._client.log_batch(self._run, params=new[begin : begin + _PARAMS_PER_BATCH], synchronous=True)
        tags = self._wanted_tags()
        for key, text in wanted.items():
            if stored.get(key, text) != text:
                tags[f"sparselt.changed.{key}"[:_KEY_CHARACTERS]] = text[:_TAG_CHARACTERS]
        changed = [RunTag(key, text) for key, text in tags.items() if self._tags.get(key) != text]
        for begin in range(0, len(changed), _PARAMS_PER_BATCH):
            self._client.log_batch(self._run, tags=changed[begin : begin + _PARAMS_PER_BATCH], synchronous=True)
        self._tags |= tags

    def _wanted_tags(self) -> dict[str, str]:
        environment = read_json(self.run_dir / "environment.json")
        values = {
            "sparselt.objective": (self.config.get("objective") or {}).get("name"),
            "sparselt.profile": environment.get("profile"),
            "sparselt.git_commit": environment.get("git_commit"),
            "mlflow.source.git.commit": environment.get("git_commit"),
            "sparselt.data_sha256": environment.get("data_manifest_sha256"),
            "sparselt.world_size": environment.get("world_size"),
        }
        return {key: str(value)[:_TAG_CHARACTERS] for key, value in values.items() if value is not None}

    # -- points -------------------------------------------------------------------------------------------------------

    def deliver(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Send the journal lines' points that the store lacks."""
        batch: list[Any] = []
        step = -1
        try:
            for line in lines:
                step = line["step"]
                batch += self._points(line)
                while len(batch) >= _METRICS_PER_BATCH:
                    self._send(batch[:_METRICS_PER_BATCH])
                    batch = batch[_METRICS_PER_BATCH:]
            self._send(batch, last_step=step)
        except BaseException:
            # What was on its way may have arrived or not: ask again before the next attempt.
            self.run_id = None
            raise

    def _points(self, line: Mapping[str, Any]) -> Iterator[Any]:
        """The line's points that were not sent yet, marked as sent; null in the journal is a NaN here."""
        from mlflow.entities import Metric

        step, milliseconds = line["step"], int((line.get("time") or 0.0) * 1000)
        for key, value in line.items():
            if key in ("step", "time") or not (value is None or isinstance(value, int | float)):
                continue
            name = _legal_key(key)
            seen = self._steps(name)
            if step in seen:
                self.already_there += 1
                continue
            seen.add(step)
            yield Metric(name, math.nan if value is None else float(value), milliseconds, step)

    def _steps(self, name: str) -> StepSet:
        seen = self._seen.get(name)
        if seen is None:
            history = self._client.get_metric_history(self._run, name) if name in self._stored_keys else []
            seen = self._seen[name] = StepSet(metric.step for metric in history)
        return seen

    def _send(self, batch: list[Any], last_step: int = -1) -> None:
        """One request; the last of a delivery also tells the step reached, which MLflow's run listing does not."""
        from mlflow.entities import RunTag

        tags = []
        if last_step > int(self._tags.get(STEPS_TAG, -1)):
            self._tags[STEPS_TAG] = str(last_step)
            tags = [RunTag(STEPS_TAG, str(last_step))]
        if batch or tags:
            self._client.log_batch(self._run, metrics=batch, tags=tags, synchronous=True)
            self.sent += len(batch)

    # -- artifacts ----------------------------------------------------------------------------------------------------

    def _log_file(self, name: str) -> None:
        path = self.run_dir / name
        if path.is_file() and self._is_new(name, digest := hashlib.sha256(path.read_bytes()).hexdigest()):
            self._client.log_artifact(self._run, str(path))
            self._remember(name, digest)

    def _log_profile(self) -> None:
        """The trace and the table of `train.profile`, where there are any, as artifact `profile`."""
        folder = self.run_dir / _PROFILE
        if folder.is_dir() and self._is_new(_PROFILE, digest := _folder_digest(folder)):
            self._client.log_artifacts(self._run, str(folder), _PROFILE)
            self._remember(_PROFILE, digest)

    def _log_model(self) -> None:
        """The exported folder as artifact `model`, with the description that the registry and
        `mlflow.transformers.load_model` need; `MLmodel` goes last and makes it complete."""
        folder = self.run_dir / _MODEL
        if not (folder / "config.json").is_file() or not self._is_new(_MODEL, digest := _folder_digest(folder)):
            return
        self._client.log_artifacts(self._run, str(folder), _MODEL)
        with tempfile.TemporaryDirectory() as staging:
            for path in sorted(folder.iterdir()):
                if "token" in path.name or path.name in ("vocab.txt", "vocab.json", "merges.txt"):
                    self._client.log_artifact(self._run, str(path), f"{_MODEL}/components/tokenizer")
            description = Path(staging) / "MLmodel"
            description.write_text(yaml.safe_dump(self._model_description(folder)), encoding="utf-8")
            self._client.log_artifact(self._run, str(description), _MODEL)
        self._remember(_MODEL, digest)

    def _model_description(self, folder: Path) -> dict[str, Any]:
        import mlflow

        architecture = (read_json(folder / "config.json").get("architectures") or ["AutoModel"])[0]
        task = next((task for ending, task in _TASKS if architecture.endswith(ending)), "feature-extraction")
        tokenizer = read_json(folder / "tokenizer_config.json").get("tokenizer_class", "PreTrainedTokenizerFast")
        versions = read_json(self.run_dir / "environment.json").get("versions") or {}
        flavor = {
            "task": task,
            "instance_type": "Pipeline",
            "pipeline_model_type": architecture,
            "source_model_name": str((self.config.get("run") or {}).get("name") or self.run_dir.name),
            "model_binary": ".",
            "components": ["tokenizer"],
            "tokenizer_type": tokenizer,
            "transformers_version": str(versions.get("transformers", "")),
            "code": None,
        }
        return {
            "artifact_path": _MODEL,
            "flavors": {"transformers": flavor},
            "mlflow_version": mlflow.__version__,
            "model_uuid": uuid.uuid4().hex,
            "run_id": self._run,
            "utc_time_created": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        }

    def _is_new(self, name: str, digest: str) -> bool:
        known: dict[str, str] = json.loads(self._tags.get(_ARTIFACTS_TAG, "{}"))
        return known.get(name) != digest[:16]

    def _remember(self, name: str, digest: str) -> None:
        known = json.loads(self._tags.get(_ARTIFACTS_TAG, "{}")) | {name: digest[:16]}
        self._tags[_ARTIFACTS_TAG] = json.dumps(known)
        self._client.set_tag(self._run, _ARTIFACTS_TAG, self._tags[_ARTIFACTS_TAG])


def _folder_digest(folder: Path) -> str:
    """Names, sizes and times: contents may be gigabytes."""
    facts = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            facts.append((str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"

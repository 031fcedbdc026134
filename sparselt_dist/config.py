"""The configuration tree: one frozen section each, unknown keys forbidden, a description with unit on every field.

Owns everything that changes the mathematics of a run; the files of `ds_configs/` own how it is executed.
Loading, merging and checking are in `config_loading.py`. Imports neither torch nor transformers.
"""

from __future__ import annotations

import os.path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RunSection(Section):
    name: str = Field("run", description="name of the run; names its folder and its MLflow run")
    output_dir: str | None = Field(None, description="folder of the run; default runs/<name>")
    seed: int = Field(0, ge=0, description="seed of initial weights, data order and masks")


class CorpusSection(Section):
    """One corpus of a mixture."""

    shards: str = Field(..., description="shard folder, pattern or URL, as data.train")
    weight: float = Field(1.0, gt=0, description="share of the samples drawn, in any unit")


class DataSection(Section):
    train: str | list[CorpusSection] | None = Field(
        None,
        description="shard folder, http(s):// or s3:// URL, or a pattern ({000..127}, *) of folders or tars; several with "
        "weights as [{shards: ..., weight: ...}, ...]; tars of raw text are tokenized on the fly; "
        "null: prepare what the section `prepare` says",
    )
    validation: str | None = Field(None, description="held-out shards; null with train null: the prepared ones")
    sequence_length: int | None = Field(128, ge=8, description="tokens a row; null: documents kept whole")
    num_workers: int = Field(0, ge=0, description="loader processes a rank; 0: in the training process")
    prefetch: int = Field(4, ge=1, description="micro-batches that a loader process keeps ready")
    shuffle_window: int = Field(
        16, ge=0, description="shards open at once; samples are permuted inside this window; 0: read in stored order"
    )
    on_bad_shard: Literal["stop", "skip"] = Field(
        "stop",
        description="a shard that stays unreadable or fails its checksum; skip: leave its samples out and count them",
    )
    verify_checksums: bool = Field(True, description="hash each local shard when it is opened; remote ones always are")
    cache_dir: str | None = Field(
        None, description="copies of remote shards, indexes of raw text; default ~/.cache/sparselt_dist"
    )
    cache_gib: float = Field(50.0, gt=0, description="bound of the copies of remote shards, GiB a machine")
    download_attempts: int = Field(5, ge=1, description="tries to read a remote file, with growing pauses between")
    download_timeout_seconds: float = Field(
        30.0, gt=0, description="longest wait for a connection, or for the next byte"
    )


class PrepareSection(Section):
    source: str | list[str] | None = Field(
        None, description="`embedded`, a file, folder, glob or Hugging Face data set; several are joined in order"
    )
    output_dir: str = Field("shards", description="where the shards go")
    text_key: str = Field("text", description="field that holds the text in JSONL files and data sets")
    license: str = Field("unknown", description="licence of the text, recorded in the manifest")
    normalize: Literal["none", "nfc", "crammed"] = Field(
        "nfc", description="nfc: Unicode NFC and tidy white space; crammed: lower-case ASCII (cramming)"
    )
    min_characters: int = Field(200, ge=0, description="shorter documents are dropped, characters")
    max_characters: int | None = Field(None, ge=1, description="longer documents are dropped, characters")
    max_tokens_per_character: float | None = Field(
        None, gt=0, description="documents with more are dropped (compressibility; cramming: 0.25)"
    )
    deduplicate_exact: bool = Field(True, description="drop documents whose normalised text was seen before")
    deduplicate_near: bool = Field(False, description="drop near duplicates by MinHash (datatrove)")
    tokenizer: str = Field(
        "wordpiece", description="kind to train: wordpiece|bpe|byte-bpe|unigram, or a tokenizer folder"
    )
    vocab_size: int = Field(32768, ge=64, description="entries of a trained tokenizer")
    tokenizer_characters: int = Field(100_000_000, ge=1, description="text used to train the tokenizer, characters")
    packing: Literal["concatenate", "best-fit", "documents"] = Field(
        "concatenate",
        description="concatenate: rows of data.sequence_length tokens, remainder dropped (cramming); "
        "best-fit: rows of whole documents, only those longer than a row are cut; "
        "documents: kept whole; implied by data.sequence_length null",
    )
    order: Literal["shuffle", "source", "sentence-length"] = Field(
        "shuffle", description="order of rows in the shards; sentence-length: the curriculum of cramming"
    )
    samples_per_shard: int = Field(8192, ge=1, description="rows or documents a shard")
    validation_fraction: float = Field(0.0, ge=0, lt=1, description="share of documents held out, by hash of the text")
    agreements: Literal["none", "strict", "parser"] = Field(
        "none",
        description="store agreement pairs for objective dac with the training shards; strict: found by rules; "
        "parser: by a trained parser, which cramming's rules exclude",
    )
    agreement_words: int = Field(20_000_000, ge=1, description="text that pairs are taken from, words")
    agreement_parser: str = Field("en_core_web_sm", description="English spaCy model of the parser track")
    num_workers: int | None = Field(None, ge=1, description="tokenizer processes; default: the cores of the machine")


class ModelSection(Section):
    architecture: str = Field("crammed-bert", description="crammed-bert, a Hugging Face config folder or a known type")
    init_from: Annotated[str, AfterValidator(os.path.expanduser)] | None = Field(
        None, description="local checkpoint folder whose weights start the model"
    )
    init_objective: bool = Field(
        False,
        description="start the objective's own parameters from model.init_from too (SLT: a `convert`ed checkpoint)",
    )
    config: dict[str, Any] = Field(default_factory=dict, description="fields of the architecture's own config class")


class ObjectiveSection(BaseModel):
    """`name` and, beside it, the keys of that objective's own configuration class."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field("mlm", strict=True, description="an objective of --list-objectives")

    def own_keys(self) -> dict[str, Any]:
        """The keys beside `name`, to be checked by the objective's configuration class."""
        return dict(self.model_extra or {})


class OptimSection(Section):
    name: Literal["adamw", "adamw-hf", "muon"] = Field(
        "adamw",
        description="adamw-hf: as transformers 4 had it, epsilon before bias correction, decay after the update; "
        "muon: for the matrices between tables and head, its steps as large as adamw's, which has the rest; ZeRO stage 0",
    )
    peak_lr: float = Field(1e-3, gt=0, description="learning rate at a schedule multiplier of 1")
    betas: tuple[float, float] = Field((0.9, 0.98), description="Adam's moment decays", strict=False)
    eps: float = Field(1e-12, gt=0, description="Adam's epsilon")
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum, with Nesterov's step")
    weight_decay: float = Field(0.01, ge=0, description="decoupled; never on biases and norms")
    encoder_lr_ratio: float = Field(
        1.0, gt=0, description="learning rate of the encoder relative to heads and the objective's own parameters"
    )
    clip_norm: float | None = Field(0.5, gt=0, description="global gradient norm; null: no clipping")


class ScheduleSection(Section):
    name: str = Field("cosine", description="constant|linear|cosine|wsd|budget-*")
    warmup: float = Field(0.0, ge=0, lt=1, description="linear warm-up, share of the budget (not for budget-*)")
    decay: float = Field(0.2, gt=0, le=1, description="wsd: final decay, share of the budget")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="floor of the multiplier")


class TrainSection(Section):
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto", "fastest"] = Field(
        "auto",
        description="sequences a rank and forward pass; auto: the largest that divides, up to 32; fastest: tried out before "
        "the clock starts",
    )
    global_batch_size: int = Field(64, ge=1, description="sequences an optimizer step")
    batch_ramp_end: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the budget at which the batch ramp ends (cramming: 0.6); null: no ramp",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="arithmetic of forward and backward")
    compile: bool = Field(False, description="compile the backbone with torch.compile")
    unpad: bool = Field(
        False, description="compute rows of unequal length without their padding; the result is the same"
    )
    zero_stage: Literal[0, 1, 2, 3] | None = Field(None, description="ZeRO stage; null: the DeepSpeed file's, else 0")
    deepspeed_config: str | None = Field(None, description="a file of ds_configs/ (by name) or a path")
    evaluate_every_steps: int | None = Field(None, ge=1, description="held-out loss during training; null: at the end")
    evaluate_samples: int = Field(2048, ge=1, description="held-out rows an evaluation")
    yardsticks: bool = Field(True, description="objective-independent measures at the end")
    profile: int = Field(0, ge=0, description="steps of a start to trace after its first ones, into profile/; 0: none")
    give_up_loss: float | None = Field(
        None,
        gt=0,
        description="end the run if its loss is above this after train.give_up_hours (cramming: 6); null: off",
    )
    give_up_hours: float = Field(3.0, gt=0, description="hours of the budget's clock until train.give_up_loss counts")
    on_non_finite: Literal["stop", "skip"] = Field(
        "stop",
        description="a loss or gradient that is NaN or infinite; skip: go on without that step's update; the batch is kept",
    )
    max_discarded_steps: int = Field(
        5, ge=1, description="updates in a row that train.on_non_finite=skip may leave out; one more ends the run"
    )
    spike_sigmas: float | None = Field(
        10.0,
        gt=0,
        description="a loss so many robust sigmas above the median of the last 128 steps is a spike; null: not looked for",
    )
    on_spike: Literal["warn", "rewind"] = Field(
        "warn",
        description="rewind: go back to the last checkpoint and leave the data of the spike out, before the update",
    )
    spike_steps: int = Field(
        1, ge=1, description="steps, the spike's the last, whose data a rewind leaves out; none before the checkpoint"
    )
    hang_minutes: float | None = Field(
        10.0,
        gt=0,
        description="a run in which no rank gets on for so long ends; six times that while it compiles or saves; null: off",
    )


class BudgetSection(Section):
    max_steps: int | None = Field(None, description="optimizer steps; null: off")
    max_tokens: int | None = Field(None, description="non-pad tokens; null: off")
    max_hours: float | None = Field(None, description="wall-clock hours of training, restarts included; null: off")
    reserve_seconds: float | None = Field(
        None,
        ge=0,
        description="of max_hours, kept for the last save and evaluation; null: predicted from measured ones",
    )


class CheckpointSection(Section):
    every_steps: int | None = Field(None, ge=1, description="optimizer steps between checkpoints; null: only the last")
    keep: int = Field(2, ge=1, description="complete checkpoints kept")
    keep_every_steps: int | None = Field(
        None, ge=1, description="checkpoints of its multiples are kept for good; null: none"
    )
    asynchronous: bool = Field(
        True,
        description="training goes on while a checkpoint is written, from a copy in memory: up to 12 bytes a weight",
    )
    scratch_dir: str | None = Field(
        None, description="folder of a disk of the node that takes this copy instead of memory; null: memory"
    )
    upload: str | None = Field(
        None, description="s3://bucket/prefix that committed checkpoints are copied to as well; null: none"
    )


class LogSection(Section):
    every_steps: int = Field(10, ge=1, description="optimizer steps between journal lines")
    mlflow_uri: str | None = Field("sqlite:///mlflow.db", description="tracking store; null: journal only")
    experiment: str = Field("sparselt_dist", description="MLflow experiment")
    batch_digest: bool = Field(False, description="journal a hash of each global step's sample keys; logs every step")
    peak_tflops: float | None = Field(
        None, gt=0, description="peak of a device for MFU; null: known table, or measured"
    )
    device_watts: float | None = Field(
        None, gt=0, description="power of a rank's device for the energy in the summary; null: that of a known device"
    )
    expected_loss: list[Annotated[tuple[float, float, float], Strict(False)]] | None = Field(
        None,
        description="[share of the budget, training loss, its sigma], shares rising: warn when off by over 3 sigma; null: off",
    )


class Config(Section):
    run: RunSection = Field(default_factory=RunSection)
    data: DataSection = Field(default_factory=DataSection)
    prepare: PrepareSection = Field(default_factory=PrepareSection)
    model: ModelSection = Field(default_factory=ModelSection)
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection)
    optim: OptimSection = Field(default_factory=OptimSection)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    train: TrainSection = Field(default_factory=TrainSection)
    budget: BudgetSection = Field(default_factory=BudgetSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    log: LogSection = Field(default_factory=LogSection)

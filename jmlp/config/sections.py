"""The sections of a config: frozen pydantic models, checked when they are made.

Nothing here imports jax, so that `jmlp train --help` and a refused config take a
fraction of a second.
"""

from typing import Annotated, ClassVar, Literal

import pydantic
from pydantic import Field

from jmlp.config.data import ColumnConfig as ColumnConfig
from jmlp.config.data import DataConfig as DataConfig
from jmlp.config.fields import (
    Bool,
    Count,
    EveryField,
    Float,
    Int,
    Mark,
    Names,
    OnlyWith,
    Patterns,
    Rate,
    Section,
    in_table_all,
    named,
    patterns_of_keys,
    texts_of_keys,
)
from jmlp.config.model import ModelConfig as ModelConfig
from jmlp.config.model import NumbersConfig as NumbersConfig
from jmlp.config.tables import OpenSection, Table, Words

# Where the words of keys are. A line more in one of these tables is a word more for its key.
OPTIMIZERS = Table(module="jmlp.optim", names=("OPTIMIZERS",), key="name", default="adamw")
SCHEDULES = Words(module="jmlp.optim", names=("SCHEDULES",), default="cosine")
DECAYS = Words(module="jmlp.optim", names=("SCHEDULES",), default="constant")
REDUCERS = Table(module="jmlp.compress", names=("REDUCERS", "CHOICES"), key="name", default="none")
TOPOLOGIES = Table(
    module="jmlp.comm", names=("ALL_REDUCE", "CHOICES"), key="all_reduce", default="psum"
)
LOSSES = Table(module="jmlp.losses", names=("LOSSES", "CHOICES"), key="name", default="auto")

BUCKET_BYTES = 4 << 20
"""of a bucket of gradients, unless told otherwise"""
Positive = Annotated[Float, Field(gt=0)]


class MeshConfig(Section):
    """Devices per mesh axis. Every axis exists; size 1 means "not split"."""

    data: Annotated[Count | Literal["auto", "planned"], Mark.MAY_CHANGE] = "auto"
    """Splits the batch. auto: all devices that the other axes leave. planned: this and the other
    axes as jmlp plan finds best for the devices here; mesh: auto is short for it."""
    fsdp: Annotated[Count, Mark.MAY_CHANGE] = 1
    """Splits the batch, parameters and optimizer state (ZeRO-3)."""
    model: Annotated[Count, Mark.MAY_CHANGE] = 1
    """Splits hidden features (tensor parallel)."""
    pipe: Annotated[Count, Mark.MAY_CHANGE] = 1
    """Splits layers (step=pipeline)."""

    def size(self, devices: int = 1) -> int:
        """Devices needed; with data=auto, the most that `devices` allow."""
        rest = self.fsdp * self.model * self.pipe
        if self.data in ("auto", "planned"):
            return rest * max(1, devices // rest)
        return rest * self.data

    @pydantic.model_validator(mode="before")
    @classmethod
    def _auto(cls, tree: object) -> object:
        return {"data": "planned"} if tree == "auto" else tree

    @pydantic.model_validator(mode="after")
    def _planned_whole(self) -> "MeshConfig":
        rest = {axis: size for axis, size in self if axis != "data" and size != 1}
        if self.data == "planned" and rest:
            raise ValueError(f"data=planned chooses all axes: leave {', '.join(rest)} out")
        return self


class TensorConfig(Section):
    """Tensor parallelism by hand, for wide models under step=sharded."""

    activations: Annotated[Literal["whole", "split"], Mark.MAY_CHANGE] = "whole"
    """Between pairs of layers: on every device of mesh.model, or each its share of features."""
    matmul: Annotated[Literal["compiler", "ring"], Mark.MAY_CHANGE] = "compiler"
    """ring: chunks of activations travel while others are multiplied. With activations=split."""

    @pydantic.model_validator(mode="after")
    def _ring_needs_split(self) -> "TensorConfig":
        if self.matmul == "ring" and self.activations != "split":
            raise ValueError("matmul=ring gathers split activations: set activations: split")
        return self


class OptimConfig(OpenSection):
    """The optimizer and its schedule. One's own settings stand beside it in `jmlp.optim`."""

    TABLE: ClassVar[Table] = OPTIMIZERS

    name: Annotated[str, OPTIMIZERS] = OPTIMIZERS.default
    """muon: hidden kernels by Muon, the rest by AdamW."""
    learning_rate: Annotated[Float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    schedule: Annotated[str, SCHEDULES] = "cosine"
    """How the learning rate moves after the warm-up, over the whole run."""
    warmup: Rate = 0.0
    """Share of all steps, W of them, over which the rate rises linearly from peak/W to the peak;
    under one_cycle from peak/25, by a cosine, and 0 is 0.3."""
    final_fraction: Annotated[Float, Field(ge=0, le=1)] = 0.0
    """Rate at the end, as a share of the peak (cosine, linear)."""
    weight_decay: Annotated[Float, Field(ge=0)] = 0.0
    """Decoupled, times the rate; kernels only, never biases or norms, unless decay_on says so."""
    decay_on: Patterns = ()
    """Parameters that decay: patterns on their paths, e.g. kernel$; none: kernels."""
    decay_schedule: Annotated[str, DECAYS] = "constant"
    """How weight_decay moves over the run, beside the rate."""
    rate_factors: Annotated[
        dict[str, Annotated[Float, Field(ge=0)]],
        pydantic.BeforeValidator(texts_of_keys),
        pydantic.AfterValidator(patterns_of_keys),
    ] = {}
    """Factors of the learning rate: by patterns on parameters' paths, of which the first one that
    matches counts, e.g. {"bias$": 0.1}."""
    l2: Annotated[Float, Field(ge=0)] = 0.0
    """Times the kernels, added to their gradient: the slope of l2/2 times their squares. adam and
    its like scale it with the gradient, which is not what weight_decay does."""
    momentum: Rate = 0.9
    """Of momentum and muon."""
    b1: Rate = 0.9
    """First-moment decay of adam, adamw, lamb, lion, and of muon's AdamW."""
    b2: Rate | None = None
    """Second-moment decay; none means 0.99 for lion, 0.999 for adam, adamw, lamb, muon."""
    eps: Annotated[Float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    clip_norm: Annotated[Float, Field(gt=0)] | None = None
    """Scales gradients down to this global norm, in which what is frozen does not count."""
    accumulate: Count = 1
    """Micro-batches per step: less activation memory, the same global batch."""
    ema: Rate = 0.0
    """Decay of an exponential moving average of weights, used to evaluate. 0: none."""


class ReducerConfig(OpenSection):
    """How gradients are compressed. Settings of one scheme stand beside it in `jmlp.compress`."""

    TABLE: ClassVar[Table] = REDUCERS

    name: Annotated[str, REDUCERS] = REDUCERS.default
    """The code on the wire. auto: by what links and compressing take, under step=explicit."""
    error_feedback: Bool = False
    """Add what was lost to the next gradient. A must below 8 bits."""
    momentum: Annotated[Rate, Mark.EXCHANGE] = 0.0
    """Momentum correction (DGC), with error feedback and plain sgd."""

    @pydantic.model_validator(mode="after")
    def _momentum_fits(self) -> "ReducerConfig":
        if self.momentum and not self.error_feedback:
            raise ValueError("momentum is part of error feedback: set error_feedback: true")
        return self

    def beyond_messages(self) -> list[str]:
        """The keys that were set, and that a message from one to another has no use for."""
        fields = type(self).model_fields
        return [key for key in self.changed() if Mark.EXCHANGE in fields[key].metadata]


# One of the classes of settings in jmlp.compress; `reducer: int8` is short for its name.
ReducerField = Annotated[
    pydantic.SerializeAsAny[ReducerConfig], pydantic.BeforeValidator(named)
]  # fmt: skip


class CommConfig(OpenSection):
    """How devices exchange gradients; comm: auto leaves all of it to jmlp.

    Settings of one topology stand beside it in `jmlp.comm`.
    """

    TABLE: ClassVar[Table] = TOPOLOGIES

    all_reduce: Annotated[str, TOPOLOGIES, Mark.MAY_CHANGE] = TOPOLOGIES.default
    """The topology. auto: by the cost model, bucket by bucket."""
    reducer: ReducerField = ReducerConfig()
    """The compressor."""
    bucket_bytes: Annotated[Count | Literal["auto"], Mark.MAY_CHANGE] = BUCKET_BYTES
    """Gradients travel in buckets of about this size. auto: by the cost model, a size for all."""
    alpha_us: Annotated[Annotated[Float, Field(gt=0)] | None, Mark.MAY_CHANGE] = None
    """auto: latency of a message. none: by the kind of device."""
    gigabytes_per_second: Annotated[Annotated[Float, Field(gt=0)] | None, Mark.MAY_CHANGE] = None
    """auto: bandwidth of a link, one way. none: by the kind of device."""

    @property
    def bucket(self) -> int:
        """Bytes of a bucket, the usual ones until they are chosen."""
        return BUCKET_BYTES if self.bucket_bytes == "auto" else self.bucket_bytes

    @classmethod
    def whole(cls, tree: object) -> object:
        choices = "all_reduce", "reducer", "bucket_bytes"
        return dict.fromkeys(choices, "auto") if tree == "auto" else tree

    @pydantic.model_validator(mode="after")
    def _reducer_fits_topology(self) -> "CommConfig":
        name, given = self.reducer.name, self.all_reduce
        if given in ("psum", "auto") or name in (REDUCERS.default, "auto"):
            return self
        schemes = REDUCERS.entries()
        own = schemes[name].topologies
        if own and given not in own:
            linear = [
                word for word, scheme in schemes.items() if not scheme.topologies and word != "auto"
            ]
            raise ValueError(
                f"all_reduce={given} cannot carry reducer {name}: sums of its codes "
                f"mean nothing, so it brings its own exchange ({', '.join(own)}). "
                f"Reducers for every topology: {', '.join(linear)}"
            )
        return self


class LocalConfig(Section):
    """How often and how devices meet under step=local."""

    method: Literal["local_sgd", "diloco", "gossip"] = "local_sgd"
    """local_sgd: mean of the parameters. diloco: outer Nesterov step along the mean drift.
    gossip: mean with one's neighbours."""
    every: Count = 10
    """Steps that each device takes alone between two exchanges (H)."""
    outer_learning_rate: Annotated[Float, Field(gt=0), OnlyWith("method", "diloco")] = 0.7
    """diloco: of the outer step."""
    outer_momentum: Annotated[Rate, OnlyWith("method", "diloco")] = 0.9
    """diloco: of the outer step, Nesterov's."""
    graph: Annotated[Literal["ring", "full"], OnlyWith("method", "gossip")] = "ring"
    """gossip: who averages with whom."""


class PipelineConfig(Section):
    """How microbatches go through the stages of step=pipeline."""

    microbatches: Annotated[Count, Mark.MAY_CHANGE] = 8
    """Parts of each device's rows; more of them, a smaller bubble and smaller products."""
    schedule: Annotated[Literal["gpipe", "circular"], Mark.MAY_CHANGE] = "gpipe"
    """gpipe: a device has one run of layers. circular: several, and rows go round."""
    rounds: Annotated[
        Int, Field(ge=2), OnlyWith("schedule", "circular"), Mark.MAY_CHANGE
    ] = 2  # fmt: skip
    """circular: runs of layers on a device."""
    remat: Annotated[Bool, Mark.MAY_CHANGE] = True
    """Compute a stage again for its backward pass, rather than keep its activations."""


class SimulateConfig(Section):
    """How fast workers are on the virtual clock of server.engine=replay."""

    jitter: Annotated[Float, Field(ge=0, le=3)] = 0.0
    """Spread of a worker's time for a push: sigma of a lognormal of median 1."""
    straggler: Annotated[Float, Field(ge=1)] = 1.0
    """How many times slower than the others the last worker is."""
    dies_at: Annotated[Float, Field(gt=0)] | None = None
    """Virtual time at which worker 0 dies; a push takes about 1."""
    returns_at: Annotated[Float, Field(gt=0)] | None = None
    """Virtual time at which it is back; none: never."""

    @pydantic.model_validator(mode="after")
    def _dies_first(self) -> "SimulateConfig":
        if self.returns_at and (self.dies_at is None or self.returns_at <= self.dies_at):
            raise ValueError(f"returns_at={self.returns_at} needs an earlier dies_at")
        return self


class ServerConfig(Section):
    """The parameter server of step=async. `comm.reducer` compresses pushes."""

    engine: Literal["threads", "replay", "ray"] = "threads"
    """threads: a worker a thread. replay: simulated asynchrony on a virtual clock, the same
    to the bit every time. ray: actors, on this machine or a cluster; they may die."""
    address: Annotated[str | None, OnlyWith("engine", "ray"), Mark.MAY_CHANGE] = None
    """ray: HOST:PORT of a cluster that exists. none: `RAY_ADDRESS`, else a Ray of its own."""
    hosts: Annotated[Count | None, OnlyWith("engine", "ray"), Mark.MAY_CHANGE] = None
    """ray: of the cluster, over which shards and workers go in turn. none: all."""
    policy: Literal["bsp", "ssp", "asp"] = "ssp"
    """bsp: rounds. ssp: at most `bound` clocks ahead of the slowest. asp: nobody waits."""
    bound: Annotated[Int, Field(ge=0), OnlyWith("policy", "ssp")] = 2
    """ssp: clocks ahead; 0 is bsp."""
    workers: Count | None = None
    """none: one a device of mesh.data."""
    shards: Count = 1
    """Parts that the parameters are held in."""
    backup: Annotated[Int, Field(ge=0), OnlyWith("policy", "bsp")] = 0
    """bsp: workers that a round need not wait for; what comes late is dropped."""
    share_work: Annotated[Bool, OnlyWith("policy", "asp")] = False
    """asp: slices of batches go to whoever is free, so that a slow worker does less."""
    rate: Literal["constant", "inverse"] = "constant"
    """inverse: learning rate divided by the staleness of the push."""
    compensation: Annotated[Float, Field(ge=0)] = 0.0
    """lambda of DC-ASGD: corrects a stale gradient by how far parameters have moved."""
    pull: ReducerField = ReducerConfig()
    """Compresses pulls; the server keeps track of what each worker knows."""
    simulate: Annotated[SimulateConfig, OnlyWith("engine", "replay")] = SimulateConfig()
    """Speeds of workers under engine=replay."""

    @pydantic.model_validator(mode="after")
    def _pull_is_a_message(self) -> "ServerConfig":
        if self.pull.name == "auto":
            raise ValueError("pull: auto is for comm.reducer under step=explicit; name a reducer")
        feedback = ["error_feedback"] if self.pull.error_feedback else []
        for key in feedback + self.pull.beyond_messages():
            raise ValueError(f"pull.{key} does nothing: a pull's next one makes up for it")
        return self


class LossConfig(OpenSection):
    """What is made small. Settings of one loss stand beside it in `jmlp.losses`."""

    TABLE: ClassVar[Table] = LOSSES

    name: Annotated[str, LOSSES] = LOSSES.default
    """auto: cross_entropy of classes, squared_error of numbers."""


LossField = Annotated[pydantic.SerializeAsAny[LossConfig], pydantic.BeforeValidator(named)]


class TrainConfig(Section):
    """The loop."""

    epochs: Annotated[Count | Literal["auto"], Mark.MAY_GO_ON] = 20
    """Passes over the training rows. auto: about 2,000 steps, but from 20 to 200 epochs."""
    steps: Annotated[Count | None, Mark.MAY_GO_ON] = None
    """Steps in all, instead of `epochs`."""
    batch_size: Count = 128
    """Rows per step, over all devices."""
    short_batch: Literal["keep", "drop"] = "keep"
    """The last batch of an epoch, where it has fewer rows. drop: they wait for another epoch."""
    eval_every: Annotated[EveryField, Mark.MAY_GO_ON] = "1"
    """Epochs between evaluations, or e.g. "500 steps". auto: some 20 in a run, an epoch apart or
    more."""
    checkpoint_every: Annotated[EveryField, Mark.MAY_CHANGE] = "1"
    """Epochs between checkpoints, or e.g. "500 steps". auto: some 10 in a run, an epoch apart or
    more."""
    keep: Annotated[Count, Mark.MAY_CHANGE] = 3
    """Newest checkpoints kept; of those saved, the best by `monitor` is kept as well."""
    metrics: Names = ()
    """Names in jmlp.metrics.METRICS, besides the loss. none given: the task's own."""
    monitor: str = "loss"
    """Validation metric, one of those in use, that names the best checkpoint: of equals, the
    first."""
    early_stopping: Annotated[Count | None, Mark.MAY_GO_ON] = None
    """Stop after so many evaluations without a better `monitor`; ends with the best."""
    select: Literal["last", "best"] = "last"
    """Weights the run ends with. early_stopping implies best."""
    ties: Annotated[Literal["first", "last"], Mark.MAY_GO_ON] = "first"
    """Which of evaluations with an equal `monitor` is the best one."""
    clip_predictions: Bool = False
    """Regression: predictions stay within the range of the training targets."""
    loss: LossField = LossConfig()
    """What is made small."""
    class_weight: Annotated[
        Literal["none", "balanced"] | dict[str, Positive], pydantic.BeforeValidator(texts_of_keys)
    ] = "none"
    """What a row counts for in the loss, by its class, besides its own weight. balanced: classes
    count alike, whatever rows they have. Or a number a label, e.g. {yes: 5, "1": 2}; others 1."""
    init_from: str | None = None
    """A run directory whose weights, those that jmlp eval takes, this run starts from, where names
    and shapes are alike and columns and classes are the same; or a .safetensors file: weights
    under the names of jmlp export, or as many linear layers."""
    init_layers: Patterns = ()
    """Of init_from: patterns on paths of parameters, e.g. ^blocks/; none: all that fit. What they
    match must fit."""
    freeze: Annotated[Patterns, Mark.MAY_GO_ON] = ()
    """Parameters that stay as they are: patterns on their paths, e.g. ^blocks/0/ or bias$."""
    label_smoothing: Rate = 0.0
    """Share of a class's probability spread over all classes."""
    steps_per_call: Annotated[Count | Literal["auto"], Mark.MAY_CHANGE] = "auto"
    """Steps per dispatch to the devices. auto: as many as take about a second."""
    kernels: Annotated[Literal["auto", "xla", "eigen"], Mark.MAY_CHANGE] = "auto"
    """Matrix products on a CPU: by XLA's choice of library, or by Eigen. auto: by size."""
    tensorboard: Annotated[Bool, Mark.MAY_CHANGE] = False
    """Also log to tensorboard/ in the run directory (needs jmlp[tensorboard])."""
    callbacks: Annotated[
        Names, in_table_all("jmlp.training.callbacks", "CALLBACKS"), Mark.MAY_CHANGE
    ] = ()  # fmt: skip
    """Told of the run's events: names in jmlp.training.callbacks.CALLBACKS, such as wandb, mlflow
    (which need jmlp[wandb], jmlp[mlflow]) and your own."""

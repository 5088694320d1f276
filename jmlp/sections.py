"""The sections of a config: frozen pydantic models, checked when they are made.

Nothing here imports jax, so that `jmlp train --help` and a refused config take a
fraction of a second.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

import pydantic
from pydantic import Field

from jmlp.fields import (
    Bool,
    BytesField,
    Count,
    EveryField,
    Float,
    Int,
    Names,
    Rate,
    Section,
    Widths,
    in_table,
)


class DataConfig(Section):
    """Where rows come from, how they are split and cleaned."""

    name: Literal["digits", "breast_cancer", "wine", "diabetes"] | None = None
    """A data set that ships with scikit-learn. Give this or `path`."""
    path: str | None = None
    """A .csv, .parquet or .npz file, an IDX file or a folder of IDX files.
    Looked for here, then in $JMLP_DATA, then in /usr/share/datasets."""
    val_path: str | None = None
    """Validation rows, in the format of `path`. Otherwise drawn: `val_fraction`."""
    test_path: str | None = None
    """Test rows, in the format of `path`. Otherwise drawn: `test_fraction`."""
    target: Names = ()
    """Target columns of a table. Several make a multi-output regression."""
    features: Names = ()
    """Feature columns of a table; none means all but the targets."""
    task: Literal["auto", "classification", "regression"] = "auto"
    """auto: text, booleans and few distinct integers are classes, the rest numbers."""
    classes: Annotated[Int, Field(ge=2, le=1_000_000)] | None = None
    """Number of classes, when labels are the integers 0..classes-1."""
    val_fraction: Rate = 0.1
    """Share of the training rows drawn for validation when none are given."""
    test_fraction: Rate = 0.2
    """Share of all rows drawn for testing when none are given."""
    missing: Literal["error", "drop", "mean"] = "error"
    """NaN, infinite or empty features: refuse, drop the row, or use the training mean."""
    scale: Literal["auto", "standardize", "none"] = "auto"
    """auto: per column, or over all pixels of 8-bit images. Statistics of training rows."""
    placement: Literal["auto", "device", "host"] = "auto"
    """Keep the rows on the devices, or send batches from the host. auto: by size."""

    memory_limit: BytesField = "auto"
    """Memory for rows, e.g. 2 GB; what is over it lies in files. auto: half of what is free."""

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> "DataConfig":
        if self.name and self.path:
            raise ValueError(f"give name ({self.name}) or path ({self.path}), not both")
        if self.name and (self.val_path or self.test_path):
            raise ValueError("val_path and test_path go with path, not with name")
        return self


class ModelConfig(Section):
    """The multilayer perceptron."""

    hidden: Widths = (256, 128)
    """Width of each hidden layer; [] is a linear model."""
    activation: Literal["relu", "gelu", "silu", "tanh", "swiglu", "geglu"] = "relu"
    """swiglu and geglu are gated: two kernels a layer (Shazeer 2020)."""
    norm: Literal["none", "layer", "rms", "batch"] = "none"
    """Between a layer's product and its activation. batch: of the global batch."""
    dropout: Rate = 0.0
    """Share of hidden features dropped in training."""
    input_dropout: Rate = 0.0
    """Share of input features dropped in training."""
    residual: Bool = False
    """Add each layer's input to its output, through a projection if widths differ."""
    init: Literal[
        "auto", "he_normal", "he_uniform", "glorot_normal", "glorot_uniform",
        "lecun_normal", "orthogonal",
    ] = "auto"  # fmt: skip
    """Hidden kernels. auto: he_normal for relu, gelu, silu; lecun_normal otherwise."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the arithmetic; parameters and the loss are float32 always."""


class MeshConfig(Section):
    """Devices per mesh axis. Every axis exists; size 1 means "not split"."""

    data: Count | Literal["auto"] = "auto"
    """Splits the batch. auto: all devices that the other axes leave."""
    fsdp: Count = 1
    """Splits the batch, parameters and optimizer state (ZeRO-3)."""
    model: Count = 1
    """Splits hidden features (tensor parallel)."""
    pipe: Count = 1
    """Splits layers (step=pipeline)."""

    def size(self, devices: int = 1) -> int:
        """Devices needed; with data=auto, the most that `devices` allow."""
        rest = self.fsdp * self.model * self.pipe
        return rest * (max(1, devices // rest) if self.data == "auto" else self.data)


class TensorConfig(Section):
    """Tensor parallelism by hand, for wide models under step=sharded."""

    activations: Literal["whole", "split"] = "whole"
    """Between pairs of layers: on every device of mesh.model, or each its share of features."""
    matmul: Literal["compiler", "ring"] = "compiler"
    """ring: chunks of activations travel while others are multiplied. With activations=split."""

    @pydantic.model_validator(mode="after")
    def _ring_needs_split(self) -> "TensorConfig":
        if self.matmul == "ring" and self.activations != "split":
            raise ValueError("matmul=ring gathers split activations: set activations: split")
        return self


class OptimConfig(Section):
    """The optimizer and its schedule."""

    name: Literal["sgd", "momentum", "adam", "adamw", "lion", "lamb", "muon"] = "adamw"
    """muon: hidden kernels by Muon, the rest by AdamW."""
    learning_rate: Annotated[Float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear", "one_cycle"] = "cosine"
    """How the learning rate moves after the warm-up, over the whole run."""
    warmup: Rate = 0.0
    """Share of all steps over which the rate rises linearly from 0."""
    final_fraction: Annotated[Float, Field(ge=0, le=1)] = 0.0
    """Rate at the end, as a share of the peak (cosine, linear)."""
    weight_decay: Annotated[Float, Field(ge=0)] = 0.0
    """Decoupled, times the rate; kernels only, never biases or norms."""
    momentum: Rate = 0.9
    """Of momentum and muon."""
    b1: Rate = 0.9
    """First-moment decay of adam, adamw, lamb, lion, and of muon's AdamW."""
    b2: Rate | None = None
    """Second-moment decay; none means 0.99 for lion, 0.999 for adam, adamw, lamb, muon."""
    eps: Annotated[Float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    clip_norm: Annotated[Float, Field(gt=0)] | None = None
    """Scales gradients down to this global norm."""
    accumulate: Count = 1
    """Micro-batches per step: less activation memory, the same global batch."""
    ema: Rate = 0.0
    """Decay of an exponential moving average of weights, used to evaluate. 0: none."""


def _named(value: Any) -> Any:
    """`reducer: int8` for `reducer: {name: int8}`."""
    return {"name": value} if isinstance(value, str) else value


BuiltIn = Literal["none", "bf16", "fp8", "int8", "int4", "sign", "top_k", "random_k", "low_rank"]


class ReducerConfig(Section):
    """How gradients are compressed. Which settings go with which: `SETTINGS`."""

    name: BuiltIn | Annotated[str, in_table("jmlp.compress", "REDUCERS")] = "none"
    """The code on the wire."""
    error_feedback: Bool = False
    """Add what was lost to the next gradient. A must below 8 bits."""
    momentum: Rate = 0.0
    """Momentum correction (DGC), with error feedback and plain sgd."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """int8, int4: unbiased, or closest."""
    keep: Annotated[Float, Field(gt=0, le=1)] = 0.01
    """top_k, random_k: share of the numbers that is sent."""
    values: Literal["float32", "bfloat16"] = "float32"
    """top_k: type of the numbers on the wire."""
    warmup_steps: Annotated[Int, Field(ge=0)] = 0
    """top_k: steps over which the share falls from a quarter to `keep`."""
    rank: Count = 4
    """low_rank: columns of the factors."""

    SETTINGS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "rounding": ("int8", "int4"),
        "keep": ("top_k", "random_k"),
        "values": ("top_k",),
        "warmup_steps": ("top_k",),
        "rank": ("low_rank",),
    }

    @pydantic.model_validator(mode="after")
    def _settings_fit(self) -> "ReducerConfig":
        for key, owners in self.SETTINGS.items():
            default = type(self).model_fields[key].default
            if getattr(self, key) != default and self.name not in owners:
                raise ValueError(f"{key} is a setting of {', '.join(owners)}, not of {self.name}")
        if self.momentum and not self.error_feedback:
            raise ValueError("momentum is part of error feedback: set error_feedback: true")
        return self


LINEAR = ("none", "random_k", "low_rank")  # reducers that take any topology
CODED = tuple(name for name in get_args(BuiltIn) if name not in LINEAR)  # and those that do not


def own_exchanges(reducer: str) -> tuple[str, ...]:
    """The topologies of a reducer whose codes cannot be summed on the way."""
    return ("full",) if reducer == "top_k" else ("full", "ring")


class CommConfig(Section):
    """How devices exchange gradients under step=explicit."""

    all_reduce: Literal[
        "psum", "full", "gather", "ring", "ring2", "tree", "double_tree", "halving_doubling",
        "hierarchical", "torus", "auto",
    ] | Annotated[str, in_table("jmlp.comm", "ALL_REDUCE")] = "psum"  # fmt: skip
    """The topology. auto: by the cost model, bucket by bucket."""
    reducer: Annotated[ReducerConfig, pydantic.BeforeValidator(_named)] = ReducerConfig()
    """The compressor."""
    bucket_bytes: Count = 4194304
    """Gradients travel in buckets of about this size."""
    inner: Count | None = None
    """hierarchical, torus: devices of the fast level. none: a host's, or a square."""
    alpha_us: Annotated[Float, Field(gt=0)] | None = None
    """auto: latency of a message. none: by the kind of device."""
    gigabytes_per_second: Annotated[Float, Field(gt=0)] | None = None
    """auto: bandwidth of a link, one way. none: by the kind of device."""

    @pydantic.model_validator(mode="after")
    def _reducer_fits_topology(self) -> "CommConfig":
        name, own = self.reducer.name, own_exchanges(self.reducer.name)
        if name in CODED and self.all_reduce not in ("psum", "auto", *own):
            raise ValueError(
                f"all_reduce={self.all_reduce} cannot carry reducer {name}: sums of its codes "
                f"mean nothing, so it brings its own exchange ({', '.join(own)}). "
                f"Reducers for every topology: {', '.join(LINEAR)}"
            )
        return self


class LocalConfig(Section):
    """How often and how devices meet under step=local."""

    method: Literal["local_sgd", "diloco", "gossip"] = "local_sgd"
    """local_sgd: mean of the parameters. diloco: outer Nesterov step along the mean drift.
    gossip: mean with one's neighbours."""
    every: Count = 10
    """Steps that each device takes alone between two exchanges (H)."""
    outer_learning_rate: Annotated[Float, Field(gt=0)] = 0.7
    """diloco: of the outer step."""
    outer_momentum: Rate = 0.9
    """diloco: of the outer step, Nesterov's."""
    graph: Literal["ring", "full"] = "ring"
    """gossip: who averages with whom."""

    SETTINGS: ClassVar[Mapping[str, str]] = {
        "outer_learning_rate": "diloco", "outer_momentum": "diloco", "graph": "gossip",
    }  # fmt: skip

    @pydantic.model_validator(mode="after")
    def _settings_fit(self) -> "LocalConfig":
        for key, owner in self.SETTINGS.items():
            default = type(self).model_fields[key].default
            if getattr(self, key) != default and self.method != owner:
                raise ValueError(f"{key} is a setting of {owner}, not of {self.method}")
        return self


class PipelineConfig(Section):
    """How microbatches go through the stages of step=pipeline."""

    microbatches: Count = 8
    """Parts of each device's rows; more of them, a smaller bubble and smaller products."""
    schedule: Literal["gpipe", "circular"] = "gpipe"
    """gpipe: a device has one run of layers. circular: several, and rows go round."""
    rounds: Annotated[Int, Field(ge=2)] = 2
    """circular: runs of layers on a device."""
    remat: Bool = True
    """Compute a stage again for its backward pass, rather than keep its activations."""

    @pydantic.model_validator(mode="after")
    def _settings_fit(self) -> "PipelineConfig":
        if self.schedule != "circular" and self.rounds != type(self).model_fields["rounds"].default:
            raise ValueError(f"rounds is a setting of schedule=circular, not of {self.schedule}")
        return self


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
    policy: Literal["bsp", "ssp", "asp"] = "ssp"
    """bsp: rounds. ssp: at most `bound` clocks ahead of the slowest. asp: nobody waits."""
    bound: Annotated[Int, Field(ge=0)] = 2
    """ssp: clocks ahead; 0 is bsp."""
    workers: Count | None = None
    """none: one a device of mesh.data."""
    shards: Count = 1
    """Parts that the parameters are held in."""
    backup: Annotated[Int, Field(ge=0)] = 0
    """bsp: workers that a round need not wait for; what comes late is dropped."""
    share_work: Bool = False
    """asp: slices of batches go to whoever is free, so that a slow worker does less."""
    rate: Literal["constant", "inverse"] = "constant"
    """inverse: learning rate divided by the staleness of the push."""
    compensation: Annotated[Float, Field(ge=0)] = 0.0
    """lambda of DC-ASGD: corrects a stale gradient by how far parameters have moved."""
    pull: Annotated[ReducerConfig, pydantic.BeforeValidator(_named)] = ReducerConfig()
    """Compresses pulls; the server keeps track of what each worker knows."""
    simulate: SimulateConfig = SimulateConfig()
    """Speeds of workers under engine=replay."""

    @pydantic.model_validator(mode="after")
    def _settings_fit(self) -> "ServerConfig":
        if self.policy != "ssp" and self.bound != type(self).model_fields["bound"].default:
            raise ValueError(f"bound is a setting of policy=ssp, not of {self.policy}")
        if self.backup and self.policy != "bsp":
            raise ValueError(f"backup is a setting of policy=bsp, not of {self.policy}")
        if self.share_work and self.policy != "asp":
            raise ValueError(f"share_work is a setting of policy=asp, not of {self.policy}")
        if self.simulate != SimulateConfig() and self.engine != "replay":
            raise ValueError(f"simulate is for engine=replay, not for {self.engine}")
        unfit = set(type(self.pull).model_fields) - {"name", "rounding", "keep", "values"}
        for key in sorted(unfit):
            if getattr(self.pull, key) != type(self.pull).model_fields[key].default:
                raise ValueError(f"pull.{key} does nothing: a pull's next one makes up for it")
        return self


class TrainConfig(Section):
    """The loop."""

    epochs: Count = 20
    """Passes over the training rows."""
    steps: Count | None = None
    """Steps in all, instead of `epochs`."""
    batch_size: Count = 128
    """Rows per step, over all devices."""
    eval_every: EveryField = "1"
    """Epochs between evaluations, or e.g. "500 steps"."""
    checkpoint_every: EveryField = "1"
    """Epochs between checkpoints, or e.g. "500 steps"."""
    keep: Count = 3
    """Newest checkpoints kept; the best one by `monitor` is kept as well."""
    monitor: Literal["loss", "accuracy", "rmse", "mae", "r2"] = "loss"
    """Validation metric that names the best checkpoint."""
    early_stopping: Count | None = None
    """Stop after so many evaluations without a better `monitor`; ends with the best."""
    select: Literal["last", "best"] = "last"
    """Weights the run ends with. early_stopping implies best."""
    label_smoothing: Rate = 0.0
    """Share of a class's probability spread over all classes."""
    steps_per_call: Count | Literal["auto"] = "auto"
    """Steps per dispatch to the devices. auto: as many as take about a second."""
    kernels: Literal["auto", "xla", "eigen"] = "auto"
    """Matrix products on a CPU: by XLA's choice of library, or by Eigen. auto: by size."""
    tensorboard: Bool = False
    """Also log to tensorboard/ in the run directory (needs jmlp[tensorboard])."""

"""The config: frozen pydantic models, read from YAML and `--key.sub=value`.

Every mistake is reported at once, one line each. Nothing here imports jax, so
that `jmlp train --help` and a refused config take a fraction of a second.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, Strict

from jmlp.errors import ConfigError
from jmlp.yaml12 import parse_yaml, read_yaml

# YAML already says what is an integer: `epochs: "3"` and `epochs: yes` are mistakes.
Int = Annotated[int, Strict()]
Bool = Annotated[bool, Strict()]
Float = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Count = Annotated[Int, Field(ge=1, le=2**31 - 1)]
Rate = Annotated[Float, Field(ge=0, lt=1)]


def _words(value: Any) -> Any:
    """A lone word, or words with commas between, as a list: `target: price`."""
    if isinstance(value, str):
        return [word.strip() for word in value.split(",") if word.strip()]
    return value


def _numbers(value: Any) -> Any:
    """`--model.hidden=64` and `--model.hidden=256,128`, as a shell user writes them."""
    if isinstance(value, str) and re.fullmatch(r"\d+(\s*,\s*\d+)*,?", value.strip()):
        return [int(part) for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


Names = Annotated[tuple[str, ...], pydantic.BeforeValidator(_words)]
Widths = Annotated[tuple[Count, ...], pydantic.BeforeValidator(_numbers)]


def _every(value: Any) -> Any:
    match = re.fullmatch(r"([1-9]\d{0,8})( (?:epoch|step)s?)?", str(value).strip())
    if not match or isinstance(value, bool):
        raise ValueError('expected a number of epochs, or e.g. "500 steps"')
    unit = "steps" if (match[2] or "").strip().startswith("step") else "epochs"
    return f"{match[1]} {unit}"


EveryField = Annotated[str, pydantic.PlainValidator(_every, json_schema_input_type=int | str)]


class Section(BaseModel):
    """A part of the config: immutable, no unknown keys, defaults checked too."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
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
    pipe: Annotated[Int, Field(ge=1, le=1)] = 1
    """Reserved for layers split over devices; 1 for now."""

    def size(self, devices: int = 1) -> int:
        """Devices needed; with data=auto, the most that `devices` allow."""
        rest = self.fsdp * self.model * self.pipe
        return rest * (max(1, devices // rest) if self.data == "auto" else self.data)


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
    """Steps per dispatch to the devices. auto: as many as take about 0.25 s."""
    tensorboard: Bool = False
    """Also log to tensorboard/ in the run directory (needs jmlp[tensorboard])."""


class Config(Section):
    """One training run."""

    seed: Annotated[Int, Field(ge=0, lt=2**32)] = 0
    """Of the split, the order of rows, the initial weights and dropout."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    step: Literal["single", "sharded", "pmap"] = "sharded"
    """single: one device. sharded: jit over the mesh. pmap: data parallel only."""
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()

    @pydantic.model_validator(mode="after")
    def _step_fits_mesh(self) -> "Config":
        mesh = self.mesh
        split = {axis: size for axis, size in mesh if axis != "data" and size > 1}
        if self.step == "pmap" and split:
            raise ValueError(f"step=pmap splits the batch only; mesh has {split}. Use step=sharded")
        if self.step == "single" and (split or mesh.data not in (1, "auto")):
            raise ValueError("step=single uses one device; set every mesh axis to 1")
        if self.train.batch_size < self.optim.accumulate:
            raise ValueError(
                f"optim.accumulate={self.optim.accumulate} exceeds "
                f"train.batch_size={self.train.batch_size}"
            )
        return self


# Keys that say where and how fast a run computes, not what: a run may change
# them and go on, with the same curves within float32 rounding.
WHERE_KEYS = frozenset(
    "mesh.data mesh.fsdp mesh.model mesh.pipe step data.placement data.path data.val_path "
    "data.test_path train.steps_per_call train.checkpoint_every train.keep "
    "train.tensorboard".split()
)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML config and applies `--key.sub=value` overrides to it.

    Raises:
      ConfigError: one line for each unreadable, unknown, mistyped or
        out-of-range key, of the file and the command line alike.
    """
    return _overridden(read_yaml(path), overrides, str(path))


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with `--key.sub=value` settings applied. Raises ConfigError."""
    return _overridden(config.model_dump(mode="json"), overrides, "config")


def _overridden(tree: dict[str, Any], overrides: Sequence[str], origin: str) -> Config:
    mistakes = [_override(tree, text) for text in overrides]
    config, more = _validate(tree, origin)
    # What the command line set, the command line answers for.
    for key in (text.partition("=")[0].replace("-", "_").lstrip("_") for text in overrides):
        mine = re.compile(rf"^.*?: (unknown key )?(?={re.escape(key)}\b)")
        more = [mine.sub(lambda match: f"{match[1] or ''}--", line) for line in more]
    lines = [line for line in mistakes if line] + more
    if lines or config is None:
        raise ConfigError("\n".join(lines))
    return config


def parse_config(tree: Mapping[str, Any] | Config | None, origin: str = "config") -> Config:
    """A `Config` from a nested mapping; ConfigError lists every mistake."""
    if isinstance(tree, Config):
        return tree
    config, mistakes = _validate(dict(tree or {}), origin)
    if config is None:
        raise ConfigError("\n".join(mistakes))
    return config


def flatten(config: Config) -> dict[str, Any]:
    """`{"model.hidden": [256, 128], ...}`: every key with its value, in order."""

    def walk(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(config.model_dump(mode="json"), ""))


def _validate(tree: dict[str, Any], origin: str) -> tuple[Config | None, list[str]]:
    try:
        return Config.model_validate(tree), []
    except pydantic.ValidationError as error:
        # A value that fits no member of a union fails once a member: one line for all.
        by_key: dict[str, list[Any]] = {}
        for mistake in error.errors():
            by_key.setdefault(".".join(_keys(mistake)), []).append(mistake)
        return None, [_line(origin, mistakes) for mistakes in by_key.values()]


def _keys(mistake: Any) -> list[str]:
    """The keys a user wrote; pydantic adds the union member that it tried."""
    member = r"[\[(]|^(int|literal|str|constrained-int)$"
    return [str(key) for key in mistake["loc"] if not re.search(member, str(key))]


def _line(origin: str, mistakes: Sequence[Any]) -> str:
    keys = _keys(mistakes[0])
    key = ".".join(keys)
    if mistakes[0]["type"] == "extra_forbidden":
        return f"{origin}: unknown key {key}{_nearest(keys)}"
    message = ", or: ".join(mistake["msg"].removeprefix("Value error, ") for mistake in mistakes)
    found = mistakes[0]["input"]
    shown = "" if isinstance(found, Mapping | Section) else f" (got {found!r})"
    return f"{origin}: {key + ': ' if key else ''}{message}{shown}"


def _nearest(keys: Sequence[str]) -> str:
    known = list(flatten(Config())) + [n for n in Config.model_fields if n not in ("seed", "step")]
    last_parts: dict[str, str] = {}
    for name in known:
        last_parts.setdefault(name.split(".")[-1], name)
    near = difflib.get_close_matches(".".join(keys), known, n=1, cutoff=0.75)
    near = near or [
        last_parts[part] for part in difflib.get_close_matches(keys[-1], last_parts, 1, 0.7)
    ]
    if near:
        return f"; did you mean {near[0]}?"
    section = keys[0] if len(keys) > 1 else None
    options = [k for k in known if (k.startswith(f"{section}.") if section else "." not in k)]
    return f"; known here: {', '.join(options)}"


def _override(tree: dict[str, Any], text: str) -> str | None:
    """Writes one `--key.sub=value` into `tree`; returns the mistake, if any."""
    match = re.fullmatch(r"--([A-Za-z][\w.\-]*)=(.*)", text, re.DOTALL)
    if not match:
        return f"{text}: expected --key.sub=value"
    *sections, last = match[1].replace("-", "_").split(".")
    for section in sections:
        below = tree.setdefault(section, {})
        if below is None:
            below = tree[section] = {}
        if not isinstance(below, dict):
            return f"{text}: {section} is not a section"
        tree = below
    try:
        tree[last] = parse_yaml(match[2])
    except ConfigError as error:
        return f"{text}: {error}"
    return None

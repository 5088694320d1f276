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
from pydantic import Field

from jmlp.errors import ConfigError
from jmlp.fields import Bool, Count, Int, Section
from jmlp.sections import (
    CODED,
    CommConfig,
    DataConfig,
    LocalConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PipelineConfig,
    ServerConfig,
    TensorConfig,
    TrainConfig,
)
from jmlp.yaml12 import parse_yaml, read_yaml


class Config(Section):
    """One training run."""

    seed: Annotated[Int, Field(ge=0, lt=2**32)] = 0
    """Of the split, the order of rows, the initial weights and dropout."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    reproducible: Bool = False
    """The same bits on any number of devices that divides `virtual_shards`."""
    virtual_shards: Count = 8
    """reproducible: parts of a batch, summed in a fixed tree; a power of two."""
    step: Literal["single", "sharded", "pmap", "explicit", "pipeline", "local", "async"] = "sharded"
    """single: one device. sharded: jit over the mesh. pmap: data parallel only.
    explicit: data (and tensor) parallel with the communication of `comm`.
    pipeline: layers over mesh.pipe, many microbatches at once: `pipeline`.
    local: devices train alone and exchange now and then, as `local` says.
    async: a parameter server and workers that do not wait for each other: `server`."""
    comm: CommConfig = CommConfig()
    tensor: TensorConfig = TensorConfig()
    pipeline: PipelineConfig = PipelineConfig()
    local: LocalConfig = LocalConfig()
    server: ServerConfig = ServerConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()

    @pydantic.model_validator(mode="after")
    def _step_fits_mesh(self) -> "Config":
        mesh = self.mesh
        split = {axis: size for axis, size in mesh if axis != "data" and size > 1}
        if self.step == "pmap" and split:
            raise ValueError(f"step=pmap splits the batch only; mesh has {split}. Use step=sharded")
        if self.step == "local" and split:
            raise ValueError(
                f"step=local gives each device a model of its own; mesh has {split}. "
                "Set those axes to 1, or use step=sharded"
            )
        if self.step == "explicit" and {"fsdp", "pipe"} & set(split):
            raise ValueError(
                f"step=explicit splits over data and model; mesh has {split}. Use step=sharded"
            )
        if self.step not in ("explicit", "local", "async") and self.comm != CommConfig():
            changed = [key for key, value in self.comm if value != getattr(CommConfig(), key)]
            raise ValueError(
                f"comm.{changed[0]} is for step=explicit and step=local; step={self.step} leaves "
                "communication to the compiler. Set step: explicit"
            )
        self._tensor_fits()
        self._pipeline_fits()
        self._local_fits()
        self._server_fits()
        self._reproducible_fits()
        if self.step == "single" and (split or mesh.data not in (1, "auto")):
            raise ValueError("step=single uses one device; set every mesh axis to 1")
        if self.train.batch_size < self.optim.accumulate:
            raise ValueError(
                f"optim.accumulate={self.optim.accumulate} exceeds "
                f"train.batch_size={self.train.batch_size}"
            )
        return self

    def _tensor_fits(self) -> None:
        if self.tensor == TensorConfig():
            return
        if self.step != "sharded" or self.reproducible:
            raise ValueError(f"tensor is for step=sharded, not for step={self.step}")
        if self.mesh.model == 1:
            raise ValueError("tensor says how layers are split over mesh.model, which is 1")
        if self.model.norm == "batch":
            raise ValueError("model.norm=batch with tensor: use layer or rms")

    def _pipeline_fits(self) -> None:
        mesh = self.mesh
        if self.step != "pipeline":
            if self.pipeline != PipelineConfig():
                raise ValueError(f"pipeline is for step=pipeline, not for step={self.step}")
            if mesh.pipe > 1:
                raise ValueError(
                    f"mesh.pipe={mesh.pipe} is for step=pipeline, not for step={self.step}"
                )
            return
        mistakes = [
            (mesh.fsdp > 1,
             f"mesh.fsdp={mesh.fsdp} with step=pipeline, which cuts arrays at rest over pipe "
             "already: set it to 1"),
            (self.optim.accumulate > 1,
             "optim.accumulate with step=pipeline: set pipeline.microbatches instead"),
            (self.model.norm == "batch",
             "model.norm=batch with step=pipeline: its statistics need all rows of a batch at "
             "once. Use layer or rms"),
        ]  # fmt: skip
        for wrong, said in mistakes:
            if wrong:
                raise ValueError(said)

    def _local_fits(self) -> None:
        if self.step != "local":
            if self.local != LocalConfig():
                raise ValueError(f"local is for step=local, not for step={self.step}")
            return
        if self.optim.ema:
            raise ValueError(
                "optim.ema with step=local: each device would average its own weights. "
                "local_sgd averages over devices already; set optim.ema: 0"
            )
        if self.local.method == "gossip" and self.comm != CommConfig():
            raise ValueError(
                "comm is not for local.method=gossip, where no mean of all is formed: "
                "neighbours send their parameters as they are"
            )

    def _reproducible_fits(self) -> None:
        shards, data = self.virtual_shards, self.mesh.data
        if not self.reproducible:
            if shards != type(self).model_fields["virtual_shards"].default:
                raise ValueError("virtual_shards is for reproducible: true")
            return
        split = {axis: size for axis, size in self.mesh if axis != "data" and size > 1}
        mistakes = [
            (self.step not in ("single", "sharded"),
             f"reproducible: true is for step=sharded and single, not for step={self.step}"),
            (split, f"reproducible: true splits over data alone; mesh has {split}. Set them to 1"),
            (shards & (shards - 1), f"virtual_shards={shards}: expected a power of two"),
            (data != "auto" and shards % data,
             f"mesh.data={data} does not divide virtual_shards={shards}: "
             "set either so that it does"),
            (self.model.norm == "batch",
             "model.norm=batch with reproducible: true: its statistics need all rows of a batch "
             "at once. Use layer or rms"),
        ]  # fmt: skip
        for wrong, said in mistakes:
            if wrong:
                raise ValueError(said)

    def _server_fits(self) -> None:
        server, optim, reducer = self.server, self.optim, self.comm.reducer
        if self.step != "async":
            if server != ServerConfig():
                raise ValueError(f"server is for step=async, not for step={self.step}")
            return
        split = {axis: size for axis, size in self.mesh if axis != "data" and size > 1}
        whole = {"clip_norm": optim.clip_norm, "ema": optim.ema}
        apart = [key for key, value in whole.items() if value and server.shards > 1]
        mistakes = [
            (split, f"step=async has one device a worker; mesh has {split}. Set those axes to 1"),
            (self.model.norm == "batch",
             "model.norm=batch with step=async: its statistics need all rows of a batch at once. "
             "Use layer or rms"),
            (self.comm != CommConfig(reducer=reducer),
             "step=async has no all-reduce: of comm it takes the reducer alone"),
            ({reducer.name, server.pull.name} - {"none", *CODED},
             f"a push or pull is a message: it may be none, {', '.join(CODED)}. Other reducers "
             "live on devices adding up"),
            (reducer.momentum or reducer.warmup_steps,
             "comm.reducer.momentum and warmup_steps are for step=explicit"),
            (server.rate == "inverse" and optim.ema,
             "server.rate=inverse with optim.ema: the average would not see the slower rate"),
            (server.shards > 1 and optim.name in ("lamb", "muon"),
             f"optim.name={optim.name} needs whole arrays: set server.shards: 1"),
            (apart, f"optim.{', '.join(apart)} needs all parameters at once: set server.shards: 1"),
        ]  # fmt: skip
        for wrong, said in mistakes:
            if wrong:
                raise ValueError(said)


# Keys that say where and how fast a run computes, not what: a run may change
# them and go on, with the same curves within float32 rounding.
WHERE_KEYS = frozenset(
    "mesh.data mesh.fsdp mesh.model mesh.pipe step data.placement data.memory_limit data.path "
    "data.val_path data.test_path train.steps_per_call train.kernels train.checkpoint_every "
    "train.keep train.tensorboard tensor.activations tensor.matmul pipeline.microbatches "
    "pipeline.schedule pipeline.rounds pipeline.remat "
    "comm.all_reduce comm.bucket_bytes comm.inner comm.alpha_us comm.gigabytes_per_second".split()
)


# Steps whose numbers depend on how many workers there are: none can take over from another.
OWN_RUNS = frozenset({"local", "async"})


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

"""The ways to train a config on some devices: strategies, meshes, and what goes with them.

What a run learns is kept: its batch, its optimizer, its compressor, its dtype. Ways that
give the same run within rounding are tried; those that train something else (`local`,
compressors, bfloat16) when they are asked for. What a strategy refuses is dropped by its own
check, so that a config that comes out of here is one that trains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from jmlp.config import Config, parse_config
from jmlp.config.keys import keys_of
from jmlp.errors import ConfigError
from jmlp.parallel import STEPS, strategy_of
from jmlp.planner.hardware import Target
from jmlp.sharding.mesh import AXES
from jmlp.sharding.tensor_parallel import kinds
from jmlp.types import Json, JsonObject

Also = Literal["bfloat16", "reducers", "local"]
ALSO: tuple[Also, ...] = ("bfloat16", "reducers", "local")
_REDUCERS: tuple[JsonObject, ...] = (
    {"name": "bf16"},
    {"name": "int8", "error_feedback": True},
    {"name": "low_rank", "rank": 4, "error_feedback": True},
)
_FEW = 64  # devices up to which every smaller mesh is tried as well
_EACH = (1, 2, 4)  # microbatches by stages


class Candidates:
    """Configs to price, and a count of what was refused and why."""

    def __init__(self, config: Config, target: Target, also: Sequence[Also] = ()):
        if config.step == "async":
            raise ConfigError(
                "step=async: there is no cost model of workers that do not wait. For a synchronous "
                "step of the same model plan with --step=sharded; to train with step: async, say "
                "mesh.data, the number of workers, in place of mesh: auto"
            )
        self._config, self._target, self._also = config, target, also
        self._tree = config.model_dump(mode="json")
        self._asked = _Asked(config)
        self.refused: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Config]:
        seen: set[str] = set()
        dtypes: list[str] = [self._config.model.dtype]
        if "bfloat16" in self._also and "bfloat16" not in dtypes:
            dtypes.append("bfloat16")
        for changes in self._ways():
            for dtype in dtypes:
                if not self._asked.allows(changes):
                    continue
                config = self.made(changes | {"model.dtype": dtype})
                if config is not None and (key := _key(config)) not in seen:
                    seen.add(key)
                    yield config

    def made(self, changes: Mapping[str, Json]) -> Config | None:
        """The config with dotted keys changed; None if it is refused."""
        tree = {**self._tree}
        step = str(changes["step"])
        mine = STEPS[step].sections if not self._config.reproducible else ("virtual_shards",)
        for name in ("comm", "tensor", "pipeline", "local", "server"):
            if name not in mine:
                tree.pop(name, None)
        for key, value in changes.items():
            section, _, name = key.partition(".")
            if name:
                tree[section] = {**_section(tree, section), name: value}
            else:
                tree[section] = value
        if (mesh := tree["mesh"]) and isinstance(mesh, Mapping) and mesh["model"] == 1:
            tree.pop("tensor", None)
        try:
            config = parse_config(tree)
        except ConfigError as error:
            self.refused[str(error).splitlines()[0].removeprefix("config: ")] += 1
            return None
        strategy = strategy_of(config)
        if config.model.norm == "batch" and (
            config.optim.accumulate > 1 or strategy.batch_statistics == "none"
        ):
            self.refused[f"model.norm=batch with {strategy.asked}, or accumulated"] += 1
            return None
        return config

    def _ways(self) -> Iterator[JsonObject]:
        config, n = self._config, self._target.devices
        every = n <= _FEW or self._asked.mesh is not None
        counts = [m for m in range(1, n + 1) if n % m == 0 and (every or m in (1, n))]
        keeps = config.comm.reducer.name != "none"
        if config.step == "local" or "local" in self._also:
            for m in counts[1:]:
                yield {"step": "local", "mesh": _mesh(data=m)}
            if config.step == "local":
                return
        if not keeps:
            yield {"step": "single", "mesh": _mesh()}
        for m in counts[1:]:
            for data, fsdp, model in _factors(m):
                if model > 1 and "column" not in kinds(config.model.hidden, model):
                    continue  # it divides no layer
                whole = m == n or self._asked.mesh or not (fsdp > 1 or model > 1)
                if not keeps and whole:
                    mesh = _mesh(data=data, fsdp=fsdp, model=model)
                    yield {"step": "sharded", "mesh": mesh}
                if fsdp == 1 and whole:
                    yield from self._explicit(data, model, keeps)
                if fsdp > 1 and not keeps and (m == n or self._asked.mesh):
                    yield from self._pipelines(data, model, pipe=fsdp)
            if not keeps:
                yield {"step": "pmap", "mesh": _mesh(data=m)}

    def _explicit(self, data: int, model: int, keeps: bool) -> Iterator[JsonObject]:
        if data == 1:
            return
        way: JsonObject = {"step": "explicit", "mesh": _mesh(data=data, model=model)}
        yield way
        if not keeps and "reducers" in self._also:
            for reducer in _REDUCERS:
                yield {**way, "comm.reducer": reducer, "comm.all_reduce": "psum"}

    def _pipelines(self, data: int, model: int, pipe: int) -> Iterator[JsonObject]:
        if pipe > len(self._config.model.hidden) + 1:
            return
        rows = self._config.train.batch_size // data
        for each in _EACH:
            if pipe * each <= rows:
                for remat in (True, False):
                    yield {
                        "step": "pipeline", "mesh": _mesh(data=data, model=model, pipe=pipe),
                        "pipeline.microbatches": pipe * each, "pipeline.remat": remat,
                    }  # fmt: skip


class _Asked:
    """What a config leaves to the planner, if it says `auto` at all; else all is."""

    def __init__(self, config: Config):
        planned, auto = config.mesh.data == "planned", config.step == "auto"
        said = config.mesh != type(config.mesh)()
        self._step = config.step if planned and not auto else None
        self.mesh = dict(config.mesh) if auto and not planned and said else None

    def allows(self, changes: Mapping[str, Json]) -> bool:
        mesh = changes["mesh"]
        assert isinstance(mesh, dict)
        if self.mesh is not None and any(
            size not in ("auto", mesh[axis]) for axis, size in self.mesh.items()
        ):
            return False
        return self._step is None or changes["step"] == self._step


def _section(tree: Mapping[str, Json], name: str) -> Mapping[str, Json]:
    found = tree.get(name)
    return found if isinstance(found, dict) else {}


def _mesh(**sizes: int) -> JsonObject:
    return {axis: sizes.get(axis, 1) for axis in AXES}


def _factors(m: int) -> Iterator[tuple[int, int, int]]:
    """(data, fsdp, model) whose product is m."""
    for model in range(1, m + 1):
        if m % model == 0:
            rest = m // model
            yield from ((rest // fsdp, fsdp, model) for fsdp in range(1, rest + 1)
                        if rest % fsdp == 0)  # fmt: skip


def _key(config: Config) -> str:
    return config.model_dump_json()


def differences(config: Config, chosen: Config) -> JsonObject:
    """Dotted keys of `chosen` to write into `config` for it to be that: step and mesh always."""
    from jmlp.config import flatten

    old, new, keys = flatten(config), flatten(chosen), keys_of(Config)
    always = {"step", *(f"mesh.{axis}" for axis in AXES)}
    # Settings of a word that is no longer said, such as a topology's, are its no longer.
    gone = {key: keys[key].field.default for key in old if key in keys and key not in new}
    kept = {key: value for key, value in new.items() if key in always or old.get(key) != value}
    return kept | {key: value for key, value in gone.items() if old[key] != value}

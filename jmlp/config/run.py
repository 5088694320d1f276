"""The whole config of a run: its sections, and what must hold between them."""

import importlib
from typing import Annotated

import pydantic
from pydantic import Field

from jmlp.config.fields import Bool, Count, Int, Mark, Section
from jmlp.config.sections import (
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
from jmlp.config.tables import Words


class Config(Section):
    """One training run."""

    seed: Annotated[Int, Field(ge=0, lt=2**32)] = 0
    """Of the order of rows, the initial weights and dropout. Splits: data.split_seed."""
    data: DataConfig = DataConfig()
    model: pydantic.SerializeAsAny[ModelConfig] = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    reproducible: Bool = False
    """The same bits on any number of devices that divides `virtual_shards`."""
    virtual_shards: Count = 8
    """reproducible: parts of a batch, summed in a fixed tree; a power of two."""
    step: Annotated[
        str,
        Words(module="jmlp.parallel", names=("STEPS", "ABOVE"), default="sharded", more=("auto",)),
        Mark.MAY_CHANGE,
    ] = "sharded"
    """single: one device. sharded: jit over the mesh. pmap: data parallel only.
    explicit: data (and tensor) parallel with the communication of `comm`.
    pipeline: layers over mesh.pipe, many microbatches at once: `pipeline`.
    local: devices train alone and exchange now and then, as `local` says.
    async: a parameter server and workers that do not wait for each other: `server`.
    auto: as jmlp plan finds best for the devices here, and the mesh as well unless it is said."""
    comm: pydantic.SerializeAsAny[CommConfig] = CommConfig()
    tensor: TensorConfig = TensorConfig()
    pipeline: PipelineConfig = PipelineConfig()
    local: LocalConfig = LocalConfig()
    server: ServerConfig = ServerConfig()
    optim: Annotated[pydantic.SerializeAsAny[OptimConfig], Mark.MAY_GO_ON] = OptimConfig()
    train: TrainConfig = TrainConfig()

    @pydantic.model_validator(mode="before")
    @classmethod
    def _with_recipe(cls, tree: object) -> object:
        """Values of `model.recipe` beneath what is said; by name, as recipes stand above."""
        return importlib.import_module("jmlp.model.recipes").with_recipe(tree, cls)

    @pydantic.model_validator(mode="after")
    def _strategy_accepts(self) -> "Config":
        # By name: ways to train stand above the config that asks for them.
        for mistake in importlib.import_module("jmlp.parallel").mistakes(self):
            raise ValueError(mistake)
        if self.train.batch_size < self.optim.accumulate:
            raise ValueError(
                f"optim.accumulate={self.optim.accumulate} exceeds "
                f"train.batch_size={self.train.batch_size}"
            )
        return self

"""The section of a config that says what the model is.

Words of its keys are lines of the tables of `jmlp.model`, beside whose code their settings stand.
"""

from typing import Annotated, ClassVar, Literal

import pydantic
from pydantic import Field

from jmlp.config.fields import Bool, Count, Float, Int, Rate, Widths, named
from jmlp.config.tables import OpenSection, Table, Words

# Where the words of keys are. A line more in one of these tables is a word more for its key.
BLOCKS = Table(module="jmlp.model", names=("BLOCKS",), key="block", default="plain")
ACTIVATIONS = Words(module="jmlp.model", names=("ACTIVATIONS",), default="relu")
NORMS = Words(module="jmlp.model", names=("NORMS",), default="none")
INITIALISERS = Words(
    module="jmlp.model", names=("INITIALISERS",), default="auto", more=("auto",)
)  # fmt: skip
NUMBERS = Table(module="jmlp.model", names=("NUMBER_EMBEDDINGS",), key="name", default="none")
RECIPES = Words(module="jmlp.model.recipes", names=("RECIPES",), default="none")

Positive = Annotated[Float, Field(gt=0)]


class NumbersConfig(OpenSection):
    """What a number becomes. Settings of one embedding stand beside it in `jmlp.model`."""

    TABLE: ClassVar[Table] = NUMBERS

    name: Annotated[str, NUMBERS] = NUMBERS.default
    """none: itself. piecewise_linear: how far it is through each bin. periodic, pbld: cosines."""


NumbersField = Annotated[
    pydantic.SerializeAsAny[NumbersConfig], pydantic.BeforeValidator(named)
]  # fmt: skip


class ModelConfig(OpenSection):
    """The multilayer perceptron. Settings of one kind of block stand beside it in `jmlp.model`."""

    TABLE: ClassVar[Table] = BLOCKS

    recipe: Annotated[str, RECIPES] = "none"
    """What other keys are where nobody says them, as a paper has found them to go together.
    realmlp: Holzmueller et al. 2024. tabm: Gorishniy et al. 2025."""

    hidden: Widths = (256, 128)
    """Width of each hidden layer; [] is a linear model."""
    block: Annotated[str, BLOCKS] = BLOCKS.default
    """What a hidden layer is. plain: product, norm, activation, dropout."""
    activation: Annotated[str, ACTIVATIONS] = "relu"
    """gelu is its tanh form. swiglu, geglu are gated: two kernels a layer (Shazeer 2020)."""
    norm: Annotated[str, NORMS] = "none"
    """Between a layer's product and its activation. batch: of the global batch."""
    dropout: Rate = 0.0
    """Share of hidden features dropped in training."""
    input_dropout: Rate = 0.0
    """Share of input features dropped in training."""
    dropout_schedule: Literal["constant", "flat_cos"] = "constant"
    """flat_cos: dropout as it is over half of the run, and from there by a cosine to 0."""
    residual: Bool = False
    """Add each layer's input to its output, through a projection if widths differ."""
    init: Annotated[str, INITIALISERS] = "auto"
    """Hidden kernels. auto: he_normal for relu, gelu, silu; lecun_normal otherwise."""
    embed_above: Annotated[Int, Field(ge=0)] = 32
    """Categories of more levels than this are embedded, the others one-hot."""
    embedding_dim: Count | Literal["auto"] = "auto"
    """Features of an embedding. auto: 1.6 levels^0.56, at most 64."""
    number_embedding: NumbersField = NumbersConfig()
    """What a number becomes before the first layer: a word, or its settings as well."""
    smooth_clip: Positive | None = None
    """c: scaled numbers x become x / sqrt(1 + (x/c)^2), which is below c. none: as they are."""
    front_scale: Bool = False
    """A learned factor of each feature before the first layer, from 1."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the arithmetic; parameters and the loss are float32 always."""

"""What a checkpoint says beside its arrays: the keys of its `meta`, JSON on disk."""

from typing import Any, NotRequired, TypedDict

from jmlp.metrics import Direction
from jmlp.types import JsonObject


class RunMeta(TypedDict):
    """What the run gives to be kept."""

    config: JsonObject
    schema: JsonObject
    progress: dict[str, Any]
    """the fields of `training.progress.Progress`, which is of a folder above"""
    data: str
    """fingerprint of the rows"""
    environment: dict[str, str]
    custom: list[str]
    """what was given from Python: `model`, `tx`, `loss`"""


class Meta(RunMeta):
    """That, and what reading the arrays needs; older checkpoints lack the last two."""

    metrics: dict[str, float]
    digests: dict[str, list[int]]
    """of each leaf, by its name"""
    comm: dict[str, tuple[list[int], str]]
    """shape and dtype of the compressor's leaves"""
    best: NotRequired[Direction]
    leaves: NotRequired[dict[str, str]]
    """`float32[32, 16]` and the like"""

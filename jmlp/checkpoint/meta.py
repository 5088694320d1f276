"""What a checkpoint says beside its arrays: the keys of its `meta`, JSON on disk."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict, cast

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
    """That, and what reading the arrays needs; older checkpoints lack the last ones."""

    metrics: dict[str, float]
    digests: dict[str, list[int]]
    """of each leaf, by its name"""
    comm: dict[str, tuple[list[int], str]]
    """shape and dtype of the compressor's leaves"""
    step: NotRequired[int]
    best: NotRequired[Direction]
    leaves: NotRequired[dict[str, str]]
    """`float32[32, 16]` and the like"""


def seal(body: Mapping[str, object]) -> dict[str, str]:
    """`body` as text, and its SHA-256."""
    text = json.dumps(body, sort_keys=True)
    return {"body": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def unseal(sealed: object) -> Meta:
    """The body, seen to be what was sealed, with parts of the types that readers rely on."""
    record = cast(dict[str, object], sealed) if isinstance(sealed, dict) else {}
    if not isinstance(body := record.get("body"), str):
        raise ValueError("not a checkpoint's: it has no body")
    if hashlib.sha256(body.encode(errors="replace")).hexdigest() != record.get("sha256"):
        raise ValueError("changed since it was saved")
    meta = json.loads(body)
    for key, kind in _KINDS.items():
        if not isinstance(meta.get(key, kind()), kind):
            raise ValueError(f"{key} is not as jmlp saves it")
    return {"metrics": {}, "digests": {}, "comm": {}} | meta


_KINDS: dict[str, type] = {"data": str, "custom": list} | dict.fromkeys(
    ("config", "schema", "progress", "environment", "metrics", "digests", "comm"), dict
)

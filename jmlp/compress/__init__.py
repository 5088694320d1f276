"""Compressed gradient means, one scheme a file: `(grads, state) -> (mean, state)`."""

from jmlp.compress.base import Exchange, Reduced, Reducer, sent_bytes
from jmlp.compress.cast import bf16, fp8
from jmlp.compress.feedback import error_feedback
from jmlp.compress.low_rank import low_rank
from jmlp.compress.none import none
from jmlp.compress.quantize import int4, int8
from jmlp.compress.sign import sign
from jmlp.compress.sparse import random_k, top_k

REDUCERS = {
    "none": none,
    "bf16": bf16,
    "fp8": fp8,
    "int8": int8,
    "int4": int4,
    "sign": sign,
    "top_k": top_k,
    "random_k": random_k,
    "low_rank": low_rank,
}

__all__ = ["REDUCERS", "Exchange", "Reduced", "Reducer", "error_feedback", "sent_bytes"]

"""Compressed gradient means, one scheme a file: `(grads, state) -> (mean, state)`.

uncompressed: `none`. bfloat16, 8-bit floats: `cast`. quantization to int8, int4 (QSGD, ZeRO++):
`quantize`. 1-bit, sign SGD: `sign`. top-k and random-k sparsification, Deep Gradient Compression:
`sparse`. PowerSGD: `low_rank`. error feedback, momentum correction: `error_feedback`. quantized
reduce-scatter and all-gather, `coded` schemes: `two_phase`. The contract, `Scheme`: `reducer`.
From a config to a reducer over a mesh: `make`; which one, by `comm.reducer: auto`: `choice`; to a
message of a parameter server: `message`.

A scheme is a file and a line in `REDUCERS`; its settings are a subclass of `ReducerConfig` in that
file. All of these can be imported without loading jax.
"""

from typing import Any

from jmlp.compress.cast import bf16_code, fp8_code
from jmlp.compress.error_feedback import error_feedback
from jmlp.compress.low_rank import LowRank, low_rank
from jmlp.compress.none import none, none_message
from jmlp.compress.quantize import Quantized, int4_code, int8_code
from jmlp.compress.reducer import (
    Choice,
    Exchange,
    Message,
    Reduced,
    Reducer,
    Scheme,
    as_scheme,
    sent_bytes,
)
from jmlp.compress.sign import sign_code
from jmlp.compress.sparse import Sparse, TopK, random_k, top_k, top_k_message
from jmlp.compress.two_phase import coded
from jmlp.config.sections import ReducerConfig
from jmlp.config.tables import Lines

REDUCERS: Lines[Scheme[Any]] = Lines({
    "none": Scheme(none, ReducerConfig, message=none_message),
    "bf16": coded(bf16_code, ReducerConfig),
    "fp8": coded(fp8_code, ReducerConfig),
    "int8": coded(int8_code, Quantized),
    "int4": coded(int4_code, Quantized),
    "sign": coded(sign_code, ReducerConfig),
    "top_k": Scheme(top_k, TopK, topologies=("full",), message=top_k_message),
    "random_k": Scheme(random_k, Sparse),
    "low_rank": Scheme(low_rank, LowRank),
}, whole=as_scheme)  # fmt: skip
"""The compressors by the names that `comm.reducer` takes; one's own may be added, also a function
`exchange -> Reducer` alone. Of a file that nothing here imports a line is `module:NAME`."""

CHOICES: Lines[Choice] = Lines({"auto": "jmlp.compress.choice:AUTO"})
"""Words of `comm.reducer` that pick one of `REDUCERS` for a run."""

__all__ = [
    "CHOICES", "REDUCERS", "Choice", "Exchange", "Message", "Reduced", "Reducer", "ReducerConfig",
    "Scheme", "error_feedback", "sent_bytes",
]  # fmt: skip

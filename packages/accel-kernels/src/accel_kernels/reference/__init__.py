"""What every op means, in plain torch, on any device; every back end is held against it.

No arguments are checked here; the functions of ``ops`` check and then call this, or something faster.

- ``training``: optimizer steps, norm, casts, to the last bit.
- ``attention``: paged attention, and writing keys and values into the cache.
- ``linear``: dense and weight-only quantized products.
- ``layers``: RMSNorm, rotary embedding, gated activations.
"""

from .attention import paged_attention, write_kv
from .layers import gelu_mul, rms_norm, rotary, silu_mul
from .linear import dequantize_int4, dequantize_int8, linear, linear_int4, linear_int8
from .training import (
    adagrad_step,
    adam_step,
    cast_copy,
    grad_norm_scale,
    lion_step,
    rounding_key,
    sgd_step,
    step,
)

__all__ = [
    "adagrad_step",
    "adam_step",
    "cast_copy",
    "dequantize_int4",
    "dequantize_int8",
    "gelu_mul",
    "grad_norm_scale",
    "linear",
    "linear_int4",
    "linear_int8",
    "lion_step",
    "paged_attention",
    "rms_norm",
    "rotary",
    "rounding_key",
    "sgd_step",
    "silu_mul",
    "step",
    "write_kv",
]

"""What every op means, in plain torch, on any device; every back end is held against it.

No arguments are checked here; the functions of ``ops`` check and then call this, or something faster.

- ``training``: optimizer steps, norm, casts, to the last bit.
- ``blocks``, ``signs``: messages of quantized tensors, to the last bit; ``random``: bits from a seed and a place.
- ``attention``: paged attention, and writing keys and values into the cache.
- ``linear``: dense and weight-only quantized products.
- ``layers``: RMSNorm, rotary embedding, gated activations.
"""

from .attention import paged_attention, write_kv
from .blocks import dequantize_blocks, dequantize_sum, quantize_blocks, requantize_sum
from .layers import gelu_mul, rms_norm, rotary, silu_mul
from .linear import dequantize_int4, dequantize_int8, linear, linear_int4, linear_int8
from .random import rounding_key
from .signs import mean_signs, pack_signs, unpack_signs
from .training import (
    adagrad_step,
    adam_step,
    cast_copy,
    grad_norm_scale,
    lion_step,
    sgd_step,
    step,
)

__all__ = [
    "adagrad_step",
    "adam_step",
    "cast_copy",
    "dequantize_blocks",
    "dequantize_int4",
    "dequantize_int8",
    "dequantize_sum",
    "gelu_mul",
    "grad_norm_scale",
    "linear",
    "linear_int4",
    "linear_int8",
    "lion_step",
    "mean_signs",
    "pack_signs",
    "paged_attention",
    "quantize_blocks",
    "requantize_sum",
    "rms_norm",
    "rotary",
    "rounding_key",
    "sgd_step",
    "silu_mul",
    "step",
    "unpack_signs",
    "write_kv",
]

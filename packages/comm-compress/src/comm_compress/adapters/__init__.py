"""Compressed collectives in the places where others call for them: zero-core, torch's DDP, torch's FSDP2.

`quantized` is zero-core's `Collectives`; `ddp` makes communication hooks; `fsdp` replaces FSDP2's collectives.
"""

from .quantized import QuantizedCollectives

__all__ = ["QuantizedCollectives"]

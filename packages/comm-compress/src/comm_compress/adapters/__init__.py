"""Compressed collectives in the places where others call for them: zero-core, torch's DDP, torch's FSDP2.

`quantized` is zero-core's `Collectives`; `ddp` makes communication hooks; `fsdp` replaces FSDP2's collectives.
"""

from .ddp import Hook, ddp_hook
from .fsdp import FsdpCompression, compress_fsdp
from .quantized import QuantizedCollectives

__all__ = ["FsdpCompression", "Hook", "QuantizedCollectives", "compress_fsdp", "ddp_hook"]

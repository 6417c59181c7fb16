"""Optimizers that do their own communication, at one bit an element once they have warmed up.

Modules, in the order in which a gradient passes through them: `policy`, `options` (what a user says) | `layout`,
`kinds` -> `bucket` -> `bucketed` (what is kept) | `state` -> `saved` (saved, loaded) | `base` (a step), `rounds`,
`counts` -> `verdict` -> `pipeline` -> `exact` -> `rules` (exact steps), or `moves` -> `signs` | `warmup` -> `freezing`,
`variances`, `scales` -> `onebit_adam`, `onebit_lamb` | `intervals`, `drift` -> `zero_one_adam` | `zero_optimizer` (on a
model of zero-core) | `footprint` (bytes).
"""

from .base import CompressedOptimizer
from .footprint import state_bytes
from .onebit_adam import OneBitAdam
from .onebit_lamb import OneBitLamb
from .policy import Compression
from .state import merge_states
from .zero_one_adam import ZeroOneAdam
from .zero_optimizer import LocalGradients, ZeroCompressedOptimizer

__all__ = [
    "CompressedOptimizer",
    "Compression",
    "LocalGradients",
    "OneBitAdam",
    "OneBitLamb",
    "ZeroCompressedOptimizer",
    "ZeroOneAdam",
    "merge_states",
    "state_bytes",
]

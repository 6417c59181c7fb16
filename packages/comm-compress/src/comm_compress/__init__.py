"""Less on the wire: codecs, compressed collectives, and the optimizers that are built on them.

Modules, in the order in which a tensor passes through them:

- `errors`, `version`.
- `topology`, `wire` (pure: formats and bytes), `ops` (the kernels): what travels, and between whom.
- `hops`, `agreement`: messages among the ranks of one group.
- `gather` (qwZ, hpZ), `reduce` (qgZ): collectives made of them.
- `settings`, `group_collectives`: what a user says, and which way each gather and reduction of a group takes.
- `traffic`, `trials`: what was sent, and whether it pays.
- `store`: frozen weights at rest as quantized numbers.
- `adapters`: the same in the places where zero-core, DDP and FSDP2 call for collectives.
- `wire_1bit`: bytes of the 1-bit collectives and of runs, counted.
- `error_feedback` -> `allreduce_1bit`: what is lost, and the mean at one bit an element.
- `optimizers`: 1-bit Adam, 0/1 Adam, 1-bit LAMB.
"""

from .adapters import QuantizedCollectives, compress_fsdp, ddp_hook
from .allreduce_1bit import OneBitState, allreduce_1bit
from .error_feedback import ErrorFeedback, Feedback, LoCo, LoCoPolicy
from .errors import CommCompressError, CompressConfigError, CompressStateError
from .optimizers import (
    CompressedOptimizer,
    Compression,
    LocalGradients,
    OneBitAdam,
    OneBitLamb,
    ZeroCompressedOptimizer,
    ZeroOneAdam,
    merge_states,
    state_bytes,
)
from .store import QuantizedStore
from .traffic import Traffic, traffic
from .version import __version__

__all__ = [
    "CommCompressError",
    "CompressConfigError",
    "CompressStateError",
    "CompressedOptimizer",
    "Compression",
    "ErrorFeedback",
    "Feedback",
    "LoCo",
    "LoCoPolicy",
    "LocalGradients",
    "OneBitAdam",
    "OneBitLamb",
    "OneBitState",
    "QuantizedCollectives",
    "QuantizedStore",
    "Traffic",
    "ZeroCompressedOptimizer",
    "ZeroOneAdam",
    "__version__",
    "allreduce_1bit",
    "compress_fsdp",
    "ddp_hook",
    "merge_states",
    "state_bytes",
    "traffic",
]

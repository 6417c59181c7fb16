"""Less on the wire: codecs, compressed collectives, and the optimizers that are built on them.

Modules, in the order in which a tensor passes through them:

- ``errors``, ``version``.
- ``wire_1bit``: bytes of the 1-bit collectives and of runs, counted.
- ``error_feedback`` -> ``allreduce_1bit``: what is lost, and the mean at one bit an element.
- ``optimizers``: 1-bit Adam, 0/1 Adam, 1-bit LAMB.
"""

from .allreduce_1bit import OneBitState, allreduce_1bit
from .error_feedback import ErrorFeedback, Feedback, LoCo, LoCoPolicy
from .errors import CommCompressError, CompressConfigError, CompressStateError
from .optimizers import Compression, OneBitAdam, OneBitLamb, ZeroOneAdam, merge_states
from .version import __version__

__all__ = [
    "CommCompressError",
    "CompressConfigError",
    "CompressStateError",
    "Compression",
    "ErrorFeedback",
    "Feedback",
    "LoCo",
    "LoCoPolicy",
    "OneBitAdam",
    "OneBitLamb",
    "OneBitState",
    "ZeroOneAdam",
    "__version__",
    "allreduce_1bit",
    "merge_states",
]

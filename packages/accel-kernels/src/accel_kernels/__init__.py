"""Fused kernels for flat tensors: optimizer steps, gradient norm, casts; on CPU and CUDA, one function an op.

Beside them a transfer engine, which moves bytes between files and memory.

Modules, in the order in which a call passes through them:

- ``segments``: the hyper-parameters of runs of elements (``AdamSegment`` and its siblings) and how they are
  packed.
- ``ops``: the public functions, one file an op.
- ``tables``: a list of tensors, whatever their sizes, stepped by one call.
- ``checks``: what is demanded of tensors, before anything is written.
- ``dispatch``: which back end runs a call; ``isa`` and ``report`` let a person steer and see it.
- ``backends``: ``cpu`` (C++ extension), ``cuda`` (NVRTC through CuPy), ``portable`` (numba or plain torch).
- ``reference``: what each op means, in plain torch; every back end is held against it.
- ``transfers``: files to memory and back, with many requests in flight.
- ``errors``, ``version``.

``csrc`` holds the CUDA sources that are compiled at first use.
"""

from . import reference
from .errors import (
    AccelKernelsError,
    AccelTypeError,
    AccelValueError,
    BackendUnavailableError,
    TransferError,
)
from .isa import available_cpu_isas, set_cpu_isa
from .ops.adagrad import adagrad_step
from .ops.adam import adam_step
from .ops.cast import cast_copy
from .ops.lion import lion_step
from .ops.norm import grad_norm_scale
from .ops.sgd import sgd_step
from .report import Report, report
from .segments import AdagradSegment, AdamSegment, LionSegment, SgdSegment
from .tables import StepTable
from .transfers import (
    StripedFile,
    Transfer,
    TransferEngine,
    TransferFile,
    TransferSettings,
    aligned_empty,
    tune,
)
from .version import __version__

__all__ = [
    "AccelKernelsError",
    "AccelTypeError",
    "AccelValueError",
    "AdagradSegment",
    "AdamSegment",
    "BackendUnavailableError",
    "LionSegment",
    "Report",
    "SgdSegment",
    "StepTable",
    "StripedFile",
    "Transfer",
    "TransferEngine",
    "TransferError",
    "TransferFile",
    "TransferSettings",
    "__version__",
    "adagrad_step",
    "adam_step",
    "aligned_empty",
    "available_cpu_isas",
    "cast_copy",
    "grad_norm_scale",
    "lion_step",
    "reference",
    "report",
    "set_cpu_isa",
    "sgd_step",
    "tune",
]

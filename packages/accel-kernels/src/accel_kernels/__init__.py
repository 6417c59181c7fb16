"""Fused kernels on CPU and CUDA, one function an op: optimizer steps, norm, casts; codecs; a decoder's inference.

Beside them a transfer engine, which moves bytes between files and memory.

Modules, in the order in which a call passes through them:

- ``segments``: the hyper-parameters of runs of elements (``AdamSegment`` and its siblings) and how they are
  packed.
- ``messages``: how quantized tensors lie in bytes.
- ``ops``: the public functions, one file an op.
- ``tables``: a list of tensors, whatever their sizes, stepped by one call.
- ``checks``, ``checks_inference``: what is demanded of tensors, before anything is written.
- ``dispatch``, ``dispatch_codecs``: which back end runs a call; ``isa`` and ``report`` let a person steer and see it.
- ``backends``: ``cpu`` (C++ extension), ``cuda`` (NVRTC through CuPy, Triton), ``portable`` (numba or plain
  torch); those of the inference ops in ``backends.inference``, of the codecs in ``backends.codecs``.
- ``reference``: what each op means, in plain torch; every back end is held against it.
- ``recording``: calls that were made once, again, without the Python between them.
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
from .ops.blocks import (
    block_bytes,
    dequantize_blocks,
    dequantize_sum,
    quantize_blocks,
    requantize_sum,
)
from .ops.cast import cast_copy
from .ops.gated import gelu_mul, silu_mul
from .ops.linear import linear, linear_int4, linear_int8
from .ops.lion import lion_step
from .ops.norm import grad_norm_scale
from .ops.paged_attention import paged_attention
from .ops.quantize import quantize_int4, quantize_int8
from .ops.rms_norm import rms_norm
from .ops.rotary import rotary
from .ops.sgd import sgd_step
from .ops.signs import mean_signs, pack_signs, sign_bytes, unpack_signs
from .ops.write_kv import write_kv
from .recording import Recording
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
    "Recording",
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
    "block_bytes",
    "cast_copy",
    "dequantize_blocks",
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
    "quantize_int4",
    "quantize_int8",
    "reference",
    "report",
    "requantize_sum",
    "rms_norm",
    "rotary",
    "set_cpu_isa",
    "sgd_step",
    "sign_bytes",
    "silu_mul",
    "tune",
    "unpack_signs",
    "write_kv",
]

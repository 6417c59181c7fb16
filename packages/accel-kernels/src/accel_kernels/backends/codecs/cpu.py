"""The C++ back end of the codec ops: hands addresses to the extension, as ``backends.cpu`` does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...isa import chosen_cpu_isa
from ...messages import BlockFormat
from ...native import cpu
from ...reference import rounding_key
from ..cpu import DTYPE_CODES

assert cpu is not None  # dispatch_codecs loads this module only where the extension is there
_cpu = cpu


def _block_size(form: BlockFormat, numel: int) -> int:
    """A block that is larger than everything is everything; the extension counts in 64 bits."""
    return min(form.block_size, numel + numel % 2)


def quantize(src: Tensor, out: Tensor, form: BlockFormat, seed: int | None) -> None:
    """See ``dispatch_codecs.CodecBackend``."""
    _cpu.quantize(
        src.data_ptr(),
        DTYPE_CODES[src.dtype],
        out.data_ptr(),
        src.numel(),
        form.bits,
        _block_size(form, src.numel()),
        form.symmetric,
        seed is not None,
        rounding_key(seed or 0),
        torch.get_num_threads(),
        chosen_cpu_isa(),
    )


def dequantize_sum(sources: Sequence[Tensor], out: Tensor, form: BlockFormat, scale: float) -> None:
    """See ``dispatch_codecs.CodecBackend``."""
    _cpu.dequantize_sum(
        [source.data_ptr() for source in sources],
        out.data_ptr(),
        DTYPE_CODES[out.dtype],
        out.numel(),
        form.bits,
        _block_size(form, out.numel()),
        form.symmetric,
        scale,
        torch.get_num_threads(),
        chosen_cpu_isa(),
    )


def requantize_sum(
    sources: Sequence[Tensor],
    out: Tensor,
    numel: int,
    form: BlockFormat,
    out_form: BlockFormat,
    scale: float,
    seed: int | None,
) -> None:
    """See ``dispatch_codecs.CodecBackend``."""
    _cpu.requantize_sum(
        [source.data_ptr() for source in sources],
        out.data_ptr(),
        numel,
        form.bits,
        out_form.bits,
        _block_size(form, numel),
        form.symmetric,
        scale,
        seed is not None,
        rounding_key(seed or 0),
        torch.get_num_threads(),
        chosen_cpu_isa(),
    )


def pack_signs(src: Tensor, out: Tensor, error: Tensor | None, squared: bool) -> None:
    """See ``dispatch_codecs.CodecBackend``."""
    _cpu.pack_signs(
        src.data_ptr(),
        DTYPE_CODES[src.dtype],
        0 if error is None else error.data_ptr(),
        out.data_ptr(),
        src.numel(),
        squared,
        torch.get_num_threads(),
        chosen_cpu_isa(),
    )


def mean_signs(sources: Sequence[Tensor], out: Tensor) -> None:
    """See ``dispatch_codecs.CodecBackend``."""
    _cpu.mean_signs(
        [source.data_ptr() for source in sources],
        out.data_ptr(),
        DTYPE_CODES[out.dtype],
        out.numel(),
        torch.get_num_threads(),
        chosen_cpu_isa(),
    )

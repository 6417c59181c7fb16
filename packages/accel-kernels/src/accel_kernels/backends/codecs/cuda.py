"""The CUDA back end of the codec ops: csrc/cuda through CuPy, as ``backends.cuda``.

On torch's current stream; nothing waits for the device. One launch an op, three for signs, and one more for every
eight messages beyond the first eight of a sum: those pass through a buffer of fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...messages import BlockFormat
from ...reference import rounding_key
from ...reference.signs import PIECE
from ..cuda import kernel, num_blocks, on_stream_of

# csrc/cuda: common.cuh, messages.cuh; threads of every kernel here
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MESSAGES = 8
_THREADS = 256
_WARP = 32
# Elements from which a block is worth 256 threads rather than 32.
_LONG_BLOCK = 4096


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _form(form: BlockFormat, numel: int) -> tuple[Any, ...]:
    """Block size, and where minima and values begin."""
    block_size = min(form.block_size, numel + numel % 2)
    scale_bytes = form.scale_bytes(numel)
    return np.int64(block_size), np.int64(scale_bytes // (1 if form.symmetric else 2)), np.int64(scale_bytes)


def _team(form: BlockFormat, numel: int) -> tuple[int, int]:
    """Threads for a block of the message, and CUDA blocks for all of them."""
    team = _THREADS if min(form.block_size, numel) >= _LONG_BLOCK else _WARP
    return team, max(1, min(form.num_blocks(numel) * team // _THREADS + 1, 1 << 20))


def _addresses(sources: Sequence[Tensor]) -> tuple[Any, ...]:
    """Eight addresses and how many of them count."""
    pointers = [source.data_ptr() for source in sources]
    return (*(np.int64(p) for p in pointers + [0] * (_MESSAGES - len(pointers))), np.int32(len(pointers)))


def quantize(src: Tensor, out: Tensor, form: BlockFormat, seed: int | None) -> None:
    """See ``dispatch_codecs.CodecBackend``."""
    numel = src.numel()
    team, blocks = _team(form, numel)
    flags = f"{_flag(form.symmetric)}, {_flag(seed is not None)}"
    expression = f"quantize<{_DTYPE_CODES[src.dtype]}, {form.bits}, {flags}, {team}>"
    arguments = (
        np.int64(src.data_ptr()),
        np.int64(out.data_ptr()),
        np.int64(numel),
        *_form(form, numel),
        np.uint64(rounding_key(seed or 0)),
    )
    with on_stream_of(src):
        kernel("blocks.cu", expression)((blocks,), (_THREADS,), arguments)


def _launch_sum(
    sources: Sequence[Tensor], before: Tensor | None, out: Tensor, form: BlockFormat, scale: float
) -> None:
    expression = f"dequantize_sum<{_DTYPE_CODES[out.dtype]}, {form.bits}, {_flag(form.symmetric)}>"
    block_size, minima, values = _form(form, out.numel())
    arguments = (
        *_addresses(sources),
        np.int64(0 if before is None else before.data_ptr()),
        np.float32(scale),
        minima,
        values,
        np.int64(out.data_ptr()),
        np.int64(out.numel()),
        block_size,
    )
    launch = kernel("blocks.cu", expression)
    launch((num_blocks(out.numel(), out.device),), (_THREADS,), arguments)


def _all_but_last(
    sources: Sequence[Tensor], numel: int, form: BlockFormat
) -> tuple[Tensor | None, Sequence[Tensor]]:
    """The sum of what does not fit one launch, and the rest."""
    before = None
    while len(sources) > _MESSAGES:
        following = before
        if following is None:
            following = torch.empty(numel, dtype=torch.float32, device=sources[0].device)
        _launch_sum(sources[:_MESSAGES], before, following, form, 1.0)
        before, sources = following, sources[_MESSAGES:]
    return before, sources


def dequantize_sum(sources: Sequence[Tensor], out: Tensor, form: BlockFormat, scale: float) -> None:
    """See ``dispatch_codecs.CodecBackend``."""
    with on_stream_of(out):
        before, rest = _all_but_last(sources, out.numel(), form)
        _launch_sum(rest, before, out, form, scale)


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
    team, blocks = _team(form, numel)
    flags = f"{_flag(form.symmetric)}, {_flag(seed is not None)}"
    expression = f"requantize_sum<{form.bits}, {out_form.bits}, {flags}, {team}>"
    with on_stream_of(out):
        before, rest = _all_but_last(sources, numel, form)
        _, in_minima, in_values = _form(form, numel)
        arguments = (
            *_addresses(rest),
            np.int64(0 if before is None else before.data_ptr()),
            np.float32(scale),
            in_minima,
            in_values,
            np.int64(out.data_ptr()),
            np.int64(numel),
            *_form(out_form, numel),
            np.uint64(rounding_key(seed or 0)),
        )
        kernel("blocks.cu", expression)((blocks,), (_THREADS,), arguments)


def pack_signs(src: Tensor, out: Tensor, error: Tensor | None, squared: bool) -> None:
    """See ``dispatch_codecs.CodecBackend``."""
    numel, code = src.numel(), _DTYPE_CODES[src.dtype]
    pieces = -(-numel // PIECE)
    with_error = _flag(error is not None)
    address = np.int64(0 if error is None else error.data_ptr())
    with on_stream_of(src):
        sums = torch.empty(pieces, dtype=torch.float64, device=src.device)
        source = (np.int64(src.data_ptr()), address)
        count = (np.int64(numel),)
        run = kernel("signs.cu", f"sign_sums<{code}, {with_error}, {_flag(squared)}>")
        run((-(-pieces * _WARP // _THREADS),), (_THREADS,), (*source, *count, np.int64(sums.data_ptr())))
        scale = (
            np.int64(sums.data_ptr()),
            np.int64(pieces),
            *count,
            np.int32(squared),
            np.int64(out.data_ptr()),
        )
        kernel("signs.cu", "sign_scale")((1,), (_THREADS,), scale)
        run = kernel("signs.cu", f"pack_signs<{code}, {with_error}>")
        run((num_blocks(numel, src.device),), (_THREADS,), (*source, np.int64(out.data_ptr()), *count))


def mean_signs(sources: Sequence[Tensor], out: Tensor) -> None:
    """See ``dispatch_codecs.CodecBackend``."""
    numel, factor = out.numel(), 1.0 / len(sources)
    with on_stream_of(out):
        before = None
        while len(sources) > _MESSAGES:
            following = (
                torch.empty(numel, dtype=torch.float32, device=out.device) if before is None else before
            )
            _launch_mean(sources[:_MESSAGES], before, following, 1.0)
            before, sources = following, sources[_MESSAGES:]
        _launch_mean(sources, before, out, factor)


def _launch_mean(sources: Sequence[Tensor], before: Tensor | None, out: Tensor, factor: float) -> None:
    arguments = (
        *_addresses(sources),
        np.int64(0 if before is None else before.data_ptr()),
        np.float32(factor),
        np.int64(out.data_ptr()),
        np.int64(out.numel()),
    )
    launch = kernel("signs.cu", f"mean_signs<{_DTYPE_CODES[out.dtype]}>")
    launch((num_blocks(out.numel(), out.device),), (_THREADS,), arguments)

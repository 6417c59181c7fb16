"""The portable back end of the codec ops: the reference, on the CPU in cache-sized pieces.

Pieces hold whole blocks of a message, and whole pieces of the sum under a scale of signs: the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...messages import SCALE_BYTES, BlockFormat
from ...reference import blocks, signs

# Elements: a piece with its temporaries fits a core's 1-2 MiB second-level cache. A multiple of `signs.PIECE`.
_PIECE = 1 << 16


def _pieces(numel: int, multiple: int, device: torch.device) -> Iterator[tuple[int, int]]:
    length = numel if device.type != "cpu" else multiple * max(1, _PIECE // multiple)
    for start in range(0, numel, length):
        yield start, min(start + length, numel)


@torch.no_grad()
def quantize(src: Tensor, out: Tensor, form: BlockFormat, seed: int | None) -> None:
    """See ``dispatch_codecs.CodecBackend``."""
    n = src.numel()
    for start, stop in _pieces(n, form.block_size, src.device):
        x = src[start:stop].to(torch.float32)
        blocks.encode(x, form, seed, start, blocks.parts_of(out, n, form, start, stop))


@torch.no_grad()
def dequantize_sum(sources: Sequence[Tensor], out: Tensor, form: BlockFormat, scale: float) -> None:
    """See ``dispatch_codecs.CodecBackend``."""
    n = out.numel()
    for start, stop in _pieces(n, form.block_size, out.device):
        out[start:stop].copy_(blocks.decode_sum(sources, n, form, scale, start, stop))


@torch.no_grad()
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
    for start, stop in _pieces(numel, form.block_size, out.device):
        total = blocks.decode_sum(sources, numel, form, scale, start, stop)
        blocks.encode(total, out_form, seed, start, blocks.parts_of(out, numel, out_form, start, stop))


@torch.no_grad()
def pack_signs(src: Tensor, out: Tensor, error: Tensor | None, squared: bool) -> None:
    """See ``dispatch_codecs.CodecBackend``; two passes, one for the scale, one for bits and error."""
    n = src.numel()
    pieces = [slice(*piece) for piece in _pieces(n, _PIECE, src.device)]

    def compensated(part: slice) -> Tensor:
        return signs.with_error(src[part], None if error is None else error[part])

    sums = torch.cat([signs.piece_sums(compensated(part), squared) for part in pieces])
    scale = signs.scale_of(sums, n, squared)
    out[:SCALE_BYTES].copy_(scale.view(1).view(torch.uint8))
    for part in pieces:
        bits = out[SCALE_BYTES + part.start // 8 : SCALE_BYTES + (part.stop + 7) // 8]
        signs.encode(compensated(part), scale, bits, None if error is None else error[part])


@torch.no_grad()
def mean_signs(sources: Sequence[Tensor], out: Tensor) -> None:
    """See ``dispatch_codecs.CodecBackend``."""
    for start, stop in _pieces(out.numel(), _PIECE, out.device):
        out[start:stop].copy_(signs.decode_mean(sources, start, stop))

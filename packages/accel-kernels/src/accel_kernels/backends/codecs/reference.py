"""``reference`` as a back end of the codec ops: the plain torch statement of each, on whole tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...messages import BlockFormat
from ...reference import blocks, signs


@torch.no_grad()
def quantize(src: Tensor, out: Tensor, form: BlockFormat, seed: int | None) -> None:
    """See ``dispatch_codecs.CodecBackend``."""
    n = src.numel()
    blocks.encode(src.to(torch.float32), form, seed, 0, blocks.parts_of(out, n, form, 0, n))


@torch.no_grad()
def dequantize_sum(sources: Sequence[Tensor], out: Tensor, form: BlockFormat, scale: float) -> None:
    """See ``dispatch_codecs.CodecBackend``."""
    out.copy_(blocks.decode_sum(sources, out.numel(), form, scale, 0, out.numel()))


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
    total = blocks.decode_sum(sources, numel, form, scale, 0, numel)
    blocks.encode(total, out_form, seed, 0, blocks.parts_of(out, numel, out_form, 0, numel))


def pack_signs(src: Tensor, out: Tensor, error: Tensor | None, squared: bool) -> None:
    """See ``dispatch_codecs.CodecBackend``."""
    signs.pack_signs(src, out, error=error, norm="l2" if squared else "l1")


def mean_signs(sources: Sequence[Tensor], out: Tensor) -> None:
    """See ``dispatch_codecs.CodecBackend``."""
    signs.mean_signs(sources, out)

"""What block-wise quantization means: each line below is one rounding, and every back end gives the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..messages import SCALE_BYTES, SMALLEST_SCALE, BlockFormat
from .random import random_16, rounding_key


class Parts(NamedTuple):
    """The bytes of a message that hold some of its elements."""

    scales: Tensor
    minima: Tensor | None
    values: Tensor


def parts_of(message: Tensor, numel: int, form: BlockFormat, start: int, stop: int) -> Parts:
    """Where elements ``start`` (of a block the first, and even) to ``stop`` of a message of ``numel`` lie."""
    whole = SCALE_BYTES * form.num_blocks(numel)
    blocks = slice(SCALE_BYTES * (start // form.block_size), SCALE_BYTES * form.num_blocks(stop))
    first = form.scale_bytes(numel)
    return Parts(
        message[:whole][blocks],
        None if form.symmetric else message[whole : 2 * whole][blocks],
        message[first + start * form.bits // 8 : first + (stop * form.bits + 7) // 8],
    )


def _floats(source: Tensor) -> Tensor:
    """Fp32 numbers from bytes, which may lie at any address."""
    return source.clone().view(torch.float32)


def _in_blocks(x: Tensor, block_size: int) -> Tensor:
    """``[blocks, block_size]``; the last element is repeated to fill the last block, and changes no extreme."""
    width = min(block_size, x.numel())
    return torch.cat((x, x[-1:].expand(-x.numel() % width))).view(-1, width)


def encode(x: Tensor, form: BlockFormat, seed: int | None, first: int, into: Parts) -> None:
    """Quantize fp32 ``x``, elements ``first`` and following of a message."""
    blocks = _in_blocks(x, form.block_size)
    if form.symmetric:
        low = None
        reach = blocks.abs().amax(dim=1)
    else:
        low = blocks.amin(dim=1) + 0.0  # -0 becomes 0: which zero is smaller, nobody says
        reach = blocks.amax(dim=1) - low
        blocks = blocks - low.unsqueeze(1)
    finite = reach.isfinite()
    scale = (reach / torch.full_like(reach, form.highest)).clamp(min=SMALLEST_SCALE)
    y = blocks * scale.reciprocal().unsqueeze(1)
    if seed is None:
        q = y.round()  # to even; the reciprocal is so close that the largest is exactly form.highest
    else:
        random = random_16(rounding_key(seed), first, x.numel(), x.device).to(torch.float32) * 2.0**-16
        y = y.clamp(form.lowest, form.highest)
        q = (y + _in_blocks(random, form.block_size)).floor()
    q = torch.where(finite.unsqueeze(1), q, 0.0).view(-1)[: x.numel()].to(torch.int16)
    nan = torch.full_like(scale, torch.nan)
    into.scales.copy_(torch.where(finite, scale, nan).view(torch.uint8))
    if low is not None and into.minima is not None:
        into.minima.copy_(torch.where(finite, low, nan).view(torch.uint8))
    if form.bits == 8:
        into.values.copy_((q & 0xFF).to(torch.uint8))
    else:
        stored = (q + form.stored_zero).to(torch.uint8)
        pairs = torch.cat((stored, stored.new_zeros(x.numel() % 2))).view(-1, 2)
        into.values.copy_(pairs[:, 0] | (pairs[:, 1] << 4))


def decode(parts: Parts, numel: int, form: BlockFormat) -> Tensor:
    """The fp32 values of ``numel`` elements."""
    if form.bits == 4:
        pairs = torch.stack((parts.values & 15, parts.values >> 4), dim=1)
        q = pairs.view(-1)[:numel].to(torch.float32) - form.stored_zero
    else:
        q = (parts.values.view(torch.int8) if form.symmetric else parts.values).to(torch.float32)
    y = _in_blocks(q, form.block_size) * _floats(parts.scales).unsqueeze(1)
    if parts.minima is not None:
        y = y + _floats(parts.minima).unsqueeze(1)
    return y.view(-1)[:numel]


def decode_sum(
    sources: Sequence[Tensor], numel: int, form: BlockFormat, scale: float, start: int, stop: int
) -> Tensor:
    """Fp32 ``scale`` times the sum of messages, added in their order: elements ``start`` to ``stop``."""
    total = decode(parts_of(sources[0], numel, form, start, stop), stop - start, form)
    for source in sources[1:]:
        total = total + decode(parts_of(source, numel, form, start, stop), stop - start, form)
    return total * scale


@torch.no_grad()
def quantize_blocks(
    src: Tensor,
    out: Tensor,
    *,
    bits: int,
    block_size: int = 256,
    symmetric: bool = True,
    seed: int | None = None,
) -> None:
    """See ``accel_kernels.quantize_blocks``."""
    form, n = BlockFormat(bits, block_size, symmetric), src.numel()
    if n > 0:
        encode(src.to(torch.float32), form, seed, 0, parts_of(out, n, form, 0, n))


@torch.no_grad()
def dequantize_sum(
    sources: Sequence[Tensor],
    out: Tensor,
    *,
    scale: float = 1.0,
    bits: int,
    block_size: int = 256,
    symmetric: bool = True,
) -> None:
    """See ``accel_kernels.dequantize_sum``."""
    form, n = BlockFormat(bits, block_size, symmetric), out.numel()
    if n > 0:
        out.copy_(decode_sum(sources, n, form, scale, 0, n))


def dequantize_blocks(
    src: Tensor, out: Tensor, *, bits: int, block_size: int = 256, symmetric: bool = True
) -> None:
    """See ``accel_kernels.dequantize_blocks``."""
    dequantize_sum([src], out, bits=bits, block_size=block_size, symmetric=symmetric)


@torch.no_grad()
def requantize_sum(
    sources: Sequence[Tensor],
    out: Tensor,
    *,
    n: int,
    scale: float = 1.0,
    bits: int,
    out_bits: int | None = None,
    block_size: int = 256,
    symmetric: bool = True,
    seed: int | None = None,
) -> None:
    """See ``accel_kernels.requantize_sum``."""
    form = BlockFormat(bits, block_size, symmetric)
    out_form = form.with_bits(bits if out_bits is None else out_bits)
    if n > 0:
        total = decode_sum(sources, n, form, scale, 0, n)
        encode(total, out_form, seed, 0, parts_of(out, n, out_form, 0, n))

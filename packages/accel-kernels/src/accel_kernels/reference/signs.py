"""What a message of signs means; the order of the sum under its scale is part of it.

Note [Order of the sum]
Elements come in pieces of ``PIECE``; within one, element i goes to lane i % ``LANES``, each lane adds its elements in
order, and the lanes are added in halves (lane k and lane k + half, until one is left). The sums of the pieces are
added in halves as well, zeros filling up to a power of two. All of it in fp64, where squares of fp32 numbers are exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..messages import SCALE_BYTES

PIECE, LANES = 4096, 32


def _halves(x: Tensor) -> Tensor:
    """The sum over the last dim, a power of two long."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x.squeeze(-1)


def piece_sums(c: Tensor, squared: bool) -> Tensor:
    """Fp64 sum of squares, or of magnitudes, of each piece of fp32 ``c``; Note [Order of the sum]."""
    wide = c.to(torch.float64)
    wide = wide * wide if squared else wide.abs()
    length = min(PIECE, -(-c.numel() // LANES) * LANES)  # rows of zeros change nothing
    rows = F.pad(wide, (0, -c.numel() % length)).view(-1, length // LANES, LANES)
    lanes = rows[:, 0].clone()
    for k in range(1, rows.shape[1]):
        lanes += rows[:, k]
    return _halves(lanes)


def scale_of(sums: Tensor, numel: int, squared: bool) -> Tensor:
    """The fp32 scale of ``numel`` elements whose pieces have these sums: NaN if one element is not finite."""
    width = 1 << (sums.numel() - 1).bit_length()
    total = _halves(F.pad(sums, (0, width - sums.numel())))
    mean = total / torch.full_like(total, numel)
    scale = (mean.sqrt() if squared else mean).to(torch.float32)
    return torch.where(scale.isfinite(), scale, torch.full_like(scale, torch.nan))


def with_error(src: Tensor, error: Tensor | None) -> Tensor:
    """Fp32 ``src + error``."""
    c = src.to(torch.float32)
    return c if error is None else c + error


def encode(c: Tensor, scale: Tensor, bits: Tensor, error: Tensor | None) -> None:
    """Signs of fp32 ``c`` into ``bits``, and what they lose into ``error``, unless the scale is NaN."""
    positive = c >= 0
    eights = F.pad(positive, (0, -c.numel() % 8)).view(-1, 8)
    weights = 1 << torch.arange(8, device=c.device)
    bits.copy_((eights * weights).sum(dim=1).to(torch.uint8))
    if error is not None:
        error.copy_(torch.where(scale.isfinite(), c - torch.where(positive, scale, -scale), error))


def decode(message: Tensor, start: int, stop: int) -> Tensor:
    """The fp32 values of elements ``start`` (a multiple of 8) to ``stop`` of a message."""
    scale = message[:SCALE_BYTES].clone().view(torch.float32)
    bits = message[SCALE_BYTES + start // 8 : SCALE_BYTES + (stop + 7) // 8]
    shifts = torch.arange(8, device=message.device)
    positive = ((bits.unsqueeze(1) >> shifts) & 1).view(-1)[: stop - start]
    return torch.where(positive.bool(), scale, -scale)


def decode_mean(sources: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Fp32 mean of messages, added in their order: elements ``start`` (a multiple of 8) to ``stop``."""
    total = decode(sources[0], start, stop)
    for source in sources[1:]:
        total = total + decode(source, start, stop)
    return total * (1.0 / len(sources))


@torch.no_grad()
def pack_signs(src: Tensor, out: Tensor, *, error: Tensor | None = None, norm: str = "l2") -> None:
    """See ``accel_kernels.pack_signs``."""
    if src.numel() > 0:
        c, squared = with_error(src, error), norm == "l2"
        scale = scale_of(piece_sums(c, squared), c.numel(), squared)
        out[:SCALE_BYTES].copy_(scale.view(1).view(torch.uint8))
        encode(c, scale, out[SCALE_BYTES:], error)


@torch.no_grad()
def mean_signs(sources: Sequence[Tensor], out: Tensor) -> None:
    """See ``accel_kernels.mean_signs``."""
    if out.numel() > 0:
        out.copy_(decode_mean(sources, 0, out.numel()))


def unpack_signs(src: Tensor, out: Tensor) -> None:
    """See ``accel_kernels.unpack_signs``."""
    mean_signs([src], out)

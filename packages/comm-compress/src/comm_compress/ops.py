"""The kernels that this package uses, with its formats; the one place that names them.

In: floats and messages. Out: messages and floats. What a message is, `wire` says; what the bits mean, accel-kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import accel_kernels as ak
import torch

from .errors import CompressConfigError
from .wire import BlockFormat

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What can be quantized; other dtypes travel as they are."""

NAMES = {"int8": 8, "int4": 4}


def block_format(name: str | None, what: str, block_size: int) -> BlockFormat | None:
    """The format that a user's word means; None for None.

    Raises:
        CompressConfigError: another word.
    """
    if name is None:
        return None
    if name not in NAMES:
        raise CompressConfigError(f"{what}: expected {', '.join(map(repr, NAMES))} or None, got {name!r}")
    return BlockFormat(NAMES[name], block_size)


def encode(src: torch.Tensor, out: torch.Tensor, form: BlockFormat, seed: int | None = None) -> None:
    """Floats [n] to one message; `seed` rounds stochastically."""
    ak.quantize_blocks(
        src, out, bits=form.bits, block_size=form.block_size, symmetric=form.symmetric, seed=seed
    )


def decode(src: torch.Tensor, out: torch.Tensor, form: BlockFormat) -> None:
    """One message to floats [n]."""
    ak.dequantize_blocks(src, out, bits=form.bits, block_size=form.block_size, symmetric=form.symmetric)


def decode_sum(
    sources: Sequence[torch.Tensor], out: torch.Tensor, form: BlockFormat, scale: float = 1.0
) -> None:
    """The sum of messages, formed in fp32 in their order, times `scale`, to floats [n]."""
    ak.dequantize_sum(
        sources,
        out,
        scale=scale,
        bits=form.bits,
        block_size=form.block_size,
        symmetric=form.symmetric,
    )


def recode_sum(
    sources: Sequence[torch.Tensor],
    out: torch.Tensor,
    form: BlockFormat,
    n: int,
    scale: float = 1.0,
    seed: int | None = None,
) -> None:
    """The sum of messages of `n` elements, formed in fp32 in their order, times `scale`, to one message."""
    ak.requantize_sum(
        sources,
        out,
        n=n,
        scale=scale,
        bits=form.bits,
        block_size=form.block_size,
        symmetric=form.symmetric,
        seed=seed,
    )

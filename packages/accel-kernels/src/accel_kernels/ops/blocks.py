"""Block-wise quantization to 8 and 4 bits for the wire: floats to messages, sums of messages, and both at once.

How a message lies in memory: ``messages``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import checks
from ..dispatch_codecs import choose_codec
from ..errors import AccelTypeError, AccelValueError
from ..messages import BlockFormat
from .common import mark_written


def _check_int(op: str, name: str, value: object, smallest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise AccelTypeError(f"{op}: {name}: expected an integer, got {value!r}")
    if value < smallest:
        raise AccelValueError(f"{op}: {name}: expected at least {smallest}, got {value}")


def _format(op: str, bits: int, block_size: int, symmetric: bool, name: str = "bits") -> BlockFormat:
    if bits not in (4, 8):
        raise AccelValueError(f"{op}: {name}: expected 4 or 8, got {bits!r}")
    _check_int(op, "block_size", block_size, 1)
    if bits == 4 and block_size % 2:
        raise AccelValueError(f"{op}: block_size: expected an even number for 4 bits, got {block_size}")
    return BlockFormat(bits, block_size, bool(symmetric))


def _message(numel: int, form: BlockFormat) -> tuple[int, str]:
    size = form.message_bytes(numel)
    kind = "" if form.symmetric else ", asymmetric"
    return size, f"{size} bytes ({numel} elements of {form.bits} bits, blocks of {form.block_size}{kind})"


def _check_seed(op: str, seed: int | None) -> None:
    if seed is not None and not isinstance(seed, int):
        raise AccelTypeError(f"{op}: seed: expected an integer or None, got {type(seed).__name__}")


def check_sources(op: str, sources: Sequence[Tensor], size: tuple[int, str]) -> list[checks.SizedRole]:
    """The roles of messages that are only read.

    Raises:
        AccelTypeError: a tensor instead of a sequence of them.
        AccelValueError: an empty sequence.
    """
    if isinstance(sources, Tensor):
        raise AccelTypeError(f"{op}: sources: expected a sequence of messages, got a tensor; pass [message]")
    if len(sources) == 0:
        raise AccelValueError(f"{op}: sources: expected at least one message, got none")
    return [(f"sources[{k}]", source, checks.BYTES, False, size) for k, source in enumerate(sources)]


def check_scale(op: str, scale: float) -> float:
    """A number as a float.

    Raises:
        AccelTypeError: not a number.
    """
    if not isinstance(scale, (float, int)):
        raise AccelTypeError(f"{op}: scale: expected a number, got {type(scale).__name__}")
    return float(scale)


def block_bytes(n: int, *, bits: int, block_size: int, symmetric: bool = True) -> int:
    """Bytes of a message of ``n`` elements.

    4 for the scale of each block (8 with its minimum, where asymmetric) and ``ceil(n * bits / 8)``; 0 for n = 0.

    Raises:
        AccelTypeError: a number that is not an integer.
        AccelValueError: negative n, bits other than 4 and 8, a block size below 1 or, with 4 bits, odd.
    """
    _check_int("block_bytes", "n", n, 0)
    return _format("block_bytes", bits, block_size, symmetric).message_bytes(n)


def quantize_blocks(
    src: Tensor,
    out: Tensor,
    *,
    bits: int,
    block_size: int = 256,
    symmetric: bool = True,
    seed: int | None = None,
    backend: str | None = None,
) -> None:
    """Quantize floats, block by block, into a message.

    Symmetric: scale = largest magnitude / 127 (8 bits) or / 7 (4 bits), never below 2^-126, and
    q = round(x / scale). Asymmetric: scale = (largest - smallest) / 255 or / 15, q = round((x - smallest) / scale).
    A block is one scale's elements: ``block_size`` neighbours, the last block those that are left.

    Error of what comes back in fp32: ``|x - x'| <= scale / 2 + 2^-22 m``, with m the largest magnitude in the
    block (asymmetric 2 m); rounded stochastically ``<= scale + 2^-22 m``. Stochastic rounding takes floor(y + u) of
    y = x / scale, with u from 16 random bits that depend on ``(seed, index)`` alone: right on average, to 2^-16 of a
    step.

    A block with an infinity or NaN in it (or, asymmetric, whose range overflows fp32) comes back as NaN, all of it,
    so that whoever looks for overflow finds it.

    The same bytes on every back end, whatever the number of threads. Reads 4 bytes an fp32 element, writes 1 or 0.5.

    Args:
        src: fp32, bf16 or fp16, flat, contiguous, n elements; read.
        out: uint8, ``block_bytes(n, ...)`` elements, at any address; written.
        bits: 8 or 4.
        block_size: at least 1; with 4 bits even. It need not divide n.
        symmetric: zero is the middle of the range, and stays zero.
        seed: rounds stochastically; any integer, taken modulo 2^64. None rounds to nearest even.
        backend: as in ``adam_step``.

    Raises:
        AccelTypeError: wrong type or dtype.
        AccelValueError: sizes, devices, layout, overlap, read-only memory, bits or block size.
        BackendUnavailableError: ``backend`` cannot run here.

    Source: Wang et al., "ZeRO++", arXiv:2306.10209, section 3.1 (block-wise quantization); Gupta et al.,
    arXiv:1502.02551, section 3 (stochastic rounding); random bits by SplitMix64 (OOPSLA 2014, figure 14).
    """
    op = "quantize_blocks"
    form = _format(op, bits, block_size, symmetric)
    _check_seed(op, seed)
    size = _message(checks.numel_of(src), form)
    checks.check_sized(op, [("src", src, checks.FLOATS, False, None), ("out", out, checks.BYTES, True, size)])
    chosen = choose_codec(op, src.device, backend)
    if src.numel() > 0:
        chosen.quantize(src, out, form, seed)
    mark_written(out)


def dequantize_blocks(
    src: Tensor,
    out: Tensor,
    *,
    bits: int,
    block_size: int = 256,
    symmetric: bool = True,
    backend: str | None = None,
) -> None:
    """A message back to floats: ``scale * q``, plus the block's minimum where asymmetric.

    Formed in fp32, each operation rounded, and rounded once more to the dtype of ``out``.

    Args:
        src: uint8, ``block_bytes(n, ...)`` elements, at any address; read.
        out: fp32, bf16 or fp16, flat, contiguous, n elements; written.
        bits: as quantized.
        block_size: as quantized.
        symmetric: as quantized.
        backend: as in ``adam_step``.

    Raises:
        AccelTypeError: wrong type or dtype.
        AccelValueError: sizes, devices, layout, overlap, read-only memory, bits or block size.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    _dequantize("dequantize_blocks", "src", [src], out, 1.0, bits, block_size, symmetric, backend)


def dequantize_sum(
    sources: Sequence[Tensor],
    out: Tensor,
    *,
    scale: float = 1.0,
    bits: int,
    block_size: int = 256,
    symmetric: bool = True,
    backend: str | None = None,
) -> None:
    """``scale`` times the sum of messages, in one pass: each is read once, ``out`` is written once.

    Added in fp32, in the order of the messages, then multiplied, then rounded to the dtype of ``out``: the same bits
    on every back end.

    Args:
        sources: at least one message, uint8, ``block_bytes(n, ...)`` elements each, at any address; read.
        out: fp32, bf16 or fp16, flat, contiguous, n elements; written.
        scale: multiplies the sum, in fp32; 1 / number of ranks makes a mean.
        bits: as quantized.
        block_size: as quantized.
        symmetric: as quantized.
        backend: as in ``adam_step``.

    Raises:
        AccelTypeError: wrong type or dtype.
        AccelValueError: no message, sizes, devices, layout, overlap, read-only memory, bits or block size.
        BackendUnavailableError: ``backend`` cannot run here.

    Source: Wang et al., "ZeRO++", arXiv:2306.10209, section 3.3 (reduction in full precision between hops).
    """
    op = "dequantize_sum"
    _dequantize(op, "sources", sources, out, check_scale(op, scale), bits, block_size, symmetric, backend)


def _dequantize(
    op: str,
    name: str,
    sources: Sequence[Tensor],
    out: Tensor,
    scale: float,
    bits: int,
    block_size: int,
    symmetric: bool,
    backend: str | None,
) -> None:
    form = _format(op, bits, block_size, symmetric)
    roles = check_sources(op, sources, _message(checks.numel_of(out), form))
    if name == "src":
        roles = [(name, *roles[0][1:])]
    checks.check_sized(op, [("out", out, checks.FLOATS, True, None), *roles])
    chosen = choose_codec(op, out.device, backend)
    if out.numel() > 0:
        chosen.dequantize_sum(sources, out, form, scale)
    mark_written(out)


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
    backend: str | None = None,
) -> None:
    """``scale`` times the sum of messages, quantized again, without the floats between going to memory.

    The same bits as ``dequantize_sum`` into fp32 and ``quantize_blocks`` of that.

    Args:
        sources: at least one message, uint8, ``block_bytes(n, bits=bits, ...)`` elements each, at any address; read.
        out: uint8, ``block_bytes(n, bits=out_bits, ...)`` elements, at any address; written. Shares no memory with a
            source.
        n: how many elements the messages stand for.
        scale: multiplies the sum, in fp32.
        bits: of the sources.
        out_bits: of the result; None for the same.
        block_size: of all of them.
        symmetric: all of them.
        seed: as in ``quantize_blocks``.
        backend: as in ``adam_step``.

    Raises:
        AccelTypeError: wrong type or dtype.
        AccelValueError: no message, sizes, devices, layout, overlap, read-only memory, bits or block size.
        BackendUnavailableError: ``backend`` cannot run here.

    Source: Wang et al., "ZeRO++", arXiv:2306.10209, section 4.2 (fused dequantization, reduction, quantization).
    """
    op = "requantize_sum"
    form = _format(op, bits, block_size, symmetric)
    out_form = _format(op, bits if out_bits is None else out_bits, block_size, symmetric, "out_bits")
    _check_int(op, "n", n, 0)
    _check_seed(op, seed)
    factor = check_scale(op, scale)
    roles = check_sources(op, sources, _message(n, form))
    checks.check_sized(op, [*roles, ("out", out, checks.BYTES, True, _message(n, out_form))])
    chosen = choose_codec(op, out.device, backend)
    if n > 0:
        chosen.requantize_sum(sources, out, n, form, out_form, factor, seed)
    mark_written(out)

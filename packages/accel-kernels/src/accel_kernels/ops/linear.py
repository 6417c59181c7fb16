"""Products of activations with a weight matrix: dense, int8 and int4 weights."""

from __future__ import annotations

from torch import Tensor

from ..checks_inference import FLOATS, INT8, SINGLE, UINT8, expect, expect_contiguous, expect_written
from ..dispatch import choose_inference
from ..errors import AccelValueError


def _prepare(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """Check what the products have in common; returns ``out``, made if there is none."""
    expect_contiguous(op, "packed" if op == "linear_int4" else "weight", weight)
    num_rows, num_outputs = x.shape[0], weight.shape[0]
    if bias is not None:
        expect(op, "bias", bias, (x.dtype,), (num_outputs,), x.device)
    if out is None:
        return x.new_empty((num_rows, num_outputs))
    expect(op, "out", out, (x.dtype,), (num_rows, num_outputs), x.device)
    expect_contiguous(op, "out", out)
    expect_written(op, "out", out, ("x", x), ("the weight", weight), ("bias", bias))
    return out


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``x @ weight.T + bias``, summed in fp32 and rounded once.

    On the ``cpu`` back end a row's bits depend on that row alone: the order of the sum over K is the same for
    one row as for a thousand, and for any number of threads. Reads ``N * K`` weights once for up to 16 rows.

    Args:
        x: ``[M, K]``, fp32, bf16 or fp16; rows may lie apart.
        weight: ``[N, K]``, contiguous, of x's dtype.
        bias: ``[N]`` of x's dtype.
        out: ``[M, N]`` of x's dtype, contiguous, with memory of its own; None makes one.
        backend: as in ``adam_step``.

    Returns:
        ``out``. Gradients are not recorded.

    Raises:
        AccelTypeError: wrong type or dtype.
        AccelValueError: shapes, devices, layout.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    op = "linear"
    expect(op, "x", x, FLOATS, (None, None))
    expect(op, "weight", weight, (x.dtype,), (None, x.shape[1]), x.device)
    out = _prepare(op, x, weight, bias, out)
    chosen = choose_inference(op, x.device.type, x.dtype, backend)
    if out.numel():
        chosen.linear(x, weight, bias, out)
    return out


def linear_int8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``x @ (weight * scale).T + bias`` with int8 weights; activations keep their precision.

    As ``linear`` otherwise, with a quarter (fp32) or half (bf16) of its bytes. With AMX a row of ``x`` is split
    exactly into three int8 digits, to 2^-23 of its largest element, and the sum over K, at most 131,072, is exact.
    The ``portable`` back end rounds the scaled weights to x's dtype.

    Args:
        x: ``[M, K]``, fp32, bf16 or fp16; rows may lie apart.
        weight: int8 ``[N, K]``, contiguous, as ``quantize_int8`` makes it.
        scale: fp32 ``[N]``.
        bias: ``[N]`` of x's dtype.
        out: as in ``linear``.
        backend: as in ``adam_step``.

    Returns:
        ``out``. Gradients are not recorded.

    Raises:
        AccelTypeError: wrong type or dtype.
        AccelValueError: shapes, devices, layout.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    op = "linear_int8"
    expect(op, "x", x, FLOATS, (None, None))
    expect(op, "weight", weight, INT8, (None, x.shape[1]), x.device)
    expect(op, "scale", scale, SINGLE, (weight.shape[0],), x.device)
    out = _prepare(op, x, weight, bias, out)
    chosen = choose_inference(op, x.device.type, x.dtype, backend)
    if out.numel():
        chosen.linear_int8(x, weight, scale, bias, out)
    return out


def linear_int4(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``x @ ((q - zero) * scale).T + bias`` with 4-bit ``q``; activations keep their precision.

    Otherwise as ``linear_int8``.

    Args:
        x: ``[M, K]``, fp32, bf16 or fp16; rows may lie apart.
        packed: uint8 ``[N, K / 2]``, contiguous: byte j holds elements 2j (low four bits) and 2j + 1.
        scale: fp32 ``[N, K / group_size]``, contiguous.
        zero: uint8 of the same shape, 0 to 15, contiguous; None is 8 everywhere.
        bias: ``[N]`` of x's dtype.
        group_size: neighbours in a row that share scale and zero; a multiple of 32 that divides K.
        out: as in ``linear``.
        backend: as in ``adam_step``.

    Returns:
        ``out``. Gradients are not recorded.

    Raises:
        AccelTypeError: wrong type or dtype.
        AccelValueError: shapes, devices, layout, group size.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    op = "linear_int4"
    expect(op, "x", x, FLOATS, (None, None))
    num_inputs = x.shape[1]
    if group_size < 1 or group_size % 32 or num_inputs % group_size:
        raise AccelValueError(
            f"{op}: group_size: expected a multiple of 32 that divides K = {num_inputs}, got {group_size}"
        )
    expect(op, "packed", packed, UINT8, (None, num_inputs // 2), x.device)
    groups = (packed.shape[0], num_inputs // group_size)
    expect(op, "scale", scale, SINGLE, groups, x.device)
    if zero is not None:
        expect(op, "zero", zero, UINT8, groups, x.device)
        expect_contiguous(op, "zero", zero)
    expect_contiguous(op, "scale", scale)
    out = _prepare(op, x, packed, bias, out)
    chosen = choose_inference(op, x.device.type, x.dtype, backend)
    if out.numel():
        chosen.linear_int4(x, packed, scale, zero, bias, group_size, out)
    return out

"""What the inference ops demand of their tensors: type, dtype, shape, device, rows without gaps.

In: one tensor with what is expected of it. Out: nothing, or an error that names the argument. A step of a model
makes hundreds of these calls, so each looks at metadata alone. Next: ``dispatch``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import no_memory
from .errors import AccelTypeError, AccelValueError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SINGLE = (torch.float32,)
INT8 = (torch.int8,)
UINT8 = (torch.uint8,)
INT32 = (torch.int32,)
INT64 = (torch.int64,)


def expect(
    op: str,
    name: str,
    tensor: Tensor,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | None],
    device: torch.device | None = None,
) -> None:
    """Demand a tensor of one of ``dtypes`` and of ``shape`` (None: any size) whose last dimension has no gaps.

    Raises:
        AccelTypeError: not a tensor, or another dtype.
        AccelValueError: shape, device, or elements of a row apart in memory.
    """
    if not isinstance(tensor, Tensor):
        raise AccelTypeError(f"{op}: {name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise AccelTypeError(f"{op}: {name}: expected {allowed}, got {tensor.dtype}")
    given = tensor.shape
    if len(given) != len(shape):
        raise _shape_error(op, name, shape, given)
    for want, got in zip(shape, given):  # noqa: B905  as long as each other, and a strict zip takes longer
        if want is not None and want != got:
            raise _shape_error(op, name, shape, given)
    if device is not None and tensor.device != device:
        raise AccelValueError(f"{op}: {name}: expected a tensor on {device}, got {tensor.device}")
    if tensor.data_ptr() == 0:
        _expect_memory(op, name, tensor)
    if tensor.stride(-1) != 1 and given[-1] > 1:
        raise AccelValueError(
            f"{op}: {name}: expected adjacent elements in the last dimension, got stride {tensor.stride()}; "
            f"pass {name}.contiguous()"
        )


def _shape_error(op: str, name: str, shape: Sequence[int | None], given: Sequence[int]) -> AccelValueError:
    wanted = ", ".join("*" if want is None else str(want) for want in shape)
    return AccelValueError(f"{op}: {name}: expected shape ({wanted}), got {tuple(given)}")


def _expect_memory(op: str, name: str, tensor: Tensor) -> None:
    """Elements of a wrapper (a ``DTensor``), or of a parameter whose memory was released, lie nowhere."""
    if tensor.numel() and not tensor.is_meta:
        raise AccelTypeError(no_memory(op, name, tensor))


def expect_written(op: str, name: str, tensor: Tensor, *read: tuple[str, Tensor | None]) -> None:
    """Demand that no two elements of a written tensor share memory, nor any with what is read meanwhile.

    Raises:
        AccelValueError: they do.
    """
    stride = tensor.stride()
    if 0 in stride and any(size > 1 for size, step in zip(tensor.shape, stride, strict=True) if step == 0):
        raise AccelValueError(
            f"{op}: {name}: expected memory for every element, got an expanded tensor of shape "
            f"{tuple(tensor.shape)}, stride {stride}"
        )
    if not read or tensor.numel() == 0:
        return
    begin, end = _span(tensor)
    for other, each in read:
        if each is not None and each.numel():
            first, last = _span(each)
            if first < end and begin < last:
                raise AccelValueError(f"{op}: {name}: expected memory of its own, shares {other}'s")


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and behind the last; what lies between may be another's."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()


def expect_contiguous(op: str, name: str, tensor: Tensor) -> None:
    """Demand a tensor without gaps.

    Raises:
        AccelValueError: it has some.
    """
    if not tensor.is_contiguous():
        raise AccelValueError(
            f"{op}: {name}: expected a contiguous tensor, got shape {tuple(tensor.shape)}, stride {tensor.stride()}"
        )

"""What the ops demand of their tensors, checked before anything is written; a few microseconds a call.

In: the tensors of one call with the role each plays. Out: nothing, or an error that names the argument, what was given
and what was expected. Next: ``dispatch``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .errors import AccelTypeError, AccelValueError
from .native import is_writable

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
SINGLE = (torch.float32,)
BYTES = (torch.uint8,)

# (argument name, tensor, allowed dtypes, written?)
Role = tuple[str, torch.Tensor, tuple[torch.dtype, ...], bool]
# and how many elements, in numbers and in words, where not as many as the first one has
SizedRole = tuple[str, torch.Tensor, tuple[torch.dtype, ...], bool, "tuple[int, str] | None"]


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype) for dtype in dtypes)


def no_memory(op: str, name: str, tensor: torch.Tensor) -> str:
    """The text for a tensor whose elements lie nowhere: a wrapper's, or those of a parameter that was released."""
    return (
        f"{op}: {name}: expected a tensor with memory, got a {type(tensor).__name__} of shape "
        f"{tuple(tensor.shape)} that has none; pass the local, gathered tensor"
    )


def check_flat(op: str, roles: Sequence[Role]) -> None:
    """Demand flat, contiguous tensors of one size and device; written ones overlap nothing, are writable.

    Raises:
        AccelTypeError: not a tensor, or another dtype.
        AccelValueError: size, device, layout, overlap, read-only memory, or part of an autograd graph.
    """
    check_sized(op, [(*role, None) for role in roles])


def numel_of(tensor: torch.Tensor) -> int:
    """Elements, or 0 for what is no tensor: `check_sized` will say so."""
    return tensor.numel() if isinstance(tensor, torch.Tensor) else 0


def check_sized(op: str, roles: Sequence[SizedRole]) -> None:
    """``check_flat`` for tensors of several sizes; None is the size of the first.

    Raises:
        AccelTypeError: not a tensor, or another dtype.
        AccelValueError: size, device, layout, overlap, read-only memory, or part of an autograd graph.
    """
    first_numel, device, first = -1, None, ""
    spans = []
    for name, tensor, dtypes, written, size in roles:
        if not isinstance(tensor, torch.Tensor):
            raise AccelTypeError(f"{op}: {name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in dtypes:
            raise AccelTypeError(f"{op}: {name}: expected {_names(dtypes)}, got {tensor.dtype}")
        if tensor.layout is not torch.strided or tensor.dim() != 1 or not tensor.is_contiguous():
            raise AccelValueError(_layout_message(op, name, tensor))
        numel = tensor.numel()
        if device is None:
            first_numel, device, first = numel, tensor.device, name
        elif tensor.device != device:
            raise AccelValueError(
                f"{op}: {name}: expected a tensor on {device}, like {first}, got {tensor.device}"
            )
        if numel != (first_numel if size is None else size[0]):
            wanted = f"{first_numel} elements, as many as {first}" if size is None else size[1]
            raise AccelValueError(f"{op}: {name}: expected {wanted}, got {numel}")
        if written and tensor.requires_grad and tensor.grad_fn is not None:
            raise AccelValueError(f"{op}: {name}: is the result of a recorded operation; detach it first")
        if not tensor.is_meta and numel > 0:
            begin = tensor.data_ptr()
            if begin == 0:
                raise AccelTypeError(no_memory(op, name, tensor))
            num_bytes = numel * tensor.element_size()
            spans.append((begin, begin + num_bytes, name, written))
            if written and tensor.is_cpu and not tensor.untyped_storage().resizable():
                _check_writable(op, name, begin, num_bytes)
    _check_overlap(op, spans)


def _check_overlap(op: str, spans: list[tuple[int, int, str, bool]]) -> None:
    """Tensors that are only read may share memory."""
    spans.sort()
    end, name = 0, ""  # of all tensors so far, and of those that are written
    end_written, name_written = 0, ""
    for begin, stop, this, written in spans:
        if begin < (end if written else end_written):
            other = name if written else name_written
            raise AccelValueError(f"{op}: {this}: expected memory of its own, shares {other}'s")
        if stop > end:
            end, name = stop, this
        if written:
            end_written, name_written = stop, this


def _check_writable(op: str, name: str, address: int, num_bytes: int) -> None:
    """Memory that torch did not allocate may be a file mapped for reading, where writing ends the process."""
    if not is_writable(address, num_bytes):
        raise AccelValueError(f"{op}: {name}: expected writable memory, lies in a read-only mapping")


def _layout_message(op: str, name: str, tensor: torch.Tensor) -> str:
    if tensor.layout is not torch.strided:
        return f"{op}: {name}: expected a dense tensor, got layout {tensor.layout}"
    shape, stride = tuple(tensor.shape), tensor.stride()
    cure = f"pass {name}.view(-1)" if tensor.is_contiguous() else "make it contiguous first"
    return f"{op}: {name}: expected a flat contiguous tensor, got shape {shape}, stride {stride}; {cure}"


def check_grad_scale(op: str, grad_scale: float | torch.Tensor, device: torch.device) -> float | torch.Tensor:
    """A float, or a one-element fp32 tensor on a non-CPU ``device``, from what the caller gave.

    Raises:
        AccelTypeError: neither a number nor a floating-point tensor.
        AccelValueError: a tensor of more than one element, or on a device that would have to be waited for.
    """
    if not isinstance(grad_scale, torch.Tensor):
        if isinstance(grad_scale, (float, int)):
            return float(grad_scale)
        raise AccelTypeError(
            f"{op}: grad_scale: expected a number or a tensor, got {type(grad_scale).__name__}"
        )
    if not grad_scale.is_floating_point():
        raise AccelTypeError(f"{op}: grad_scale: expected a floating-point tensor, got {grad_scale.dtype}")
    if grad_scale.numel() != 1:
        raise AccelValueError(f"{op}: grad_scale: expected one element, got shape {tuple(grad_scale.shape)}")
    if grad_scale.device.type == "cpu":
        return float(grad_scale.detach())
    if grad_scale.device != device:
        raise AccelValueError(
            f"{op}: grad_scale: expected a number or a tensor on {device}, got {grad_scale.device}"
        )
    return grad_scale.detach().to(torch.float32).reshape(1)

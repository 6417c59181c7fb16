"""A parameter whose values are not here: what it shows, what it refuses, and which changes of state are legal.

A released parameter keeps its identity, shape, dtype, device and `requires_grad`; its storage is empty. Python
code that touches the values meets `ReleasedParameter.__torch_function__`, which gathers for a forward under way, and
elsewhere raises with the call that cures it (inside `sharded_init` it always gathers, so that initialisers work). One
whose values are on their way waits for them (`ArrivingParameter`).
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .errors import ReleasedParameterError, ZeroStateError


class Residency(enum.Enum):
    """Where the full values of a unit are."""

    SHARDED = "sharded"
    GATHERING = "gathering"
    GATHERED = "gathered"


_LEGAL = {
    (Residency.SHARDED, Residency.GATHERING),
    (Residency.GATHERING, Residency.GATHERED),
    (Residency.GATHERED, Residency.SHARDED),
    (Residency.GATHERING, Residency.SHARDED),  # a gather that failed
}


def check_transition(unit: str, now: Residency, then: Residency) -> None:
    """Raise unless a unit may go from `now` to `then`."""
    if (now, then) not in _LEGAL:
        raise ZeroStateError(f"unit '{unit}': illegal transition {now.value} -> {then.value}")


_METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in (
        "shape", "dtype", "device", "layout", "requires_grad", "is_leaf", "grad", "grad_fn", "ndim", "names",
        "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_sparse_csr", "is_mkldnn", "is_quantized", "is_nested",
        "is_mps", "is_xpu", "itemsize", "nbytes", "_version", "retains_grad", "output_nr", "_backward_hooks",
        "_post_accumulate_grad_hooks", "is_inference", "is_vulkan", "is_ipu", "is_xla", "is_mtia", "is_maia",
    )
    if hasattr(getattr(torch.Tensor, name, None), "__get__")
} | {
    getattr(torch.Tensor, name)
    for name in (
        "size", "dim", "numel", "nelement", "element_size", "stride", "storage_offset", "is_contiguous",
        "is_floating_point", "is_complex", "is_signed", "get_device", "ndimension", "requires_grad_", "register_hook",
        "register_post_accumulate_grad_hook", "__hash__", "__len__", "untyped_storage", "is_shared", "is_inference",
        "is_conj", "is_neg", "is_same_size", "has_names", "is_pinned", "new_empty", "new_empty_strided", "new_full",
        "new_ones", "new_tensor", "new_zeros",
    )
    if hasattr(torch.Tensor, name)
} | {
    torch.Tensor.grad.__set__,  # type: ignore[union-attr]  # a getset descriptor
    torch.Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
    torch.is_floating_point, torch.is_complex, torch.numel,
    torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like, torch.rand_like, torch.randn_like,
}  # fmt: skip


class ArrivingParameter(nn.Parameter):
    """The class of a parameter whose updated values are on their way; whatever needs them waits."""

    settle: ClassVar[Callable[..., None]]
    """Wait for the values, and make the parameter an ordinary one again."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer questions about shape and the like; wait before anything else."""
        kwargs = kwargs or {}
        if func in _METADATA and func is not torch.Tensor.untyped_storage:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        for tensor in tensors_in((args, kwargs)):
            if isinstance(tensor, ArrivingParameter):
                tensor.settle(tensor)
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # as torch defines it
        """As of an ordinary parameter."""
        self.settle(self)
        return repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Wait, then copy."""
        self.settle(self)
        return copy.deepcopy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Wait, then be pickled."""
        self.settle(self)
        return self.__reduce_ex__(protocol)


def arriving_class(settle: Callable[[nn.Parameter], None]) -> type[ArrivingParameter]:
    """An `ArrivingParameter` for one owner."""
    return type("ArrivingParameter", (ArrivingParameter,), {"settle": staticmethod(settle)})


class ReleasedParameter(nn.Parameter):
    """The class of a parameter while its values rest as shards; `release_class` makes one per sharded model."""

    explain: ClassVar[Callable[..., str]]
    intercept: ClassVar[Callable[..., Any] | None] = None
    gather_for_forward: ClassVar[Callable[..., bool]] = staticmethod(lambda param: False)
    """Make the parameter whole where a forward under way computes with it; False elsewhere."""
    restore: ClassVar[Callable[[nn.Parameter], None]]
    """Under `sharded_init`: make the parameter whole and an ordinary one again."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer questions about shape and the like; hand to `intercept`, gather for, or refuse, what needs values."""
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if cls.intercept is not None:
            return cls.intercept(func, args, kwargs)
        for param in tensors_in((args, kwargs)):
            if isinstance(param, ReleasedParameter) and not param.gather_for_forward(param):
                raise ReleasedParameterError(f"{getattr(func, '__name__', func)}: {param.explain(param)}")
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # as torch defines it
        """Shape and dtype; there are no values to show."""
        return f"Parameter(sharded, shape={tuple(self.shape)}, dtype={self.dtype}, requires_grad={self.requires_grad})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Refuse, since a copy would hold nothing; under `sharded_init`, gather and copy."""
        if self.intercept is not None:
            return self.intercept(copy.deepcopy, (self, memo), {})
        raise ReleasedParameterError(f"copy.deepcopy: {self.explain(self)}")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse: a pickle would hold nothing."""
        raise ReleasedParameterError(f"pickle: {self.explain(self)}")


def release_class(
    explain: Callable[[nn.Parameter], str], intercept: Callable[..., Any] | None = None
) -> type[ReleasedParameter]:
    """A `ReleasedParameter` for one owner.

    Args:
        explain: the message for a parameter that was touched: what it is, and what to do.
        intercept: `(func, args, kwargs) -> result` that runs what needs values, instead of refusing it.
    """
    return type(
        "ReleasedParameter",
        (ReleasedParameter,),
        {
            "explain": staticmethod(explain),
            "intercept": None if intercept is None else staticmethod(intercept),
        },
    )


def free_storage(tensor: torch.Tensor) -> None:
    """Give the memory of `tensor`'s storage back; the storage object, and every view of it, stays."""
    tensor.untyped_storage().resize_(0)


def allocate_storage(tensor: torch.Tensor) -> None:
    """Give a freed storage memory again (uninitialised); no effect if it has its memory."""
    storage = tensor.untyped_storage()
    nbytes = int(tensor.storage_offset() + tensor.numel()) * tensor.element_size()
    if storage.nbytes() < nbytes:
        storage.resize_(nbytes)


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors among the leaves of nested arguments."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]

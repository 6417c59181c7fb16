"""One parameter as a kernel meets it: the fp32 values to update, the states beside them, the copy to write.

In: a parameter and its entry in `Optimizer.state`. Out: a `Row`, with whatever the state lacked filled in, and what
lay elsewhere or in another dtype brought to the host in fp32. Next: `host_steps` or `device_steps`.

Note [the parameter is right]: a master is another copy of what the user sees. Where the parameter is no longer the
rounded master (weights were loaded, averaged, pruned since), its values count, element by element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import OffloadConfigError, OffloadStateError
from .maps import pinned_empty
from .rules import Group, Rule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASTER = "master"


@dataclass(eq=False)
class Row:
    """One parameter.

    Attributes:
        param: as the user has it, anywhere.
        state: its entry in `Optimizer.state`.
        held: the rule's state tensors, fp32 on the host, in the parameter's shape and order of memory.
        master: fp32 on the host, or None where the parameter itself is that.
        dense: whether the parameter's elements fill a stretch of memory.
        strides: of every tensor here but a parameter that is not dense.
        version: the parameter's version when it was last known to be the rounded master; -1 for unknown.
    """

    param: Tensor
    state: dict[str, Any]
    held: tuple[Tensor, ...]
    master: Tensor | None
    dense: bool
    strides: tuple[int, ...]
    version: int

    def like(self, given: Tensor) -> Tensor:
        """`given` in this row's order of memory: itself, or a copy."""
        if given.stride() == self.strides or given.numel() <= 1:
            return given
        return torch.empty_strided(given.shape, self.strides, dtype=given.dtype, device=given.device).copy_(
            given
        )

    def follow(self) -> None:
        """Take over what was written into the parameter since the last step; Note [the parameter is right]."""
        if self.master is None or self.version == self.param._version:
            return
        now = self.param.detach().to(self.master.device)
        edited = self.master.to(now.dtype) != now
        if bool(edited.any()):
            self.master.copy_(torch.where(edited, now.to(torch.float32), self.master))
        self.version = self.param._version


def make_row(param: Tensor, state: dict[str, Any], rule: Rule, group: Group, name: str) -> Row:
    """A parameter's row; its state is completed in place.

    Raises:
        OffloadStateError: a state of another shape than the parameter.
    """
    row = begin_row(param, state, rule, group, name)
    if param.is_cpu and param.dtype == torch.float32:
        state.pop(MASTER, None)  # of a time when the parameter had another dtype
    else:
        fresh = MASTER not in state
        row.master = _state_tensor(row, MASTER, name, param.detach)
        row.version = param._version if fresh else -1
    return row


def begin_row(param: Tensor, state: dict[str, Any], rule: Rule, group: Group, name: str) -> Row:
    """The same without a master, which is made of the parameter's values."""
    dense = is_dense(param.shape, param.stride())
    strides = param.stride() if dense else torch.empty_like(param, device="meta").stride()
    row = Row(param, state, (), None, dense, strides, -1)
    row.held = tuple(_state_tensor(row, key, name, lambda: float(rule.initial(group))) for key in rule.states)
    return row


def _state_tensor(row: Row, key: str, name: str, initial: Any) -> Tensor:
    """A state as the kernel wants it: kept where it is so already, else made or converted, and put in the state."""
    given = row.state.get(key)
    shape = row.param.shape
    if given is None:
        given = torch.empty_strided(shape, row.strides, dtype=torch.float32)
        value = initial()
        given.copy_(value) if isinstance(value, Tensor) else given.fill_(value)
    elif given.shape != shape:
        raise OffloadStateError(
            f"{name}: state {key!r}: expected shape {tuple(shape)}, got {tuple(given.shape)}"
        )
    elif given.dtype != torch.float32 or not given.is_cpu or row.like(given) is not given:
        given = row.like(given.detach().to("cpu", torch.float32))
    # A device copies from the master while the host goes on.
    if key == MASTER and row.param.is_cuda and not given.is_pinned():
        pinned = pinned_empty(given.numel(), torch.float32).as_strided(shape, row.strides)
        given = pinned.copy_(given)
    row.state[key] = given
    return given


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order of memory, as a view; contiguous ones stay themselves."""
    if tensor.is_contiguous():
        return tensor
    return torch.as_strided(tensor.detach(), (tensor.numel(),), (1,), tensor.storage_offset())


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements fill a stretch of memory, each once, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n != 1):
        if stride != expected:
            return 0 in shape
        expected *= size
    return True


def check_param(param: Tensor, name: str) -> None:
    """Refuse a parameter that these optimizers cannot step.

    Raises:
        OffloadConfigError: its dtype, or a sparse one.
    """
    if param.layout is not torch.strided or param.dtype not in DTYPES:
        raise OffloadConfigError(
            f"{name}: expected a dense float32, bfloat16 or float16 tensor, got {param.dtype}, {param.layout}; "
            "leave it to an optimizer of torch"
        )

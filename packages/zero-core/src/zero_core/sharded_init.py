"""Build a model directly as shards: no rank ever holds all of it.

In: the user's constructor, unchanged, run inside `sharded_init`. Each parameter is cut to this rank's part soon after
it was registered; an initialiser that touches it later (`nn.init`, `copy_`, tying, deep copies of layers) finds it
gathered. Out: a model of released parameters that `shard` lays out into units (`fill`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from .collectives import PlainCollectives, Wire
from .config import Overlap
from .errors import ZeroConfigError
from .groups import device_type, resolve_groups, sibling_group
from .params import allocate_storage, free_storage, release_class, tensors_in

WHOLE_BYTES = 64 << 20
"""Kept whole while constructing, if nothing else is said."""


@contextmanager
def sharded_init(
    mesh: DeviceMesh | dist.ProcessGroup,
    *,
    stage: int = 3,
    whole_bytes: int | None = None,
    overlap: Overlap | None = None,
) -> Iterator[None]:
    """Construct models inside this block as shards; every rank runs the same constructors.

    Values are those of a plain construction where the ranks' random generators agree. Below stage 3 parameters stay
    whole, so nothing is done.

    Args:
        mesh: as for `shard`. Parameters may be constructed on its devices (`with torch.device("cuda")`) or on the CPU,
            where they travel over a gloo group beside it.
        stage: the stage that `shard` will be called with.
        whole_bytes: stage 3: parameters kept whole at a time while constructing (the one in use always is). None:
            64 MiB.
        overlap: stage 3: the deadline of collectives.

    Raises:
        ZeroConfigError: an argument cannot be honoured.

    Bytes per rank: the shards, `whole_bytes`, and the largest parameter.
    """
    if stage not in (0, 1, 2, 3):
        raise ZeroConfigError(f"stage: expected 0, 1, 2 or 3, got {stage!r}")
    if stage < 3:
        for name, given in (("whole_bytes", whole_bytes), ("overlap", overlap)):
            if given is not None:
                raise ZeroConfigError(
                    f"sharded_init({name}=...): at stage {stage} parameters stay whole, and nothing is done; leave "
                    "it out"
                )
        yield
        return
    group = resolve_groups(mesh).shard
    timeout_s = (overlap or Overlap()).timeout_s
    kind = device_type(mesh, group)
    wires = {kind: Wire(group, PlainCollectives(group, timeout_s), torch.device(kind), timeout_s)}
    if kind != "cpu":
        beside = sibling_group(group, "gloo")
        wires["cpu"] = Wire(beside, PlainCollectives(beside, timeout_s), torch.device("cpu"), timeout_s)
    builder = _Builder(wires, WHOLE_BYTES if whole_bytes is None else whole_bytes)
    removers = (
        register_module_parameter_registration_hook(builder.registered),
        register_module_module_registration_hook(builder.attached),
    )
    try:
        yield
    finally:
        for remover in removers:
            remover.remove()
        builder.evict(0)


@dataclass
class _Part:
    """A parameter under construction and, while it is released, this rank's part of it."""

    param: nn.Parameter
    cls: type[nn.Parameter]
    local: torch.Tensor | None = None


class _Builder:
    """Keeps the parameters used last whole, up to a budget, and the others as shards.

    Args:
        wires: type of device -> how parameters that are on such a device travel among the ranks.
        whole_bytes: the budget.
    """

    def __init__(self, wires: dict[str, Wire], whole_bytes: int) -> None:
        self.wires = wires
        self.whole_bytes = whole_bytes
        self.parts: dict[int, _Part] = {}
        self.whole: dict[int, int] = {}
        self.released = release_class(lambda param: "", self.run)
        self.released.restore = staticmethod(self.restore)

    def registered(self, module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        """A module has got a parameter (perhaps one it shares with another)."""
        if param is None or param.is_meta or id(param) in self.parts:
            return
        self.parts[id(param)] = _Part(param, type(param))
        self._touch(param)
        self.evict(self.whole_bytes, keep={id(param)})

    def attached(self, module: nn.Module, name: str, child: nn.Module | None) -> None:
        """A module has got a submodule: a deep copy brings parameters that were never registered."""
        for owner in child.modules() if child is not None else ():
            for key, param in owner._parameters.items():
                self.registered(owner, key, param)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run `func` with the released parameters among its arguments whole."""
        used = [t for t in tensors_in((args, kwargs)) if isinstance(t, self.released)]
        for param in used:
            self._gather(param)
        self.evict(self.whole_bytes, keep={id(param) for param in used})
        return func(*args, **kwargs)

    def restore(self, param: nn.Parameter) -> None:
        """Make a parameter whole for good; it is no longer this builder's."""
        self._gather(param)
        self.whole.pop(id(param), None)
        self.parts.pop(id(param))

    def evict(self, budget_bytes: int, keep: set[int] | None = None) -> None:
        """Cut the parameters used longest ago until those that are whole fit into the budget."""
        for key in [key for key in self.whole if key not in (keep or set())]:
            if sum(self.whole.values()) <= budget_bytes:
                break
            self._cut(self.parts[key])
            del self.whole[key]

    def _wire_of(self, param: nn.Parameter) -> Wire:
        if param.device.type not in self.wires:
            raise ZeroConfigError(
                f"sharded_init: a parameter is constructed on '{param.device}', and the ranks of the mesh exchange "
                f"between devices of type {' or '.join(self.wires)}; construct it there"
            )
        return self.wires[param.device.type]

    def _touch(self, param: nn.Parameter) -> None:
        self.whole.pop(id(param), None)
        self.whole[id(param)] = param.numel() * param.element_size()

    @torch.no_grad()
    def _cut(self, part: _Part) -> None:
        param, group = part.param, self._wire_of(part.param).group
        flat = param.detach().reshape(-1)
        n = math.ceil(flat.numel() / group.size())
        start = group.rank() * n
        part.local = torch.zeros(n, dtype=flat.dtype, device=flat.device)
        mine = flat[start : start + n]
        part.local[: mine.numel()].copy_(mine)
        # A storage of its own: whoever else looks at the old one (a buffer made of the same tensor) keeps it.
        param.data = torch.empty(param.shape, dtype=param.dtype, device=param.device)
        param.__class__ = self.released
        free_storage(param)

    @torch.no_grad()
    def _gather(self, param: nn.Parameter) -> None:
        part = self.parts[id(param)]
        if part.local is None:
            self._touch(param)
            return
        wire = self._wire_of(param)
        full = torch.empty(part.local.numel() * wire.group.size(), dtype=param.dtype, device=param.device)
        wire.gather(f"a parameter of shape {tuple(param.shape)} under construction", part.local, full).wait()
        param.__class__ = part.cls
        allocate_storage(param)
        param.copy_(full[: param.numel()].view(param.shape))
        part.local = None
        self._touch(param)

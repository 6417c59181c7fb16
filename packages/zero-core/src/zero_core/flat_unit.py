"""A unit at run time: one flat buffer, the parameters as views into it, and this rank's shard.

In: a `UnitSpec`. Out: a `FlatUnit` whose parameters keep their identity. Everything else in the package moves
between the buffers held here: `gather` fills `full`, `buckets` fills `grad_full`, `accumulate` owns `grad_shard`,
`optimizer` updates `master`, `publish` writes `shard` (stage 1, 2: and from there `full`).
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import nn

from .layout import LocalSlot, UnitLayout, plan_layout
from .params import ReleasedParameter, Residency, allocate_storage, check_transition, free_storage
from .units import UnitSpec

# Note [Storage identity]
# Autograd saves views of a parameter (linear keeps `weight.t()`), and a view knows its storage, not its parameter.
# Pointing `param.data` elsewhere for the backward would compute with stale values, silently. So `full` and its
# storage are made once; releasing resizes the storage to zero bytes, gathering resizes it back and fills it in place.


class FlatUnit:
    """The one data structure of ZeRO: a unit's flat buffer, cut into one shard per rank.

    Attributes:
        full: all elements, [numel], in the parameters' dtype. Stage 3: memory only while gathered.
        shard: what this rank holds of it, [local numel]. Stages 1, 2: a view of `full`; stage 0: all of `full`.
        master: what the optimizer updates, [local numel]; is `shard` where the dtypes agree; made on demand.
        local: the range of `full` that `shard` covers.
        local_slots: the parts of the parameters inside `local`.
    """

    def __init__(self, spec: UnitSpec, index: int, rank: int, world_size: int, stage: int) -> None:
        self.name = spec.name
        self.index = index
        self.stage = stage
        self.trainable = spec.trainable
        self.anchors = spec.anchors
        self.params = [param for _, param in spec.params]
        self.classes = [type(param) for param in self.params]
        shapes = [tuple(param.shape) for param in self.params]
        self.layout: UnitLayout = plan_layout([names for names, _ in spec.params], shapes, world_size)
        self.slice = self.layout.shard_range(rank)
        self.local = (0, self.layout.numel) if stage == 0 else self.slice
        self.local_slots: list[LocalSlot] = self.layout.local_slots(*self.local)
        self.residency = Residency.GATHERED
        self.full: torch.Tensor
        self.shard: torch.Tensor
        self.master: torch.Tensor | None = None
        self._versions: list[int] = []

    @property
    def full_bytes(self) -> int:
        """Bytes of the unit when whole, padding included."""
        return self.layout.numel * self.full.element_size()

    def allocate(self, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
        """Make the flat buffer; returns a view of it for each parameter, still to be filled."""
        self.full = torch.empty(self.layout.numel, dtype=dtype, device=device)
        for lo, hi in self.layout.gaps:
            self.full[lo:hi].zero_()
        return self.views_of(self.full)

    def views_of(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Each parameter's shape over a flat buffer of this layout."""
        return [flat[slot.offset : slot.stop].view(slot.shape) for slot in self.layout.slots]

    def cut(self) -> None:
        """Take this rank's shard of a filled `full`; stage 3 then releases the rest."""
        self.shard = self.full[slice(*self.local)]
        if self.stage == 3:
            self.shard = self.shard.clone()

    def own_slice(self) -> torch.Tensor:
        """This rank's slice of `full`, which must have its memory."""
        return self.full[slice(*self.slice)]

    def ensure_master(self, dtype: torch.dtype) -> torch.Tensor:
        """The values that the optimizer updates, in `dtype`; the shard itself where it has that dtype."""
        if self.master is None or self.master.dtype != dtype:
            self.master = self.shard if self.shard.dtype == dtype else self.shard.to(dtype)
            self._versions = [param._version for param in self.params]
        return self.master

    def refresh_master(self) -> None:
        """Take the shard's values over into the master, after something else than the optimizer wrote them."""
        if self.master is not None and self.master.data_ptr() != self.shard.data_ptr():
            self.master.copy_(self.shard)
        self._versions = [param._version for param in self.params]

    def take_edits(self) -> None:
        """Below stage 3: what plain torch code wrote to the parameters since the last step goes into the master.

        A parameter's version counter is its own, not the buffer's: gathers and steps leave it alone.
        """
        if self.stage < 3 and self._versions != [param._version for param in self.params]:
            self.refresh_master()

    def detached(self) -> str | None:
        """Below stage 3: the name of a parameter that no longer lies in the flat buffer."""
        start, size = self.full.data_ptr(), self.full.element_size()
        for slot, param in zip(self.layout.slots, self.params, strict=True):
            if slot.numel and param.data_ptr() != start + slot.offset * size:
                return slot.name
        return None

    def enter(self, then: Residency, released: type[ReleasedParameter]) -> None:
        """Change state: allocate before a gather, show the parameters after it, free them on release."""
        check_transition(self.name, self.residency, then)
        if then is Residency.GATHERING:
            allocate_storage(self.full)
        elif then is Residency.GATHERED:
            for param, cls in zip(self.params, self.classes, strict=True):
                param.__class__ = cls
        else:
            for param in self.params:
                param.__class__ = released
            free_storage(self.full)
        self.residency = then

    @cached_property
    def label(self) -> str:
        """Name and parameters, for messages."""
        names = [slot.name for slot in self.layout.slots]
        shown = ", ".join(names[:3]) + (f", ... {len(names)} in all" if len(names) > 3 else "")
        return f"unit '{self.name}' ({shown})"


def is_released(param: nn.Parameter) -> bool:
    """Whether the parameter's values rest as shards just now."""
    return isinstance(param, ReleasedParameter)

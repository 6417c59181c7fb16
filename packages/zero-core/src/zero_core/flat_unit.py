"""A unit at run time: one flat buffer, the parameters as views into it, and this rank's shard.

In: a `UnitSpec`. Out: a `FlatUnit` whose parameters keep their identity. Everything else in the package moves
between the buffers held here: `gather` fills `full`, `buckets` fills `grad_full`, `accumulate` owns `grad_shard`,
`optimizer` updates `master`, `publish` writes `shard` (stages 0 to 2: and from there `full`).
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

# Note [One resting copy]
# At stage 3 a separate master says all that the shard would: the shard is dropped, and a gather casts the master into
# this rank's slice of `full`. Saves 2P/N bytes of bf16 parameters for 2P/N more bytes read a gather.


class FlatUnit:
    """The one data structure of ZeRO: a unit's flat buffer, cut into one shard per rank.

    Attributes:
        full: all elements, [numel], in the parameters' dtype. Stage 3: memory only while gathered.
        shard: what this rank holds of it, [local numel]. Stages 1, 2: a view of `full`; stage 0: all of `full`.
            Stage 3: None beside a separate master, see Note [One resting copy].
        master: what the optimizer updates, [local numel]; is `shard` where the dtypes agree; made on demand.
        local: the range of `full` that `shard` covers.
        local_slots: the parts of the parameters inside `local`.
        sparse: it is an embedding's weight, whose gradient is sparse by rows.
    """

    def __init__(
        self, spec: UnitSpec, index: int, rank: int, world_size: int, stage: int, replicas: int = 1
    ) -> None:
        self.name = spec.name
        self.index = index
        self.stage = stage
        self.trainable = spec.trainable
        self.sparse = spec.sparse
        self.anchors = spec.anchors
        self.params = [param for _, param in spec.params]
        self.classes = [type(param) for param in self.params]
        shapes = [tuple(param.shape) for param in self.params]
        self.layout: UnitLayout = plan_layout(
            [names for names, _ in spec.params], shapes, world_size, replicas=replicas
        )
        self.slice = self.layout.shard_range(rank)
        self.local = (0, self.layout.numel) if stage == 0 else self.slice
        self.local_slots: list[LocalSlot] = self.layout.local_slots(*self.local)
        self.residency = Residency.GATHERED
        self.full: torch.Tensor
        self.shard: torch.Tensor | None
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
        local = self.full[slice(*self.local)]
        self.shard = local.clone() if self.stage == 3 else local

    def own_slice(self) -> torch.Tensor:
        """This rank's slice of `full`, which must have its memory."""
        return self.full[slice(*self.slice)]

    def to_gather(self) -> torch.Tensor:
        """This rank's slice, for an all-gather into `full`, which must have its memory."""
        if self.shard is not None:
            return self.shard
        assert self.master is not None
        return self.own_slice().copy_(self.master)

    def ensure_master(self, dtype: torch.dtype) -> torch.Tensor:
        """The values that the optimizer updates, in `dtype`; the shard itself where it has that dtype."""
        if self.master is None:
            assert self.shard is not None
            self.master = self.shard.to(dtype)
            self._versions = [param._version for param in self.params]
            if self.stage == 3 and self.has_separate_master:
                self.shard = None
        return self.master

    @property
    def has_separate_master(self) -> bool:
        """Whether the optimizer updates a copy in a dtype of its own."""
        return self.master is not None and self.master.dtype != self.full.dtype

    def values(self) -> torch.Tensor:
        """This rank's part in the parameters' dtype, [local numel]: the shard, or a copy of what the master says."""
        if self.shard is not None:
            return self.shard
        assert self.master is not None
        return self.master.to(self.full.dtype)

    def set_values(self, values: torch.Tensor, *, keep_unchanged: bool = False) -> None:
        """Something else than the optimizer wrote the parameters: shard and master take the values over.

        Args:
            values: [local numel] in the parameters' dtype; may be the shard itself.
            keep_unchanged: leave the master alone where it rounds to the value, instead of losing its further digits.
        """
        if self.shard is not None and self.shard.data_ptr() != values.data_ptr():
            self.shard.copy_(values)
        if self.has_separate_master:
            assert self.master is not None
            if keep_unchanged:
                changed = self.master.to(values.dtype) != values
                values = torch.where(changed, values.to(self.master.dtype), self.master)
            self.master.copy_(values)
        self._versions = [param._version for param in self.params]

    def take_edits(self) -> None:
        """Below stage 3: what plain torch code wrote to the parameters since the last step goes into the master.

        A parameter's version counter is its own, not the buffer's: gathers and steps leave it alone.
        """
        if self.stage < 3 and self._versions != [param._version for param in self.params]:
            self.set_values(self.values(), keep_unchanged=True)

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

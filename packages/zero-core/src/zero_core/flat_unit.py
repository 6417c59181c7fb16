"""A unit at run time: one flat buffer, the parameters as views into it, and this rank's shard.

In: a `UnitSpec`. Out: a `FlatUnit` whose parameters keep their identity. Everything else in the package moves
between the buffers held here: `gather` fills `full`, `buckets` fills `grad_full`, `accumulate` owns `grad_shard`,
`optimizer` updates `master`, `publish` writes `shard` (stages 0 to 2: and from there `full`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import cached_property

import torch
from torch import nn

from .errors import ZeroStateError
from .layout import LocalSlot, UnitLayout, plan_layout
from .params import (
    ArrivingParameter,
    ReleasedParameter,
    Residency,
    allocate_storage,
    check_transition,
    free_storage,
)
from .stores import ON_DEVICE, Resting, ShardStore, Stores, is_lossy, rewritten
from .units import UnitSpec

# Note [Storage identity]
# Autograd saves views of a parameter (linear keeps `weight.t()`), and a view knows its storage, not its parameter.
# Pointing `param.data` elsewhere for the backward would compute with stale values, silently. So `full` and its
# storage are made once; releasing resizes the storage to zero bytes, gathering resizes it back and fills it in place.

# Note [One resting copy]
# At stage 3 a separate master says all that the shard would: the shard is dropped, and a gather casts the master into
# this rank's slice of `full`. Saves 2P/N bytes of bf16 parameters for 2P/N more bytes read a gather. Not where one of
# the two rests in a store: gathers should not read a drive for the further digits.


class FlatUnit:
    """The one data structure of ZeRO: a unit's flat buffer, cut into one shard per rank.

    Attributes:
        full: all elements, [numel], in the parameters' dtype. Stage 3: memory only while gathered. Stages 1, 2: waits
            for values that were published late.
        approximate: what `full` is filled with to compute with may differ from the shards (stages 1 to 3).
        num_exact_uses: blocks in which it must not, all the same (stages 1, 2; at stage 3 `gather` counts them).
        shard: what this rank holds of it, [local numel]. Stages 1, 2: a view of `full`, or memory of its own where
            that is approximate; stage 0: all of `full`. Stage 3: None beside a separate master, see Note [One resting
            copy], and in a lossy store.
        master: what the optimizer updates, [local numel]; is `shard` where the dtypes agree; made on demand.
        local: the range of `full` that `shard` covers.
        local_slots: the parts of the parameters inside `local`.
        resting: stage 3: the shard in the store of parameters; `shard` is its view then.
        claimed_by: slot -> the optimizer that claimed it last; one that did before has nothing to do with it any more.
        stored_states: optimizer states in the store of the optimizer, flat like the master, by name. They outlive the
            optimizer that asked for them; where several step parameters of one unit, each has its slices of them.
        sparse: it is an embedding's weight, whose gradient is sparse by rows.
        num_edits: how often something else than the optimizer wrote its parameters.
        version: changes, on all ranks alike, whenever a rank's shard may have.
    """

    def __init__(
        self,
        spec: UnitSpec,
        index: int,
        rank: int,
        world_size: int,
        stage: int,
        replicas: int = 1,
        stores: Stores = ON_DEVICE,
    ) -> None:
        self.name = spec.name
        self.index = index
        self.stage = stage
        self.trainable = spec.trainable
        self.sparse = spec.sparse
        self.anchors = spec.anchors
        self.params = [param for _, param in spec.params]
        self._holders = spec.holders
        self.classes = [type(param) for param in self.params]
        shapes = [tuple(param.shape) for param in self.params]
        self.layout: UnitLayout = plan_layout(
            [names for names, _ in spec.params], shapes, world_size, replicas=replicas
        )
        self.slice = self.layout.shard_range(rank)
        self.local = (0, self.layout.numel) if stage == 0 else self.slice
        self.local_slots: list[LocalSlot] = self.layout.local_slots(*self.local)
        self.residency = Residency.GATHERED
        self._full: torch.Tensor
        self._arrival: Callable[[], None] | None = None
        self.shard: torch.Tensor | None
        self.master: torch.Tensor | None = None
        self.stores = stores
        self.resting: Resting | None = None
        self.claimed_by: dict[int, weakref.ref[object]] = {}
        self.stored_states: dict[str, torch.Tensor] = {}
        self.approximate = False
        self.num_exact_uses = 0
        self.num_edits = 0
        self.version = 0
        self._num_outdated = [0] * len(self.params)
        self._known_writes: list[int] = []

    @property
    def full(self) -> torch.Tensor:
        """See the class."""
        self.settle()
        return self._full

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self._full.dtype

    @property
    def device(self) -> torch.device:
        """Where the unit lives."""
        return self._full.device

    @property
    def full_bytes(self) -> int:
        """Bytes of the unit when whole, padding included."""
        return self.layout.numel * self.dtype.itemsize

    def allocate(self, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
        """Make the flat buffer; returns a view of it for each parameter, still to be filled."""
        self._full = torch.empty(self.layout.numel, dtype=dtype, device=device)
        for lo, hi in self.layout.gaps:
            self._full[lo:hi].zero_()
        return self.views_of(self._full)

    def views_of(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Each parameter's shape over a flat buffer of this layout."""
        return [flat[slot.offset : slot.stop].view(slot.shape) for slot in self.layout.slots]

    @property
    def shard_store(self) -> ShardStore | None:
        """Where the shard is to rest; None: on the device."""
        stores = self.stores
        store = stores.params if self.trainable else stores.frozen or stores.params
        return store if self.stage == 3 else None

    def make_room(self, dtype: torch.dtype) -> None:
        """Have the store set aside what the shard in `dtype` takes, if it can."""
        reserve = getattr(self.shard_store, "reserve", None)
        if reserve is not None:
            reserve(self.key("param"), self.local[1] - self.local[0], dtype)

    def cut(self) -> None:
        """Take this rank's shard of a filled `full`; stage 3 then releases the rest."""
        local = self.full[slice(*self.local)]
        store = self.shard_store
        if store is not None:
            self.resting = Resting.of(store, self.key("param"), local)
            self.shard = None if is_lossy(store) else self.resting.view()
        else:
            self.shard = local.clone() if self.stage == 3 or self.approximate else local
        self.forget_edits()

    def own_slice(self) -> torch.Tensor:
        """This rank's slice of `full`, which must have its memory."""
        return self.full[slice(*self.slice)]

    def to_gather(self, into: torch.Tensor) -> torch.Tensor:
        """This rank's shard, for an all-gather into a buffer of this layout; may lie there."""
        own = into[slice(*self.slice)]
        if self.resting is not None:
            self.resting.store.fetch(self.resting.name, own).wait()
            return own
        if self.shard is not None:
            return self.shard
        assert self.master is not None
        return own.copy_(self.master)

    def prefetch(self) -> None:
        """Stage 3: `to_gather` will be asked for soon."""
        if self.resting is not None:
            self.resting.store.prefetch(self.resting.name)

    def forget_prefetched(self) -> None:
        """Or not."""
        if self.resting is not None:
            self.resting.store.forget(self.resting.name)

    def key(self, what: str) -> str:
        """A name for one of its tensors in a store."""
        return f"{self.stores.prefix}{self.name or 'root'}.{what}"

    def ensure_master(self, dtype: torch.dtype) -> torch.Tensor:
        """The values that the optimizer updates, in `dtype`; the shard itself where it has that dtype."""
        if self.master is None:
            if self.approximate or self.stage == 3:
                self.take_edits()
            if self.shard is None:  # it was frozen
                assert self.resting is not None
                self.shard = self.resting.view()
                self.resting.store.release(self.resting.name)
                self.resting = None
            master = self.shard.to(dtype)
            self.forget_edits()
            if dtype != self.dtype and self.stores.optimizer is not None:
                master = Resting.of(self.stores.optimizer, self.key("master"), master).view()
            self.master = master  # last: a store that has no room may have some when it is asked again
            rests = self.stores.optimizer is not None or self.stores.params is not None
            if self.stage == 3 and self.has_separate_master and not rests:
                self.shard = None
        return self.master

    @property
    def has_separate_master(self) -> bool:
        """Whether the optimizer updates a copy in a dtype of its own."""
        return self.master is not None and self.master.dtype != self.dtype

    def values(self) -> torch.Tensor:
        """This rank's part in the parameters' dtype, [local numel]: the shard, or a copy of what the master says."""
        self.settle()
        if self.approximate or self.stage == 3:
            self.take_edits()
        return self._rested()

    def _rested(self) -> torch.Tensor:
        """See `values`; without what was written to the parameters since."""
        if self.shard is not None:
            return self.shard
        if self.resting is not None:
            return self.resting.view()
        assert self.master is not None
        return self.master.to(self.dtype)

    def set_values(
        self, values: torch.Tensor, *, keep_unchanged: bool = False, with_state: bool = False
    ) -> None:
        """Something else than the optimizer wrote the parameters: shard and master take the values over.

        Args:
            values: [local numel] in the parameters' dtype; may be the shard itself.
            keep_unchanged: leave the master alone where it rounds to the value, instead of losing its further digits.
            with_state: the optimizer's state is loaded along, and belongs to them.
        """
        self.settle()
        self.forget_prefetched()
        self.num_edits += not with_state
        self.version += 1
        if self.shard is None and self.resting is not None:
            self.resting.store.put(self.resting.name, values).wait()
        elif self.shard is not None and self.shard.data_ptr() != values.data_ptr():
            self.shard.copy_(values)
        if self.has_separate_master:
            assert self.master is not None
            values = values.to(self.master.device)  # it may rest in host memory
            if keep_unchanged:
                changed = self.master.to(values.dtype) != values
                values = torch.where(changed, values.to(self.master.dtype), self.master)
            self.master.copy_(values)
        if self.resting is not None:
            rewritten(self.resting.store, self.resting.name)
        if self.stores.optimizer is not None:
            rewritten(self.stores.optimizer, self.key("master"))
        self.forget_edits()

    def write(self, part: LocalSlot, values: torch.Tensor) -> None:
        """Put values, [part numel] in any dtype, in their place in shard and master."""
        self.forget_prefetched()
        for flat in (self.shard, self.master):
            if flat is not None:
                flat[part.start : part.stop].copy_(values)
        if self.shard is None and self.resting is not None:
            kept = self.resting.view()
            kept[part.start : part.stop].copy_(values)
            self.resting.store.put(self.resting.name, kept).wait()

    def take_edits(self) -> None:
        """What plain torch code wrote to the parameters since the last step, or gather, goes into shard and master.

        At stage 3 only what is whole can have been written.
        """
        if self.residency is not Residency.GATHERED:
            return
        writes = self.writes()
        if self._known_writes == writes:
            return
        if not self.approximate:
            self.set_values(self.own_slice() if self.stage == 3 else self.values(), keep_unchanged=True)
            return
        # Where `full` is approximate, nothing tells which elements were written: all of a parameter that was counts.
        values, own = self._rested().clone(), self.own_slice()
        for part in self.local_slots:
            if self._known_writes[part.index] != writes[part.index]:
                values[part.start : part.stop].copy_(own[part.start : part.stop])
        self.set_values(values, keep_unchanged=True)

    def forget_edits(self) -> None:
        """What plain torch code wrote to the parameters so far has been overwritten."""
        self._known_writes = self.writes()

    def writes(self) -> list[int]:
        """How often each parameter was written in place, by others than the optimizer.

        A parameter's version counter is its own, not the buffer's: gathers leave it alone.
        """
        return [param._version - own for param, own in zip(self.params, self._num_outdated, strict=True)]

    def outdate(self, moving: Iterable[int]) -> None:
        """A step gives these slots new values: autograd refuses to go back through what used the old ones."""
        moving = list(moving)
        torch.autograd.graph.increment_version([self.params[index] for index in moving])
        for index in moving:
            self._num_outdated[index] += 1

    def check_attached(self) -> None:
        """Raise where a module holds another parameter now, or (below stage 3) one does not lie in the flat buffer."""
        for slot, param, holders in zip(self.layout.slots, self.params, self._holders, strict=True):
            for module, name in holders:
                held = module._parameters.get(name)
                # One that was moved (parametrizations) is still in use, and functional_call puts other tensors there.
                if held is not param and isinstance(held, nn.Parameter):
                    raise ZeroStateError(
                        f"parameter '{slot.name}' was replaced by another one after shard() (such as by "
                        "load_state_dict(assign=True), module.weight = nn.Parameter(...) or tying), which no gradient "
                        "is reduced of and no step would reach; do that before shard(), or give it values with "
                        "zero_core.load_full_state_dict or set_full"
                    )
        if self.stage == 3 or self.is_arriving:  # whoever waits for what is arriving looks then
            return
        start, size = self.full.data_ptr(), self.dtype.itemsize
        for slot, param in zip(self.layout.slots, self.params, strict=True):
            if slot.numel and param.data_ptr() != start + slot.offset * size:
                raise ZeroStateError(
                    f"parameter '{slot.name}' no longer lies in its unit's buffer: something has replaced its data "
                    "(such as model.to(), .half() or .double()) and no step would reach it; do that before shard(), or "
                    "use zero_core.load_full_state_dict"
                )

    @property
    def is_arriving(self) -> bool:
        """Whether updated values are on their way."""
        return self._arrival is not None

    def arrive_late(self, arrival: Callable[[], None], cls: type[ArrivingParameter]) -> None:
        """The full values are on their way: parameters take `cls`, until `settle` has called `arrival`."""
        self._arrival = arrival
        for param in self.params:
            param.__class__ = cls

    def settle(self) -> None:
        """Wait for values that are on their way (`arrive_late`), if there are any."""
        if self._arrival is not None:
            self._arrival()
            self._arrival = None
            for param, cls in zip(self.params, self.classes, strict=True):
                param.__class__ = cls

    def enter(self, then: Residency, released: type[ReleasedParameter]) -> None:
        """Change state: allocate before a gather, show the parameters after it, free them on release."""
        check_transition(self.name, self.residency, then)
        if then is Residency.GATHERING:
            allocate_storage(self._full)
        elif then is Residency.GATHERED:
            self.show()
            self.forget_edits()
        else:
            # A NumPy array of a parameter keeps the memory, which can no longer be given back in place.
            if not self._full.untyped_storage().resizable():
                self._full = torch.empty_like(self._full)
                for param, view in zip(self.params, self.views_of(self._full), strict=True):
                    param.data = view
            self.hide(released)
            free_storage(self._full)
        self.residency = then

    def show(self) -> None:
        """Have the parameters be ordinary ones."""
        for param, cls in zip(self.params, self.classes, strict=True):
            param.__class__ = cls

    def hide(self, released: type[ReleasedParameter]) -> None:
        """Have whoever touches a parameter ask first, whole or not."""
        for param in self.params:
            param.__class__ = released

    def hand_back(self, values: list[torch.Tensor]) -> None:
        """Make the parameters ordinary ones, with memory of their own; they are this unit's no longer.

        Args:
            values: one for each parameter, in its shape and dtype; not copied.
        """
        for param, cls, value in zip(self.params, self.classes, values, strict=True):
            param.__class__ = cls
            param.data = value

    def empty_stores(self) -> None:
        """Keep nothing in a store any longer; views of what was there may show what comes after."""
        names = ["master", *self.stored_states]
        kept = [(self.stores.grads, "grad"), *((self.stores.optimizer, each) for each in names)]
        for store, name in kept:
            if store is not None:
                store.release(self.key(name))
        if self.resting is not None:
            self.resting.store.release(self.resting.name)
        self.stored_states = {}

    @cached_property
    def label(self) -> str:
        """Name and parameters, for messages."""
        names = [slot.name for slot in self.layout.slots]
        shown = ", ".join(names[:3]) + (f", ... {len(names)} in all" if len(names) > 3 else "")
        return f"unit '{self.name}' ({shown})"

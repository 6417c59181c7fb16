"""Optimizers that look at a parameter as a whole: each parameter is stepped by one rank, in its true shape.

In: `UnitStep`s, as for any stepper. Out: the same units, with new values in every rank's master. A parameter's owner
(`owners`) gets the parts of its gradient and master from the ranks that hold them, steps, and sends the new values
back; one exchange a unit each way.

Note [Borrowed masters]
Masters rest as slices in the units, whatever steps them, so edits, checkpoints and stages know one kind of master. The
owner's whole master lives for the step alone. Between steps it has its shape and no memory: one nan, repeated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from .claims import Member
from .collectives import Pending, Wire
from .flat_unit import FlatUnit
from .layout import LocalSlot, Slot
from .owners import Routes, assign_owners
from .steppers import UnitStep


@dataclass(frozen=True)
class WholeParameter:
    """A parameter that this rank owns.

    Attributes:
        slot: its place in its unit.
        master: its master in its true shape, as the optimizer sees it; see Note [Borrowed masters].
    """

    slot: Slot
    master: nn.Parameter

    @property
    def name(self) -> str:
        """The parameter's name."""
        return self.slot.name


@dataclass(frozen=True)
class _Flight:
    """One unit's exchange on its way: what arrives from each rank, and the parts that it consists of."""

    item: UnitStep
    pending: Pending
    parts: Sequence[Sequence[LocalSlot]]
    received: Sequence[torch.Tensor]


class WholeStepper:
    """Any torch optimizer whose update of one parameter depends on that parameter alone, on whole parameters.

    Where every rank holds all (stage 0), each steps all, on views of the unit's own master; nothing travels.

    Args:
        inner: the torch optimizer.
        wire: the ranks.
        overlap: have the next unit's exchange under way while one is waited for.

    Attributes:
        owned: the parameters that this rank steps.
    """

    casts = False

    def __init__(self, inner: Optimizer, wire: Wire, *, overlap: bool) -> None:
        self.inner = inner
        self.wire = wire
        self.overlap = overlap
        self.owned: list[WholeParameter] = []
        self._rank = wire.group.rank()
        self._masters: dict[tuple[int, int], nn.Parameter] = {}
        self._routes: dict[int, Routes] = {}
        self._dealt: list[tuple[Member, int]] = []  # with the owners

    def add(self, members: Sequence[Member], owners: Mapping[str, int] | None = None) -> None:
        """Deal out parameters, beside those that were dealt out before; the same list on every rank.

        Args:
            members: the parameters; those that this rank is to step get a master.
            owners: of those of which they are known, by name.
        """
        known = owners or {}
        loads = [0] * self.wire.group.size()
        dealt = [(member, known[member.name]) for member in members if member.name in known]
        for member, owner in self._dealt + dealt:
            loads[owner] += member.nbytes
        rest = [member for member in members if member.slot.numel and member.name not in known]
        dealt += zip(rest, assign_owners([member.nbytes for member in rest], loads), strict=True)
        for member, owner in dealt:
            if owner == self._rank or _is_whole(member.unit):
                self._own(member)
            member.state = None
        self._dealt += dealt
        found: dict[int, dict[int, int]] = {}
        for member, owner in self._dealt:
            found.setdefault(member.unit.index, {})[member.index] = owner
        layouts = {member.unit.index: member.unit.layout for member, _ in self._dealt}
        self._routes = {unit: Routes(layout, found[unit]) for unit, layout in layouts.items()}

    def deal_as(self, owners: Mapping[str, int]) -> None:
        """Deal out all parameters anew, as in a state that is about to be loaded; the state that there is goes."""
        members = [member for member, _ in self._dealt]
        for member in members:
            member.master = None
        for master in self._masters.values():
            self.inner.state.pop(master, None)
        self._dealt.clear()
        self._masters.clear()
        self.owned.clear()  # others hold the list
        self.add(members, owners)

    def owners(self) -> dict[str, int]:
        """The rank that steps each parameter, by name."""
        return {member.name: owner for member, owner in self._dealt}

    def _own(self, member: Member) -> None:
        flat, slot = member.unit.master, member.slot
        assert flat is not None
        is_whole = _is_whole(member.unit)
        member.master = nn.Parameter(
            flat[slot.offset : slot.stop].view(slot.shape) if is_whole else _absent(flat, slot)
        )
        self._masters[member.unit.index, member.index] = member.master
        self.owned.append(WholeParameter(slot, member.master))
        if member.state:
            self.inner.state[member.master] = member.state_like(flat)

    def step(self, work: Sequence[UnitStep], scale: torch.Tensor | float) -> Iterator[UnitStep]:
        """See `ShardOptimizer.step`; the owner holds whole gradients and masters meanwhile."""
        stays = [item for item in work if _is_whole(item.unit)]
        travels = [item for item in work if not _is_whole(item.unit)]
        self._show_gradients(stays, scale)
        self._bring(travels, scale)
        self.inner.step()
        for master in self._masters.values():
            master.grad = None
        yield from stays
        for flight in self._in_turn(travels, self._send_back):
            self._take_back(flight)
            yield flight.item

    # -- nothing travels --------------------------------------------------------------------------------------

    def _show_gradients(self, work: Sequence[UnitStep], scale: torch.Tensor | float) -> None:
        for item in work:
            for index in item.moving:
                master = self._masters.get((item.unit.index, index))
                if master is not None:
                    slot = item.unit.layout.slots[index]
                    grad = item.grad[slot.offset : slot.stop].view(slot.shape).to(master.dtype)
                    master.grad = grad if _is_one(scale) else grad * scale

    # -- to the owners ----------------------------------------------------------------------------------------

    def _bring(self, work: Sequence[UnitStep], scale: torch.Tensor | float) -> None:
        for flight in self._in_turn(work, lambda item: self._collect(item, scale)):
            self._assemble(flight)

    def _collect(self, item: UnitStep, scale: torch.Tensor | float) -> _Flight:
        """Start to bring gradients and masters of a unit's parameters to their owners."""
        master = item.unit.master
        assert master is not None

        def pack(parts: Sequence[LocalSlot]) -> torch.Tensor:
            packed = master.new_empty(2, sum(part.numel for part in parts))
            for part, (lo, hi) in _ranges(parts):
                packed[0, lo:hi].copy_(item.grad[part.start : part.stop])
                packed[1, lo:hi].copy_(master[part.start : part.stop])
            if not _is_one(scale):
                packed[0].mul_(scale)
            return packed.view(-1)

        return self._exchange(item, "gradients", self._outward(item), pack, self._inward(item), 2)

    def _assemble(self, flight: _Flight) -> None:
        """Make whole gradients and masters of what has arrived."""
        unit = flight.item.unit
        for parts, received in zip(flight.parts, flight.received, strict=True):
            grads, masters = received.view(2, -1)
            for part, (lo, hi) in _ranges(parts):
                master = self._masters[unit.index, part.index]
                if master.grad is None:
                    master.data = torch.empty(part.slot.shape, dtype=master.dtype, device=master.device)
                    master.grad = torch.empty_like(master.data)
                place = slice(part.param_start, part.param_start + part.numel)
                master.grad.view(-1)[place].copy_(grads[lo:hi])
                master.data.view(-1)[place].copy_(masters[lo:hi])

    # -- and back ---------------------------------------------------------------------------------------------

    def _send_back(self, item: UnitStep) -> _Flight:
        """Start to return the new values to the ranks that hold them; the whole masters go."""
        unit, flat_master = item.unit, item.unit.master
        assert flat_master is not None
        own = {index: master for (u, index), master in self._masters.items() if u == unit.index}

        def pack(parts: Sequence[LocalSlot]) -> torch.Tensor:
            flat = [own[part.index].data.view(-1) for part in parts]
            pieces = [f[p.param_start : p.param_start + p.numel] for f, p in zip(flat, parts, strict=True)]
            return torch.cat(pieces) if pieces else flat_master.new_empty(0)

        flight = self._exchange(item, "new values", self._inward(item), pack, self._outward(item), 1)
        for index in own.keys() & set(item.moving):
            own[index].data = _absent(flat_master, unit.layout.slots[index])
        return flight

    def _take_back(self, flight: _Flight) -> None:
        master = flight.item.unit.master
        assert master is not None
        for parts, received in zip(flight.parts, flight.received, strict=True):
            for part, (lo, hi) in _ranges(parts):
                master[part.start : part.stop].copy_(received[lo:hi])

    # -- exchanges --------------------------------------------------------------------------------------------

    def _outward(self, item: UnitStep) -> list[list[LocalSlot]]:
        """For each owner: the parts in this rank's shard."""
        routes = self._routes[item.unit.index]
        return [routes.parts(self._rank, owner, item.moving) for owner in range(self.wire.group.size())]

    def _inward(self, item: UnitStep) -> list[list[LocalSlot]]:
        """For each rank: the parts in its shard that this rank owns."""
        routes = self._routes[item.unit.index]
        return [routes.parts(holder, self._rank, item.moving) for holder in range(self.wire.group.size())]

    def _exchange(
        self,
        item: UnitStep,
        what: str,
        outgoing: Sequence[Sequence[LocalSlot]],
        pack: Callable[[Sequence[LocalSlot]], torch.Tensor],
        incoming: Sequence[Sequence[LocalSlot]],
        num_rows: int,
    ) -> _Flight:
        """Send each rank its packed parts; what comes has `num_rows` values an element."""
        assert item.unit.master is not None
        sent = [pack(parts) for parts in outgoing]
        received = [
            sent[rank]
            if rank == self._rank
            else item.unit.master.new_empty(num_rows * sum(part.numel for part in parts))
            for rank, parts in enumerate(incoming)
        ]
        return _Flight(
            item, self.wire.swap(f"{what} of {item.unit.label}", sent, received), incoming, received
        )

    def _in_turn(self, work: Sequence[UnitStep], launch: Callable[[UnitStep], _Flight]) -> Iterator[_Flight]:
        """Each unit's exchange once it has arrived; the next one is on its way meanwhile."""
        flights: deque[_Flight] = deque()
        for item in work:
            flights.append(launch(item))
            if len(flights) > int(self.overlap):
                flights[0].pending.wait()
                yield flights.popleft()
        for flight in flights:
            flight.pending.wait()
            yield flight


def _is_whole(unit: FlatUnit) -> bool:
    """Whether this rank holds all of the unit, as every other does."""
    return unit.local == (0, unit.layout.numel)


def _is_one(scale: torch.Tensor | float) -> bool:
    return isinstance(scale, float) and scale == 1.0


def _absent(like: torch.Tensor, slot: Slot) -> torch.Tensor:
    """The parameter's shape without memory; who reads it all the same finds nan."""
    return like.new_full((), torch.nan).expand(slot.shape)


def _ranges(parts: Sequence[LocalSlot]) -> Iterator[tuple[LocalSlot, tuple[int, int]]]:
    """Each part with its range in a buffer that holds them one after another."""
    start = 0
    for part in parts:
        yield part, (start, start + part.numel)
        start += part.numel

"""A flat bucket at run time: its parameters, their gradients on the way in, and everything kept for them.

In: a `BucketPlan` and the parameters. Out: flat state tensors, their views by slot, and gradients gathered into one
flat tensor or given back from it. Parameters stay the users' own tensors. Next: `exact` and `moves` work on it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .layout import BucketPlan, Run, Slot, parts_of, runs_of


@dataclass
class Bucket:
    """Parameters that are reduced together.

    Attributes:
        plan: where each lies.
        params: by position.
        flat: state tensors by key: fp32, all of the bucket or the part of it that this rank keeps.
        numbers: by key: one number a slot. "step": steps that moved it.
        master_span: the elements of the bucket that the master covers.
    """

    plan: BucketPlan
    params: list[Tensor]
    flat: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, list[float]] = field(default_factory=dict)
    master_span: tuple[int, int] = (0, 0)
    _noted: list[tuple[int, int]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where all of it lives."""
        return self.params[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters'."""
        return self.params[0].dtype

    def view(self, flat: Tensor, slot: Slot) -> Tensor:
        """A slot of a flat tensor of the bucket's size, in the parameter's shape."""
        return flat[slot.start : slot.stop].view(slot.shape)

    def views(self, flat: Tensor, slots: Iterable[Slot]) -> list[Tensor]:
        """Several."""
        return [self.view(flat, slot) for slot in slots]

    def params_of(self, slots: Iterable[Slot]) -> list[Tensor]:
        """The parameters themselves."""
        return [self.params[slot.position] for slot in slots]

    def moving(self, used: Collection[int] | None) -> list[Slot]:
        """The slots that a step moves; `used` holds parameters' indices, None is all."""
        return [slot for slot in self.plan.slots if used is None or slot.index in used]

    def resting(self, used: Collection[int] | None) -> list[Slot]:
        """Those that it does not: no rank has a gradient."""
        return [slot for slot in self.plan.slots if used is not None and slot.index not in used]

    def runs(self, used: Collection[int] | None) -> list[Run]:
        """What moves, in few pieces; `step` of each is the one under way."""
        return runs_of(self.plan, [int(step) + 1 for step in self.numbers["step"]], used)

    def count(self, used: Collection[int] | None, key: str = "step") -> None:
        """One more step of what moves."""
        for slot in self.moving(used):
            self.numbers[key][slot.position] += 1

    def scale(self, flat: Tensor) -> None:
        """Multiply each slot of a flat tensor by its number "scale"."""
        self._multiply(flat, self.numbers["scale"])

    def unscale(self, flat: Tensor) -> None:
        """Undo `scale`, to rounding."""
        self._multiply(flat, [1.0 / factor for factor in self.numbers["scale"]])

    def _multiply(self, flat: Tensor, factors: Sequence[float]) -> None:
        if any(factor != 1.0 for factor in factors):
            views = [flat[slot.start : slot.stop] for slot in self.plan.slots]
            torch._foreach_mul_(views, list(factors))

    # -- gradients --------------------------------------------------------------------------------------------

    def gather(self, grads: Sequence[Tensor | None], dtype: torch.dtype, numel: int) -> Tensor:
        """This rank's gradients (by the parameters' indices) as one flat tensor of `numel` elements; else zeros."""
        flat = torch.empty(numel, dtype=dtype, device=self.device)
        flat[self.plan.numel :].zero_()
        pairs = [(self.view(flat, slot), grads[slot.index]) for slot in self.plan.slots]
        given = [(view, grad) for view, grad in pairs if grad is not None]
        if given:
            torch._foreach_copy_([view for view, _ in given], [grad for _, grad in given])
        for view, grad in pairs:
            if grad is None:
                view.zero_()
        return flat

    def scatter(self, flat: Tensor, grads: list[Tensor | None], used: Collection[int] | None) -> None:
        """Give gradients back: written into those that there are, made where another rank had one.

        Where `flat` has digits that a gradient would lose, it is written to all the same, for people to see, and a view
        of `flat` takes its place in `grads`.
        """
        for slot in self.moving(used):
            grad, view = grads[slot.index], self.view(flat, slot)
            dtype = self.params[slot.position].dtype if grad is None else grad.dtype
            if grad is not None:
                grad.copy_(view)
            if torch.promote_types(dtype, flat.dtype) != dtype:
                grads[slot.index] = view
            elif grad is None:
                grads[slot.index] = view.to(dtype, copy=True)

    # -- masters ----------------------------------------------------------------------------------------------

    @property
    def master(self) -> Tensor | None:
        """fp32 values that the optimizer updates, of `master_span`; None where the parameters are these."""
        return self.flat.get("master")

    def make_master(self, span: tuple[int, int]) -> None:
        """Take the values of a part of the parameters."""
        self.master_span = span
        self.flat["master"] = torch.zeros(span[1] - span[0], device=self.device)  # what rounds alike is kept
        self._copy_params(self.plan.slots)
        self.note()

    def edits(self) -> list[Slot]:
        """The slots whose parameters others have written to since the last step, where there is a master to tell.

        Or given other memory; what is written in place through `param.data` cannot be seen (`take_values`).
        """
        if self.master is None:
            return []
        return [
            slot
            for slot in self.plan.slots
            if _as_it_is(self.params[slot.position]) != self._noted[slot.position]
        ]

    def take(self, slots: Sequence[Slot]) -> None:
        """Values of parameters into the master, unless it says the same already.

        Digits of the master beyond the parameter's stay where they round to the parameter.
        """
        if slots:
            self._copy_params(slots)
            self.note()

    def take_values(self) -> None:
        """`take`, of all parameters, if there is a master."""
        if self.master is not None:
            self._copy_params(self.plan.slots)

    def _copy_params(self, slots: Sequence[Slot]) -> None:
        assert self.master is not None
        wanted = {slot.position for slot in slots}
        for part in parts_of(self.plan, *self.master_span):
            if part.slot.position in wanted:
                param = self.params[part.slot.position].detach().reshape(-1)
                values = param[part.first : part.first + part.stop - part.start]
                master = self.master[part.start : part.stop]
                master.copy_(torch.where(master.to(values.dtype) == values, master, values.to(master.dtype)))

    def publish(self, slots: Sequence[Slot], values: Tensor | None = None) -> None:
        """Write the master (or other `values`), which is all of the bucket, to the parameters; `note` it later."""
        source = self.master if values is None else values
        if source is not None and slots:
            torch._foreach_copy_(self.params_of(slots), self.views(source, slots))

    def note(self) -> None:
        """The parameters say what the master says: what is written to them from now on is an edit."""
        self._noted = [_as_it_is(param) for param in self.params]


def _as_it_is(param: Tensor) -> tuple[int, int]:
    """How often it was written to, and where it lies: vector_to_parameters and the like exchange `param.data`."""
    return param._version, param.data_ptr()

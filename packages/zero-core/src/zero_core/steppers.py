"""The arithmetic of a step on this rank's shards: torch's own optimizer, or one fused pass over each flat shard.

In: `UnitStep`s (master, gradient, low-precision shard, and which slots move). Out: the same units, one after another
as they are done, so that `optimizer` can publish each at once. `ShardOptimizer` is the seam for other places where a
step may run (a CPU, a thread, an older gradient).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import accel_kernels as ak
import torch
from torch import nn
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, Optimizer

from .errors import ZeroStateError
from .flat_unit import FlatUnit
from .hooks import Lane
from .layout import ALIGN_ELEMENTS, LocalSlot

PER_TENSOR = (Adafactor, *filter(None, [getattr(torch.optim, "Muon", None)]))
"""The optimizers of torch whose update of one element looks at others of the same parameter."""


@dataclass(frozen=True)
class ShardSlot:
    """One parameter's part of this rank's shard, as the optimizer sees it."""

    place: LocalSlot
    master: nn.Parameter
    group: dict[str, Any]

    @property
    def name(self) -> str:
        """The parameter's name."""
        return self.place.slot.name


@dataclass(frozen=True)
class UnitStep:
    """What one unit brings to a step.

    Attributes:
        unit: whose `master` [local numel] is updated.
        grad: [local numel] in the accumulate dtype.
        slots: the parts that move (a parameter that no rank used stays as it is, as under DDP).
        moving: every slot of the unit that moves, those of which this rank has no part too.
        lend: gives `grad` to someone who reads it after the step; the next gradient goes into other memory.
    """

    unit: FlatUnit
    grad: torch.Tensor
    slots: Sequence[ShardSlot]
    lend: Callable[[], torch.Tensor]
    moving: Collection[int] = ()


UNFINISHED = "unfinished"
"""Key of a state, a number: steps that were taken are not all in it, and only the stepper that wrote it can go on."""


def check_finished(slot: ShardSlot, state: dict[str, Any]) -> None:
    """Refuse a state to which updates still belong that another stepper was about to make.

    Raises:
        ZeroStateError: it is one.
    """
    if UNFINISHED in state:
        raise ZeroStateError(
            f"the state of '{slot.name}' is unfinished: updates that wait belong to it, which this optimizer "
            "would lose; load it into one of the kind that saved it, and flush() that before it is saved for "
            "another"
        )


class ShardOptimizer(Protocol):
    """Steps flat shards given gradients."""

    casts: bool
    """Whether the step also writes the low-precision shard."""

    def step(self, work: Sequence[UnitStep], scale: torch.Tensor | float) -> Iterator[UnitStep]:
        """Update every unit's master with `grad * scale`; yields each unit when its master is final."""


class StepGuard:
    """Has `step` of a wrapped optimizer raise where it is called by hand: it would see no gradients, and do nothing.

    It is a hook of that optimizer, and so stays whatever LR schedulers make of its `step`, before or after. Inside a
    `with` block it lets steps pass.
    """

    def __init__(self, inner: Optimizer) -> None:
        self._is_open = False
        inner.register_step_pre_hook(self)

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Look at a step that is about to begin.

        Raises:
            ZeroStateError: it was called by hand.
        """
        if not self._is_open:
            raise ZeroStateError(
                f"step() of the {type(optimizer).__name__} that a ShardedOptimizer has taken over: no gradients come "
                "to it; call step() and zero_grad() of the ShardedOptimizer instead"
            )

    def __enter__(self) -> None:
        self._is_open = True

    def __exit__(self, *error: object) -> None:
        self._is_open = False


class TorchStepper:
    """Any elementwise torch optimizer, given each slot's master as a parameter and its gradient in that dtype."""

    casts = False

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner

    def step(self, work: Sequence[UnitStep], scale: torch.Tensor | float) -> Iterator[UnitStep]:
        """See `ShardOptimizer.step`; holds the gradients in the master's dtype meanwhile."""
        unscaled = isinstance(scale, float) and scale == 1.0
        for item in work:
            for slot in item.slots:
                check_finished(slot, self.inner.state.get(slot.master, {}))
                grad = item.grad[slot.place.start : slot.place.stop].to(slot.master.dtype)
                slot.master.grad = grad if unscaled else grad * scale
        self.inner.step()
        for item in work:
            for slot in item.slots:
                slot.master.grad = None
        yield from work


@dataclass(frozen=True)
class FusedRule:
    """How one torch optimizer maps to a fused kernel: its state tensors, and a slot's segment."""

    states: Callable[[dict[str, Any]], tuple[str, ...]]
    segment: Callable[[int, int, dict[str, Any], float], Any]
    kernel: Callable[..., None]
    initial: Callable[[dict[str, Any]], float] = lambda group: 0.0

    def advance(self, inner: Optimizer, slot: ShardSlot) -> Any:
        """Count the step of one slot; returns its segment."""
        segment, state = self.next_segment(inner, slot), inner.state[slot.master]
        if "step" not in state:
            state["step"] = torch.tensor(_num_steps(state))
        state["step"] += 1
        return segment

    def next_segment(self, inner: Optimizer, slot: ShardSlot) -> Any:
        """The segment of one slot's next step."""
        state = inner.state.get(slot.master, {})
        check_finished(slot, state)
        step = int(_num_steps(state)) + 1
        return self.segment(slot.place.start, slot.place.stop, slot.group, step)

    def run(
        self,
        master: torch.Tensor,
        grad: torch.Tensor,
        states: Sequence[torch.Tensor],
        segments: Sequence[Any],
        scale: torch.Tensor | float,
        low: torch.Tensor | None,
    ) -> None:
        """Step flat tensors of one size."""
        if self.kernel is ak.sgd_step and not states:
            self.kernel(master, grad, None, segments, grad_scale=scale, low_precision=low)  # no momentum
        else:
            self.kernel(master, grad, *states, segments, grad_scale=scale, low_precision=low)


def _num_steps(state: dict[str, Any]) -> float:
    """Of one slot; torch's SGD counts no steps, but its buffer says that there was one."""
    return float(state.get("step", "momentum_buffer" in state))


def _adam_segment(
    start: int, stop: int, group: dict[str, Any], step: float, *, decoupled: bool
) -> ak.AdamSegment:
    beta1, beta2 = group["betas"]
    return ak.AdamSegment(
        start=start, stop=stop, lr=float(group["lr"]), beta1=float(beta1), beta2=float(beta2), eps=group["eps"],
        weight_decay=group["weight_decay"], step=step, decoupled=decoupled,
    )  # fmt: skip


def _adagrad_segment(start: int, stop: int, group: dict[str, Any], step: float) -> ak.AdagradSegment:
    return ak.AdagradSegment(
        start=start, stop=stop, lr=float(group["lr"]), lr_decay=group["lr_decay"], eps=group["eps"],
        weight_decay=group["weight_decay"], step=int(step),
    )  # fmt: skip


def _sgd_segment(start: int, stop: int, group: dict[str, Any], step: float) -> ak.SgdSegment:
    return ak.SgdSegment(
        start=start, stop=stop, lr=float(group["lr"]), momentum=group["momentum"], dampening=group["dampening"],
        weight_decay=group["weight_decay"], nesterov=group["nesterov"], first_step=step == 1,
    )  # fmt: skip


def _lion_segment(start: int, stop: int, group: dict[str, Any], step: float) -> ak.LionSegment:
    beta1, beta2 = group["betas"]
    return ak.LionSegment(
        start=start, stop=stop, lr=float(group["lr"]), beta1=float(beta1), beta2=float(beta2),
        weight_decay=group["weight_decay"],
    )  # fmt: skip


LION = FusedRule(lambda group: ("exp_avg",), _lion_segment, ak.lion_step)
"""Torch has none: for classes of other packages, as their `fused_rule`."""
RULES: dict[type[Optimizer], FusedRule] = {
    AdamW: FusedRule(
        lambda group: ("exp_avg", "exp_avg_sq"),
        lambda *a: _adam_segment(*a, decoupled=True),
        ak.adam_step,
    ),
    Adam: FusedRule(
        lambda group: ("exp_avg", "exp_avg_sq"),
        lambda *a: _adam_segment(*a, decoupled=bool(a[2].get("decoupled_weight_decay", False))),
        ak.adam_step,
    ),
    Adagrad: FusedRule(
        lambda group: ("sum",),
        _adagrad_segment,
        ak.adagrad_step,
        lambda group: group["initial_accumulator_value"],
    ),
    SGD: FusedRule(
        lambda group: ("momentum_buffer",) if group["momentum"] else (), _sgd_segment, ak.sgd_step
    ),
}


def rule_of(inner: Optimizer) -> FusedRule | None:
    """How a kernel steps it; None: none does. A class of another package may name its own, as `fused_rule`.

    Of a subclass that is not the very class, nobody knows what its step does.
    """
    own: FusedRule | None = vars(type(inner)).get("fused_rule")
    return own or RULES.get(type(inner))


Options: TypeAlias = "list[tuple[tuple[bool, ...], bool]]"


def asked_for(inner: Optimizer) -> Options:
    """For each group: the options that no kernel has, and whether there is momentum."""
    unusual = ("amsgrad", "maximize", "differentiable", "capturable")
    return [
        (tuple(bool(group.get(option)) for option in unusual), bool(group.get("momentum")))
        for group in inner.param_groups
    ]


def has_kernel(inner: Optimizer) -> bool:
    """Whether a kernel does what `inner` does to fp32 masters, with the options of its groups."""
    options = asked_for(inner)
    hooks = [*inner._optimizer_step_pre_hooks.values(), *inner._optimizer_step_post_hooks.values()]
    hooked = not all(isinstance(hook, StepGuard) for hook in hooks)  # only its own step calls others
    return (
        rule_of(inner) is not None
        and not hooked
        and not any(any(unusual) for unusual, _ in options)
        and _num_momenta(options) == 1
    )


def _num_momenta(options: Options) -> int:
    """How many kinds of state groups have: with momentum, without, or both."""
    return len({momentum for _, momentum in options})


def check_options(inner: Optimizer, before: Options) -> None:
    """Refuse groups that ask for something else than when the stepper was built, and further ones without a kernel."""
    options = asked_for(inner)
    new = options[len(before) :]
    if (
        options[: len(before)] != before
        or any(any(unusual) for unusual, _ in new)
        or _num_momenta(options) > 1
    ):
        raise ZeroStateError(
            "the optimizer's groups now ask for other options (amsgrad, maximize, differentiable, capturable, or "
            "momentum where there was none) than when ShardedOptimizer was built; build a new one"
        )


class FusedStepper:
    """AdamW, Adam, Adagrad and SGD as one fused pass over each unit's flat shard.

    Unscaling, clipping, the step and the write of the low-precision shard share that pass. State lies flat beside the
    master; `inner.state` holds views of it under torch's own names, so that both kinds of step read the same state.
    """

    casts = True

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        rule = rule_of(inner)
        assert rule is not None  # `supports` was asked
        self._rule = rule
        self._options = asked_for(inner)
        self._flat: dict[int, tuple[torch.Tensor, ...]] = {}

    @staticmethod
    def supports(inner: Optimizer, lanes: Sequence[Lane]) -> bool:
        """Whether a kernel does exactly what `inner` would do."""
        dtypes = {
            (lane.unit.master.dtype, lane.shard.dtype) for lane in lanes if lane.unit.master is not None
        }
        return has_kernel(inner) and all(
            master == torch.float32 and grad != torch.float64 for master, grad in dtypes
        )

    def step(self, work: Sequence[UnitStep], scale: torch.Tensor | float) -> Iterator[UnitStep]:
        """See `ShardOptimizer.step`."""
        check_options(self.inner, self._options)
        self.inner._opt_called = True  # type: ignore[attr-defined]  # or torch's schedulers warn of a missing step
        for item in work:
            unit = item.unit
            assert unit.master is not None
            segments = [self._rule.advance(self.inner, slot) for slot in item.slots]
            if segments:
                low = unit.shard if unit.has_separate_master else None
                states = self.flat_state(unit, item.slots)
                self._rule.run(unit.master, item.grad, states, merge(segments), scale, low)
            yield item

    def flat_state(self, unit: FlatUnit, slots: Sequence[ShardSlot]) -> tuple[torch.Tensor, ...]:
        """The unit's flat state tensors; per-slot entries of `inner.state` that are not views of them are moved in."""
        group = self.inner.param_groups[0]
        assert unit.master is not None
        names = self._rule.states(group)
        if unit.index not in self._flat:
            initial = self._rule.initial(group)
            self._flat[unit.index] = tuple(torch.full_like(unit.master, initial) for _ in names)
        for slot in slots:
            state = self.inner.state[slot.master]
            for name, flat in zip(names, self._flat[unit.index], strict=True):
                view = flat[slot.place.start : slot.place.stop]
                held = state.get(name)
                if held is None or held.data_ptr() != view.data_ptr():
                    view.copy_(held) if held is not None else view.fill_(self._rule.initial(slot.group))
                    state[name] = view
        return self._flat[unit.index]


def merge(segments: list[Any]) -> list[Any]:
    """Neighbours that differ only in their range, as one segment; the zeros of the alignment between may move along."""
    runs = [[segments[0], segments[0].stop]]
    for segment in segments[1:]:
        first, stop = runs[-1]
        adjacent = segment.start - stop < ALIGN_ELEMENTS  # a slot left out takes at least that much
        if adjacent and vars(segment) | _NOWHERE == vars(first) | _NOWHERE:
            runs[-1][1] = segment.stop
        else:
            runs.append([segment, segment.stop])
    return [first if stop == first.stop else replace(first, stop=stop) for first, stop in runs]


_NOWHERE = {"start": 0, "stop": 0}


def choose_stepper(inner: Optimizer, lanes: Sequence[Lane]) -> ShardOptimizer:
    """The fused pass where it does what `inner` would do, else `inner` itself."""
    return FusedStepper(inner) if FusedStepper.supports(inner, lanes) else TorchStepper(inner)

"""What steps on the host and steps for a device share: rows that are kept between steps, and counts of steps.

In: the parameters that have gradients now. Out: a gradient, a hyper-parameter set and a row for each, handed to
`_run`. Everything that can be kept from step to step is; what a user may have changed meanwhile is noticed by
comparing addresses and identities, one list at a time: a step must not cost Python calls by the dozen a parameter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import OffloadStateError
from .rows import MASTER, Row, make_row
from .rules import Group, Rule


class Work(NamedTuple):
    """One parameter with a gradient; `group` counts the optimizer's groups, `place` the parameters of it."""

    param: Tensor
    group: int
    place: int

    def name(self, groups: Sequence[Group]) -> str:
        """What an error calls the parameter."""
        names = groups[self.group].get("param_names")
        where = f"parameter {self.place} of group {self.group}"
        called = f"{where} ({names[self.place]!r})" if names else where
        return f"{called}, shape {tuple(self.param.shape)}"


def same(one: Sequence[object], other: Sequence[object]) -> bool:
    """Whether two lists hold the same objects."""
    return len(one) == len(other) and all(map(is_, one, other))


class Stepper(ABC):
    """Steps the parameters of one device.

    Args:
        rule: the optimizer.
        states: `Optimizer.state`, completed in place.
    """

    def __init__(self, rule: Rule, states: dict[Any, dict[str, Any]]) -> None:
        self._rule = rule
        self.states = states
        self._rows: list[Row] = []
        self._work: list[Work] = []
        self._places: dict[Tensor, int] = {}
        self._addresses: list[int] = []
        self._mastered: list[Row] = []
        self._versions: list[int] = []
        self._entries: list[dict[str, Any]] = []
        self._all_entries: list[dict[str, Any]] = []
        self._last: list[Work] = []
        self._last_places: list[int] = []
        self._known: dict[str, list[Any]] = {}
        self._counts = torch.zeros(0)
        self._count_views: list[Tensor] = []

    def step(self, work: Sequence[Work], groups: Sequence[Group]) -> None:
        """Update every parameter of `work`, all of one device, each with a gradient."""
        current = self._is_current()
        if not (current and same(work, self._last)):
            if not current or any(item.param not in self._places for item in work):
                self._keep(work, groups)
            self._last = list(work)
            self._last_places = [self._places[item.param] for item in work]
        if [row.param._version for row in self._mastered] != self._versions:
            for row in self._mastered:
                row.follow()
        places = self._last_places
        given = [item.param.grad for item in work]
        if [grad.layout for grad in given if grad is not None].count(torch.strided) != len(given):
            self._refuse(work, groups)
        counts = (
            [int(count) + 1 for count in self._counts.tolist()]
            if self._rule.counts
            else [1] * len(self._rows)
        )
        distinct: dict[tuple[int, int], int] = {}
        hyper = [
            distinct.setdefault((item.group, counts[place]), len(distinct))
            for item, place in zip(work, places, strict=True)
        ]
        grads: list[Tensor | None] = [None] * len(self._rows)
        which = [0] * len(self._rows)
        for place, grad, number in zip(places, given, hyper, strict=True):
            grads[place], which[place] = grad, number
        segments = [self._rule.segment(groups[group], count) for group, count in distinct]
        self._run(grads, segments, which)
        if len(places) == len(self._rows):
            self._counts += 1
        else:
            self._counts[places] += 1
        self._versions = [
            row.param._version for row in self._mastered
        ]  # who writes from now on is somebody else
        for row, version in zip(self._mastered, self._versions, strict=True):
            row.version = version

    def _refuse(self, work: Sequence[Work], groups: Sequence[Group]) -> None:
        """Name the gradient that is not dense."""
        for item in work:
            if item.param.grad is not None and item.param.grad.layout is not torch.strided:
                raise OffloadStateError(
                    f"{item.name(groups)}: expected a dense gradient, got {item.param.grad.layout}; "
                    "build the embedding with sparse=False, or leave it to torch.optim.SparseAdam"
                )

    @abstractmethod
    def _run(self, grads: Sequence[Tensor | None], segments: Sequence[Any], which: Sequence[int]) -> None:
        """Step every row that has a gradient."""

    @abstractmethod
    def _prepare(self) -> None:
        """Make whatever depends on which rows there are."""

    def _is_current(self) -> bool:
        """Whether parameters and states are still those that the rows were made from."""
        if [param.data_ptr() for param in self._places] != self._addresses:
            return False
        if not same(
            list(self.states.values()), self._all_entries
        ):  # by order, for a tensor's hash costs more
            return False
        return all(
            all(map(is_, [state.get(key) for state in self._entries], known))
            for key, known in self._known.items()
        )

    def _keep(self, work: Sequence[Work], groups: Sequence[Group]) -> None:
        """Make rows anew, for what was there before and for what is new."""
        now = {item.param: item for item in work}
        everywhere = {
            param: Work(param, number, place)
            for number, group in enumerate(groups)
            for place, param in enumerate(group["params"])
        }
        device = work[0].param.device  # a model that moved is another stepper's
        kept = [
            now.pop(item.param, everywhere[item.param])
            for item in self._work
            if item.param in self.states and item.param in everywhere and item.param.device == device
        ]
        self._work = [*kept, *now.values()]
        self._rows = [
            make_row(item.param, self.states[item.param], self._rule, groups[item.group], item.name(groups))
            for item in self._work
        ]
        self._mastered = [row for row in self._rows if row.master is not None]
        self._versions = [-1] * len(self._mastered)
        self._places = {item.param: place for place, item in enumerate(self._work)}
        self._addresses = [row.param.data_ptr() for row in self._rows]
        # torch's `step` of each parameter is a view of one tensor here, so that all are counted at once.
        before = [float(row.state.get("step", 0.0)) for row in self._rows]
        self._counts = torch.tensor(before, dtype=torch.float32)
        self._count_views = list(self._counts.unbind()) if self._rule.counts else []
        for row, view in zip(self._rows, self._count_views, strict=False):
            row.state["step"] = view
        self._entries = [row.state for row in self._rows]
        self._all_entries = list(self.states.values())
        self._known = {
            key: [state.get(key) for state in self._entries] for key in (*self._rule.states, "step", MASTER)
        }
        self._prepare()

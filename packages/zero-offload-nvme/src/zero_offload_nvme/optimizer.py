"""The step of a plain torch optimizer whose states and arithmetic are on the host.

In: parameters with gradients, wherever they lie. Out: the same parameters, updated. `adam`, `adagrad` and `lion` add
their options; `steppers` does the work, one for each device that holds parameters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from .copies import DeviceCopies
from .device_steps import DeviceStepper
from .errors import OffloadStateError
from .host_steps import HostStepper
from .rows import begin_row, check_param
from .rules import Group, Rule, check_group
from .steppers import Stepper, Work, same


class HostOptimizer(Optimizer):
    """Base of the optimizers of this package; a subclass names its rule and its options."""

    rule: ClassVar[Rule]
    _steppers: dict[torch.device, Stepper]
    _known_work: tuple[list[int], list[Work]]

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._forget()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters with options of their own, as in torch.

        Raises:
            OffloadConfigError: an option or a parameter that cannot be honoured; nothing is added then.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(type(self).__name__, group)
            self._check_params(len(self.param_groups) - 1)
        except ValueError:
            self.param_groups.pop()
            raise
        if self.rule.eager:
            for item in self._work_of(len(self.param_groups) - 1):
                self._begin(item)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss again, with gradients, and returns it.

        Returns:
            What `closure` returned, or None. On a device the update is queued when this returns: work queued after it
            on the current stream sees it.

        Raises:
            OffloadStateError: a sparse gradient, a state of another shape than its parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            work = [item for item in self._work() if item.param.grad is not None]
            host = [item for item in work if item.param.is_cpu]
            devices: dict[torch.device, list[Work]] = defaultdict(list)
            if len(host) < len(work):
                for item in work:
                    if not item.param.is_cpu:
                        devices[item.param.device].append(item)
            for device, items in devices.items():
                self._stepper(device).step(items, self.param_groups)
            if host:
                self._stepper(torch.device("cpu")).step(host, self.param_groups)
        return loss

    def _work(self) -> list[Work]:
        """Every parameter with its place; the same objects as long as the groups hold the same parameters."""
        lists = [group["params"] for group in self.param_groups]
        sizes = [len(params) for params in lists]
        known_sizes, known = self._known_work
        if sizes != known_sizes or not same(
            [p for params in lists for p in params], [item.param for item in known]
        ):
            known = [item for number in range(len(lists)) for item in self._work_of(number)]
            self._known_work = (sizes, known)
        return known

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state dict of this class, or of torch's class of the same name.

        States stay on the host in fp32, whatever the parameters are; tensors that are so already are taken as they
        are, as torch does. A state dict without masters is welcome: they are made of the parameters.

        Raises:
            OffloadConfigError: its groups ask for what is not done here; nothing has changed then.
            OffloadStateError: a state of another shape than its parameter; nothing has changed then.
            ValueError: other numbers of groups or parameters.
        """
        held: dict[Any, Any] = {}
        saved: list[Any] = []

        def set_aside(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            # torch would cast states to the parameters' dtype and move them to their device.
            for group in given["param_groups"]:
                check_group(type(self).__name__, group)
            self._check_states(given)
            held.update(given["state"])
            saved.extend(chain.from_iterable(group["params"] for group in given["param_groups"]))
            return {**given, "state": {}}

        def put_back(_: Optimizer) -> None:
            ours = dict(zip(saved, chain.from_iterable(g["params"] for g in self.param_groups), strict=True))
            for key, state in held.items():
                self.state[ours.get(key, key)] = dict(state) if isinstance(state, dict) else state
            for group in self.param_groups:
                for name, value in self.defaults.items():
                    group.setdefault(name, value)

        last = self.register_load_state_dict_pre_hook(set_aside)
        first = self.register_load_state_dict_post_hook(put_back, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
            first.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        """Drop what is kept from step to step; the next one makes it anew."""
        self._steppers = {}
        self._known_work = ([], [])

    def _stepper(self, device: torch.device) -> Stepper:
        if self._steppers and next(iter(self._steppers.values())).states is not self.state:  # assigned anew
            self._forget()
        if device not in self._steppers:
            self._steppers[device] = (
                HostStepper(self.rule, self.state)
                if device.type == "cpu"
                else DeviceStepper(self.rule, self.state, DeviceCopies(device))
            )
        return self._steppers[device]

    def _work_of(self, number: int) -> list[Work]:
        params: list[Tensor] = self.param_groups[number]["params"]
        return [Work(param, number, place) for place, param in enumerate(params)]

    def _check_params(self, number: int) -> None:
        for item in self._work_of(number):
            check_param(item.param, f"{type(self).__name__}: {item.name(self.param_groups)}")

    def _begin(self, item: Work) -> None:
        """States before the first gradient, for an optimizer of torch that expects them; values are not looked at."""
        name, group = item.name(self.param_groups), self.param_groups[item.group]
        begin_row(item.param, self.state[item.param], self.rule, group, name)
        self.state[item.param]["step"] = torch.tensor(0.0)

    def _check_states(self, given: dict[str, Any]) -> None:
        """Shapes of all states that are to be loaded."""
        saved = [key for group in given["param_groups"] for key in group["params"]]
        items = [item for number in range(len(self.param_groups)) for item in self._work_of(number)]
        for key, item in zip(saved, items, strict=False):  # torch compares the numbers
            state = given["state"].get(key, {})
            for name in (*self.rule.states, "master"):
                value = state.get(name)
                if value is not None and value.shape != item.param.shape:
                    raise OffloadStateError(
                        f"{type(self).__name__}: {item.name(self.param_groups)}: state {name!r} has shape "
                        f"{tuple(value.shape)}; load the state of this model"
                    )

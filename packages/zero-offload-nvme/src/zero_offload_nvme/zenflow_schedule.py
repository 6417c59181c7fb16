"""PURE: what a step does under ZenFlow: step everything, choose channels anew, end the window.

In: a `ZenFlow` and how far training has come. Out: `Turn`s, and the next `Progress`. Ints and floats; every rank
computes the same from the same. Next: `zenflow_stepper` does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, ClassVar

from .zenflow import ZenFlow


class Selection(Enum):
    """Whether a step chooses channels before it does anything else."""

    KEEP = "keep"
    IF_STALE = "if stale"
    ANEW = "anew"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far training has come.

    Attributes:
        num_steps: taken, skipped ones left out.
        num_held: gradients of the rest that the open window holds.
        selection_age: steps since channels were chosen; None: they have not been.
    """

    num_steps: int = 0
    num_held: int = 0
    selection_age: int | None = None

    KEYS: ClassVar = ("zenflow_num_steps", "zenflow_num_held", "zenflow_selection_age")
    """Its names in the state of an optimizer, where it is kept with every parameter."""

    @property
    def numbers(self) -> list[int]:
        """By which it can be compared: the further one has the larger ones."""
        return [self.num_steps, self.num_held, -1 if self.selection_age is None else self.selection_age]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> Progress:
        """The way back."""
        num_steps, num_held, age = map(int, numbers)
        return cls(num_steps=num_steps, num_held=num_held, selection_age=None if age < 0 else age)

    def as_state(self) -> dict[str, int]:
        """Under its names."""
        return dict(zip(self.KEYS, self.numbers, strict=True))

    def stepped(self, *, exact: bool = False, ended: bool = False) -> Progress:
        """After a step.

        Args:
            exact: it stepped everything.
            ended: it ended the window.
        """
        age = None if self.selection_age is None else self.selection_age + 1
        held = self.num_held if exact else 0 if ended else self.num_held + 1
        return Progress(num_steps=self.num_steps + 1, num_held=held, selection_age=age)

    def selected(self) -> Progress:
        """Channels have just been chosen."""
        return replace(self, selection_age=0)


def is_warming_up(policy: ZenFlow, progress: Progress) -> bool:
    """Whether the step to come steps everything, exactly."""
    return progress.num_steps < policy.full_warm_up_rounds and progress.selection_age is None


def selection(policy: ZenFlow, progress: Progress) -> Selection:
    """Whether the step to come chooses channels: never while a window holds gradients of channels as they are."""
    if progress.num_held:
        return Selection.KEEP
    if progress.selection_age is None:
        return Selection.ANEW
    if policy.select_strategy == "auto":
        return Selection.IF_STALE
    interval = 1 if policy.select_interval == "auto" else policy.select_interval
    if policy.select_strategy == "epoch":
        assert policy.steps_per_epoch is not None
        interval *= policy.steps_per_epoch
    return Selection.ANEW if progress.selection_age >= interval else Selection.KEEP


def ends_window(policy: ZenFlow, progress: Progress, *, is_ripe: bool) -> bool:
    """Whether the gradient of the step to come is the window's last.

    Args:
        policy: what is wanted.
        progress: before the step.
        is_ripe: see there; looked at for `update_interval="auto"`.
    """
    if policy.update_interval == "auto":
        return is_ripe or progress.num_held + 1 >= policy.max_update_interval
    return progress.num_held + 1 >= policy.update_interval


def is_ripe(policy: ZenFlow, *, rest: tuple[float, float], chosen: tuple[float, float]) -> bool:
    """Whether what has accumulated is as important as what is stepped at once.

    Args:
        policy: its `auto_ratio` counts.
        rest: sum of squares of the accumulated gradients that wait, and how many elements they are.
        chosen: the same of the gradients that are stepped at once.
    """
    (rest_sum, num_rest), (chosen_sum, num_chosen) = rest, chosen
    return num_rest > 0 and rest_sum * num_chosen >= policy.auto_ratio * chosen_sum * num_rest


def is_stale(policy: ZenFlow, *, held: float, best: float) -> bool:
    """Whether channels are to be chosen anew.

    Args:
        policy: its `reselect_share` counts.
        held: importance of the chosen channels.
        best: of as many that are the most important now.
    """
    return held < policy.reselect_share * best


def late_group(policy: ZenFlow, group: dict[str, Any], num_held: int, *, decoupled: bool) -> dict[str, Any]:
    """A group's options for the step that a window's mean gradient takes.

    Args:
        policy: its `late_step` counts.
        group: of an Adam.
        num_held: gradients of the window.
        decoupled: weight decay is AdamW's, and goes with the rate: S steps shrink by S times as much, whatever theirs.
    """
    if policy.late_step == "one" or num_held == 1:
        return group
    beta1, beta2 = group["betas"]
    ahead = num_held**0.75
    return group | {
        "lr": float(group["lr"]) * ahead,
        "betas": (float(beta1) ** num_held, float(beta2) ** num_held),
        "weight_decay": group["weight_decay"] * (num_held / ahead if decoupled else 1),
    }


def late_count(policy: ZenFlow, before: int, num_held: int) -> tuple[int, float]:
    """Of the rest's steps, for Adam's bias correction.

    Args:
        policy: its `late_step` counts.
        before: steps so far.
        num_held: gradients of the window.

    Returns:
        Steps afterwards, in steps of the group's own betas; and in steps of the betas of `late_group`.
    """
    if policy.late_step == "one":
        return before + 1, before + 1
    return before + num_held, (before + num_held) / num_held

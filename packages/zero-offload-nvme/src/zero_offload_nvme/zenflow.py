"""`ZenFlow`: how much of a model is stepped at once, and how late the rest may be.

In: what a user wants. Out: the same, checked. `zenflow_schedule` turns it into what a step does, `importance` chooses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import OffloadConfigError


@dataclass(frozen=True, kw_only=True)
class ZenFlow:
    """The most important channels are stepped at once on the device, the rest in windows on the host.

    A channel is one index of a parameter's first dimension (an output of `nn.Linear`, a word of `nn.Embedding`), which
    is a column of the matrix as the paper writes it. Parameters of fewer than two dimensions are stepped at once.

    Attributes:
        topk_ratio: the part of each parameter's channels that is stepped at once, rounded up; over 0, at most 1.
        select_strategy: when channels are chosen anew, always between two windows. "step": every `select_interval`
            steps; "epoch": every `select_interval` epochs of `steps_per_epoch` steps; "auto": when those chosen hold
            less than `reselect_share` of the importance that the best would hold.
        select_interval: steps or epochs, at least 1; "auto": one epoch, or what the strategy "auto" finds.
        update_interval: steps whose gradients of the rest are averaged for one update; "auto": as many as it takes
            until their sum is as important as what is stepped at once, see `auto_ratio`.
        full_warm_up_rounds: steps at the beginning that step everything, exactly.
        overlap_step: the host steps the rest in a thread while training goes on; its update is one window late.
        late_step: what the rest takes for a window of S gradients. "window": as far as S steps would have gone, for
            rates of fine-tuning: the betas to the power S, and the rate times S^(3/4), between the square root of S
            (gradients that are all noise) and S (that all agree). "one": one ordinary step, for rates so high that
            what is late must be small.
        steps_per_epoch: for "epoch".
        auto_ratio: for `update_interval="auto"`: a window ends when the mean square of the accumulated gradients of the
            rest has come to this part of the mean square of the gradients that are stepped at once.
        max_update_interval: for `update_interval="auto"`: steps of a window, at most.
        reselect_share: for `select_strategy="auto"`; 0 to 1.

    Raises:
        OffloadConfigError: a value out of range, or one that the others leave without an effect.

    Source: ZenFlow (Lan et al., 2025, arXiv:2505.12242), sections 3 and 4; names as in DeepSpeed's documentation.
    `late_step` is not the paper's; how Adam's rate and betas go with the batch: Malladi et al., 2022, arXiv:2205.10287.
    """

    topk_ratio: float = 0.05
    select_strategy: Literal["auto", "step", "epoch"] = "auto"
    select_interval: int | Literal["auto"] = "auto"
    update_interval: int | Literal["auto"] = 4
    full_warm_up_rounds: int = 0
    overlap_step: bool = True
    late_step: Literal["window", "one"] = "window"
    steps_per_epoch: int | None = None
    auto_ratio: float = 0.99
    max_update_interval: int = 16
    reselect_share: float = 0.8

    def __post_init__(self) -> None:
        self._check_ranges()
        by_itself = self.select_strategy == "auto"
        if by_itself and self.select_interval != "auto":
            _refuse(
                "select_interval",
                "'auto', since select_strategy='auto' finds out by itself",
                self.select_interval,
                "leave it out, or use select_strategy='step'",
            )
        if self.select_strategy == "step" and self.select_interval == "auto":
            _refuse("select_interval", "steps, for select_strategy='step'", "auto", "give a number")
        if (self.select_strategy == "epoch") != (self.steps_per_epoch is not None):
            _refuse(
                "steps_per_epoch",
                "it with select_strategy='epoch', and with no other",
                self.steps_per_epoch,
                "give the number of optimizer steps of an epoch, or leave it out",
            )
        given = {"auto_ratio": self.auto_ratio != 0.99, "max_update_interval": self.max_update_interval != 16}
        for name, is_given in given.items():
            if is_given and self.update_interval != "auto":
                _refuse(name, "it with update_interval='auto' alone", getattr(self, name), "leave it out")
        if self.reselect_share != 0.8 and not by_itself:
            _refuse(
                "reselect_share", "it with select_strategy='auto' alone", self.reselect_share, "leave it out"
            )

    def _check_ranges(self) -> None:
        if not 0 < self.topk_ratio <= 1:
            _refuse("topk_ratio", "over 0, at most 1", self.topk_ratio, "0.05 steps a twentieth at once")
        if self.select_strategy not in ("auto", "step", "epoch"):
            _refuse(
                "select_strategy", "'auto', 'step' or 'epoch'", self.select_strategy, "choose one of them"
            )
        if self.late_step not in ("window", "one"):
            _refuse("late_step", "'window' or 'one'", self.late_step, "choose one of them")
        for name in ("select_interval", "update_interval", "max_update_interval", "steps_per_epoch"):
            value = getattr(self, name)
            may_be_auto = name in ("select_interval", "update_interval")
            if (value == "auto" and may_be_auto) or (value is None and name == "steps_per_epoch"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                expected = "an integer of at least 1" + (", or 'auto'" if may_be_auto else "")
                _refuse(name, expected, value, "give a number of steps (select_interval: or epochs)")
        rounds = self.full_warm_up_rounds
        if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 0:
            _refuse("full_warm_up_rounds", "an integer of at least 0", rounds, "give a number of steps")
        if not isinstance(self.overlap_step, bool):
            _refuse("overlap_step", "True or False", self.overlap_step, "choose one of them")
        if not self.auto_ratio > 0:
            _refuse("auto_ratio", "a number over 0", self.auto_ratio, "larger ones make longer windows")
        if not 0 <= self.reselect_share <= 1:
            _refuse("reselect_share", "0 to 1", self.reselect_share, "larger ones choose more often")


def _refuse(name: str, expected: str, given: object, do: str) -> None:
    raise OffloadConfigError(f"ZenFlow({name}=...): expected {expected}, got {given!r}; {do}")

"""PURE: 0/1 Adam's two schedules: when the variance is updated, and when ranks synchronize.

In: step numbers, from 1 on. Out: whether it is time. The same on all ranks, since they count alike. Next:
`zero_one_adam` follows them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import CompressConfigError


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """The policies of 0/1 Adam.

    Args:
        var_freeze_step: the last step that may update the variance; from there on ranks may step alone.
        var_update_scaler: kappa: updates of the variance after which their distance doubles. The paper's 16 are for
            runs of 100,000 steps; a short one wants about half of `var_freeze_step`, or its variance is too old.
        local_step_scaler: steps after `var_freeze_step` in which the distance of synchronizations doubles: in the
            paper's policy, those in which the learning rate halves.
        local_step_clipper: H: the largest distance of synchronizations, in steps. 1: every step synchronizes.

    Raises:
        CompressConfigError: out of range.

    Source: Lu et al., 0/1 Adam, arXiv:2202.06009, section 6.
    """

    var_freeze_step: int = 100_000
    var_update_scaler: int = 16
    local_step_scaler: int = 32_678
    local_step_clipper: int = 16

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CompressConfigError(f"{name}: expected a whole number >= 1, got {value!r}")

    def variance_distance(self, number: int) -> int:
        """k_(j+1) - k_j = 2^floor(j / kappa): steps from update j = `number` of the variance, from 0, to the next."""
        return 1 << (number // self.var_update_scaler)

    def sync_distance(self, step: int) -> int:
        """Steps from one synchronization to the next, around `step`: 1 until the variance is frozen, at most H."""
        if step <= self.var_freeze_step:
            return 1
        doublings = (step - self.var_freeze_step) // self.local_step_scaler
        return min(1 << min(doublings, 62), self.local_step_clipper)

    def variance_steps(self, num_steps: int) -> Iterator[int]:
        """T_v: the steps of a run that update the variance; the first is step 1."""
        step, number = 1, 0
        while step <= min(self.var_freeze_step, num_steps):
            yield step
            step += self.variance_distance(number)
            number += 1

    def sync_steps(self, num_steps: int) -> Iterator[int]:
        """T_u without T_v: the steps of a run that synchronize by signs."""
        exact, last = set(self.variance_steps(num_steps)), 0
        for step in range(1, num_steps + 1):
            if step in exact:
                last = step
            elif step - last >= self.sync_distance(step):
                last = step
                yield step

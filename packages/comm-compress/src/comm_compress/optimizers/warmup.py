"""PURE: when the variance has settled, so that it may be frozen and compression may begin.

In: norms of the variance as training goes on. Out: a yes, once. Next: the optimizers freeze.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CompressConfigError

CHECKS_IN_WINDOW = 10
"""How often the variance is looked at while its window passes: a look costs a read of it and a small message."""


@dataclass(frozen=True, kw_only=True)
class FreezeRule:
    """When to freeze.

    Args:
        freeze_step: after so many steps, whatever the variance does; None: when it has settled.
        threshold: settled is: |v_t|_1 and |v_(t - window)|_1, bias-corrected, differ by no more than this ratio, and no
            learning rate has risen since.

    Raises:
        CompressConfigError: out of range.

    Source: Tang et al., 1-bit Adam, arXiv:2102.02888, on the number of warm-up steps: |v_t|_1 / |v_(t - window)|_1
    >= 0.96 with a window of 1 / (1 - beta2) steps, after the warm-up of the learning rate. A variance that still grows
    is not settled either, so the ratio is bounded on both sides here.
    """

    freeze_step: int | None = None
    threshold: float = 0.96

    def __post_init__(self) -> None:
        if self.freeze_step is not None and (
            isinstance(self.freeze_step, bool)
            or not isinstance(self.freeze_step, int)
            or self.freeze_step < 1
        ):
            raise CompressConfigError(
                f"freeze_step: expected a number of steps >= 1, or None to freeze when the variance has settled, got "
                f"{self.freeze_step!r}"
            )
        if not 0 < self.threshold <= 1:
            raise CompressConfigError(f"freeze_threshold: expected 0 < ratio <= 1, got {self.threshold!r}")


class VarianceWatch:
    """Compares the variance with that of a window ago.

    Args:
        rule: what settled means.
        beta2: decay of the variance; the window is 1 / (1 - beta2) steps, in tenths of which it looks.
    """

    def __init__(self, rule: FreezeRule, beta2: float) -> None:
        self.rule = rule
        window = round(1 / (1 - beta2))
        self.stride = max(1, window // CHECKS_IN_WINDOW)
        self._looks = -(-window // self.stride)
        self._seen: deque[tuple[float, tuple[float, ...]]] = deque(maxlen=self._looks + 1)

    @property
    def window_steps(self) -> int:
        """Steps between what is compared."""
        return self._looks * self.stride

    def is_due(self, step: int) -> bool:
        """Whether `observe` wants to be told about the variance after this step."""
        return self.rule.freeze_step is None and step % self.stride == 0

    def observe(self, norm: float, rates: Sequence[float]) -> bool:
        """Take in what is due.

        Args:
            norm: |v_t|_1 over all parameters, bias-corrected.
            rates: the learning rates.

        Returns:
            Whether the variance has settled.
        """
        self._seen.append((norm, tuple(rates)))
        if len(self._seen) <= self._looks:
            return False
        before, rates_before = self._seen[0]
        rising = any(now > then for now, then in zip(rates, rates_before, strict=False))
        smaller, larger = sorted((norm, before))
        return not rising and larger > 0 and smaller / larger >= self.rule.threshold

    def state(self) -> list[Any]:
        """What it has seen, for a checkpoint."""
        return [[norm, list(rates)] for norm, rates in self._seen]

    def load(self, state: Sequence[Any]) -> None:
        """Go on from `state()`."""
        self._seen.clear()
        self._seen.extend((float(norm), tuple(rates)) for norm, rates in state)

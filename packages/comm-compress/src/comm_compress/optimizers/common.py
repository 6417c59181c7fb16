"""PURE: how long the mean of the ranks' gradients is where nobody has it.

In: of exact steps, the squared norm of the mean beside the mean of squared norms. Out: an estimate of the former from
the latter. Next: `base` clips by it.

Note [What ranks have in common]
Gradients of N ranks are a part that they share and noise of their own. Of the mean of their squared norms let s be the
shared part's; the mean of gradients keeps that, and a squared norm of s + (1 - s) / N. Clipping by the ranks' own norms
would clip for their noise: with a frozen variance, that is a smaller learning rate for the rest of a run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_DECAY = 0.9


class CommonPart:
    """The shared part of squared norms, as the last exact steps have shown it; before any, all of them."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def observe(self, square: float, mean_square: float, num_ranks: int) -> None:
        """After an exact step.

        Args:
            square: squared norm of the mean gradient.
            mean_square: mean over ranks of squared norms.
            num_ranks: ranks.
        """
        if num_ranks == 1 or not mean_square > 0:
            return
        alone = 1 / num_ranks
        share = max((square / mean_square - alone) / (1 - alone), 0.0)
        if share > 1 - 1e-6:  # all ranks have the same: gradients that somebody has averaged tell nothing
            return
        self._sum = _DECAY * self._sum + (1 - _DECAY) * share
        self._weight = _DECAY * self._weight + (1 - _DECAY)

    def norm(self, mean_square: float, num_ranks: int) -> float:
        """Estimated norm of the mean gradient; no more than the root of `mean_square`."""
        share = self._sum / self._weight if self._weight else 1.0
        return math.sqrt(mean_square * (share + (1 - share) / num_ranks))

    def state(self) -> list[float]:
        """For a checkpoint; it holds for any number of ranks."""
        return [self._sum, self._weight]

    def load(self, state: Sequence[float]) -> None:
        """Go on from `state()`."""
        self._sum, self._weight = (float(each) for each in state)

"""PURE: how many tokens of prompts fit beside decodes, so that these seldom wait longer than they may.

In: what each forward had and how long it took. Out: the most tokens of prompts for the next one. Next: `packing`.

A quantile is followed, and no model of the machine is needed: a forward in time lets the limit grow a little, one that
is late makes it shrink by so much more that both balance where one forward in twenty is late (Robbins & Monro 1951).
"""

from __future__ import annotations

import math

_LATE = 0.05
"""The part of forwards that may be late."""
_STEP = 0.5
"""Of the limit's logarithm."""
_EARLY = 0.7
"""Below this part of the time allowed, the limit grows faster: by a quarter."""
_LEAST = 1
"""Prompts always get on."""


class Pace:
    """Watches forwards.

    Args:
        gap_s: seconds that a forward with decodes may take.
        most: tokens of a forward.
    """

    def __init__(self, gap_s: float, most: int) -> None:
        self._gap_s = gap_s
        self._most = most
        self._size = float(_LEAST)

    @property
    def prompt_tokens(self) -> int:
        """The most of the next forward, if it has decodes: 1, 2, ..., 7, 8, 10, 12, 14, 16, 20, ...

        Few sizes, so that forwards come in shapes that have come before (`replays`).
        """
        tokens = int(self._size)
        step = 1 << max(tokens.bit_length() - 3, 0)
        return min(tokens // step * step, self._most)

    def took(self, prompt_tokens: int, seconds: float) -> None:
        """A forward with decodes, and so many tokens of prompts, has taken so long."""
        if not prompt_tokens:
            return
        if seconds > self._gap_s:
            self._size = min(self._size, prompt_tokens) * math.exp(-_STEP * (1.0 - _LATE))
        elif prompt_tokens >= self.prompt_tokens:
            self._size *= 1.25 if seconds < _EARLY * self._gap_s else math.exp(_STEP * _LATE)
        self._size = min(max(self._size, _LEAST), max(self._most, _LEAST))

"""PURE: how many tokens of prompts fit beside decodes, so that these seldom wait longer than they may.

In: what each forward had and how long it took. Out: the most tokens of prompts for the next one. Next: `packing`.

Note [Late forwards]
Nineteen forwards of twenty are to be in time, and none to take more than `LATEST` times as long. What always fits is
found by following a quantile, without a model of the machine: a forward in time lets the size grow a little, one that
is late makes it shrink by so much more that both balance where one in fifty is late (Robbins & Monro 1951). Late in a
long prompt even one token may be too many, since it reads all keys and values before it: then prompts pause. What may
be late is not spent on such tokens: when `_BETWEEN` forwards have been in time, the next has as many tokens as the
greatest delay allows, so that prompts get on however little fits, and short ones are through at once.
"""

from __future__ import annotations

import math

LATEST = 4.0
"""The time that a late forward may take, in those allowed."""
_BETWEEN = 32
"""Forwards that prompts have not made late, before one that they may."""
_LATE = 0.02
"""The part of the others that may be late."""
_STEP = 0.5
"""Of a size's logarithm."""
_LEAST = 0.5
"""The smallest size of what always fits: it is 1 again after some seventy forwards in time."""
_OVER_ALONE = 1.1
"""Where decodes alone take longer than they may, this much more than they take is allowed."""


class Pace:
    """Watches forwards; see Note [Late forwards].

    Args:
        gap_s: seconds that a forward with decodes may take.
        most: tokens of a forward.
    """

    def __init__(self, gap_s: float, most: int) -> None:
        self._gap_s = gap_s
        self._most = float(max(most, 1))
        self._fits = 1.0
        self._burst = 8.0
        self._since_late = _BETWEEN
        self._alone_s = 0.0

    @property
    def prompt_tokens(self) -> int:
        """The most of the next forward, if it has decodes: 0, 1, 2, ..., 7, 8, 10, 12, 14, 16, 20, ...

        Few sizes, so that forwards come in shapes that have come before (`replays`).
        """
        tokens = int(max(self._fits, self._burst if self._may_be_late else 0.0))
        step = 1 << max(tokens.bit_length() - 3, 0)
        return tokens // step * step

    def took(self, prompt_tokens: int, seconds: float) -> None:
        """A forward with decodes, and so many tokens of prompts, has taken so long."""
        if not prompt_tokens:
            self._alone_s += 0.1 * (seconds - self._alone_s) if self._alone_s else seconds
        else:  # decodes alone would not have taken longer
            self._alone_s = min(self._alone_s, seconds)
        used_all = prompt_tokens >= self.prompt_tokens
        part = seconds / max(self._gap_s, _OVER_ALONE * self._alone_s)
        if self._may_be_late and prompt_tokens > self._fits:
            self._burst = self._next_burst(prompt_tokens, part / LATEST, used_all=used_all)
        elif prompt_tokens or self._fits < 1.0:
            self._fits = self._next_fits(prompt_tokens, part, used_all=used_all)
        self._since_late = 0 if prompt_tokens and part > 1.0 else self._since_late + 1

    @property
    def _may_be_late(self) -> bool:
        return self._since_late >= _BETWEEN

    def _next_fits(self, tokens: int, part: float, *, used_all: bool) -> float:
        """What always fits, after a forward that has taken such a part of the time allowed."""
        size = self._fits
        if part > 1.0:
            size = min(size, max(tokens, 1)) * math.exp(-_STEP * (1.0 - _LATE))
        elif used_all and tokens and part < 0.7:
            size *= 2.0 if part < 0.4 else 1.25
        elif used_all:
            size *= math.exp(_STEP * _LATE)
        return min(max(size, _LEAST), self._most)

    def _next_burst(self, tokens: int, part: float, *, used_all: bool) -> float:
        """What a late forward may have; there are few to learn from, so it goes straight to what this one shows."""
        size = self._burst
        if part > 1.0:
            size = tokens * max(0.95 / part, 0.5)
        elif used_all:
            size *= min(max(0.95 / part, 1.0), 2.0)
        return min(max(size, 1.0), self._most)

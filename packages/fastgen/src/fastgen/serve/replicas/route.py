"""Which replica serves a prompt: one that is not busier than others, and knows how the prompt begins. Pure.

What a replica has served is remembered in pieces of text, each by a hash of it and all before it: how many of them a
prompt shares with earlier ones is about how much of it is in that replica's prefix cache.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PIECE = 128  # characters: about two blocks of a cache
MOST_PIECES = 1 << 16
MOST_AHEAD = 4  # requests that a replica may have more than another and still get a prompt that it knows


def beginnings(body: bytes) -> list[int]:
    """A hash for each beginning of a request's prompt, the shortest first; none of what is no such request."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return []
    if not isinstance(asked, dict):
        return []
    known, text = hash(_as_text(asked.get("model"))), _prompt(asked)
    found = []
    for start in range(0, len(text) - PIECE + 1, PIECE):
        known = hash((known, text[start : start + PIECE]))
        found.append(known)
    return found


def _prompt(asked: Mapping[str, Any]) -> str:
    """What comes first in the context, as text."""
    if "messages" in asked:
        return _as_text(asked.get("tools")) + _as_text(asked["messages"])
    prompt = asked.get("prompt")
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    first = prompt[0] if several and isinstance(prompt, list) else prompt
    return first if isinstance(first, str) else _as_text(first)


def _as_text(value: object) -> str:
    return "" if value is None else json.dumps(value)


@dataclass
class Load:
    """What is known of a replica.

    Attributes:
        running: requests that it answers.
        last: when it was last chosen, as a count.
    """

    running: int = 0
    last: int = 0
    _known: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def num_known(self, pieces: list[int]) -> int:
        """How many of a prompt's beginnings it has served."""
        return next((at for at, piece in enumerate(pieces) if piece not in self._known), len(pieces))

    def learn(self, pieces: list[int]) -> None:
        """It serves a prompt; the least recently served are forgotten."""
        for piece in pieces:
            self._known[piece] = None
            self._known.move_to_end(piece)
        while len(self._known) > MOST_PIECES:
            self._known.popitem(last=False)


def choose(loads: Mapping[int, Load], pieces: list[int]) -> int:
    """The replica for a prompt: of those that are not far busier than the idlest the one that knows most of it.

    Args:
        loads: by replica; at least one.
        pieces: of `beginnings`.
    """
    least = min(load.running for load in loads.values())

    def rank(number: int) -> tuple[int, int, int]:
        load = loads[number]
        return -load.num_known(pieces), load.running, load.last

    return min((number for number, load in loads.items() if load.running <= least + MOST_AHEAD), key=rank)

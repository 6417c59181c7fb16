"""PURE: the order in which buckets go through stages, so that one travels while another is computed.

In: items and stages. Out: calls. Used for everything that the optimizers send.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def pipeline(items: Sequence[T], *stages: Callable[[T], object]) -> None:
    """Take every item through all stages, each item one stage behind the one before it.

    A stage begins by waiting for what the stage before it sent, and ends by sending. In each round the newest item goes
    first, so that the wire has work while older ones are waited for; as many items are under way as there are stages.
    Every rank calls it with as many items and the same stages.
    """
    for beat in range(len(items) + len(stages) - 1):
        for number, stage in enumerate(stages):
            if 0 <= beat - number < len(items):
                stage(items[beat - number])

"""PURE: how much of the optimizer's state may be stepped on the host with backward to hide it.

In: sizes of units, seconds of a backward, elements that the host steps in a second. Out: the part of the elements for
`zero_core.Stores(optimizer_ratio=, keep_first=True)`, which keeps the rest, reduced last, on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn
from zero_core.units import UnitChoice, find_units

from .errors import OffloadConfigError


def hidden_ratio(
    model_or_sizes: nn.Module | Sequence[int],
    *,
    backward_s: float,
    elements_per_s: float,
    slack_s: float = 0.0,
    units: UnitChoice = None,
) -> float:
    """The largest part whose steps are over when backward is, if each begins when its unit's gradient is reduced.

    Backward is taken to go from the unit that is defined last to the first, in time proportional to their elements; the
    host steps one unit after another.

    Args:
        model_or_sizes: a model, on any device, or the trainable elements of its units, in order of definition.
        backward_s: seconds of one backward.
        elements_per_s: that all ranks together step in a second, with what the link or the drive takes. AdamW in host
            memory: `Speeds.memory` of `preflight` in bytes a second by 28 bytes an element.
        slack_s: seconds that the host may take after backward: of the norm, or of the steps on the device.
        units: as for `zero_core.shard`.

    Returns:
        0 to 1: whole units.

    Raises:
        OffloadConfigError: a time or a speed that is none.

    Source: SuperOffload (Lian et al., 2026), bucketization repartitioning.
    """
    given = {"backward_s": backward_s, "elements_per_s": elements_per_s, "slack_s": slack_s}
    wrong = {name: value for name, value in given.items() if not (math.isfinite(value) and value >= 0)}
    if wrong or not elements_per_s:
        raise OffloadConfigError(
            f"hidden_ratio: expected seconds and a speed, 0 or more, got {wrong or given}"
        )
    if isinstance(model_or_sizes, nn.Module):
        specs = find_units(model_or_sizes, units)
        sizes = [sum(param.numel() for _, param in spec.params) * spec.trainable for spec in specs]
    else:
        sizes = list(model_or_sizes)
    total = sum(sizes)
    reduced, hidden, done_s = 0, 0, 0.0
    for size in reversed(sizes):
        reduced += size
        done_s = max(done_s, backward_s * reduced / max(total, 1)) + size / elements_per_s
        if done_s > backward_s + slack_s:
            break
        hidden = reduced
    return hidden / total if total else 1.0

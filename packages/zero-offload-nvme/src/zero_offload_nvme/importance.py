"""PURE: how important each channel of a parameter is, which are chosen, and where their elements lie in a shard.

In: the shape of a parameter, the part of it that a rank holds, a gradient. Out: squared norms by channel, to be added
over ranks; the numbers of the most important ones; runs of rows. No device, no group. Next: `chosen` moves the rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from zero_core.layout import LocalSlot

# Note [Channels are rows]
# A channel is one index of the first dimension: contiguous in the flat buffer, so that nearly every channel lies on one
# rank, a rank reads and writes it in one piece, and a selection is one number a channel on the wire. Squared norms are
# added over ranks before any rank chooses: which channels are chosen does not depend on how the buffer was cut.


@dataclass(frozen=True)
class Rows:
    """Equally long pieces of consecutive channels, one after another in a flat shard.

    Attributes:
        start: first element in the shard.
        first: the channel of the first piece.
        num: pieces.
        width: elements of each.
    """

    start: int
    first: int
    num: int
    width: int

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """[num, width] over a shard."""
        return flat[self.start : self.start + self.num * self.width].view(self.num, self.width)


def num_channels(shape: Sequence[int]) -> int:
    """Channels among which is chosen: the first dimension; 0 where there are fewer than two, or no elements."""
    return shape[0] if len(shape) > 1 and all(shape) else 0


def num_chosen(channels: int, ratio: float) -> int:
    """How many of them are chosen: `ratio`, rounded up."""
    return min(channels, math.ceil(ratio * channels - 1e-9))


def rows_of(shape: Sequence[int], part_start: int, param_start: int, numel: int) -> list[Rows]:
    """The part of a parameter that a rank holds, as pieces of channels: an end of one, whole ones, a beginning.

    Args:
        shape: of the parameter.
        part_start: the part's first element in the shard.
        param_start: the part's first element in the flattened parameter.
        numel: elements of the part.
    """
    if not num_channels(shape):
        return [Rows(part_start, 0, 1, numel)]
    width, found = math.prod(shape[1:]), list[Rows]()
    at, stop = param_start, param_start + numel
    while at < stop:
        channel, offset = divmod(at, width)
        whole = (stop - at) // width if not offset else 0
        num, length = (whole, width) if whole else (1, min(width - offset, stop - at))
        found.append(Rows(part_start + at - param_start, channel, num, length))
        at += num * length
    return found


def rows_in(place: LocalSlot) -> list[Rows]:
    """`rows_of` a parameter's part in a shard."""
    return rows_of(place.slot.shape, place.start, place.param_start, place.numel)


def importance(grad: torch.Tensor, rows: Sequence[Rows], channels: int) -> torch.Tensor:
    """Squared norm of each channel's gradient, as far as it lies in this shard.

    Args:
        grad: flat shard, any floating dtype.
        rows: of one parameter.
        channels: of the parameter.

    Returns:
        fp32, [channels]; to be added up over ranks.
    """
    found = torch.zeros(channels, dtype=torch.float32, device=grad.device)
    for each in rows:
        norms = torch.linalg.vector_norm(each.view(grad), dim=1, dtype=torch.float32)
        found[each.first : each.first + each.num] += norms.square_()
    return found


def most_important(values: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` channels with the largest values, ascending; of equal ones the first.

    Args:
        values: [channels].
        count: how many; at most as many as there are.

    Returns:
        int64, [count].
    """
    order = torch.sort(values, descending=True, stable=True).indices
    return order[:count].sort().values


def pick(rows: Sequence[Rows], chosen: torch.Tensor) -> list[tuple[Rows, torch.Tensor]]:
    """For each run of rows, the numbers of its pieces that are chosen; runs without any are left out.

    Args:
        rows: of one parameter.
        chosen: bool, [channels].
    """
    found = [(each, chosen[each.first : each.first + each.num].nonzero().flatten()) for each in rows]
    return [(each, pieces) for each, pieces in found if len(pieces)]


def as_mask(place: LocalSlot, chosen: torch.Tensor) -> torch.Tensor:
    """Which elements of a parameter's part belong to chosen channels, uint8 [numel]: how a choice is saved."""
    mask = torch.zeros(place.stop, dtype=torch.uint8)
    for rows, pieces in pick(rows_in(place), chosen):
        rows.view(mask)[pieces] = 1
    return mask[place.start :].clone()


def from_mask(place: LocalSlot, mask: torch.Tensor | None) -> torch.Tensor:
    """The way back, as far as this part says; bool [channels]; all, where none is chosen among.

    Args:
        place: the part.
        mask: what `as_mask` returned; None: nothing has been chosen.
    """
    channels = num_channels(place.slot.shape)
    if not channels:
        return torch.ones(1, dtype=torch.bool)
    chosen = torch.zeros(channels, dtype=torch.bool)
    if mask is not None:
        flat = torch.zeros(place.stop, dtype=torch.bool)
        flat[place.start :] = mask.cpu() != 0
        for rows in rows_in(place):
            chosen[rows.first : rows.first + rows.num] |= rows.view(flat)[:, 0]
    return chosen

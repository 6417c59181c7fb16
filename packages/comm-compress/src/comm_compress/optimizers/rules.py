"""The exact steps of warm-up: Adam as one fused pass, LAMB layer by layer; on whole buckets or on this rank's parts.

In: mean gradients. Out: updated values, momenta and variances. Next: `exact.publish_parts` where a rank has stepped a
part; otherwise the step is done.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accel_kernels import AdamSegment, adam_step, grad_norm_scale
from torch import Tensor
from zero_core import Wire

from .bucket import Bucket
from .layout import Slot, parts_of

Group = Mapping[str, Any]
NO_CORRECTION_STEP = 1e9
"""At this step beta^step is 0, and so no bias is left to correct."""


@dataclass(frozen=True)
class Piece:
    """What this rank steps of a parameter: flat tensors of one size.

    Attributes:
        values: fp32, updated.
        low: the parameter's own memory, in its dtype, where that is another one and may be written as it lies.
        write_back: the parameter, where `values` are a copy of it.
    """

    slot: Slot
    step: int
    grad: Tensor
    values: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    low: Tensor | None = None
    write_back: Tensor | None = None

    def finish(self) -> None:
        """Bring a copy back."""
        if self.write_back is not None:
            self.write_back.copy_(self.values.view(self.write_back.shape))


def whole_pieces(
    bucket: Bucket, grads: Sequence[Tensor | None], used: Collection[int] | None
) -> Iterator[Piece]:
    """Each parameter that moves, whole."""
    for slot in bucket.moving(used):
        grad, param = grads[slot.index], bucket.params[slot.position].detach()
        if grad is None:
            continue
        low = write_back = None
        if bucket.master is not None:
            values = bucket.view(bucket.master, slot).view(-1)
            low = param.view(-1) if param.is_contiguous() else None
            write_back = None if low is not None else param
        elif param.is_contiguous():
            values = param.view(-1)
        else:
            values, write_back = param.reshape(-1), param
        yield Piece(
            slot,
            int(bucket.numbers["step"][slot.position]) + 1,
            grad.detach().reshape(-1),
            values,
            bucket.flat["exp_avg"][slot.start : slot.stop],
            bucket.flat["exp_avg_sq"][slot.start : slot.stop],
            low=low,
            write_back=write_back,
        )


def part_pieces(bucket: Bucket, mean: Tensor, used: Collection[int] | None) -> Iterator[Piece]:
    """The parts of the parameters that move, in this rank's part of the bucket."""
    assert bucket.master is not None
    for part in parts_of(bucket.plan, *bucket.master_span):
        if used is None or part.slot.index in used:
            cut = slice(part.start, part.stop)
            yield Piece(
                part.slot,
                int(bucket.numbers["step"][part.slot.position]) + 1,
                mean[cut],
                bucket.master[cut],
                bucket.flat["exp_avg"][cut],
                bucket.flat["exp_avg_sq"][cut],
            )


def step_adam(pieces: Iterator[Piece], groups: Sequence[Group], factor: float) -> None:
    """Adam or AdamW on gradients times `factor`.

    Source: arXiv:1412.6980, algorithm 1; arXiv:1711.05101, algorithm 2.
    """
    for piece in pieces:
        group = groups[piece.slot.group]
        beta1, beta2 = group["betas"]
        segment = AdamSegment(
            start=0,
            stop=piece.values.numel(),
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=piece.step if group["bias_correction"] else NO_CORRECTION_STEP,
            decoupled=group["decoupled_weight_decay"],
        )
        adam_step(
            piece.values, piece.grad, piece.exp_avg, piece.exp_avg_sq, [segment],
            grad_scale=factor, low_precision=piece.low,
        )  # fmt: skip
        piece.finish()


def step_lamb(
    pieces: Iterator[Piece], groups: Sequence[Group], factor: float, *, num_params: int, wire: Wire | None
) -> list[list[float]]:
    """LAMB on gradients times `factor`.

    For each parameter x, with Adam's bias-corrected m and v: r = m / (sqrt(v) + eps) + weight_decay x, and
    x -= lr c r with the coefficient c = |x| / |r| (`trust`).

    Args:
        pieces: of all buckets.
        groups: the optimizer's.
        factor: of gradients.
        num_params: indices of parameters are below.
        wire: where ranks hold parts, to add up norms; every rank calls it then. None: pieces are whole.

    Returns:
        [|x|, |r|] of each parameter by index, on every rank; zeros where it did not move.

    Source: You et al., LAMB, arXiv:1904.00962, algorithm 2.
    """
    device = torch.device("cpu") if wire is None else wire.device
    squares = torch.zeros(num_params, 2, dtype=torch.float64, device=device)
    waiting: list[tuple[Piece, Tensor]] = []
    for piece in pieces:
        group, update = groups[piece.slot.group], _lamb_update(piece, groups[piece.slot.group], factor)
        for column, tensor in enumerate((piece.values, update)):
            squares[piece.slot.index, column] += grad_norm_scale(tensor)[0].to(device)
        if wire is None:
            _lamb_move(piece, update, group, squares[piece.slot.index].sqrt().tolist())
        else:
            waiting.append((piece, update))
    if wire is not None:
        wire.all_reduce("norms of layers", squares, dist.ReduceOp.SUM).wait()
    norms: list[list[float]] = squares.sqrt().tolist()
    for piece, update in waiting:
        _lamb_move(piece, update, groups[piece.slot.group], norms[piece.slot.index])
    return norms


def _lamb_update(piece: Piece, group: Group, factor: float) -> Tensor:
    beta1, beta2 = group["betas"]
    grad = piece.grad.float() if factor == 1.0 else piece.grad.float() * factor
    piece.exp_avg.lerp_(grad, 1 - beta1)
    piece.exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    first, second = corrections(group, piece.step)
    update = piece.exp_avg_sq.sqrt().div_(math.sqrt(second)).add_(group["eps"]).mul_(first)
    torch.div(piece.exp_avg, update, out=update)
    return update.add_(piece.values, alpha=group["weight_decay"])


def _lamb_move(piece: Piece, update: Tensor, group: Group, norms: Sequence[float]) -> None:
    piece.values.add_(update, alpha=-float(group["lr"]) * trust(norms, group))
    if piece.low is not None:
        piece.low.copy_(piece.values)
    piece.finish()


def trust(norms: Sequence[float], group: Group) -> float:
    """LAMB's coefficient of a layer: |x| / |r| within the group's bounds; 1 where one of them is 0."""
    values, update = norms
    if not (values > 0 and update > 0):
        return 1.0
    return float(min(max(values / update, group["min_coeff"]), group["max_coeff"]))


def corrections(group: Group, step: int) -> tuple[float, float]:
    """1 - beta1^t and 1 - beta2^t, or ones where the group corrects no bias."""
    if not group["bias_correction"]:
        return 1.0, 1.0
    beta1, beta2 = group["betas"]
    return 1 - beta1**step, 1 - beta2**step

"""What the optimizers of this package share: one step from local gradients to the same parameters on every rank.

In: gradients of this rank alone. Out: updated parameters. `begin` agrees on what there is and averages what must be
exact, `finish` steps: exactly, by signs (momenta through the 1-bit all-reduce, bucket by bucket), or alone. What is
stepped how, and what is kept for it, a subclass says. Next: `onebit_adam`, `zero_one_adam`, `onebit_lamb`.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accel_kernels import grad_norm_scale
from torch import Tensor

from ..allreduce_1bit import start_allreduce_1bit
from ..errors import CompressConfigError, CompressStateError
from ..traffic import Entry
from ..wire import Sent
from ..wire_1bit import sent_1bit, sent_exact
from . import exact
from .bucket import Bucket
from .layout import Slot
from .pipeline import pipeline
from .policy import Compression
from .rounds import Round, SignFlight, Travel, fingerprint, kept_of
from .saved import SavedOptimizer
from .verdict import Verdict, agree, check_alike, judge

logger = logging.getLogger(__name__)


class CompressedOptimizer(SavedOptimizer):
    """Base of the optimizers of this package.

    Attributes:
        last_step_skipped: the last `step` found a gradient that is not finite on some rank, and changed nothing on any.
        agrees_always: ranks agree on gradients where a step sends nothing, too (24 bytes), and skip together.
    """

    # GradScaler: hand over scale and overflow instead of leaving `step` out on one rank alone.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        group: dist.ProcessGroup | None,
        compression: Compression | None,
    ) -> None:
        super().__init__(params, defaults, group, compression)
        self.last_step_skipped = False
        self.agrees_always = False
        self._round: Round | None = None
        self._alike_checked = False
        self._scratch: Tensor | None = None
        self._warned = False
        self._counted = {
            Travel.EXACT: Entry("gradients"),
            Travel.SIGNS: Entry("signs of momenta"),
            Travel.NOTHING: Entry("nothing"),
        }

    # -- what a subclass says ---------------------------------------------------------------------------------

    @abstractmethod
    def travel(self) -> Travel:
        """What the next step sends; the same on every rank."""

    @abstractmethod
    def _step_exact(self, round_: Round) -> None:
        """Step all buckets by mean gradients."""

    @abstractmethod
    def _before_signs(self, bucket: Bucket, round_: Round) -> Tensor:
        """This rank's gradients into its momentum; returns what is to be averaged, flat, in place."""

    @abstractmethod
    def _after_signs(self, bucket: Bucket, mean: Tensor, round_: Round) -> None:
        """The mean is there: move the bucket's parameters."""

    def _step_alone(self, round_: Round) -> None:
        """Step without a word to others, where `travel` says so."""
        raise AssertionError(f"{type(self).__name__} never steps alone")

    def _end(self, round_: Round) -> None:
        """A step is done."""

    def _touched(self) -> set[int]:
        """Parameters that this rank moved alone, by index."""
        return set()

    def _edited(self, bucket: Bucket, slots: Sequence[Slot]) -> None:
        """Others wrote to parameters since the last step; the master has taken that over."""

    # -- a step -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters from this rank's gradients; every rank calls it.

        Gradients are those of this rank's own loss: of a plain loop, or of DistributedDataParallel under `no_sync`.
        A parameter that some rank has a gradient of moves on all, with zeros from the others; one that no rank has a
        gradient of stays as it is. Where any rank has an infinity or NaN, nothing changes on any.

        Args:
            closure: computes the loss again, with gradients, and returns it.

        Raises:
            CompressStateError: parameters that differ between ranks (first step), a sparse gradient, a parameter that
                was unfrozen after compression began.
            zero_core.CollectiveError: a rank died, or did not come.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, overflow = self._of_scaler()
        round_ = self._round
        grads = self._gradients()
        if round_ is None or round_.seen != fingerprint(grads):
            round_ = self._begin(grads, scale=scale, overflow=overflow)
        elif scale != 1.0:
            raise CompressStateError(
                "clip_grad_norm saw gradients that are still scaled; call scaler.unscale_(optimizer) before it"
            )
        self.finish(round_)
        return loss

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scale the next step's gradients so that their norm is at most `max_norm`; every rank calls it.

        In warm-up, gradients are averaged now (`param.grad` is their mean then, unless state is sharded), and the norm
        is that of the mean, as under data parallelism. Later the mean is known to nobody: the norm is then the root of
        the mean over ranks of squared norms. It is no smaller than that of the mean, so the promise holds; and all
        ranks use one factor, so that the mean keeps its direction (clipping each rank's gradient by its own norm, as
        `torch.nn.utils.clip_grad_norm_` does before a step, weighs ranks with large gradients less). Where a step of
        0/1 Adam sends nothing, each rank clips by its own norm.

        Returns:
            float32 scalar tensor: the norm before.

        Raises:
            CompressConfigError: `max_norm` is not positive.
        """
        if not max_norm > 0:
            raise CompressConfigError(f"clip_grad_norm: expected max_norm > 0, got {max_norm!r}")
        with torch.no_grad():
            round_ = self._begin(self._gradients())
            if math.isfinite(round_.norm):
                round_.scale *= min(1.0, max_norm / (round_.norm + 1e-6))
            self._round = round_
        return torch.tensor(round_.norm, dtype=torch.float32)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients."""
        self._round = None
        super().zero_grad(set_to_none)

    def begin(self, grads: list[Tensor | None], *, scale: float = 1.0, overflow: bool = False) -> Round:
        """Agree on this rank's gradients, and average them where the step needs them exact; every rank calls it.

        For those who hold gradients elsewhere than in `param.grad`. `finish` must come next.

        Args:
            grads: by the parameters' indices (`names`), dense; those that are averaged are written in place.
            scale: this rank's own factor, such as that of its loss scaler.
            overflow: this rank knows of an overflow already.
        """
        wire, travel = self._wire(), self.travel()
        if not self._alike_checked:
            check_alike(wire, self._alike())
            self._alike_checked = True
        alone = travel is Travel.NOTHING and not self.agrees_always
        if alone:
            verdict = judge(wire.device, grads, scale, overflow=overflow)
        else:
            verdict = agree(wire, grads, scale, overflow=overflow, touched=self._touched())
        round_ = Round(travel, grads, verdict, scale)
        if alone and not verdict.finite:
            # Others go on, and so must this rank's count of steps; its gradient it can leave out alone.
            logger.warning("step %d: a gradient of this rank is not finite; left out", self.num_steps + 1)
            return Round(travel, [None] * len(grads), Verdict(True, 0.0, None), scale, norm=math.nan)
        if not verdict.finite:
            return round_
        if travel is not Travel.EXACT:
            round_.norm = math.sqrt(verdict.mean_square)
            if travel is Travel.NOTHING:
                round_.verdict = Verdict(
                    True, verdict.mean_square, None
                )  # all move, by their momentum at least
            return round_
        dtype, round_.scale = self.compression.reduce_dtype, 1.0
        if self._steps_parts():
            round_.parts = exact.average_to_parts(self._buckets, grads, wire, dtype=dtype, scale=scale)
            squares = grad_norm_scale(round_.parts, out=_zeros(2, wire.device))
            wire.all_reduce("norm of mean gradients", squares, dist.ReduceOp.SUM).wait()
        else:
            used = verdict.used
            exact.average(self._buckets, grads, wire, dtype=dtype, scale=scale, used=used)
            moving = [grad.reshape(-1) for grad in grads if grad is not None]
            squares = grad_norm_scale(moving, out=_zeros(2, wire.device))
        round_.norm = math.sqrt(float(squares[0]))
        return round_

    def finish(self, round_: Round, factor: float = 1.0) -> None:
        """Step with what `begin` returned, gradients multiplied by `factor` (the same on all ranks)."""
        self._round = None
        self.last_step_skipped = not round_.verdict.finite
        if self.last_step_skipped:
            if not self._warned:
                self._warned = True
                logger.warning("step %d: a gradient is not finite; skipped on all ranks", self.num_steps + 1)
            return
        round_.scale *= factor
        self._count(round_.travel)
        for bucket in self._buckets:
            self._edited(bucket, bucket.take_edits())
        if round_.travel is Travel.EXACT:
            self._step_exact(round_)
        elif round_.travel is Travel.SIGNS:
            self._step_signs(round_)
        else:
            self._step_alone(round_)
        self.num_steps += 1
        self._end(round_)
        self._note()

    def entries(self) -> list[Entry]:
        """What steps have sent, for `comm_compress.traffic`; beside what exact ones would have."""
        return [entry for entry in self._counted.values() if entry.calls]

    def _count(self, travel: Travel, *, steps: int = 1) -> None:
        rank, world = self.group.rank(), self.group.size()
        wire_dtype = self.compression.reduce_dtype
        exact_bytes = signs_bytes = 0
        for bucket in self._buckets:
            numel, itemsize = bucket.plan.numel, (wire_dtype or bucket.dtype).itemsize
            exact_bytes += sent_exact(numel, world, itemsize).total
            signs_bytes += sent_1bit(numel, world, rank).total
        entry = self._counted[travel]
        entry.begin(Sent(across=steps * exact_bytes))
        if travel is not Travel.NOTHING:
            entry.sent += Sent(across=exact_bytes if travel is Travel.EXACT else signs_bytes)

    def _step_signs(self, round_: Round) -> None:
        wire, used = self._wire(), round_.verdict.used
        counted = self._counted[Travel.SIGNS]

        def send(flight: SignFlight) -> None:
            flight.kept = kept_of(flight.bucket, flight.state, wire, used)
            tensor = self._before_signs(flight.bucket, round_)
            with counted.codec.running(wire.device):
                flight.reduction = start_allreduce_1bit(tensor, wire, flight.state)

        def serve(flight: SignFlight) -> None:
            assert flight.reduction is not None
            flight.reduction.arrive()
            with counted.codec.running(wire.device):
                flight.reduction.advance()

        def receive(flight: SignFlight) -> None:
            assert flight.reduction is not None
            serve(flight)
            self._after_signs(flight.bucket, flight.reduction.tensor, round_)
            for place, before in flight.kept:
                place.copy_(before)
            flight.kept, flight.reduction = [], None

        flights = [SignFlight(bucket, self._signs[bucket.plan.name]) for bucket in self._buckets]
        pipeline(flights, send, serve, receive)

    def _move(
        self,
        bucket: Bucket,
        direction: Tensor,
        used: frozenset[int] | None,
        rate: Callable[[int, int], float],
    ) -> None:
        """Values = values (1 - lr weight_decay) - rate(group, step) direction, where weight decay is decoupled."""
        for run in bucket.runs(used):
            group = self.param_groups[run.group]
            decay = 1 - float(group["lr"]) * group["weight_decay"] if group["decoupled_weight_decay"] else 1.0
            if bucket.master is not None:
                values = [bucket.master[run.start : run.stop]]
                directions = [direction[run.start : run.stop]]
            else:
                values = bucket.params_of(run.slots)
                directions = bucket.views(direction, run.slots)
            if decay != 1.0:
                torch._foreach_mul_(values, decay)
            torch._foreach_add_(values, directions, alpha=-rate(run.group, run.step))
        bucket.publish(bucket.moving(used))

    def _momentum(self, bucket: Bucket, round_: Round, momentum: Tensor, out: Tensor) -> None:
        """Out = beta1 momentum + (1 - beta1) gradient of this rank, of what moves; `out` may be `momentum`."""
        for run in bucket.runs(round_.verdict.used):
            group = self.param_groups[run.group]
            beta1 = group["betas"][0]
            torch.mul(momentum[run.start : run.stop], beta1, out=out[run.start : run.stop])
            pairs = [(bucket.view(out, slot), round_.grads[slot.index]) for slot in run.slots]
            given = [(view, grad) for view, grad in pairs if grad is not None]
            if given:
                views, grads = [view for view, _ in given], [grad for _, grad in given]
                torch._foreach_add_(views, grads, alpha=(1 - beta1) * round_.scale)
            if group["weight_decay"] and not group["decoupled_weight_decay"]:
                master = None if bucket.dtype == torch.float32 else bucket.master
                values = bucket.params_of(run.slots) if master is None else bucket.views(master, run.slots)
                torch._foreach_add_(
                    bucket.views(out, run.slots), values, alpha=(1 - beta1) * group["weight_decay"]
                )

    def _gradients(self) -> list[Tensor | None]:
        self._plan()
        return [param.grad for param in self._params]

    def _begin(self, grads: list[Tensor | None], *, scale: float = 1.0, overflow: bool = False) -> Round:
        round_ = self.begin(grads, scale=scale, overflow=overflow)
        for param, grad in zip(self._params, round_.grads, strict=True):
            if param.grad is None and grad is not None:
                param.grad = grad
        round_.seen = fingerprint(round_.grads)
        return round_

    def _of_scaler(self) -> tuple[float, bool]:
        """The factor that unscales this rank's gradients, and whether its GradScaler has found an overflow."""
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        return (
            1.0 if scale is None else 1.0 / float(scale),
            found is not None and bool(found),
        )

    def _alike(self) -> list[Tensor]:
        """What must be the same on all ranks before a step."""
        return self._params

    def _steps_parts(self) -> bool:
        """Whether exact steps are those of this rank's parts alone."""
        return False

    def _borrow(self, bucket: Bucket) -> Tensor:
        """fp32 scratch of the bucket's size, until the next call."""
        if self._scratch is None or self._scratch.numel() < bucket.plan.numel:
            self._scratch = torch.empty(max(b.plan.numel for b in self._buckets), device=bucket.device)
        return self._scratch[: bucket.plan.numel]


def _zeros(numel: int, device: torch.device) -> Tensor:
    return torch.zeros(numel, dtype=torch.float64, device=device)

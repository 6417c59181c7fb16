"""What the optimizers of this package share: one step from local gradients to the same parameters on every rank.

In: gradients of this rank alone. Out: updated parameters. `begin` agrees on what there is and averages what must be
exact, `finish` steps: exactly, by signs (momenta through the 1-bit all-reduce, bucket by bucket), or alone. What is
stepped how, and what is kept for it, a subclass says. Next: `onebit_adam`, `zero_one_adam`, `onebit_lamb`.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from accel_kernels import grad_norm_scale
from torch import Tensor

from ..errors import CompressConfigError, CompressStateError
from ..traffic import Entry
from . import exact
from .bucket import Bucket
from .common import CommonPart
from .counts import StepCounts
from .moves import blend
from .policy import Compression
from .rounds import Round, Travel, fingerprint
from .saved import SavedOptimizer
from .signs import average_by_signs
from .verdict import Verdict, agree, check_alike, judge

logger = logging.getLogger(__name__)


class CompressedOptimizer(SavedOptimizer):
    """Base of the optimizers of this package.

    Attributes:
        last_step_skipped: the last `step` found a gradient that is not finite on some rank, and changed nothing on any.
        agrees_always: ranks agree on gradients where a step sends nothing, too (32 bytes), and skip together.
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
        self._num_checked = 0  # parameters that are known to be alike on all ranks
        self._scratch: Tensor | None = None
        self._warned = False
        self._counts = StepCounts()
        self._common = CommonPart()

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

    def _between_steps(self, what: str) -> None:
        """Refuse something that would change what a step under way is about."""
        if self._round is not None:
            raise CompressStateError(
                f"{what}: a step has begun (clip_grad_norm); call step or zero_grad before it"
            )

    def _loaded(self) -> None:
        self._round = None
        super()._loaded()

    def _touched(self) -> set[int]:
        """Parameters that this rank moved alone, by index."""
        return set()

    # -- a step -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters from this rank's gradients; every rank calls it.

        Gradients are those of this rank's own loss: of a plain loop, or of DistributedDataParallel under `no_sync`.
        A parameter that some rank has a gradient of moves on all, with zeros from the others; one that no rank has a
        gradient of stays as it is. Where any rank has an infinity or NaN, or the mean has in the dtype in which it
        travels, nothing changes on any.

        Args:
            closure: computes the loss again, with gradients, and returns it.

        Raises:
            CompressStateError: parameters that differ between ranks (their first step), a sparse gradient, a parameter
                that was unfrozen after compression began, or written where 0/1 Adam's ranks are apart.
            zero_core.CollectiveError: a rank died, or did not come.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        unscale, overflow = self._of_scaler()
        round_ = self._round
        grads = self._gradients()
        if round_ is None or round_.seen != fingerprint(grads):
            round_ = self._begin(grads, unscale, overflow=overflow)
        elif unscale != round_.unscale:  # where scales are ranks' own, that there is one is not: all raise
            raise CompressStateError(
                "clip_grad_norm saw gradients that are still scaled; call scaler.unscale_(optimizer) before it, or "
                "(fp16 gradients, which torch unscales for nobody) clip_grad_norm(max_norm, scaler)"
            )
        self.finish(round_)
        return loss

    def clip_grad_norm(self, max_norm: float, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """Scale the next step's gradients so that their norm is at most `max_norm`; every rank calls it.

        In warm-up, gradients are averaged now (`param.grad` is their mean then, unless state is sharded), and the norm
        is that of the mean, as under data parallelism. Later the mean is known to nobody: its norm is then estimated
        from the ranks' own norms and what exact steps have shown of their noise (Note [What ranks have in common]). All
        ranks use one factor, so that the mean keeps its direction (clipping each rank's gradient by its own norm, as
        `torch.nn.utils.clip_grad_norm_` does before a step, weighs ranks with large gradients less). Where a step of
        0/1 Adam sends nothing, each rank estimates from its own norm.

        Args:
            max_norm: see above.
            scaler: whose scale gradients still have; for fp16 gradients, which `scaler.unscale_` refuses.

        Returns:
            float32 scalar tensor: the norm before, or its estimate.

        Raises:
            CompressConfigError: `max_norm` is not positive.
        """
        if not max_norm > 0:
            raise CompressConfigError(f"clip_grad_norm: expected max_norm > 0, got {max_norm!r}")
        with torch.no_grad():
            grads, round_ = self._gradients(), self._round
            if round_ is None or round_.seen != fingerprint(grads):
                unscale = None
                if scaler is not None and scaler.is_enabled():
                    unscale = 1.0 / scaler.get_scale()
                round_ = self._begin(grads, unscale)
            if math.isfinite(round_.norm):
                # Means are unscaled already.
                unscale = 1.0 if round_.unscale is None or round_.travel is Travel.EXACT else round_.unscale
                round_.scale = min(round_.scale, unscale * min(1.0, max_norm / (round_.norm + 1e-6)))
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
        if self._num_checked < len(self._params):
            check_alike(wire, self._alike())
            self._num_checked = len(self._params)
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
            round_.norm = self._common.norm(verdict.mean_square, wire.group.size())
            return round_
        dtype, round_.scale, parts = self.compression.reduce_dtype, 1.0, self._steps_parts()
        scaled = verdict.scaled
        self._counts.exact(self._buckets, self.group, dtype, scaled=scaled, parts=parts)
        if parts:
            round_.parts = exact.average_to_parts(
                self._buckets, grads, wire, dtype=dtype, scale=scale, scaled=scaled
            )
            squares = grad_norm_scale(round_.parts, out=_zeros(2, wire.device))
            wire.all_reduce("norm of mean gradients", squares, dist.ReduceOp.SUM).wait()
        else:
            used = verdict.used
            exact.average(self._buckets, grads, wire, dtype=dtype, scale=scale, scaled=scaled, used=used)
            moving = [grad.reshape(-1) for grad in grads if grad is not None]
            squares = grad_norm_scale(moving, out=_zeros(2, wire.device))
        square, bad = squares.tolist()
        if bad or not math.isfinite(square):  # finite on every rank, but not in the dtype of the wire
            round_.verdict = Verdict(False, 0.0, verdict.used)
        else:
            round_.norm = math.sqrt(square)
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
        self._take_edits()
        counted = self._buckets, self.group, self.compression.reduce_dtype
        if round_.travel is Travel.EXACT:
            self._common.observe(round_.norm**2, round_.verdict.mean_square, self.group.size())
            self._step_exact(round_)
        elif round_.travel is Travel.SIGNS:
            self._step_signs(round_)
            self._counts.signs(*counted)
        else:
            self._step_alone(round_)
            self._counts.nothing(*counted)
        self.num_steps += 1
        self._end(round_)
        self._note()

    def entries(self) -> Iterator[Entry]:
        """What steps have sent, for `comm_compress.traffic`; beside what exact ones would have."""
        return self._counts.entries()

    def _step_signs(self, round_: Round) -> None:
        average_by_signs(
            self._buckets,
            self._signs,
            self._wire(),
            round_.verdict.used,
            before=lambda bucket: self._before_signs(bucket, round_),
            after=lambda bucket, mean: self._after_signs(bucket, mean, round_),
            codec=self._counts.codec,
        )

    def _momentum(self, bucket: Bucket, round_: Round, out: Tensor) -> None:
        """This rank's gradient into its momentum (`moves.blend`); `out` may be the momentum."""
        momentum, used = bucket.flat["exp_avg"], round_.verdict.used
        blend(bucket, self.param_groups, round_.grads, round_.scale, used, momentum, out)

    def _gradients(self) -> list[Tensor | None]:
        self._plan()
        return [param.grad for param in self._params]

    def _begin(self, grads: list[Tensor | None], unscale: float | None, *, overflow: bool = False) -> Round:
        round_ = self.begin(grads, scale=1.0 if unscale is None else unscale, overflow=overflow)
        round_.unscale = unscale
        for param, grad in zip(self._params, round_.grads, strict=True):
            if param.grad is None and grad is not None:
                param.grad = grad.to(param.dtype)
        round_.seen = fingerprint([param.grad for param in self._params])
        return round_

    def _of_scaler(self) -> tuple[float | None, bool]:
        """The factor that unscales this rank's gradients, if any, and whether its GradScaler has found an overflow."""
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        return (
            None if scale is None else 1.0 / float(scale),
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

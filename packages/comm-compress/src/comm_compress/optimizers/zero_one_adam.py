"""0/1 Adam: the variance is updated ever more rarely, momenta travel as signs, and later not at every step.

In: local gradients. Out: updated parameters, the same on all ranks whenever they have synchronized. `base` runs the
steps, `intervals` says when; this module says what is kept and what is computed.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import CompressStateError
from .base import CompressedOptimizer
from .bucket import Bucket
from .drift import NUMBERS, drift_on, forget, land, own_values, refuse_edits
from .intervals import Intervals
from .kinds import Held
from .layout import Slot
from .moves import move
from .options import adam_defaults
from .policy import Compression
from .rounds import Round, Travel
from .scales import layer_scales
from .signs import kept, residuals
from .variances import add_squares, settle_roots
from .verdict import agree


class Variance(enum.Enum):
    """UPDATED from time to time -> FROZEN, once."""

    UPDATED = "updated"
    FROZEN = "frozen"


class ZeroOneAdam(CompressedOptimizer):
    """AdamW (or Adam) whose variance is updated at a few steps, and whose ranks synchronize at others.

    It does all communication, as `OneBitAdam` does. With m_i, g_i rank i's momentum and gradient, d = sqrt(v / (1 -
    beta2^j)) + eps after j updates of the variance, and rates b = lr / (1 - beta1^t); at each step one of three:

    - update of the variance (T_v; `Intervals.variance_steps`): g = mean of g_i, exact; v = beta2 v + (1 - beta2) g^2,
      m = beta1 m + (1 - beta1) g, x = x (1 - lr weight_decay) - b m / d.
    - alone: m_i = beta1 m_i + (1 - beta1) g_i, and what the rank has drifted, times d:
      u_i = u_i (1 - lr weight_decay) + b m_i. It goes on from x - u_i / d.
    - synchronization (T_u; `Intervals.sync_steps`): the same, then u = `allreduce_1bit` of u_i, x = x - u / d (with
      all weight decay since the last one), m = u / (sum of b since then, each with the weight decay after it); u_i = 0.

    At an update of the variance, the exact mean is known and nothing else need travel: a 1-bit all-reduce without
    error, so to speak, which leaves the residuals alone.

    Args:
        params: parameters, or groups with options of their own; float32, bfloat16, float16.
        lr: learning rate.
        betas: decay of momentum and variance.
        eps: added to the root of the variance.
        weight_decay: decay of the values.
        var_freeze_step, var_update_scaler, local_step_scaler, local_step_clipper: see `Intervals`.
        group: the ranks; None: all.
        bias_correction: correct moments for their start at zero.
        decoupled_weight_decay: AdamW; False adds the decay to the gradient (Adam).
        compression: what shares a scale, and how bytes travel.

    Between synchronizations ranks have parameters of their own: `shared_values` shows what they have in common (to
    save it, say), `synchronize` makes them alike (at the end, or before something else writes parameters, which is
    refused otherwise). Where a step sends nothing, ranks agree on nothing: a rank whose gradient is not finite leaves
    that gradient out, and parameters without one count as having zeros, but for those that have yet to move, which all
    ranks must have agreed on, and frozen ones.

    Raises:
        CompressConfigError: an argument that cannot be honoured.

    Bytes a parameter and rank, N ranks, besides parameter and gradient; low: parameters are not fp32:

    | variance is | momentum | variance | divisor | drift | master | residuals |
    | --- | --- | --- | --- | --- | --- | --- |
    | updated | 4 | 4 | 4 | | 4 if low | worker 4, server 4/N |
    | frozen | 4 | | 4 | 4 where ranks step alone | 4 if low or ranks step alone | worker 4, server 4/N |

    Only the server's residual is sharded: every rank steps everything at every step.
    Sent: `wire_1bit.sent_exact` at updates of the variance, `wire_1bit.sent_1bit` at synchronizations, 32 bytes at
    both; at synchronizations also, as they are, momenta of parameters whose rate has been 0 since the last one.
    Source: Lu et al., 0/1 Adam, arXiv:2202.06009, algorithm 1 and section 6.
    """

    numbers_kept: ClassVar[Mapping[str, float]] = {
        "step": 0,
        "scale": 1.0,
        "variance_updates": 0,
        **NUMBERS,
    }

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        var_freeze_step: int = 100_000,
        var_update_scaler: int = 16,
        local_step_scaler: int = 32_678,
        local_step_clipper: int = 16,
        group: dist.ProcessGroup | None = None,
        bias_correction: bool = True,
        decoupled_weight_decay: bool = True,
        compression: Compression | None = None,
    ) -> None:
        defaults = adam_defaults(
            lr,
            betas,
            eps,
            weight_decay,
            bias_correction=bias_correction,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self.intervals = Intervals(
            var_freeze_step=var_freeze_step,
            var_update_scaler=var_update_scaler,
            local_step_scaler=local_step_scaler,
            local_step_clipper=local_step_clipper,
        )
        self.variance = Variance.UPDATED
        self._keeps_common = local_step_clipper > 1
        self._num_updates = 0
        self._next_update = 1
        self._num_syncs = 0
        self._since_sync = 0
        self._flushing = False
        self._owed: dict[str, list[tuple[Tensor, Tensor]]] = {}
        super().__init__(params, defaults, group, compression)

    @property
    def steps_since_sync(self) -> int:
        """Steps that this rank has gone alone; 0: parameters are the same on all ranks."""
        return self._since_sync

    @torch.no_grad()
    def synchronize(self) -> None:
        """Average what ranks have drifted, by signs, without a step; every rank calls it. Done if they have not.

        Raises:
            CompressStateError: a step has begun, or something wrote parameters meanwhile.
        """
        if self._since_sync:
            self._between_steps("synchronize")
            self._take_edits()
            nothing: list[Tensor | None] = [None] * len(self._params)
            verdict = agree(self._wire(), nothing, 1.0, touched=self._touched())
            self._flushing = True
            try:
                round_ = Round(Travel.SIGNS, nothing, verdict, 1.0)
                self._step_signs(round_)
                dtype = self.compression.reduce_dtype
                self._counts.signs(self._buckets, self.group, dtype, in_step=False)
                self._end(round_)
                self._note()
            finally:
                self._flushing = False

    @contextmanager
    def shared_values(self) -> Iterator[None]:
        """Inside, parameters are what all ranks had after the last synchronization; then this rank's own again."""
        with torch.no_grad():
            self._take_edits()
            for bucket in self._buckets if self._since_sync else ():
                bucket.publish(bucket.plan.slots)
            self._note()
        try:
            yield
        finally:
            with torch.no_grad():
                self._show_own()

    def take_values(self) -> None:
        """See `BucketedOptimizer.take_values`.

        Raises:
            CompressStateError: each rank has values of its own, so that it is not known what all have in common.
        """
        if self._since_sync:
            raise CompressStateError(
                f"take_values: expected the same values on all ranks, got {self._since_sync} step(s) that each went "
                "alone; call synchronize() before parameters are written"
            )
        super().take_values()

    # -- what is kept -----------------------------------------------------------------------------------------

    def keys(self, progress: Mapping[str, Any], *, low: bool) -> dict[str, Held]:
        """See `BucketedOptimizer.keys`."""
        apart = progress["since_sync"] > 0
        kept = {"exp_avg": Held.OWN if apart else Held.WHOLE, "denominator": Held.WHOLE}
        kept |= {"worker_error": Held.OWN, "server_error": Held.CHUNK}
        if Variance(progress["variance"]) is Variance.UPDATED:
            kept["exp_avg_sq"] = Held.WHOLE
        elif progress["keeps_common"]:
            low = True  # what ranks have in common, beside what they show
        if low:
            kept["master"] = Held.WHOLE
        if apart:
            kept["drift"] = Held.OWN
        return kept

    def settings(self) -> Any:
        """See `BucketedOptimizer.settings`."""
        return self.intervals

    def progress(self) -> dict[str, Any]:
        """See `BucketedOptimizer.progress`."""
        return {
            "kind": type(self).__name__,
            "num_steps": self.num_steps,
            "common": self._common.state(),
            "variance": self.variance.value,
            "num_updates": self._num_updates,
            "next_update": self._next_update,
            "num_syncs": self._num_syncs,
            "since_sync": self._since_sync,
            "keeps_common": self._keeps_common,
        }

    def _set_progress(self, progress: Mapping[str, Any]) -> None:
        self._common.load(progress["common"])
        self.variance = Variance(progress["variance"])
        self._num_updates = progress["num_updates"]
        self._next_update = progress["next_update"]
        self._num_syncs = progress["num_syncs"]
        self._since_sync = progress["since_sync"]
        self._keeps_common = bool(progress["keeps_common"])

    def _loaded(self) -> None:
        self._freeze_in_time()  # it may have been saved by one that freezes later
        if not self._keeps_common and self.intervals.local_step_clipper > 1:
            self._keeps_common = True  # it was saved by one whose ranks never step alone
            for bucket in self._buckets:
                self._allocate(bucket, self.progress())
        self._show_own()
        super()._loaded()

    def _alike(self) -> list[Tensor]:
        masters = [bucket.master for bucket in self._buckets if bucket.master is not None]
        return masters if self._since_sync else super()._alike()

    def _touched(self) -> set[int]:
        return {
            slot.index
            for bucket in self._buckets
            for slot in bucket.plan.slots
            if bucket.numbers["alone"][slot.position] or self._has_yet_to_move(bucket, slot)
        }

    def _has_yet_to_move(self, bucket: Bucket, slot: Slot) -> bool:
        """Whether this rank alone has had its first gradients; ranks move it once they have agreed that it is used."""
        if bucket.numbers["step"][slot.position]:
            return False
        return bool(bucket.flat["exp_avg"][slot.start : slot.stop].any())

    # -- steps ------------------------------------------------------------------------------------------------

    def travel(self) -> Travel:
        """See `CompressedOptimizer.travel`."""
        step = self.num_steps + 1
        if self.variance is Variance.UPDATED and step == self._next_update:
            return Travel.EXACT
        alone = self._since_sync + 1 < self.intervals.sync_distance(step)
        return Travel.NOTHING if alone else Travel.SIGNS

    def _step_exact(self, round_: Round) -> None:
        used = round_.verdict.used
        for bucket in self._buckets:
            momentum = bucket.flat["exp_avg"]
            self._momentum(bucket, round_, momentum)
            add_squares(bucket, self.param_groups, round_.grads, round_.scale, used)
            bucket.count(used, "variance_updates")
            self._divide_by(bucket)
            direction = torch.div(momentum, bucket.flat["denominator"], out=self._borrow(bucket))
            move(bucket, self.param_groups, direction, used)
            bucket.count(used)
        distance = self.intervals.variance_distance(self._num_updates)
        self._num_updates += 1
        self._next_update = self.num_steps + 1 + distance
        if self._num_syncs == 0:
            for bucket in self._buckets:
                bucket.numbers["scale"] = layer_scales(bucket, enabled=self.compression.scale_layers)

    def _divide_by(self, bucket: Bucket) -> None:
        """The divisor that belongs to the variance."""
        denominator = bucket.flat["denominator"].copy_(bucket.flat["exp_avg_sq"])
        settle_roots(
            bucket,
            denominator,
            bucket.numbers["variance_updates"],
            self.param_groups,
            self.compression.variance_floor,
        )
        for slot in bucket.plan.slots:
            denominator[slot.start : slot.stop].add_(self.param_groups[slot.group]["eps"])

    def _step_alone(self, round_: Round) -> None:
        # The same on all ranks, without a word: by their momentum, what has been moved before, and is not frozen.
        moving = {
            slot.index
            for bucket in self._buckets
            for slot in bucket.plan.slots
            if bucket.numbers["step"][slot.position] and bucket.params[slot.position].requires_grad
        }
        given = {index for index, grad in enumerate(round_.grads) if grad is not None}
        round_.verdict = replace(round_.verdict, used=frozenset(moving | given))
        for bucket in self._buckets:
            if "drift" not in bucket.flat:
                bucket.flat["drift"] = torch.zeros_like(bucket.flat["exp_avg"])
            self._momentum(bucket, round_, bucket.flat["exp_avg"])
            drift_on(bucket, self.param_groups, moving, bucket.flat["drift"])
            bucket.count(moving)
            bucket.count(moving, "alone")
        self._since_sync += 1
        self._show_own()

    def _before_signs(self, bucket: Bucket, round_: Round) -> Tensor:
        moved = bucket.flat["drift"] if self._since_sync else torch.zeros_like(bucket.flat["exp_avg"])
        used, name = round_.verdict.used, bucket.plan.name
        if not self._flushing:
            self._momentum(bucket, round_, bucket.flat["exp_avg"])
            drift_on(bucket, self.param_groups, used, moved)
        still = [slot for slot in bucket.moving(used) if not bucket.numbers["mass"][slot.position]]
        self._owed[name] = kept(residuals(bucket, self._signs[name], self._wire()), still)
        bucket.scale(moved)
        return moved

    def _after_signs(self, bucket: Bucket, mean: Tensor, round_: Round) -> None:
        used = round_.verdict.used
        bucket.unscale(mean)
        for place, values in self._owed.pop(bucket.plan.name):
            place.copy_(values)
        still = land(bucket, mean, used, self._borrow(bucket))  # all ranks find the same
        if still:
            flat = torch.cat(still)
            self._wire().all_reduce(f"momenta at rest of {bucket.plan.name}", flat, dist.ReduceOp.SUM).wait()
            self._counts.at_rest(flat.numel(), self.group)
            means = flat.div_(self.group.size()).split([len(momentum) for momentum in still])
            for momentum, values in zip(still, means, strict=True):
                momentum.copy_(values)
        bucket.publish(bucket.plan.slots if self._since_sync else bucket.moving(used))
        if not self._flushing:
            bucket.count(used)

    def _end(self, round_: Round) -> None:
        if round_.travel is Travel.SIGNS:
            self._num_syncs += 1
            self._since_sync = 0
            for bucket in self._buckets:
                forget(bucket)
        self._freeze_in_time()

    def _freeze_in_time(self) -> None:
        """After the last step that may update the variance, keep what belongs to a frozen one."""
        if self.variance is Variance.UPDATED and self.num_steps >= self.intervals.var_freeze_step:
            self.variance = Variance.FROZEN
            for bucket in self._buckets:
                self._allocate(bucket, self.progress())

    def _take_edits(self) -> None:
        """See `BucketedOptimizer._take_edits`; none are taken while ranks are apart."""
        if not self._since_sync:
            super()._take_edits()
            return
        for bucket in self._buckets:
            if bucket.edits():
                refuse_edits(bucket, own_values(bucket, self._borrow(bucket)))

    def _show_own(self) -> None:
        """Parameters as this rank has them: what all have in common, and its drift."""
        for bucket in self._buckets if self._since_sync else ():
            bucket.publish(bucket.plan.slots, own_values(bucket, self._borrow(bucket)))
        self._note()

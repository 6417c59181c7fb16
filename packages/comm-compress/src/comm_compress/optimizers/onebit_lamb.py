"""1-bit LAMB: exact LAMB until variance and coefficients have settled, then momenta at one bit an element.

In: local gradients. Out: updated parameters, each layer at a rate of its own. `base` runs the steps, `freezing` changes
phase; this module says what is kept and what is computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from accel_kernels import grad_norm_scale
from torch import Tensor

from ..errors import CompressConfigError
from . import exact
from .bucket import Bucket
from .freezing import FreezingOptimizer, Phase
from .kinds import Held
from .layout import Slot
from .options import adam_defaults
from .policy import Compression
from .rounds import Round
from .rules import corrections, part_pieces, step_lamb, trust, whole_pieces
from .scales import layer_scales
from .warmup import FreezeRule


class OneBitLamb(FreezingOptimizer):
    """LAMB that sends gradients until its variance has settled, and signs of momenta from then on.

    It does all communication, as `OneBitAdam` does. A layer is a parameter x with moments m, v:

    - warm-up: LAMB on mean gradients (`rules.step_lamb`), with coefficients c; their moving average
      a = coeff_beta a + (1 - coeff_beta) c.
    - from the freeze on, a / (1 - coeff_beta^T) and the divisor d = sqrt(v / (1 - beta2^T)) + eps stay; a layer without
      a gradient so far takes the c of an update whose elements are of size one. Then, with m_i rank i's momentum and
      s the layer's factor (`layer_scales`), m = `allreduce_1bit`(s m_i) / s. The gradient that this momentum stands for
      is h = (m - beta1 m_before) / (1 - beta1); v goes on with it. Where the variance has changed since the freeze, so
      does the rate: r = max over the layer of d / (sqrt(v / (1 - beta2^t)) + eps), which moves by no more than
      factor_threshold of itself a step, within [factor_min, factor_max]. x -= lr r a (m / (1 - beta1^t) / d +
      weight_decay x).

    Args:
        params: parameters, or groups with options of their own; each parameter is a layer.
        lr: learning rate.
        betas: decay of momentum and variance.
        eps: added to the root of the variance.
        weight_decay: of the values, inside the layer's update.
        freeze_step: steps of warm-up; None: until the variance has settled.
        freeze_threshold: how still the variance must be, where that decides.
        group: the ranks; None: all.
        bias_correction: correct moments, and a, for their start at zero.
        max_coeff, min_coeff: bounds of c.
        coeff_beta: of the moving average of c.
        factor_max, factor_min: bounds of r.
        factor_threshold: largest relative change of r in a step.
        shard: as for `OneBitAdam`.
        compression: None: `Compression(scale_layers=True)`.

    Raises:
        CompressConfigError: an argument that cannot be honoured.

    Bytes a parameter and rank: as `OneBitAdam`, and 4 for the variance that goes on after the freeze.
    Source: Li et al., 1-bit LAMB, arXiv:2104.06069, algorithm 1; You et al., LAMB, arXiv:1904.00962.
    """

    numbers_kept: ClassVar[Mapping[str, float]] = {
        "step": 0,
        "scale": 1.0,
        "coefficient": 0.0,
        "factor": 1.0,
        "floor": 0.0,
    }

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        freeze_step: int | None = None,
        freeze_threshold: float = 0.96,
        group: dist.ProcessGroup | None = None,
        bias_correction: bool = True,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        coeff_beta: float = 0.9,
        factor_max: float = 4.0,
        factor_min: float = 0.5,
        factor_threshold: float = 0.1,
        shard: bool = False,
        compression: Compression | None = None,
    ) -> None:
        checks = {
            "0 < min_coeff <= max_coeff": 0 < min_coeff <= max_coeff,
            "0 <= coeff_beta < 1": 0 <= coeff_beta < 1,
            "0 < factor_min <= 1 <= factor_max": 0 < factor_min <= 1 <= factor_max,
            "0 < factor_threshold < 1": 0 < factor_threshold < 1,
        }
        broken = [rule for rule, holds in checks.items() if not holds]
        if broken:
            raise CompressConfigError(f"OneBitLamb: expected {' and '.join(broken)}")
        defaults = adam_defaults(
            lr,
            betas,
            eps,
            weight_decay,
            bias_correction=bias_correction,
            decoupled_weight_decay=True,
        )
        defaults |= {
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
            "coeff_beta": coeff_beta,
            "factor_max": factor_max,
            "factor_min": factor_min,
            "factor_threshold": factor_threshold,
        }
        rule = FreezeRule(freeze_step=freeze_step, threshold=freeze_threshold)
        compression = compression or Compression(scale_layers=True)
        super().__init__(params, defaults, group, compression, rule=rule, shard=shard)

    def keys(self, progress: Mapping[str, Any], *, low: bool) -> dict[str, Held]:
        """See `BucketedOptimizer.keys`."""
        if Phase(progress["phase"]) is Phase.WARMUP:
            held = Held.PART if self.shard else Held.WHOLE
            moments = {"exp_avg": held, "exp_avg_sq": held}
            return moments | ({"master": held} if low or self.shard else {})
        kept = dict.fromkeys(("exp_avg", "exp_avg_sq", "denominator"), Held.WHOLE)
        residuals = {"worker_error": Held.OWN, "server_error": Held.CHUNK}
        return kept | residuals | ({"master": Held.WHOLE} if low else {})

    def _step_exact(self, round_: Round) -> None:
        used, groups = round_.verdict.used, self.param_groups
        pieces = (
            piece
            for number, bucket in enumerate(self._buckets)
            for piece in (
                part_pieces(bucket, round_.parts[number], used)
                if self.shard
                else whole_pieces(bucket, round_.grads, used)
            )
        )
        wire = self._wire() if self.shard else None
        norms = step_lamb(pieces, groups, round_.scale, num_params=len(self._params), wire=wire)
        for bucket in self._buckets:
            for slot in bucket.moving(used):
                beta = groups[slot.group]["coeff_beta"]
                averages = bucket.numbers["coefficient"]
                now = trust(norms[slot.index], groups[slot.group])
                averages[slot.position] = beta * averages[slot.position] + (1 - beta) * now
            bucket.count(used)
        if self.shard:
            exact.publish_parts(self._buckets, self._wire(), used)

    def _freeze_bucket(self, bucket: Bucket, roots: Tensor) -> None:
        variance = torch.square(roots)
        for slot in bucket.plan.slots:
            group, step = self.param_groups[slot.group], max(1, int(bucket.numbers["step"][slot.position]))
            variance[slot.start : slot.stop].mul_(corrections(group, step)[1])
            view = roots[slot.start : slot.stop]
            bucket.numbers["floor"][slot.position] = float(view.min())
            view.add_(group["eps"])
            bucket.numbers["coefficient"][slot.position] = self._settle_coefficient(bucket, slot)
        bucket.flat["exp_avg_sq"], bucket.flat["denominator"] = variance, roots
        bucket.numbers["scale"] = layer_scales(bucket, enabled=self.compression.scale_layers)

    def _settle_coefficient(self, bucket: Bucket, slot: Slot) -> float:
        """The layer's a from here on, which had started at zero."""
        group, step = self.param_groups[slot.group], int(bucket.numbers["step"][slot.position])
        if step == 0:  # no gradient yet: c of an update whose elements are of size one
            square = float(grad_norm_scale(bucket.params[slot.position].reshape(-1))[0])
            return trust((math.sqrt(square), math.sqrt(slot.numel)), group)
        average = bucket.numbers["coefficient"][slot.position]
        return average / (1 - group["coeff_beta"] ** step) if group["bias_correction"] else average

    def _before_signs(self, bucket: Bucket, round_: Round) -> Tensor:
        tensor = torch.empty_like(bucket.flat["exp_avg"])
        tensor.copy_(bucket.flat["exp_avg"])
        self._momentum(bucket, round_, tensor)
        bucket.scale(tensor)
        return tensor

    def _after_signs(self, bucket: Bucket, mean: Tensor, round_: Round) -> None:
        bucket.unscale(mean)
        momentum, denominator = bucket.flat["exp_avg"], bucket.flat["denominator"]
        scratch = self._borrow(bucket)
        for slot in bucket.moving(round_.verdict.used):
            cut = slice(slot.start, slot.stop)
            self._adapt(bucket, slot, mean[cut], momentum[cut], scratch[cut])
            momentum[cut].copy_(mean[cut])
            self._move_layer(bucket, slot, mean[cut], denominator[cut])
        bucket.publish(bucket.moving(round_.verdict.used))
        bucket.count(round_.verdict.used)

    def _adapt(self, bucket: Bucket, slot: Slot, mean: Tensor, before: Tensor, scratch: Tensor) -> None:
        """Go on with the layer's variance, and with the factor that follows it."""
        group, step = self.param_groups[slot.group], int(bucket.numbers["step"][slot.position]) + 1
        beta1, beta2 = group["betas"]
        gradient = torch.sub(mean, before, alpha=beta1, out=scratch).div_(1 - beta1)
        variance = bucket.flat["exp_avg_sq"][slot.start : slot.stop]
        variance.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        now = torch.sqrt(variance, out=scratch).div_(math.sqrt(corrections(group, step)[1]))
        now.clamp_(min=bucket.numbers["floor"][slot.position]).add_(group["eps"])
        ratio = float(torch.div(bucket.flat["denominator"][slot.start : slot.stop], now, out=scratch).max())
        bucket.numbers["factor"][slot.position] = next_factor(
            ratio, bucket.numbers["factor"][slot.position], group
        )

    def _move_layer(self, bucket: Bucket, slot: Slot, mean: Tensor, denominator: Tensor) -> None:
        group, step = self.param_groups[slot.group], int(bucket.numbers["step"][slot.position]) + 1
        param = bucket.params[slot.position]
        values = param if bucket.master is None else bucket.view(bucket.master, slot)
        update = torch.div(mean, denominator, out=self._borrow(bucket)[slot.start : slot.stop])
        update = update.div_(corrections(group, step)[0]).view(slot.shape)
        update.add_(values, alpha=group["weight_decay"])
        coefficient = bucket.numbers["coefficient"][slot.position] * bucket.numbers["factor"][slot.position]
        values.add_(update, alpha=-float(group["lr"]) * coefficient)


def next_factor(ratio: float, before: float, group: Mapping[str, Any]) -> float:
    """R of a step: near the one before it, and within its bounds.

    Args:
        ratio: max over the layer of frozen over present divisor.
        before: r of the step before, 1 at the freeze.
        group: its factor_max, factor_min, factor_threshold.
    """
    threshold = group["factor_threshold"]
    near = min(max(ratio, before * (1 - threshold)), before * (1 + threshold))
    return float(min(max(near, group["factor_min"]), group["factor_max"]))

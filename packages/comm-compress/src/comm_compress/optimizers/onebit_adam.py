"""1-bit Adam: exact Adam until the variance has settled, then momenta at one bit an element.

In: local gradients. Out: updated parameters. `base` runs the steps, `freezing` changes phase; this module says what is
kept and what is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import exact
from .bucket import Bucket
from .freezing import FreezingOptimizer, Phase
from .kinds import Held
from .moves import move
from .options import adam_defaults
from .policy import Compression
from .rounds import Round
from .rules import part_pieces, step_adam, whole_pieces
from .scales import layer_scales
from .warmup import FreezeRule


class OneBitAdam(FreezingOptimizer):
    """AdamW (or Adam) that sends gradients until its variance has settled, and signs of momenta from then on.

    It does all communication: gradients stay local (a plain loop; DistributedDataParallel under `no_sync`; a model of
    zero-core through `ZeroCompressedOptimizer`), over any number of backward passes. With m, v the moments and g_i rank
    i's gradient:

    - warm-up: g = mean of g_i, then exactly AdamW.
    - from the freeze on, v stays, and m_i = beta1 m + (1 - beta1) g_i; m = `allreduce_1bit` of m_i;
      x = x (1 - lr weight_decay) - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^T)) + eps), T the last step of warm-up.

    Parameters stay the same bits on all ranks.

    Args:
        params: parameters, or groups with options of their own; float32, bfloat16, float16.
        lr: learning rate.
        betas: decay of momentum and variance.
        eps: added to the root of the variance.
        weight_decay: decay of the values.
        freeze_step: steps of warm-up, usually 15 to 25 % of a run; None: until the variance has settled (`FreezeRule`).
        freeze_threshold: how still the variance must be, where that decides.
        group: the ranks; None: all.
        bias_correction: correct moments for their start at zero.
        decoupled_weight_decay: AdamW; False adds the decay to the gradient (Adam).
        shard: keep momentum, variance and masters of an equal part of each bucket in warm-up (ZeRO stage 1): gradients
            are reduce-scattered, parameters gathered. From the freeze on every rank steps everything, and needs them
            whole.
        compression: what shares a scale, and how bytes travel.

    Raises:
        CompressConfigError: an argument that cannot be honoured.

    Bytes a parameter and rank, N ranks, besides parameter and gradient; low: parameters are not fp32:

    | | momentum | variance | master | residuals |
    | --- | --- | --- | --- | --- |
    | warm-up | 4 | 4 | 4 if low | |
    | warm-up, shard | 4/N | 4/N | 4/N | |
    | compressed | 4 | 4 (the divisor) | 4 if low | worker 4, server 4/N |

    Sent a step and rank: `wire_1bit.sent_exact`, then `wire_1bit.sent_1bit` (of each bucket), and 32 bytes to agree.
    Source: Tang et al., 1-bit Adam, arXiv:2102.02888, algorithm 1.
    """

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
        decoupled_weight_decay: bool = True,
        shard: bool = False,
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
        rule = FreezeRule(freeze_step=freeze_step, threshold=freeze_threshold)
        super().__init__(params, defaults, group, compression, rule=rule, shard=shard)

    def keys(self, progress: Mapping[str, Any], *, low: bool) -> dict[str, Held]:
        """See `BucketedOptimizer.keys`."""
        if Phase(progress["phase"]) is Phase.WARMUP:
            held = Held.PART if self.shard else Held.WHOLE
            moments = {"exp_avg": held, "exp_avg_sq": held}
            return moments | ({"master": held} if low or self.shard else {})
        kept = {"exp_avg": Held.WHOLE, "denominator": Held.WHOLE}
        residuals = {"worker_error": Held.OWN, "server_error": Held.CHUNK}
        return kept | residuals | ({"master": Held.WHOLE} if low else {})

    def _step_exact(self, round_: Round) -> None:
        used = round_.verdict.used
        for number, bucket in enumerate(self._buckets):
            pieces = (
                part_pieces(bucket, round_.parts[number], used)
                if self.shard
                else whole_pieces(bucket, round_.grads, used)
            )
            step_adam(pieces, self.param_groups, round_.scale)
            bucket.count(used)
        if self.shard:
            exact.publish_parts(self._buckets, self._wire(), used)

    def _freeze_bucket(self, bucket: Bucket, roots: Tensor) -> None:
        for slot in bucket.plan.slots:
            roots[slot.start : slot.stop].add_(self.param_groups[slot.group]["eps"])
        bucket.flat["denominator"] = roots
        bucket.numbers["scale"] = layer_scales(bucket, enabled=self.compression.scale_layers)

    def _before_signs(self, bucket: Bucket, round_: Round) -> Tensor:
        momentum = bucket.flat["exp_avg"]
        self._momentum(bucket, round_, momentum)
        bucket.scale(momentum)
        return momentum

    def _after_signs(self, bucket: Bucket, mean: Tensor, round_: Round) -> None:
        bucket.unscale(mean)
        direction = torch.div(mean, bucket.flat["denominator"], out=self._borrow(bucket))
        move(bucket, self.param_groups, direction, round_.verdict.used)
        bucket.count(round_.verdict.used)

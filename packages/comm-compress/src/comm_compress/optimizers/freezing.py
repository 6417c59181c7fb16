"""Warm-up, freeze, compression: what 1-bit Adam and 1-bit LAMB have in common.

In: exact steps until the rule says so. Out: roots of variances that never change again, residuals, and a phase in which
momenta travel as signs. Next: `onebit_adam`, `onebit_lamb`.
"""

from __future__ import annotations

import enum
import logging
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import exact
from .base import CompressedOptimizer
from .bucket import Bucket
from .policy import Compression
from .rounds import Round, Travel
from .rules import corrections
from .variances import settle_roots
from .warmup import FreezeRule, VarianceWatch

logger = logging.getLogger(__name__)


class Phase(enum.Enum):
    """WARMUP -> COMPRESSED, once."""

    WARMUP = "warmup"
    COMPRESSED = "compressed"


class FreezingOptimizer(CompressedOptimizer):
    """An optimizer whose variance is exact at first, and then frozen.

    Attributes:
        phase: where it is.
        rule: when it freezes.
        shard: in warm-up, ranks step an equal part of each bucket, and keep momentum, variance and master of that.
    """

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        group: dist.ProcessGroup | None,
        compression: Compression | None,
        *,
        rule: FreezeRule,
        shard: bool,
    ) -> None:
        super().__init__(params, defaults, group, compression)
        self.rule = rule
        self.shard = shard
        self.phase = Phase.WARMUP
        self._watch = VarianceWatch(rule, max(each["betas"][1] for each in self.param_groups))

    @abstractmethod
    def _freeze_bucket(self, bucket: Bucket, roots: Tensor) -> None:
        """The bucket's state of warm-up becomes that of compression.

        Args:
            bucket: its "exp_avg" is whole, its "exp_avg_sq" has become `roots`.
            roots: [bucket]: roots of its bias-corrected variances, settled (`settle_roots`); the callee's to keep.
        """

    def freeze(self) -> None:
        """End warm-up now; every rank calls it. The rule does so by itself.

        Where state is sharded, momentum, variance and masters are gathered: 12 bytes a parameter, once.

        Raises:
            CompressStateError: a step has begun.
        """
        if self.phase is Phase.COMPRESSED:
            return
        self._between_steps("freeze")
        wire = self._wire()
        for bucket in self._buckets:
            if self.shard:
                for key in list(bucket.flat):
                    exact.gather_whole(bucket, key, wire)
                self._counts.gathered(bucket, self.group, tensors=len(bucket.flat))
                bucket.master_span = (0, bucket.plan.numel)
            floor, counts = self.compression.variance_floor, bucket.numbers["step"]
            roots = settle_roots(bucket, bucket.flat.pop("exp_avg_sq"), counts, self.param_groups, floor)
            self._freeze_bucket(bucket, roots)
        self.phase = Phase.COMPRESSED
        for bucket in self._buckets:
            self._allocate(bucket, self.progress())
        logger.info("variance frozen after step %d; momenta travel as signs from here on", self.num_steps)

    def travel(self) -> Travel:
        """See `CompressedOptimizer.travel`."""
        return Travel.EXACT if self.phase is Phase.WARMUP else Travel.SIGNS

    def settings(self) -> Any:
        """See `BucketedOptimizer.settings`."""
        return self.rule, self.shard

    def progress(self) -> dict[str, Any]:
        """See `BucketedOptimizer.progress`."""
        return {
            "kind": type(self).__name__,
            "num_steps": self.num_steps,
            "common": self._common.state(),
            "phase": self.phase.value,
            "watch": self._watch.state(),
        }

    def _set_progress(self, progress: Mapping[str, Any]) -> None:
        self._common.load(progress["common"])
        self.phase = Phase(progress["phase"])
        self._watch.load(progress["watch"])

    def _may_grow(self) -> bool:
        return self.phase is Phase.WARMUP

    def _steps_parts(self) -> bool:
        return self.shard and self.phase is Phase.WARMUP

    def _end(self, round_: Round) -> None:
        if self.phase is Phase.COMPRESSED:
            return
        freeze_step = self.rule.freeze_step
        if freeze_step is not None and self.num_steps >= freeze_step:
            self.freeze()
        elif self._watch.is_due(self.num_steps):
            rates = [float(group["lr"]) for group in self.param_groups]
            if self._watch.observe(self._variance_norm(), rates):
                self.freeze()

    def _variance_norm(self) -> float:
        """|v|_1, bias-corrected, over all parameters; the same bits on all ranks."""
        wire = self._wire()
        total = torch.zeros(1, dtype=torch.float64, device=wire.device)
        for bucket in self._buckets:
            total += bucket.flat["exp_avg_sq"].sum(dtype=torch.float64)
        wire.all_reduce("norm of the variance", total, dist.ReduceOp.SUM).wait()
        second = max(corrections(group, max(1, self.num_steps))[1] for group in self.param_groups)
        return float(total) / second / (1 if self.shard else self.group.size())

"""`OffloadedOptimizer`: zero-core's optimizer, with its state in a store."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer
from zero_core import LossScaler, ShardedOptimizer

from .store_stepper import StoreStepper


class OffloadedOptimizer(ShardedOptimizer):
    """Steps a model that was sharded with `store=`; its results are bit for bit those without one.

    Args:
        model: a model that `zero_core.shard(..., store=...)` returned.
        optimizer: torch's AdamW, Adam, Adagrad or SGD on its parameters.
        scaler: as for `zero_core.ShardedOptimizer`.
        window_bytes: host memory for blocks of states on their way from and to a drive.

    Raises:
        OffloadConfigError: an optimizer that no kernel steps block by block.
        zero_core.ZeroConfigError: as `zero_core.ShardedOptimizer`.

    Bytes per rank: `window_bytes`, whatever the size of the model; in the store 4 bytes an element of the shard for
    each state, and 4 for the master where that is separate.
    Source: ZeRO-Offload (Ren et al., 2021), section 4; ZeRO-Infinity (Rajbhandari et al., 2021), section 5.2.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        scaler: LossScaler | None = None,
        window_bytes: int = 192 << 20,
    ) -> None:
        stepper = StoreStepper(optimizer, window_bytes=window_bytes)
        super().__init__(model, optimizer, scaler=scaler, stepper=stepper)

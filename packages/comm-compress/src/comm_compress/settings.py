"""What a user says about compressed collectives, checked; what all ranks must have been told alike.

In: `QuantizedCollectives`' arguments. Out: which format a buffer of some size and dtype takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch.distributed.device_mesh import DeviceMesh

from . import ops
from .error_feedback import LoCoPolicy
from .errors import CompressConfigError
from .wire import BlockFormat

Quantized: TypeAlias = Literal["int8", "int4"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """See `QuantizedCollectives`.

    Raises:
        CompressConfigError: a value that cannot be honoured.
    """

    weights: Quantized | None = "int8"
    grads: Quantized | None = "int4"
    frozen: Quantized | None = None
    node_size: int | None = None
    mesh: DeviceMesh | None = None
    secondary: bool = False
    block_size: int = 256
    min_bytes: int = 1 << 14
    policy: Literal["always", "auto"] = "always"
    stochastic: bool = False
    loco: LoCoPolicy | None = None
    timeout_s: float = 300.0
    shared_memory: bool = True

    def __post_init__(self) -> None:
        for name in ("weights", "grads", "frozen"):
            ops.block_format(getattr(self, name), name, self.block_size)
        if self.policy not in ("always", "auto"):
            raise CompressConfigError(f"policy: expected 'always' or 'auto', got {self.policy!r}")
        if not isinstance(self.min_bytes, int) or self.min_bytes < 0:
            raise CompressConfigError(f"min_bytes: expected a number of bytes >= 0, got {self.min_bytes!r}")
        if not self.timeout_s > 0:
            raise CompressConfigError(f"timeout_s: expected seconds above 0, got {self.timeout_s!r}")
        if self.secondary and self.node_size is None and self.mesh is None:
            raise CompressConfigError(
                "secondary=True keeps weights within a node, and nothing says what a node is: give node_size= or mesh="
            )
        if self.grads is None and (self.stochastic or self.loco is not None):
            name = "stochastic=True" if self.stochastic else "loco=..."
            raise CompressConfigError(
                f"{name} is about quantized gradients, and grads is None; leave one out"
            )

    def form(
        self, which: Literal["weights", "grads", "frozen"], nbytes: int, dtype: torch.dtype
    ) -> BlockFormat | None:
        """How a buffer of `nbytes` in all travels; None: as it is."""
        if nbytes < self.min_bytes or dtype not in ops.FLOATS:
            return None
        return ops.block_format(getattr(self, which), which, self.block_size)

    def shared(self, node_size: int) -> dict[str, Any]:
        """What ranks must agree on, as plain values; `node_size` is the one that holds."""
        names = (
            "weights", "grads", "frozen", "secondary", "block_size", "min_bytes", "policy", "stochastic",
            "shared_memory",
        )  # fmt: skip
        loco = None if self.loco is None else vars(self.loco)
        return {**{name: getattr(self, name) for name in names}, "loco": loco, "node_size": node_size}

"""Linear layers: their weights dense, int8 or int4, the product that is fastest for the batch, and adapters on top.

Weights come in by `load`, which quantises; until then they take no memory. Used by `models`; `adapters` adds low-rank
pairs at run time.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache

import accel_kernels
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import Weights
from .errors import ModelError
from .parallel import Shard

_GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class LinearPolicy:
    """How the linear layers of a model are held and computed.

    Attributes:
        dtype: of activations and dense weights.
        device: of both.
        weights: dense, int8 or int4.
        batch_invariant: a row's bits depend on that row alone.
    """

    dtype: torch.dtype
    device: torch.device
    weights: Weights = Weights.DENSE
    batch_invariant: bool = False

    def dense(self) -> LinearPolicy:
        """The same with dense weights: routers, logits."""
        return LinearPolicy(self.dtype, self.device, Weights.DENSE, self.batch_invariant)


@cache
def has_native_linear(device_type: str, dtype: torch.dtype) -> bool:
    """Whether accel_kernels has a compiled product for this device, and not only torch's own."""
    tiny = torch.zeros(1, 32, dtype=dtype, device=device_type)
    try:
        accel_kernels.linear(tiny, tiny, backend=device_type)
    except accel_kernels.BackendUnavailableError:
        return False
    return True


@cache
def native_rows(device_type: str, dtype: torch.dtype) -> int:
    """Up to so many rows accel_kernels' product is faster than torch's, as measured with weights from memory."""
    if device_type != "cpu" or not has_native_linear(device_type, dtype):
        return 0
    isas = accel_kernels.available_cpu_isas()
    if dtype is torch.float32 or "avx2" not in isas:
        return 32
    return 128 if "amx" in isas else sys.maxsize


def product(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, batch_invariant: bool) -> Tensor:
    """`x @ weight.T + bias` by the faster of torch and accel_kernels.

    With `batch_invariant` by the kernel whose sums have one order, however many rows there are.
    """
    if batch_invariant or x_MK.shape[0] <= native_rows(x_MK.device.type, x_MK.dtype):
        return accel_kernels.linear(x_MK, weight_NK, bias_N)
    return F.linear(x_MK, weight_NK, bias_N)


class Linear(nn.Module):
    """A linear layer, or the part of it that a rank holds.

    Attributes:
        shard: rows (outputs) and columns (inputs) of the full weight that are here.
        wanted: what `load` is to be given; without the weight where it is another module's (`shared`).
        adapters: low-rank pairs `(A [r, K], B [N, r])` by adapter name; B has the scale in it.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, shard: Shard, policy: LinearPolicy, bias: bool, *, shared: bool = False, adds_bias: bool = True
    ) -> None:
        super().__init__()
        self.shard = shard
        self.policy = policy
        self.dtype, self.device = policy.dtype, policy.device
        bias_shard = shard.bias if adds_bias else Shard(shard.sections, ())  # of a sum, one rank adds it
        held = {"weight": (shard, not shared), "bias": (bias_shard, bias)}
        self.wanted = {name: part for name, (part, loaded) in held.items() if loaded}
        self.adapters: dict[str, tuple[Tensor, Tensor]] = {}
        nothing = torch.empty(shard.shape, dtype=policy.dtype, device="meta")
        self.register_buffer("weight", nothing)
        self.register_buffer("bias", nothing.new_empty(shard.num_rows) if bias else None)
        self.register_buffer("scale", None)
        self.register_buffer("zero", None)
        self.group_size = 0

    def load(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """Take what is `wanted`, of the policy's dtype and device; it may be shared with the caller."""
        self.bias = bias if bias is not None and bias.numel() else None
        if weight is not None:
            self._hold(weight)

    def _hold(self, weight_NK: Tensor) -> None:
        if self.policy.weights is Weights.DENSE:
            self.weight = weight_NK.contiguous()
        elif self.policy.weights is Weights.INT8:
            self.weight, self.scale = accel_kernels.quantize_int8(weight_NK)
        else:
            num_inputs = weight_NK.shape[1]
            self.group_size = next((size for size in _GROUP_SIZES if num_inputs % size == 0), 0)
            if not self.group_size:
                raise ModelError(
                    f"int4 weights: expected a multiple of {_GROUP_SIZES[-1]} inputs, got a layer with {num_inputs}; "
                    "use weights=Weights.INT8"
                )
            self.weight, self.scale, self.zero = accel_kernels.quantize_int4(weight_NK, self.group_size)

    def forward(self, x_TK: Tensor, adapter_rows: dict[str, Tensor]) -> Tensor:
        """`[T, K]` to `[T, N]`; rows of each adapter get its low-rank product added."""
        y_TN = self._product(x_TK)
        if self.adapters and adapter_rows:
            for name, rows in adapter_rows.items():
                if name in self.adapters:
                    a, b = self.adapters[name]
                    low = product(x_TK[rows], a, None, self.policy.batch_invariant)
                    y_TN[rows] += product(low, b, None, self.policy.batch_invariant)
        return y_TN

    def _product(self, x_TK: Tensor) -> Tensor:
        if self.policy.weights is Weights.DENSE:
            return product(x_TK, self.weight, self.bias, self.policy.batch_invariant)
        if self.policy.weights is Weights.INT8:
            return accel_kernels.linear_int8(x_TK, self.weight, self.scale, self.bias)
        return accel_kernels.linear_int4(
            x_TK, self.weight, self.scale, self.zero, self.bias, group_size=self.group_size
        )

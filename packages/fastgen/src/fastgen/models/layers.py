"""A decoder's parts: embedding, norm, rotary angles, attention, MLP.

In: a `RaggedBatch` and the activations of its T tokens, without padding. Each part is built from its piece of a
`DecoderSpec`, holds what its rank holds (`parallel`), and gets its weights by `load` (`weights`).
"""

from __future__ import annotations

from collections.abc import Callable

import accel_kernels
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import attention
from ..batch import RaggedBatch
from ..errors import ModelError
from ..kv_cache import KVCache
from ..linear import Linear, LinearPolicy
from ..parallel import Shard, TensorParallel
from . import spec as specs

_TANH_GELUS = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    **dict.fromkeys(_TANH_GELUS, lambda x: F.gelu(x, approximate="tanh")),
}


def rowwise(function: Callable[[Tensor], Tensor], x: Tensor, policy: LinearPolicy) -> Tensor:
    """An elementwise function of `[T, ...]`.

    torch computes the last few elements of a run by other instructions, so where rows must not depend on each other,
    each is a run of its own.
    """
    if not policy.batch_invariant or x.shape[0] <= 1:
        return function(x)
    return torch.cat([function(row) for row in x.split(1)])


class Embedding(nn.Module):
    """Rows of a table by token or position; of a table that ranks share, the sum over ranks."""

    weight: Tensor

    def __init__(self, shard: Shard, policy: LinearPolicy, parallel: TensorParallel | None = None) -> None:
        super().__init__()
        self.wanted = {"weight": shard}
        self.dtype, self.device = policy.dtype, policy.device
        self.parallel = parallel if parallel is not None and parallel.size > 1 else None
        self.register_buffer("weight", torch.empty(shard.shape, dtype=policy.dtype, device="meta"))

    def load(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """Take the rows held here."""
        assert weight is not None
        self.weight = weight

    def forward(self, ids_T: Tensor) -> Tensor:
        """`[T]` to `[T, width]`."""
        if self.parallel is None:
            return F.embedding(ids_T, self.weight)
        (mine,) = self.wanted["weight"].rows
        local_T = ids_T - mine.start
        held_T = (local_T >= 0) & (local_T < len(mine))
        rows = self.weight if len(mine) else self.weight.new_zeros(1, self.weight.shape[1])
        x_TE = F.embedding(local_T * held_T, rows)
        return self.parallel.all_reduce(x_TE * held_T.unsqueeze(1))


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, in float32 inside; its own weights are float32."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, spec: specs.Norm, width: int, policy: LinearPolicy) -> None:
        super().__init__()
        self.spec = spec
        shard = Shard.whole(width)
        self.wanted = {name: shard for name, held in (("weight", spec.affine), ("bias", spec.bias)) if held}
        self.dtype, self.device = torch.float32, policy.device
        empty = torch.empty(width, dtype=torch.float32, device="meta")
        self.register_buffer("weight", empty if spec.affine else None)
        self.register_buffer("bias", empty if spec.bias else None)
        self.width = width
        if not spec.affine and not spec.centered:  # the kernel multiplies by a weight
            self.weight = torch.full((width,), 1.0 - spec.offset, device=policy.device)

    def load(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """Take weight and bias."""
        self.weight = weight if weight is not None else self.weight
        self.bias = bias

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The norm of `x`, or of `residual + x`, which is then also written to `residual`."""
        if not self.spec.centered:
            assert self.weight is not None
            return accel_kernels.rms_norm(
                x, self.weight, self.spec.eps, residual=residual, weight_offset=self.spec.offset
            )
        if residual is not None:
            x = residual.add_(x)
        return F.layer_norm(x.float(), (self.width,), self.weight, self.bias, self.spec.eps).to(x.dtype)


class RotaryTable(nn.Module):
    """Cosine and sine of every position up to `max_len`, made once: a position's bits depend on nothing else."""

    cos: Tensor
    sin: Tensor

    def __init__(self, spec: specs.Rotary, max_len: int, device: torch.device) -> None:
        super().__init__()
        self.spec = spec
        self.max_len = max_len
        variants = [spec.inv_freq] + ([spec.long_inv_freq] if spec.long_inv_freq is not None else [])
        positions = torch.arange(max_len, dtype=torch.float32).unsqueeze(1)
        angles = torch.cat([positions * torch.tensor(freq, dtype=torch.float32) for freq in variants])
        self.register_buffer("cos", (angles.cos() * spec.factor).to(device), persistent=False)
        self.register_buffer("sin", (angles.sin() * spec.factor).to(device), persistent=False)

    def rows(self, batch: RaggedBatch) -> Tensor:
        """The table's row of each token; the second half of the table is for long sequences."""
        if self.spec.long_inv_freq is None:
            return batch.positions_T
        longest_T = batch.longest_T.clamp(max=self.max_len)
        return batch.positions_T + (longest_T > self.spec.original_len) * self.max_len

    def rotate(self, q_THD: Tensor, k_TGD: Tensor, rows_T: Tensor) -> None:
        """In place."""
        accel_kernels.rotary(q_THD, k_TGD, self.cos, self.sin, rows_T, interleaved=self.spec.interleaved)


class AttentionLayer(nn.Module):
    """Queries, keys and values by one product, attention over the cache, the output product."""

    def __init__(
        self, spec: specs.DecoderSpec, layer: int, policy: LinearPolicy, parallel: TensorParallel
    ) -> None:
        super().__init__()
        own = spec.layers[layer].attention
        heads, kv_heads = parallel.split(spec.num_heads, "heads"), parallel.kv_heads(spec.num_kv_heads)
        self.layer, self.parallel, self.rotary = layer, parallel, own.rotary
        self.num_heads, self.num_kv_heads, self.head_dim = len(heads), len(kv_heads), spec.head_dim
        d = spec.head_dim
        own_q, own_kv = range(heads.start * d, heads.stop * d), range(kv_heads.start * d, kv_heads.stop * d)
        qkv = Shard.whole(spec.num_heads * d, spec.num_kv_heads * d, spec.num_kv_heads * d, width=spec.width)
        self.qkv = Linear(qkv.take_rows(own_q, own_kv, own_kv), policy, spec.qkv_bias)
        o = Shard.whole(spec.width, width=spec.num_heads * d)
        self.o = Linear(o.take_cols(own_q), policy, spec.o_bias, adds_bias=parallel.rank == 0)
        self.q_norm = Norm(spec.qk_norm, d, policy) if spec.qk_norm else None
        self.k_norm = Norm(spec.qk_norm, d, policy) if spec.qk_norm else None
        slopes = torch.tensor(spec.alibi_slopes[heads.start : heads.stop], device=policy.device)
        self.spec = attention.AttentionSpec(
            own.scale, own.window, spec.softcap, slopes if spec.alibi_slopes else None
        )

    def forward(
        self, x_TE: Tensor, batch: RaggedBatch, cache: KVCache, rotaries: list[tuple[RotaryTable, Tensor]]
    ) -> Tensor:
        """`[T, width]` to `[T, width]`; `rotaries` are the tables with this batch's rows."""
        num_heads = self.num_heads + 2 * self.num_kv_heads
        heads_THD = self.qkv(x_TE, batch.adapter_rows).view(x_TE.shape[0], num_heads, self.head_dim)
        q_THD, k_TGD, v_TGD = heads_THD.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q_THD, k_TGD = self.q_norm(q_THD), self.k_norm(k_TGD)
        if self.rotary is not None:
            table, rows_T = rotaries[self.rotary]
            table.rotate(q_THD, k_TGD, rows_T)
        attended_THD = attention.attend(q_THD, k_TGD, v_TGD, self.layer, batch, cache, self.spec)
        return self.parallel.all_reduce(self.o(attended_THD.flatten(1), batch.adapter_rows))


class MlpLayer(nn.Module):
    """A feed-forward layer, gated or not; without its all-reduce, so that experts can share one."""

    def __init__(self, spec: specs.Mlp, width: int, policy: LinearPolicy, parallel: TensorParallel) -> None:
        super().__init__()
        if spec.activation not in _ACTIVATIONS:
            raise ModelError(
                f"activation: expected one of {', '.join(_ACTIVATIONS)}, got {spec.activation!r}; "
                "this model is not supported"
            )
        self.spec, self.policy = spec, policy
        own = parallel.split(spec.width, "MLP width")
        sections = (spec.width, spec.width) if spec.gated else (spec.width,)
        up = Shard.whole(*sections, width=width).take_rows(*(own for _ in sections))
        down = Shard.whole(width, width=spec.width).take_cols(own)
        self.up = Linear(up, policy, spec.bias)
        self.down = Linear(down, policy, spec.bias, adds_bias=parallel.rank == 0)

    def forward(self, x_TE: Tensor, adapter_rows: dict[str, Tensor]) -> Tensor:
        """`[T, width]` to `[T, width]`; with several ranks, their sum is the result."""
        hidden: Tensor = self.up(x_TE, adapter_rows)
        down: Tensor = self.down(self.activate(hidden), adapter_rows)
        return down

    def activate(self, hidden_TF: Tensor) -> Tensor:
        """Of the first product; of gate and up for a gated one."""
        name = self.spec.activation
        if self.spec.gated and name in ("silu", "swish"):
            return accel_kernels.silu_mul(hidden_TF)
        if self.spec.gated and name in _TANH_GELUS:
            return accel_kernels.gelu_mul(hidden_TF)
        if self.spec.gated:
            gate, up = hidden_TF.chunk(2, dim=1)
            return rowwise(_ACTIVATIONS[name], gate, self.policy) * up
        return rowwise(_ACTIVATIONS[name], hidden_TF, self.policy)

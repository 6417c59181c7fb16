"""Parts of a foreign module: attention over our cache and our linear layers, and the slot in which they find the batch.

In: what transformers' modules pass on, which is not always what they were given. `generic` puts these parts into a
module and fills the slot for each forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..attention import AttentionSpec, attend
from ..batch import RaggedBatch
from ..errors import ModelError
from ..kv_cache import KVCache
from ..linear import Linear, LinearPolicy
from ..parallel import Shard

_REFUSED = ("s_aux", "position_bias", "sinks")  # terms of the softmax that the kernel has not


@dataclass(frozen=True)
class Call:
    """One forward: what `paged_attention` needs beside queries, keys and values.

    Attributes:
        numbers: a layer's number in the cache, by its `layer_idx`.
    """

    batch: RaggedBatch
    cache: KVCache
    numbers: dict[int, int]


@dataclass
class Probe:
    """The first forward, of one token: which layers attend, and with what shapes; by `layer_idx`."""

    shapes: dict[int, tuple[int, int]] = field(default_factory=dict)
    windows: dict[int, int] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
        """A lone token attends to itself."""
        if layer in self.shapes:
            raise ModelError(
                f"layer {layer}: expected to attend once a forward, got twice; this model is not supported"
            )
        self.shapes[layer] = (key.shape[1], max(key.shape[3], value.shape[3]))
        self.windows[layer] = window
        return value[0].repeat_interleave(query.shape[1] // value.shape[1], dim=0).transpose(0, 1)


@dataclass
class Slot:
    """The forward that a decoder is in; its attention and linear modules hold the slot, for they get no arguments."""

    call: Call | Probe | None = None

    @property
    def adapter_rows(self) -> dict[str, Tensor]:
        """Rows of each adapter in it."""
        return self.call.batch.adapter_rows if isinstance(self.call, Call) else {}

    @property
    def num_tokens(self) -> int:
        """Tokens in it."""
        return self.call.batch.num_tokens if isinstance(self.call, Call) else 1

    @contextmanager
    def holding(self, call: Call | Probe) -> Iterator[None]:
        """For the time of a forward."""
        self.call = call
        try:
            yield
        finally:
            self.call = None


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function: `[1, heads, T, head_dim]` in, `[1, T, heads, head_dim]` out."""
    slot: Slot = module.fastgen_slot  # type: ignore[assignment]
    call = slot.call
    assert call is not None
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    window = int(sliding_window or 0)
    if isinstance(call, Probe):
        refused = [name for name in _REFUSED if others.get(name) is not None]
        if refused or not getattr(module, "is_causal", True):
            raise ModelError(
                f"{type(module).__name__}: {refused or 'attention to later tokens'}: not supported"
            )
        return call.attend(layer, query, key, value, window).unsqueeze(0), None
    width = call.cache.layout.head_dim
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    q_THD, k_TGD, v_TGD = (
        nn.functional.pad(x[0].transpose(0, 1), (0, width - x.shape[3])) for x in (query, key, value)
    )
    attended_THD = attend(
        q_THD,
        k_TGD,
        v_TGD,
        call.numbers[layer],
        call.batch,
        call.cache,
        AttentionSpec(scale, window, softcap or 0.0),
    )
    return attended_THD[..., : value.shape[3]].unsqueeze(0), None


class HostedLinear(nn.Module):
    """A `Linear` in the place of an `nn.Linear`."""

    def __init__(self, replaced: nn.Linear, policy: LinearPolicy, slot: Slot) -> None:
        super().__init__()
        shard = Shard.whole(replaced.out_features, width=replaced.in_features)
        self.inner = Linear(shard, policy, replaced.bias is not None)
        self.inner.load(replaced.weight.detach(), None if replaced.bias is None else replaced.bias.detach())
        self.slot = slot

    @property
    def weight(self) -> Tensor:
        """As modules look at it, for its dtype and device."""
        return self.inner.weight

    @property
    def bias(self) -> Tensor | None:
        """Likewise."""
        return self.inner.bias

    def forward(self, x: Tensor) -> Tensor:
        """Over the last dimension."""
        rows = self.slot.adapter_rows if self.inner.adapters else {}
        if rows and x.shape[:-1].numel() != self.slot.num_tokens:
            raise ModelError(
                "adapters: expected a layer that sees every token, got one that sees some; not supported"
            )
        y: Tensor = self.inner(x.reshape(-1, x.shape[-1]), rows)
        return y.view(*x.shape[:-1], y.shape[-1])

"""The decoder: embedding, blocks, final norm, logits; built from a `DecoderSpec` alone.

In: a `RaggedBatch` and the `KVCache`. Out: float32 logits of the rows that the batch wants, or hidden states. The
weights come in by `weights`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..batch import RaggedBatch
from ..kv_cache import CacheLayout, KVCache
from ..linear import Linear, LinearPolicy, has_native_linear
from ..parallel import Shard, TensorParallel
from .layers import AttentionLayer, Embedding, MlpLayer, Norm, RotaryTable, rowwise
from .moe import MoeLayer
from .spec import DecoderSpec, Experts, Placement

Rotaries = list[tuple[RotaryTable, Tensor]]


class Block(nn.Module):
    """Attention and an MLP around the residual stream.

    What a part adds to the stream waits for the next norm, which adds and normalises in one pass: a block takes and
    returns (what waits, stream).
    """

    def __init__(self, spec: DecoderSpec, layer: int, policy: LinearPolicy, parallel: TensorParallel) -> None:
        super().__init__()
        own = spec.layers[layer].mlp
        self.placement, self.parallel = spec.placement, parallel
        self.attention = AttentionLayer(spec, layer, policy, parallel)
        self.mlp: MlpLayer | MoeLayer = (
            MoeLayer(own, spec.width, policy, parallel)
            if isinstance(own, Experts)
            else MlpLayer(own, spec.width, policy, parallel)
        )

        def norm(held: bool = True) -> Norm | None:
            return Norm(spec.norm, spec.width, policy) if held else None

        sandwich = spec.placement is Placement.SANDWICH
        self.norm1, self.norm2 = norm(), norm(not spec.shared_norm)
        self.norm3, self.norm4 = norm(sandwich), norm(sandwich)

    def forward(
        self, added: Tensor, stream: Tensor, batch: RaggedBatch, cache: KVCache, rotaries: Rotaries
    ) -> tuple[Tensor, Tensor]:
        """One block; `stream` is updated in place."""

        def attend(x: Tensor) -> Tensor:
            return self.attention(x, batch, cache, rotaries)  # type: ignore[no-any-return]

        def mlp(x: Tensor) -> Tensor:
            return self.parallel.all_reduce(self.mlp(x, batch.adapter_rows))

        n1, n2, n3, n4 = self.norm1, self.norm2, self.norm3, self.norm4
        assert n1 is not None
        if self.placement is Placement.PARALLEL:
            x = n1(added, stream)
            return attend(x) + mlp(x if n2 is None else n2(stream)), stream
        assert n2 is not None
        if self.placement is Placement.PRE:
            return mlp(n2(attend(n1(added, stream)), stream)), stream
        if self.placement is Placement.SANDWICH:
            assert n3 is not None
            assert n4 is not None
            return n4(mlp(n2(n3(attend(n1(added, stream))), stream))), stream
        if self.placement is Placement.NORMED:
            x = n1(added, stream)
            x = n2(attend(x) + x)
            return mlp(x), x
        x = stream.add_(added)
        x = n1(attend(x), x)
        return n2(mlp(x), x), torch.zeros_like(x)


class Decoder(nn.Module):
    """A decoder-only language model.

    Args:
        spec: what it is made of.
        policy: dtype, device and how linear weights are held.
        parallel: this rank's place.
        max_len: positions that rotary tables are made for; None: the spec's.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        policy: LinearPolicy,
        parallel: TensorParallel | None = None,
        max_len: int | None = None,
    ) -> None:
        super().__init__()
        parallel = parallel or TensorParallel()
        self.spec, self.policy, self.parallel = spec, policy, parallel
        self.max_len = max_len or spec.max_len
        embed_width = spec.embed_width or spec.width
        vocabulary = Shard.whole(spec.vocab_size, width=embed_width).take_rows(
            parallel.vocabulary(spec.vocab_size)
        )
        dense = policy.dense()
        self.embed = Embedding(vocabulary, policy, parallel)
        positions = Shard.whole(spec.num_positions, width=spec.width)
        self.positions = Embedding(positions, policy) if spec.num_positions else None
        projected = embed_width != spec.width
        into, out = Shard.whole(spec.width, width=embed_width), Shard.whole(embed_width, width=spec.width)
        self.project_in = Linear(into, dense, False) if projected else None
        self.project_out = Linear(out, dense, False) if projected else None
        self.embed_norm = Norm(spec.embed_norm, spec.width, policy) if spec.embed_norm else None
        self.rotaries = nn.ModuleList(
            RotaryTable(rotary, self.max_len, policy.device) for rotary in spec.rotaries
        )
        self.layers = nn.ModuleList(Block(spec, i, policy, parallel) for i in range(len(spec.layers)))
        self.norm = Norm(spec.final_norm, spec.width, policy) if spec.final_norm else None
        self.lm_head = Linear(vocabulary, dense, spec.logits_bias, shared=spec.tied)
        # Experts' products one by one: how many rows each has is asked of the tensors.
        asks = any(isinstance(each, MoeLayer) and not each.grouped for each in self.modules())
        native = policy.device.type == "cuda" or has_native_linear(policy.device.type, policy.dtype)
        self.replayable = native and parallel.size == 1 and not asks
        self.weights_version = 0

    def finish(self) -> None:
        """Once the weights are loaded: tie and stack those that are held so."""
        if self.spec.tied:
            self.lm_head.weight = self.embed.weight
        for module in self.modules():
            if isinstance(module, MoeLayer):
                module.finish()
        self.weights_version += 1
        self.eval()

    def cache_layout(self, dtype: torch.dtype | None) -> CacheLayout:
        """What the KV cache keeps for each token, on this rank; of the model's dtype if None."""
        num_kv_heads = len(self.parallel.kv_heads(self.spec.num_kv_heads))
        return CacheLayout(len(self.layers), num_kv_heads, self.spec.head_dim, dtype or self.policy.dtype)

    def activation_bytes(self, num_tokens: int, num_logits: int) -> int:
        """See `CausalModel`: the residual stream and what a block holds at once; logits and their float32 copy."""
        spec, size = self.spec, self.policy.dtype.itemsize
        widest = max(
            own.top_k * (3 * own.mlp.width + 3 * spec.width) if isinstance(own, Experts) else 3 * own.width
            for own in (layer.mlp for layer in spec.layers)
        )
        attention = 2 * (spec.num_heads + spec.num_kv_heads) * spec.head_dim
        per_token = 4 * spec.width + (max(widest, attention) + attention) // self.parallel.size
        return num_tokens * per_token * size + num_logits * spec.vocab_size * (2 * size + 8)

    def length_class(self, longest: int) -> int:
        """Sequences whose prompts begin alike can share cache blocks only if this is equal for both.

        Args:
            longest: prompt tokens and `max_tokens`, as `RaggedBatch.longest_T` has them.
        """
        scaled = (each for each in self.spec.rotaries if each.long_inv_freq is not None)
        return int(any(min(longest, self.max_len) > each.original_len for each in scaled))

    @torch.no_grad()
    def hidden(self, batch: RaggedBatch, cache: KVCache) -> Tensor:
        """Hidden states of all T tokens after the final norm, `[T, width]`, of the model's dtype."""
        x_TE = self.embed(batch.input_ids_T)
        if self.spec.embed_scale != 1.0:  # transformers rounds the factor to the model's dtype
            x_TE = x_TE * torch.tensor(self.spec.embed_scale, dtype=x_TE.dtype, device=x_TE.device)
        if self.project_in is not None:
            x_TE = self.project_in(x_TE, {})
        if self.positions is not None:
            x_TE = x_TE + self.positions(batch.positions_T + self.spec.position_offset)
        if self.embed_norm is not None:
            x_TE = self.embed_norm(x_TE)
        rotaries: Rotaries = [(table, table.rows(batch)) for table in self.rotaries]  # type: ignore[misc, operator]
        added, stream = x_TE, torch.zeros_like(x_TE)
        for block in self.layers:
            added, stream = block(added, stream, batch, cache, rotaries)
        hidden_TE: Tensor = added + stream if self.norm is None else self.norm(added, stream)
        return hidden_TE

    @torch.no_grad()
    def logits(self, hidden_LE: Tensor) -> Tensor:
        """Float32 logits `[L, vocab]` of hidden states."""
        if self.project_out is not None:
            hidden_LE = self.project_out(hidden_LE, {})
        local_LV = self.lm_head(hidden_LE, {})
        logits_LV = self.parallel.gather_vocabulary(local_LV, self.spec.vocab_size).float()
        if self.spec.logits_scale != 1.0:
            logits_LV = logits_LV * self.spec.logits_scale
        if self.spec.logits_softcap:
            cap = self.spec.logits_softcap
            logits_LV = rowwise(lambda row: torch.tanh(row / cap) * cap, logits_LV, self.policy)
        return logits_LV

    def forward(self, batch: RaggedBatch, cache: KVCache) -> Tensor:
        """Float32 logits `[L, vocab]` of the rows that the batch wants."""
        hidden = self.hidden(batch, cache)
        if batch.shape.num_logits < batch.num_tokens:  # else of all, in their order
            hidden = hidden.index_select(0, batch.logits_rows_L)
        return self.logits(hidden)

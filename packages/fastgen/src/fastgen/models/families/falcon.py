"""Falcon: q, k and v interleaved, parallel residual (but not in the RW models, which have ALiBi)."""

from __future__ import annotations

from typing import Any

import torch

from ..spec import Attention, DecoderSpec, Layer, Mlp, Norm, Placement
from ..weight_map import Grouped, Table
from .family import Family, alibi_slopes, rotary

_TABLE: Table = {
    "embed": "word_embeddings",
    "layers.{i}.norm1": ["h.{i}.input_layernorm", "h.{i}.ln_attn"],
    "layers.{i}.norm2": ["h.{i}.post_attention_layernorm", "h.{i}.ln_mlp"],
    "layers.{i}.attention.qkv": Grouped("h.{i}.self_attention.query_key_value"),
    "layers.{i}.attention.o": "h.{i}.self_attention.dense",
    "layers.{i}.mlp.up": "h.{i}.mlp.dense_h_to_4h",
    "layers.{i}.mlp.down": "h.{i}.mlp.dense_4h_to_h",
    "norm": "ln_f",
    "lm_head": "lm_head",
}


def _spec(config: Any, max_len: int | None) -> DecoderSpec:
    dim = config.hidden_size // config.num_attention_heads
    scale = dim**-0.5
    norm = Norm(config.layer_norm_epsilon, centered=True, bias=True)
    new = config.new_decoder_architecture
    width = getattr(config, "ffn_hidden_size", None) or 4 * config.hidden_size
    mlp = Mlp(width, getattr(config, "activation", "gelu"), gated=False, bias=config.bias)
    layer = Layer(Attention(scale, rotary=None if config.alibi else 0), mlp)
    num_kv_heads = config.num_kv_heads if new or not config.multi_query else 1
    norms = getattr(config, "num_ln_in_parallel_attn", None) or (2 if new else 1)
    parallel = config.parallel_attn or new
    return DecoderSpec(
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_dim=dim,
        layers=(layer,) * config.num_hidden_layers,
        norm=norm,
        placement=Placement.PARALLEL if parallel else Placement.PRE,
        final_norm=norm,
        max_len=config.max_position_embeddings,
        shared_norm=parallel and not (new and norms == 2),
        qkv_bias=config.bias,
        o_bias=config.bias,
        alibi_slopes=_slopes(config.num_attention_heads, scale) if config.alibi else (),
        rotaries=() if config.alibi else (rotary(config, dim, max_len),),
        tied=config.tie_word_embeddings,
    )


def _slopes(num_heads: int, scale: float) -> tuple[float, ...]:
    """Falcon rounds slopes to bf16, and scales scores once the biases are added to them."""
    rounded = torch.tensor(alibi_slopes(num_heads)).bfloat16().float()
    return tuple((rounded * scale).tolist())


FAMILIES = [Family(("falcon",), _spec, lambda config: _TABLE, prefixes=("transformer.",))]

"""BLOOM: ALiBi, a norm after the embedding, q, k and v interleaved."""

from __future__ import annotations

from typing import Any

from ..spec import Attention, DecoderSpec, Layer, Mlp, Norm, Placement
from ..weight_map import Grouped, Table
from .family import Family, alibi_slopes

_TRAINED_LEN = 2048  # the config does not say; ALiBi has no limit of its own
_TABLE: Table = {
    "embed": "word_embeddings",
    "embed_norm": "word_embeddings_layernorm",
    "layers.{i}.norm1": "h.{i}.input_layernorm",
    "layers.{i}.norm2": "h.{i}.post_attention_layernorm",
    "layers.{i}.attention.qkv": Grouped("h.{i}.self_attention.query_key_value"),
    "layers.{i}.attention.o": "h.{i}.self_attention.dense",
    "layers.{i}.mlp.up": "h.{i}.mlp.dense_h_to_4h",
    "layers.{i}.mlp.down": "h.{i}.mlp.dense_4h_to_h",
    "norm": "ln_f",
    "lm_head": "lm_head",
}


def _spec(config: Any, max_len: int | None) -> DecoderSpec:
    dim = config.hidden_size // config.n_head
    norm = Norm(config.layer_norm_epsilon, centered=True, bias=True)
    mlp = Mlp(4 * config.hidden_size, "gelu_new", gated=False, bias=True)
    normed = config.apply_residual_connection_post_layernorm
    return DecoderSpec(
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        num_heads=config.n_head,
        num_kv_heads=config.n_head,
        head_dim=dim,
        layers=(Layer(Attention(dim**-0.5, rotary=None), mlp),) * config.n_layer,
        norm=norm,
        placement=Placement.NORMED if normed else Placement.PRE,
        final_norm=norm,
        max_len=getattr(config, "seq_length", None) or max_len or _TRAINED_LEN,
        qkv_bias=True,
        o_bias=True,
        alibi_slopes=alibi_slopes(config.n_head),
        embed_norm=norm,
        tied=config.tie_word_embeddings,
    )


FAMILIES = [Family(("bloom",), _spec, lambda config: _TABLE, prefixes=("transformer.",))]

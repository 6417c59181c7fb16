"""Llama 2 and 3, Mistral, and whatever has their blocks."""

from __future__ import annotations

from typing import Any

from ..spec import DecoderSpec, Mlp, Norm, Placement
from ..weight_map import Table
from .family import Family, head_dim, layers, rotary

BLOCK: Table = {
    "embed": "embed_tokens",
    "layers.{i}.norm1": "layers.{i}.input_layernorm",
    "layers.{i}.norm2": "layers.{i}.post_attention_layernorm",
    "layers.{i}.attention.qkv": tuple(f"layers.{{i}}.self_attn.{each}_proj" for each in "qkv"),
    "layers.{i}.attention.o": "layers.{i}.self_attn.o_proj",
    "layers.{i}.attention.q_norm": "layers.{i}.self_attn.q_norm",
    "layers.{i}.attention.k_norm": "layers.{i}.self_attn.k_norm",
    "layers.{i}.mlp.up": ("layers.{i}.mlp.gate_proj", "layers.{i}.mlp.up_proj"),
    "layers.{i}.mlp.down": "layers.{i}.mlp.down_proj",
    "norm": "norm",
    "lm_head": "lm_head",
}


def base(config: Any, max_len: int | None, **changes: Any) -> DecoderSpec:
    """RMSNorm before each part, rotary positions, a gated MLP; families change what differs."""
    dim = head_dim(config)
    norm = changes.get("norm") or Norm(config.rms_norm_eps)
    bias = bool(getattr(config, "attention_bias", False))
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "width": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads or config.num_attention_heads,
        "head_dim": dim,
        "norm": norm,
        "placement": Placement.PRE,
        "final_norm": norm,
        "max_len": config.max_position_embeddings,
        "qkv_bias": bias,
        "o_bias": bias,
        "tied": bool(config.tie_word_embeddings),
    }
    if "layers" not in changes:
        mlp = Mlp(config.intermediate_size, config.hidden_act, bias=bool(getattr(config, "mlp_bias", False)))
        fields["layers"] = layers(config, mlp, dim**-0.5)
    if "rotaries" not in changes:
        fields["rotaries"] = (rotary(config, dim, max_len),)
    return DecoderSpec(**{**fields, **changes})


FAMILIES = [Family(("llama", "mistral"), base, lambda config: BLOCK)]

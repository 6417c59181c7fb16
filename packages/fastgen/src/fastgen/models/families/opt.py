"""OPT: learned positions from row 2 on, ReLU, norms before or (350 M) after each part."""

from __future__ import annotations

from typing import Any

from ..spec import Attention, DecoderSpec, Layer, Mlp, Norm, Placement
from ..weight_map import Table
from .family import Family

_FIRST_POSITION = 2  # fairseq kept rows for padding
_TABLE: Table = {
    "embed": "embed_tokens",
    "positions": "embed_positions",
    "project_in": "project_in",
    "project_out": "project_out",
    "layers.{i}.norm1": "layers.{i}.self_attn_layer_norm",
    "layers.{i}.norm2": "layers.{i}.final_layer_norm",
    "layers.{i}.attention.qkv": tuple(f"layers.{{i}}.self_attn.{each}_proj" for each in "qkv"),
    "layers.{i}.attention.o": "layers.{i}.self_attn.out_proj",
    "layers.{i}.mlp.up": "layers.{i}.fc1",
    "layers.{i}.mlp.down": "layers.{i}.fc2",
    "norm": "final_layer_norm",
    "lm_head": "lm_head",
}


def _spec(config: Any, max_len: int | None) -> DecoderSpec:
    dim = config.hidden_size // config.num_attention_heads
    affine = config.layer_norm_elementwise_affine
    norm = Norm(1e-5, centered=True, affine=affine, bias=affine)
    mlp = Mlp(config.ffn_dim, config.activation_function, gated=False, bias=config.enable_bias)
    layer = Layer(Attention(dim**-0.5, rotary=None), mlp)
    before = config.do_layer_norm_before
    return DecoderSpec(
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_dim=dim,
        layers=(layer,) * config.num_hidden_layers,
        norm=norm,
        placement=Placement.PRE if before else Placement.POST,
        final_norm=norm if before and not getattr(config, "_remove_final_layer_norm", False) else None,
        max_len=config.max_position_embeddings,
        qkv_bias=config.enable_bias,
        o_bias=config.enable_bias,
        embed_width=config.word_embed_proj_dim,
        num_positions=config.max_position_embeddings + _FIRST_POSITION,
        position_offset=_FIRST_POSITION,
        tied=config.tie_word_embeddings,
    )


FAMILIES = [Family(("opt",), _spec, lambda config: _TABLE, prefixes=("model.decoder.", "decoder.", "model."))]

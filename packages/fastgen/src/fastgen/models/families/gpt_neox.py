"""GPT-NeoX and Pythia: q, k and v interleaved, parallel residual with two norms, a quarter of a head rotated."""

from __future__ import annotations

from typing import Any

from ..spec import Attention, DecoderSpec, Layer, Mlp, Norm, Placement
from ..weight_map import Grouped, Table
from .family import Family, rotary

_TABLE: Table = {
    "embed": "embed_in",
    "layers.{i}.norm1": "layers.{i}.input_layernorm",
    "layers.{i}.norm2": "layers.{i}.post_attention_layernorm",
    "layers.{i}.attention.qkv": Grouped("layers.{i}.attention.query_key_value"),
    "layers.{i}.attention.o": "layers.{i}.attention.dense",
    "layers.{i}.mlp.up": "layers.{i}.mlp.dense_h_to_4h",
    "layers.{i}.mlp.down": "layers.{i}.mlp.dense_4h_to_h",
    "norm": "final_layer_norm",
    "lm_head": ["embed_out", "lm_head"],
}
_BUFFERS = (r"attention\.bias$", r"attention\.masked_bias$", r"rotary_emb\.inv_freq$")


def _spec(config: Any, max_len: int | None) -> DecoderSpec:
    dim = config.hidden_size // config.num_attention_heads
    norm = Norm(config.layer_norm_eps, centered=True, bias=True)
    mlp = Mlp(config.intermediate_size, config.hidden_act, gated=False, bias=True)
    bias = getattr(config, "attention_bias", True)
    return DecoderSpec(
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_dim=dim,
        layers=(Layer(Attention(dim**-0.5), mlp),) * config.num_hidden_layers,
        norm=norm,
        placement=Placement.PARALLEL if config.use_parallel_residual else Placement.PRE,
        final_norm=norm,
        max_len=config.max_position_embeddings,
        qkv_bias=bias,
        o_bias=bias,
        rotaries=(rotary(config, dim, max_len),),
        tied=config.tie_word_embeddings,
    )


FAMILIES = [Family(("gpt_neox",), _spec, lambda config: _TABLE, prefixes=("gpt_neox.",), ignored=_BUFFERS)]

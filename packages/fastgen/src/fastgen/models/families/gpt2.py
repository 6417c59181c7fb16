"""GPT-2: learned positions, weights stored as inputs by outputs."""

from __future__ import annotations

from typing import Any

from ..spec import Attention, DecoderSpec, Layer, Mlp, Norm, Placement
from ..weight_map import Joined, Table
from .family import Family

_TABLE: Table = {
    "embed": "wte",
    "positions": "wpe",
    "layers.{i}.norm1": "h.{i}.ln_1",
    "layers.{i}.norm2": "h.{i}.ln_2",
    "layers.{i}.attention.qkv": Joined("h.{i}.attn.c_attn", transposed=True),
    "layers.{i}.attention.o": Joined("h.{i}.attn.c_proj", transposed=True),
    "layers.{i}.mlp.up": Joined("h.{i}.mlp.c_fc", transposed=True),
    "layers.{i}.mlp.down": Joined("h.{i}.mlp.c_proj", transposed=True),
    "norm": "ln_f",
    "lm_head": "lm_head",
}
_MASKS = (r"attn\.bias$", r"attn\.masked_bias$")  # old files have the causal mask among the weights


def _spec(config: Any, max_len: int | None) -> DecoderSpec:
    dim = config.n_embd // config.n_head
    norm = Norm(config.layer_norm_epsilon, centered=True, bias=True)
    mlp = Mlp(config.n_inner or 4 * config.n_embd, config.activation_function, gated=False, bias=True)
    scale = dim**-0.5 if config.scale_attn_weights else 1.0
    by_layer = config.scale_attn_by_inverse_layer_idx
    return DecoderSpec(
        vocab_size=config.vocab_size,
        width=config.n_embd,
        num_heads=config.n_head,
        num_kv_heads=config.n_head,
        head_dim=dim,
        layers=tuple(
            Layer(Attention(scale / (i + 1) if by_layer else scale, rotary=None), mlp)
            for i in range(config.n_layer)
        ),
        norm=norm,
        placement=Placement.PRE,
        final_norm=norm,
        max_len=config.n_positions,
        qkv_bias=True,
        o_bias=True,
        num_positions=config.n_positions,
        tied=config.tie_word_embeddings,
    )


FAMILIES = [Family(("gpt2",), _spec, lambda config: _TABLE, prefixes=("transformer.",), ignored=_MASKS)]

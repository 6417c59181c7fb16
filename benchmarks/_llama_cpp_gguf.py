"""A Llama checkpoint as a GGUF file, which is what llama.cpp reads. Runs in the peers' environment.

In: a folder with config.json and model.safetensors, as transformers writes it. Out: one file with the same values in
bfloat16, in float16 or in float32; norms are float32, as llama.cpp wants them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import safe_open
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(folder: Path, out: Path, dtype: str) -> None:
    """Write the weights of `folder` to `out`.

    Without `lm_head.weight` the embedding is used twice; that is llama.cpp's way too. The vocabulary has no text.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(out, "llama", use_temp_file=False)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(rope_theta(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - it is no mapping
            value = tensors.get_tensor(name)
            if name.endswith("q_proj.weight"):
                value = rotary_pairs(value, heads)
            elif name.endswith("k_proj.weight"):
                value = rotary_pairs(value, kv_heads)
            add(writer, new_name(name), value, dtype if value.dim() > 1 else "f32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rope_theta(config: dict[str, Any]) -> float:
    """The base of rotary frequencies, which has had two places."""
    found = config.get("rope_parameters") or config
    if found.get("rope_type", "default") != "default":
        raise ValueError(f"rope_parameters: expected rope_type 'default', got {found['rope_type']!r}")
    return float(found["rope_theta"])


def rotary_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head in llama.cpp's order: it turns neighbours together, transformers the halves of a head."""
    halves: Tensor = weight.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def new_name(name: str) -> str:
    """A tensor's name in GGUF."""
    if name in _NAMES:
        return _NAMES[name]
    _, _, layer, part = name.split(".", 3)
    stem, kind = part.rsplit(".", 1)
    return f"blk.{layer}.{_LAYER_NAMES[stem]}.{kind}"


def add(writer: gguf.GGUFWriter, name: str, value: Tensor, dtype: str) -> None:
    """One tensor; numpy has no bfloat16, so bytes are handed over."""
    value = value.to(DTYPES[dtype]).contiguous()
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    writer.add_tensor(name, value.view(torch.uint8).numpy(), raw_dtype=kind)

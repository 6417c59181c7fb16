"""The trained model as a Hugging Face directory that `fastgen serve` and transformers load.

In: the full values of a `GPT`. Out: config.json, model.safetensors, tokenizer files. The demo's model is a GPT-NeoX
with other names: whole heads rotated, parts one after the other, biases of zero in the MLP, q, k, v by head.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from ckpt_universal import write_safetensors_file
from torch import Tensor

from .gpt import GPTConfig

_TENSORS = {
    "norm1.weight": "input_layernorm.weight",
    "norm1.bias": "input_layernorm.bias",
    "norm2.weight": "post_attention_layernorm.weight",
    "norm2.bias": "post_attention_layernorm.bias",
    "attention.qkv.weight": "attention.query_key_value.weight",
    "attention.out.weight": "attention.dense.weight",
    "up.weight": "mlp.dense_h_to_4h.weight",
    "down.weight": "mlp.dense_4h_to_h.weight",
}
_CONTINUE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def export(values: Mapping[str, Tensor], size: GPTConfig, folder: Path) -> None:
    """Write the directory; one rank calls it.

    Args:
        values: Of all parameters, by the names of `GPT`, on any device.
        size: Of the model.
        folder: Made if it is not there; files of these names are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(_tensors(values, size))
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    hidden = folder / ".model.safetensors.tmp"
    write_safetensors_file(hidden, specs, tensors.items())
    hidden.replace(folder / "model.safetensors")
    _write(folder / "config.json", _config(size))
    _write(folder / "tokenizer.json", _tokenizer())
    # No chat model: a conversation is a text to go on with.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": size.context}
    _write(folder / "tokenizer_config.json", {**settings, "chat_template": _CONTINUE})


def serve_command(folder: Path) -> str:
    """What a user types to serve it, from any folder."""
    program = Path(sys.executable).with_name("fastgen")
    return shlex.join([str(program) if program.exists() else "fastgen", "serve", str(folder.resolve())])


def _tensors(values: Mapping[str, Tensor], size: GPTConfig) -> Iterator[tuple[str, Tensor]]:
    full = {name: value.detach().float().cpu().contiguous() for name, value in values.items()}
    yield "gpt_neox.embed_in.weight", full["embed.weight"]
    for number in range(size.layers):
        for ours, theirs in _TENSORS.items():
            tensor = full[f"blocks.{number}.{ours}"]
            if ours == "attention.qkv.weight":
                tensor = _by_head(tensor, size)
            yield f"gpt_neox.layers.{number}.{theirs}", tensor
        for name, width in {"dense_h_to_4h": 4 * size.width, "dense_4h_to_h": size.width}.items():
            yield f"gpt_neox.layers.{number}.mlp.{name}.bias", torch.zeros(width)
    yield "gpt_neox.final_layer_norm.weight", full["norm.weight"]
    yield "gpt_neox.final_layer_norm.bias", full["norm.bias"]
    if not size.tied:
        yield "embed_out.weight", full["head.weight"]


def _by_head(qkv_RC: Tensor, size: GPTConfig) -> Tensor:
    """Rows of q, k, v, of each all heads, to rows of heads, of each q, k, v."""
    parts = qkv_RC.view(3, size.heads, size.width // size.heads, size.width)
    return parts.transpose(0, 1).reshape(3 * size.width, size.width).contiguous()


def _config(size: GPTConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": size.vocab,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "intermediate_size": 4 * size.width,
        "max_position_embeddings": size.context,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tie_word_embeddings": size.tied,
        "rotary_pct": 1.0,
        "rotary_emb_base": 10_000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def _tokenizer() -> dict[str, Any]:
    """Every byte a token, its value the id; tokenizers' file format."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {"type": "BPE", "vocab": {letter: byte for byte, letter in enumerate(_letters())}, "merges": []}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": model,
    }


def _letters() -> list[str]:
    """The letter that stands for each byte in byte-level tokenizers: its own, or one past the last that is shown."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    letters, others = [], 256
    for byte in range(256):
        letters.append(chr(byte if byte in shown else others))
        others += byte not in shown
    return letters


def _write(path: Path, content: dict[str, Any]) -> None:
    hidden = path.with_name(f".{path.name}.tmp")
    hidden.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    hidden.replace(path)

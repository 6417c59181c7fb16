"""Hugging Face models from tiny random configs, with batches that differ by rank and step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

VOCAB, LENGTH = 64, 8
Batch = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """How to build a tiny model of a family, and what to feed it; a batch holds labels, so outputs have a loss."""

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator, int], Batch]


def tokens(generator: torch.Generator, count: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(5, VOCAB, (count, length), generator=generator)


def causal(generator: torch.Generator, rank: int) -> Batch:
    ids = tokens(generator)
    return {"input_ids": ids, "labels": ids}


def _decoder(kind: str, **more: Any) -> nn.Module:
    import transformers

    sizes = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        "attention_dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **more,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=64,
        )
    )  # fmt: skip


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def _whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=VOCAB, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
            max_source_positions=10, max_target_positions=32, dropout=0.0, attention_dropout=0.0,
            activation_dropout=0.0, encoder_layerdrop=0.0, decoder_layerdrop=0.0, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
        )
    )  # fmt: skip


def _whisper_batch(generator: torch.Generator, rank: int) -> Batch:
    return {
        "input_features": torch.randn(2, 8, 20, generator=generator),
        "labels": tokens(generator, length=6),
    }


IMAGE_TOKEN = 3


def _llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=8, patch_size=4,
        projection_dim=32,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=4)
    )


def _llava_batch(generator: torch.Generator, rank: int) -> Batch:
    """The second rank has no image."""
    ids = tokens(generator)
    if rank == 1:
        return {"input_ids": ids, "labels": ids}
    ids[:, 1:5] = IMAGE_TOKEN
    return {"input_ids": ids, "labels": ids, "pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}


VIDEO_TOKEN, VISION_START, VISION_END = 4, 62, 63


def _qwen2_vl() -> nn.Module:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(
        text_config={
            "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        },
        vision_config={
            "depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
        },
        image_token_id=IMAGE_TOKEN, video_token_id=VIDEO_TOKEN, vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config)


def _qwen2_vl_batch(generator: torch.Generator, rank: int) -> Batch:
    """One image of 4 x 4 patches (4 tokens after merging) a sequence; the second rank has none."""
    ids = tokens(generator).clamp(max=VISION_START - 1)
    if rank == 1:
        return {"input_ids": ids, "labels": ids}
    ids[:, 0], ids[:, 1:5], ids[:, 5] = VISION_START, IMAGE_TOKEN, VISION_END
    return {
        "input_ids": ids,
        "labels": ids,
        "pixel_values": torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).int(),
    }


FAMILIES: dict[str, Family] = {
    "gpt2": Family(_gpt2, causal),
    "llama": Family(lambda: _decoder("Llama"), causal),
    "qwen2": Family(lambda: _decoder("Qwen2", tie_word_embeddings=True), causal),
    "qwen3": Family(lambda: _decoder("Qwen3"), causal),
    "mixtral": Family(lambda: _decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2), causal),
    "bert": Family(_bert, causal),
    "t5": Family(_t5, causal),
    "whisper": Family(_whisper, _whisper_batch),
    "llava": Family(_llava, _llava_batch),
    "qwen2-vl": Family(_qwen2_vl, _qwen2_vl_batch),
}


def batch_of(family: str, rank: int, step: int) -> Batch:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return FAMILIES[family].batch(generator, rank)


def require_transformers() -> None:
    pytest.importorskip("transformers", reason="pip install transformers")
